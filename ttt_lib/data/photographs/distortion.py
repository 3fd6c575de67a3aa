"""The lenses' distortion, where three or more photographs tell it.

Most phones and cameras take it away themselves. Where a lens still bends straight lines and nobody says so, the focal
length, of which it looks like a part, comes out wrong: by a quarter, of one that moves corners by a tenth of their radius.
"""

from __future__ import annotations

import numpy as np

from ttt_lib.data.photographs.focal import against
from ttt_lib.data.photographs.job import Job, Lens, SparseModel
from ttt_lib.data.photographs.mapping import refitted, with_distortion

PHOTOGRAPHS = 3  # two tell no more of their lens than of its focal length
SOUND = 0.93  # of the matches that pinhole cameras explain: what moved would look like a lens that bends
BENDS = 9.0  # chi squared of one more number: under 6 of cameras without, 12 to 300 of k from 0.05 to 0.2, 460 of a castle's
STEEPEST = 0.3  # how fast places in the corners move with their rays, over the centre's: slower, and they fold soon


def look_for_distortion(job: Job, model: SparseModel) -> bool:
    """Whether the matches fit clearly better to cameras with a radial distortion, which become the job's lenses then.

    Args:
        job: with pinhole cameras; of pictures that are said to be theirs nothing is looked for, nor twice.
        model: that `attempt` gave.
    """
    if job.straight or job.looked or len(model.image) < PHOTOGRAPHS or np.median(model.explained) < SOUND:
        return False
    if set(model.image.tolist()) < set(job.kept):
        return False  # of the others nothing would be known
    job.looked = True
    pinhole, (bent, lenses) = refitted(model), with_distortion(model)
    if against(bent, pinhole) < BENDS * len(lenses):
        return False
    return _take(job, lenses)


def settle_distortion(job: Job, model: SparseModel) -> bool:
    """Whether the distortion had to be fitted again: it was found with the focal lengths free, and goes with these.

    Args:
        job: perhaps with lenses that bend.
        model: with the focal lengths that are believed.
    """
    if job.settled or not any(lens.distortion for lens in job.lenses):
        return False
    job.settled = True
    return _take(job, with_distortion(model, held=True)[1])


def _take(job: Job, lenses: dict[int, Lens]) -> bool:
    """Make these the job's; False where one of them folds its picture."""
    if min(map(_slowest, lenses.values())) < STEEPEST:
        return False
    job.lenses = [lenses.get(number, lens) for number, lens in enumerate(job.lenses)]
    return True


def _slowest(lens: Lens) -> float:
    focal, cx, cy, k = lens.params
    radius = np.hypot(max(cx, lens.width - cx), max(cy, lens.height - cy)) / focal
    return 1 + 3 * k * radius**2
