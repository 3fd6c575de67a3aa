"""From photographs alone to a scene: features, matches, several reconstructions that must agree, and the tracks.

Whatever cannot be reconstructed ends in one sentence in `Scene.refused`; nothing here raises for it. What is computed is
in `agreement.py`.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ttt_lib.core.errors import DataError
from ttt_lib.data.images import shrink
from ttt_lib.data.photographs.job import LONGEST_SIDE, Failed, Job, Lens, Picture, Selection, SparseModel, apart
from ttt_lib.data.photographs.scene import Photograph, Scene, Tracks
from ttt_lib.data.photographs.undistort import can_be_undistorted, straightened

log = logging.getLogger(__name__)
SIDE_BY_SIDE = 4  # at most: a picture whose features are found takes 300 MB


def do_apart(
    task: str, pictures: list[Picture], seed: int, in_order: bool, *arguments: object, straight: bool = True
) -> Job:
    """The job that a task makes of the pictures' gray copies; each is read once. arguments: of the task, after the job.

    Raises `DataError` for a picture that cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="ttt-scene-") as name:
        folder = Path(name)
        grays = [_write_gray(picture.read(), folder / f"gray_{k}.npy") for k, picture in enumerate(pictures)]
        sizes, digests = map(list, zip(*grays))
        without = [replace(picture, source=None) for picture in pictures]
        threads = min(torch.get_num_threads(), SIDE_BY_SIDE)
        job = Job(folder, without, sizes, digests, seed, in_order, threads, straight=straight)
        try:
            return apart(task, 1500 + 300 * len(pictures), job, *arguments)
        except Failed as error:
            less = " or less at a time (OMP_NUM_THREADS=1), which takes less memory" if threads > 1 else ""
            job.refused = f"the photographs could not be compared ({error}); try fewer of them{less}."
            return job


def _write_gray(image: Tensor, path: Path) -> tuple[tuple[int, int], str]:
    """The luma of an image (3,H,W) in [0,1], at most LONGEST_SIDE long, as uint8 array in a file; (width, height), hash."""
    array = image.detach().cpu().float().permute(1, 2, 0).numpy()
    gray = shrink(array, LONGEST_SIDE) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    gray = np.ascontiguousarray((gray.clip(0, 1) * 255).round().astype(np.uint8))
    np.save(path, gray)
    return gray.shape[::-1], hashlib.sha256(gray.tobytes()).hexdigest()


def reconstruct(pictures: list[Picture], seed: int = 0, in_order: bool = False, straight: bool = False) -> Scene:
    """Cameras and tracks of photographs of one scene, or a sentence that says why they tell nothing.

    Args:
        pictures: two or more, of one scene that stood still; they are read one at a time.
        seed: the same seed gives the same scene.
        in_order: whether neighbors in the list are neighbors in space (frames of a clip).
        straight: whether the pictures are those of pinhole cameras, so that no distortion is looked for.

    Returns:
        The scene; its photographs are without the distortion of their lenses where one was found. `about` holds the
        signals as far as they were reached; see `Scene`.

    Raises:
        DataError: for fewer than two pictures, or one that cannot be read.

    Example:
        >>> import torch
        >>> plain = [Picture(name, torch.full((3, 64, 64), 0.5)) for name in "ab"]
        >>> reconstruct(plain).refused
        'b is a copy of a, or taken from the same place: take a second photograph a step to the side.'
    """
    if len(pictures) < 2:
        raise DataError("several photographs of one scene are needed, at least two; this is one photograph alone.")
    job = do_apart("agreement.reconstruct", pictures, seed, in_order, straight=straight)
    left_out = [(pictures[i].name, why) for i, why in sorted(job.left_out.items())]
    plain = [Photograph(picture.name, picture.source) for picture in pictures]
    if job.refused:
        log.info("refused: %s", job.refused)
        return Scene(plain, left_out, job.about, job.refused)
    lenses = _lenses(job)
    if not all(map(can_be_undistorted, lenses.values())):
        return reconstruct(pictures, seed, in_order, straight=True)
    for index, lens in lenses.items():
        plain[index] = straightened(plain[index], lens)
    if lenses:
        by_camera = {job.camera_of[index]: round(lens.distortion[0], 4) for index, lens in lenses.items()}
        job.about |= {"undistorted": len(lenses), "distortion": [by_camera[camera] for camera in sorted(by_camera)]}
    found = to_photographs(job.model, job.picked, [plain[i] for i in job.model.image])
    return Scene(found, left_out, job.about, rest=[plain[i] for i in sorted(job.left_out)])


def _lenses(job: Job) -> dict[int, Lens]:
    """Of the photographs that take part the lenses that bend straight lines, in pixels of what was matched."""
    result = {}
    for index, (focal, _, cx, cy) in zip(job.model.image.tolist(), job.model.intrinsics.tolist()):
        lens = job.lenses[job.camera_of[index]]
        if lens.distortion and index not in job.picked.weak:
            result[index] = lens._replace(params=(focal, cx, cy, *lens.distortion))
    return result


def normalized_intrinsics(model: SparseModel, row: int) -> Tensor:
    """(3,3) float32 of an image: divided by its width and height."""
    (fx, fy, cx, cy), (width, height) = model.intrinsics[row], model.size[row]
    matrix = [[fx / width, 0, cx / width], [0, fy / height, cy / height], [0, 0, 1]]
    return torch.tensor(matrix, dtype=torch.float32)


def to_photographs(model: SparseModel, picked: Selection, plain: list[Photograph | None]) -> list[Photograph]:
    """The photographs that are not weak, with cameras and tracks. plain: of each image of the model, without them."""
    result = []
    for row, image in enumerate(model.image.tolist()):
        if image in picked.weak:
            continue
        here = np.flatnonzero(picked.which & (model.seen_by == row))
        _, once = np.unique(model.point[here], return_index=True)  # a point that one picture sees twice
        here = here[np.sort(once)]
        places, weights = model.uv[here] / model.size[row], np.exp(-(picked.error[here] ** 2))
        uv, depth, weight, pose = (
            torch.from_numpy(each).float() for each in (places, model.depth[here], weights, model.pose[row])
        )
        bent = None if model.bent is None else torch.from_numpy(model.bent[here]).float()
        tracks = Tracks(uv, depth, torch.from_numpy(model.point[here]).long(), weight, bent)
        result.append(replace(plain[row], intrinsics=normalized_intrinsics(model, row), tracks=tracks, pose=pose))
    return result
