"""The lenses' distortion, where three or more photographs tell it.

Most phones and cameras take it away themselves. Where a lens still bends straight lines and nobody says so, the focal
length, of which it looks like a part, comes out wrong: by a quarter, of one that moves corners by a tenth of their radius.
"""

from __future__ import annotations

import numpy as np

from ttt_lib.data.photographs.focal import against
from ttt_lib.data.photographs.job import Job, Lens, SparseModel
from ttt_lib.data.photographs.mapping import set_lenses, with_distortion

PHOTOGRAPHS = 3  # two tell no more of their lens than of its focal length
SOUND = 0.93  # of the matches that pinhole cameras explain: what moved would look like a lens that bends
BENDS = (
    9.0  # chi squared of one more number: under 3 of pinhole cameras, 12 to 300 of k from 0.05 to 0.2, 460 of a camera
)
STEEPEST = 0.3  # how much slower than at the centre a place in the corner may move with its ray: the rest folds soon


def look_for_distortion(job: Job, model: SparseModel) -> bool:
    """Whether the matches fit clearly better to cameras with a radial distortion. These become the job's lenses then, and
    there is nothing more to look for.

    Args:
        job: with pinhole cameras; of pictures that are said to be theirs nothing is looked for.
        model: that `attempt` gave.
    """
    if job.straight or len(model.image) < PHOTOGRAPHS or np.median(model.explained) < SOUND:
        return False
    job.straight = True
    bent, lenses = with_distortion(model)
    if against(bent, model) < BENDS or min(map(_slowest, lenses.values())) < STEEPEST:
        return False
    job.lenses = [lenses.get(number, lens) for number, lens in enumerate(job.lenses)]
    set_lenses(job)
    return True


def _slowest(lens: Lens) -> float:
    """How fast places in the picture's corners move with their rays, over how fast they do at the centre."""
    focal, cx, cy, k = lens.params
    radius = np.hypot(max(cx, lens.width - cx), max(cy, lens.height - cy)) / focal
    return 1 + 3 * k * radius**2
