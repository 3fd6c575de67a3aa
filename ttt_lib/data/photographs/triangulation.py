"""Tracks from photographs whose cameras are known: matched, and triangulated without moving a camera. Runs in a process of
its own."""

from __future__ import annotations

import numpy as np
import pycolmap

from ttt_lib.data.photographs.features import extract, verify
from ttt_lib.data.photographs.job import MIN_MATCHES, Job, Lens, Refusal
from ttt_lib.data.photographs.mapping import place
from ttt_lib.data.photographs.matching import too_few

EXPLAINED = 0.6  # of the matches: 1.0 of right cameras, 0.3 where two were exchanged, 0.7 where they are a few px off
EXPLAINED_EACH = 0.5  # of one photograph's matches
MAX_MEDIAN_ERROR = 1.5  # pixels


def triangulate(job: Job, lenses: list[Lens], poses: np.ndarray) -> Job:
    """The job with points that its photographs see, by cameras that stay as they are, or with why there are none.

    Args:
        job: of pictures as their cameras saw them, of the shape of their lenses.
        lenses: one a picture.
        poses: (N,4,4) world -> camera.

    `about` gets `explained`, the share of the matches that the cameras explain; `left_out` says why a photograph's camera
    cannot be right.
    """
    try:
        _triangulate(job, [_scaled(lens, *size) for lens, size in zip(lenses, job.sizes)], poses)
    except Refusal as refusal:
        job.refused = str(refusal)
    return job


def _scaled(lens: Lens, width: int, height: int) -> Lens:
    """The same lens for a picture of another size and the same shape."""
    camera = pycolmap.Camera(**lens._asdict())
    camera.rescale(width, height)
    return Lens(lens.model, width, height, tuple(camera.params))


def _triangulate(job: Job, lenses: list[Lens], poses: np.ndarray) -> None:
    distinct = list(dict.fromkeys(lenses))
    job.camera_of = [distinct.index(lens) for lens in lenses]
    coarse, _ = extract(job, distinct, [True] * len(distinct))
    verify(job, coarse)
    if job.inliers.max(initial=0) < MIN_MATCHES:
        raise too_few(job.inliers.max(initial=0))
    job.model = place(job, poses)
    shares = _explained(job)
    job.about["explained"] = share = float(np.average(list(shares.values()))) if shares else 0.0
    error = float(np.median(job.model.error)) if len(job.model.error) else np.inf
    if share < EXPLAINED or error > MAX_MEDIAN_ERROR:
        raise Refusal(
            f"the given cameras contradict the photographs: {share:.0%} of the matches fit to them, at least "
            f"{EXPLAINED:.0%} are needed, with a median error of {error:.1f} px; check that cameras and files belong "
            "together, and in which direction their axes point."
        )
    why = "its camera contradicts its matches with the others ({:.0%} of them fit)"
    job.left_out = {index: why.format(share) for index, share in shares.items() if share < EXPLAINED_EACH}


def _explained(job: Job) -> dict[int, float]:
    """Of each photograph with matches enough the share of them that became points, from 0 to 1."""
    model, places = job.model, range(len(job.pictures))
    points = {i: set(model.point[model.seen_by == row].tolist()) for row, i in enumerate(model.image.tolist())}
    fit, seen = np.zeros(len(places)), np.zeros(len(places))
    for pair, count in zip(job.pairs, job.inliers):
        if count >= MIN_MATCHES:
            both = set.intersection(*(points.get(index, set()) for index in pair))
            fit[list(pair)] += min(len(both), count)
            seen[list(pair)] += count
    return {index: fit[index] / seen[index] for index in places if seen[index]}
