"""A finished COLMAP model as arrays: read by pycolmap in a process of its own, and checked."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from ttt_lib.core.errors import DataError
from ttt_lib.core.types import are_normalised_intrinsics
from ttt_lib.data.photographs.colmap_files import Listing, ModelFiles, list_model
from ttt_lib.data.photographs.job import FARTHEST, LEAST_FOCAL, Failed, Lens, SparseModel, apart
from ttt_lib.data.photographs.reconstruct import normalized_intrinsics
from ttt_lib.data.photographs.sources import natural
from ttt_lib.data.photographs.undistort import LASTING, can_be_undistorted

BASE_MEMORY = 2**31  # bytes that the process which reads may take: its libraries,
MEMORY_PER_BYTE = 12  # and what becomes of a byte of the files
PATIENCE, BYTES_A_SECOND = 60, 2**20  # how long it may take


def read_model(files: ModelFiles) -> tuple[SparseModel, Listing]:
    """Images (by COLMAP's ids), cameras, points and observations of a model's files; and what they list.

    Cameras are pinhole ones, and so are the places of the observations: where a lens has distortion, those of the
    pinhole picture (`undistort`). What would lie outside of it is left out.

    Raises:
        DataError: the files are damaged, lie about what they hold, or hold no image with a camera.
    """
    listing = list_model(files)
    with tempfile.TemporaryDirectory(prefix="ttt-colmap-") as name:
        _lay_out(files, Path(name))
        size = files.bytes()
        try:
            memory = BASE_MEMORY + MEMORY_PER_BYTE * size
            model, failed = apart("mapping.read", PATIENCE + size / BYTES_A_SECOND, Path(name), memory), ""
        except Failed as error:
            model, failed = None, str(error)
    if model is None or not len(model.image):
        raise DataError(f"{files.folder}: the COLMAP model cannot be read ({failed or 'it has no images'}).")
    if not listing.own:  # in the order of their names, as they were taken; COLMAP numbers them as it comes
        names = [natural(listing.images[image][0]) if image in listing.images else [] for image in model.image.tolist()]
        order = np.array(sorted(range(len(names)), key=names.__getitem__))
        images = {name: getattr(model, name)[order] for name in ("image", "pose", "size", "intrinsics")}
        model = replace(model, **images, seen_by=np.argsort(order)[model.seen_by])
    good = (np.isfinite(model.xyz) & (np.abs(model.xyz) < FARTHEST)).all(-1)
    known = np.isfinite(model.uv).all(-1) & np.isfinite(model.depth) & np.isfinite(model.error)
    model = _observed(replace(model, xyz=np.where(good[:, None], model.xyz, 0.0)), good[model.point] & known)
    for row, image in enumerate(model.image.tolist()):
        if why := _why_no_camera(model, row, listing.taken_by(image)):
            listing.unusable[image] = why
            model.pose[row], model.intrinsics[row] = np.eye(4), (1.0, 1.0, 0.5, 0.5)  # so that nothing else breaks
    return _observed(model, ~np.isin(model.image[model.seen_by], list(listing.unusable))), listing


def _lay_out(files: ModelFiles, target: Path) -> None:
    """The three files alone: rigs and frames beside them say nothing that images do not, and are checked by nobody."""
    (target / f"points3D{files.files[0].suffix}").write_bytes(bytes(8) if files.is_binary else b"")
    for path in files.files:
        (target / path.name).unlink(missing_ok=True)
        try:
            os.symlink(path.resolve(), target / path.name)
        except OSError:  # not every system lets everybody
            shutil.copyfile(path, target / path.name)


def _observed(model: SparseModel, keep: np.ndarray) -> SparseModel:
    """With these observations alone."""
    names = ("seen_by", "feature", "point", "uv", "depth", "error")
    return replace(model, **{name: getattr(model, name)[keep] for name in names})


def _why_no_camera(model: SparseModel, row: int, lens: Lens | None) -> str:
    """Why an image has no camera that can be used; "" where it has one."""
    pose, rotation = model.pose[row], model.pose[row, :3, :3]
    (fx, fy, cx, cy), (width, height) = model.intrinsics[row], model.size[row]
    if np.isnan(fx):
        return (
            "has a fisheye lens, which this cannot use: make a model of undistorted pictures by COLMAP's "
            "image_undistorter"
        )
    far = not (np.isfinite(pose).all() and np.abs(pose).max() < FARTHEST)
    if far or np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3:
        return "has a pose that is none"
    # What is not in pixels has a centre in the first one, or a field of view near 180 degrees.
    in_pixels = not (0 <= min(cx, cy) and max(cx, cy) <= 1) and min(fx / width, fy / height) > LEAST_FOCAL
    if not in_pixels or not are_normalised_intrinsics(normalized_intrinsics(model, row)):
        return (
            "has a camera that cannot be: a focal length below zero, a centre far outside, or one of them not in pixels"
        )
    return "" if lens is None or can_be_undistorted(lens) else LASTING
