"""Tracks from photographs whose cameras are known: matched, and triangulated without moving a camera."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ttt_lib.data.photographs.colmap_files import Lens
from ttt_lib.data.photographs.features import Picture, choose_pairs, write_gray
from ttt_lib.data.photographs.job import MIN_MATCHES, Job, Refusal
from ttt_lib.data.photographs.process import SparseModel, read_sparse_model

log = logging.getLogger(__name__)

PLACED_ANGLE = 0.1  # degrees between two rays: far points count too when cameras and matches are compared
EXPLAINED = 0.6  # of the matches: 1.0 of right cameras, 0.3 where two were exchanged, 0.7 where they are a few px off
EXPLAINED_EACH = 0.5  # of one photograph's matches
MAX_MEDIAN_ERROR = 1.5  # pixels
ONE_FOCAL = (
    "SIMPLE_PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "SIMPLE_DIVISION",
)  # f, cx, cy, ...; others fx, fy, cx, cy, ...


def scaled(lens: Lens, width: int, height: int) -> Lens:
    """The same lens for a picture of another size and the same shape.

    Example:
        >>> scaled(Lens("SIMPLE_RADIAL", 800, 600, (700.0, 400.0, 300.0, -0.1)), 400, 300)
        Lens(model='SIMPLE_RADIAL', width=400, height=300, params=(350.0, 200.0, 150.0, -0.1))
    """
    x, y = width / lens.width, height / lens.height
    factors = [x, x, y] if lens.model in ONE_FOCAL else [x, y, x, y]
    rest = lens.params[len(factors) :]
    return Lens(lens.model, width, height, (*(p * f for p, f in zip(lens.params, factors)), *rest))


def triangulate(
    pictures: list[Picture], lenses: list[Lens], poses: np.ndarray, seed: int, in_order: bool, about: dict[str, Any]
) -> tuple[SparseModel, dict[int, str]]:
    """Points that the photographs see, by cameras that stay as they are. Images are places in the list.

    Args:
        pictures: as their cameras saw them, of the shape of their lenses.
        lenses: one a picture.
        poses: (N,4,4) world -> camera.
        about: gets `explained`, the share of the matches that the cameras explain.

    Returns:
        The model, and why a photograph's camera cannot be right: place -> reason.

    Raises:
        Refusal: the photographs share too little, or the cameras contradict them.
    """
    with tempfile.TemporaryDirectory(prefix="ttt-known-") as name:
        job = Job(Path(name), pictures, seed, kept=list(range(len(pictures))))
        for index, picture in enumerate(pictures):
            job.grays.append(write_gray(picture.read(), job.folder / f"gray_{index}.npy"))
        _match(job, [scaled(lens, gray.width, gray.height) for lens, gray in zip(lenses, job.grays)], in_order)
        _do(job, "triangulate", poses=poses.tolist(), min_angle=PLACED_ANGLE, two_view=True)
        model = read_sparse_model(job.folder / "triangulated.npz")
    if model is None:
        raise Refusal("no points could be placed by these cameras.")
    model.image = model.image - 1
    shares = _explained(job, model)
    about["explained"] = float(np.average(list(shares.values()))) if shares else 0.0
    error = float(np.median(model.error)) if len(model.error) else np.inf
    if about["explained"] < EXPLAINED or error > MAX_MEDIAN_ERROR:
        raise Refusal(
            f"the given cameras contradict the photographs: {about['explained']:.0%} of the matches fit to them, at "
            f"least {EXPLAINED:.0%} are needed, with a median error of {error:.1f} px; check that cameras and files "
            "belong together, and in which direction their axes point."
        )
    why = "its camera contradicts its matches with the others ({:.0%} of them fit)"
    return model, {index: why.format(share) for index, share in shares.items() if share < EXPLAINED_EACH}


def _do(job: Job, task: str, **arguments: Any) -> None:
    failed = job.run(task, **arguments)
    if failed:
        raise Refusal(f"the photographs could not be compared ({task}: {failed}); try fewer of them.")


def _match(job: Job, lenses: list[Lens], in_order: bool) -> None:
    """Features and verified matches in the job's database, by lenses of the gray pictures' sizes."""
    distinct = list(dict.fromkeys(lenses))
    job.camera_of = [distinct.index(lens) for lens in lenses]
    cameras = [
        {"model": lens.model, "width": lens.width, "height": lens.height, "params": list(lens.params), "known": True}
        for lens in distinct
    ]
    most = 4096 if len(job.pictures) <= 8 else 2048
    _do(job, "features", cameras=cameras, camera_of=job.camera_of, most=most)
    with np.load(job.folder / "features.npz") as arrays:
        coarse = arrays["coarse"]
    job.pairs = choose_pairs(coarse, in_order)
    _do(job, "match", pairs=job.pairs, seed=job.seed)
    with np.load(job.folder / "matches.npz") as arrays:
        job.inliers, job.flat = arrays["inliers"], arrays["flat"]
    if job.inliers.max(initial=0) < MIN_MATCHES:
        raise Refusal(
            f"the photographs share too few points ({job.inliers.max(initial=0)} matches at most, {MIN_MATCHES} are "
            "needed): they must show the same things, with texture, and overlap by half or more."
        )


def _explained(job: Job, model: SparseModel) -> dict[int, float]:
    """Of each photograph with matches enough the share of them that became points, from 0 to 1."""
    row_of = {int(image): row for row, image in enumerate(model.image)}
    points = [set(model.point[model.seen_by == row].tolist()) for row in range(len(model.image))]
    fit, seen = dict.fromkeys(job.kept, 0.0), dict.fromkeys(job.kept, 0.0)
    for (i, j), count in zip(job.pairs, job.inliers):
        if count >= MIN_MATCHES:
            both = points[row_of[i]] & points[row_of[j]] if i in row_of and j in row_of else ()
            for index in (i, j):
                fit[index] += min(len(both), count)
                seen[index] += count
    return {index: fit[index] / seen[index] for index in job.kept if seen[index]}
