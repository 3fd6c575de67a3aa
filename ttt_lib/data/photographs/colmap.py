"""A finished COLMAP model as a scene: read by pycolmap in a process of its own, checked, put beside its photographs."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ttt_lib.core.errors import DataError
from ttt_lib.core.types import are_normalised_intrinsics
from ttt_lib.data.photographs.colmap_files import Listing, Model, list_model
from ttt_lib.data.photographs.process import SparseModel, read_sparse_model, run_worker
from ttt_lib.data.photographs.sources import natural
from ttt_lib.data.photographs.tracks import normalized_intrinsics

BASE_MEMORY = 2**31  # bytes that the process which reads may take: its libraries,
MEMORY_PER_BYTE = 12  # and what becomes of a byte of the files
PATIENCE, BYTES_A_SECOND = 60, 2**20  # how long it may take
FARTHEST = 1e8  # units: a coordinate beyond is no measurement
LEAST_FOCAL = 0.02  # of the picture's side, as for transforms.json: 175 degrees
# Fields of a SparseModel.
OF_IMAGES = ("image", "name", "camera", "pose", "size", "intrinsics", "fisheye")  # one row an image
OBSERVED = ("seen_by", "feature", "point", "uv", "depth", "error")  # one row an observation


@dataclass
class Finished:
    """A model that was read. model: images are COLMAP's ids; listing; unusable: id -> why an image has no camera."""

    model: SparseModel
    listing: Listing
    unusable: dict[int, str] = field(default_factory=dict)


def read_model(files: Model) -> Finished:
    """Images, cameras, points and observations of a model's files.

    Raises:
        DataError: the files are damaged, lie about what they hold, or hold no image with a camera.
    """
    listing = list_model(files)
    with tempfile.TemporaryDirectory(prefix="ttt-colmap-") as name:
        folder = Path(name)
        _lay_out(files, folder / "model")
        size = files.bytes()
        failed = run_worker(
            folder, "read", PATIENCE + size / BYTES_A_SECOND,
            model=str(folder / "model"), memory=BASE_MEMORY + MEMORY_PER_BYTE * size,
        )  # fmt: skip
        model = None if failed else read_sparse_model(folder / "model.npz")
    if model is None or not len(model.image):
        raise DataError(f"{files.folder}: the COLMAP model cannot be read ({failed or 'it has no images'}).")
    # Of a text file pycolmap takes a name up to its first space.
    model.name = np.array([listing.images[int(i)][0] if int(i) in listing.images else "" for i in model.image])
    model = model if listing.own else _by_name(model)
    finished = Finished(_without_bad_points(model), listing)
    _check_images(finished)
    return finished


def _lay_out(files: Model, target: Path) -> None:
    """The three files alone: rigs and frames beside them say nothing that images do not, and are checked by nobody."""
    target.mkdir()
    for path in (files.cameras, files.images, files.points):
        if path is not None:
            try:
                os.symlink(path.resolve(), target / path.name)
            except OSError:  # not every system lets everybody
                shutil.copyfile(path, target / path.name)
    if files.points is None:
        empty = target / f"points3D{files.cameras.suffix}"
        empty.write_bytes(bytes(8) if files.is_binary else b"")


def _by_name(model: SparseModel) -> SparseModel:
    """Images in the order of their names, as they were taken; COLMAP numbers them as it comes."""
    order = np.array(sorted(range(len(model.image)), key=lambda row: natural(str(model.name[row]))))
    place = np.argsort(order)
    images = {name: getattr(model, name)[order] for name in OF_IMAGES}
    return replace(model, **images, seen_by=place[model.seen_by])


def _without_bad_points(model: SparseModel) -> SparseModel:
    """Without the observations that are no numbers, or of points that are none."""
    good = (np.isfinite(model.xyz) & (np.abs(model.xyz) < FARTHEST)).all(-1)
    keep = good[model.point] & np.isfinite(model.uv).all(-1) & np.isfinite(model.depth) & np.isfinite(model.error)
    xyz = np.where(good[:, None], model.xyz, 0.0)
    return replace(model, xyz=xyz, **{name: getattr(model, name)[keep] for name in OBSERVED})


def _check_images(finished: Finished) -> None:
    """Fill in `unusable`, and put a camera that is a number in its place so that nothing else breaks."""
    model = finished.model
    for row, image in enumerate(map(int, model.image)):
        pose = model.pose[row]
        rotation = pose[:3, :3]
        if model.fisheye[row]:
            finished.unusable[image] = (
                "has a fisheye lens, which this cannot use: make a model of undistorted pictures by COLMAP's "
                "image_undistorter"
            )
        elif not (np.isfinite(pose).all() and np.abs(pose).max() < FARTHEST) or (
            np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3
        ):
            finished.unusable[image] = "has a pose that is none"
        elif not _is_a_camera(model, row):
            finished.unusable[image] = (
                "has a camera that cannot be: a focal length below zero, a centre far outside, or one of them not in pixels"
            )
        if image in finished.unusable:
            model.pose[row], model.intrinsics[row] = np.eye(4), (1.0, 1.0, 0.5, 0.5)
    bad = np.isin(model.image[model.seen_by], list(finished.unusable))
    for name in OBSERVED:
        setattr(model, name, getattr(model, name)[~bad])


def _is_a_camera(model: SparseModel, row: int) -> bool:
    """All of it in pixels: what is not has a centre in the first one, or a field of view near 180 degrees."""
    (fx, fy, cx, cy), (width, height) = model.intrinsics[row], model.size[row]
    in_pixels = not (0 <= min(cx, cy) and max(cx, cy) <= 1) and min(fx / width, fy / height) > LEAST_FOCAL
    return bool(in_pixels) and are_normalised_intrinsics(normalized_intrinsics(model, row))
