"""Scenes whose cameras somebody else computed: a COLMAP model, with points or without, or a `transforms.json`, and the
photographs that belong to the names in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ttt_lib.core.errors import DataError, UserError, printable
from ttt_lib.data.images import is_photo, read_photo
from ttt_lib.data.photographs.as_seen import read_undistorted, turn, turns_of_camera
from ttt_lib.data.photographs.colmap import find_model, is_own, read_model
from ttt_lib.data.photographs.job import SCANT, Lens, Picture, Selection, SparseModel
from ttt_lib.data.photographs.reconstruct import do_apart, to_photographs
from ttt_lib.data.photographs.scene import Photograph, Scene
from ttt_lib.data.photographs.signals import centres, moves_ahead, select_tracks, summarize
from ttt_lib.data.photographs.sources import as_one, because, distinct_names, photographs_of, thinned
from ttt_lib.data.photographs.transforms import Frame, find_transforms, read_transforms

INSIDE = (".", "images", "input", "photos", "images_2", "images_4", "images_8")  # folders that people use
FAR = 1000.0  # times their own spread: so far from the origin float32 would cost a ten-thousandth of it


class Posed(NamedTuple):
    """A photograph with its camera. turns: quarter turns, clockwise, from the picture as the camera saw it to the
    upright one that `read_photo` gives; lens: of the picture as the camera saw it; pose (4,4) float64 world -> camera.

    Where the lens has distortion, `source` and `as_seen` are without it, so that they fit to its pinhole camera.
    """

    name: str
    file: Path
    turns: int
    lens: Lens
    pose: np.ndarray

    @property
    def plain(self) -> Photograph:
        """As it was taken, for where its camera does not count."""
        return Photograph(self.name, partial(read_photo, self.file))

    @property
    def source(self) -> Callable[[], Tensor]:
        """Reads the picture (3,H,W) without distortion, upright."""
        if not self.lens.distortion:
            return partial(read_photo, self.file)
        return partial(read_undistorted, self.file, self.lens, self.turns)

    def as_seen(self) -> Tensor:
        """The picture (3,H,W) without distortion, as the camera saw it before it was turned upright."""
        return self.source().rot90(self.turns, (1, 2))


def find_cameras(path: Path) -> Path | None:
    """The folder of a COLMAP model in a folder, else a `transforms.json` there or of this name; None without either."""
    return (find_model(path) if os.path.isdir(path) else None) or find_transforms(path)


def scene_of_cameras(cameras: Path, folder: Path | None, every: int | None, count: int | None, seed: int) -> Scene:
    """The scene of cameras and the photographs that they have.

    Args:
        cameras: as `find_cameras` gives it.
        folder: the one that the photographs lie in; None: beside the cameras.
        every, count, seed: see `load_scene`.

    Raises:
        DataError: the files of cameras are damaged, or fewer than two of their photographs can be used.
    """
    scene, model = Scene([], about={"scale": "as the cameras have it"}), None  # the scene is filled in
    if os.path.isdir(cameras):
        model, names, lenses, scene.left_out = read_model(cameras)
        poses = model.pose
    else:
        lenses, scene.left_out = read_transforms(cameras)
        names, poses = [frame.path for frame in lenses], [frame.pose for frame in lenses]
    files = _files(names, folder or (cameras if model else cameras.parent), cameras, scene)
    rows = thinned([row for row, name in enumerate(names) if name in files], every, count, cameras)
    posed = {}  # by the camera's row
    for row, name in zip(rows, distinct_names([files[names[row]] for row in rows])):
        try:
            posed[row] = _posed(name, files[names[row]], lenses[row], poses[row])
        except UserError as error:
            scene.left_out.append((name, str(error)))
    if len(posed) < 2:
        raise DataError(
            f"{cameras}: {len(posed)} photographs with a camera can be used, two are needed{because(scene.left_out[-1:])}."
        )
    if model is not None and len(model.xyz):
        picked = _select(model)
        if is_own(cameras):
            picked = replace(picked, which=model.depth > 0, weak={})
        return _finished(model, picked, posed, scene)
    return _triangulated(posed, seed, scene)


def _files(names: list[str], near: Path, cameras: Path, scene: Scene) -> dict[str, Path]:
    """The photograph of each name. Raises `DataError` where fewer than two are there."""
    files, where = find_photographs(names, near)
    if len(files) < 2:
        such = f" (such as {printable(names[0], 100)!r})" if names else ""
        raise DataError(
            f"{cameras}: of its {len(names)} photographs{such} {len(files)} are in {where}; give the folder that they lie "
            f"in{because(scene.left_out[-1:])}."
        )
    said = {Path(name).stem for name, _ in scene.left_out}
    others = [file.stem for file in photographs_of(where)[0] if file not in files.values() and file.stem not in said]
    scene.left_out += as_one(others, f"no camera in {cameras}")
    scene.left_out += [(printable(name, 100), f"is not in {where}") for name in names if name not in files]
    return files


def _posed(name: str, file: Path, camera: Lens | Frame, pose: np.ndarray) -> Posed:
    """Raises `UserError` where the photograph and its camera cannot be used; the sentence is the reason."""
    turns, stored = turns_of_camera(file, (camera.width, camera.height) if isinstance(camera, Lens) else camera.size)
    lens = camera if isinstance(camera, Lens) else camera.lens(*(camera.size or stored))
    if lens.fault:
        raise UserError(f"{lens.fault}.")
    return Posed(name, file, turns, lens, pose)


def _triangulated(posed: dict[int, Posed], seed: int, scene: Scene) -> Scene:
    """A scene of photographs whose cameras are known and stay as they are; its scale is that of the poses."""
    pictures = [Picture(each.name, each.as_seen) for each in posed.values()]
    lenses = [each.lens.pinhole for each in posed.values()]
    poses = np.stack([each.pose for each in posed.values()])
    job = do_apart(pictures, seed, False, lenses, poses)
    scene.about |= job.about
    if job.refused:
        return replace(scene, photographs=[each.plain for each in posed.values()], refused=job.refused)
    picked = _select(job.model)
    picked.weak.update(job.left_out)
    return _finished(job.model, picked, dict(enumerate(posed.values())), scene)


def _select(model: SparseModel) -> Selection:
    """Its tracks; with little parallax too where fewer than two photographs have enough others."""
    ahead = moves_ahead(model)
    picked = select_tracks(model, ahead)
    return picked if len(picked.weak) + 2 <= len(model.image) else select_tracks(model, ahead, SCANT)


def _finished(model: SparseModel, picked: Selection, posed: dict[int, Posed], scene: Scene) -> Scene:
    """The scene of the photographs that are not weak, which are read without the distortion of their lenses, as the
    model's cameras and places are. The others are left out, and stay as they were taken."""
    weak = {image: each for image, each in posed.items() if image in picked.weak}
    scene.left_out += [(each.name, picked.weak[image]) for image, each in weak.items()]
    taken = {image: each for image, each in posed.items() if image not in weak}
    if len(taken) < 2:
        refused = f"fewer than two photographs have points enough{because(scene.left_out[-1:])}: give more, from places apart."
        return replace(scene, photographs=[each.plain for each in posed.values()], refused=refused)
    for row, image in enumerate(model.image.tolist()):
        if image in taken:
            turn(model, row, taken[image].turns)
    _near_origin(model, scene)
    used = np.isin(model.image, list(taken))
    picked.which &= used[model.seen_by]
    picked.weak = dict.fromkeys(model.image[~used].tolist(), "")
    scene.about.update(summarize(model, picked))
    focals = model.intrinsics[used, 0] / model.size[used, 0]
    scene.about["focal"] = sorted({round(focal, 4) for focal in focals.tolist()})
    if undistorted := sum(bool(each.lens.distortion) for each in taken.values()):
        scene.about["undistorted"] = undistorted
    found = to_photographs(model, picked, {i: Photograph(each.name, each.source) for i, each in taken.items()})
    return replace(scene, photographs=found, rest=[each.plain for each in weak.values()])


def _near_origin(model: SparseModel, scene: Scene) -> None:
    """Move the world where the cameras stand far from its origin, as in geographic coordinates: poses are float32.

    `about["origin"]` says what has to be added to have the old coordinates again.
    """
    places = centres(model)
    middle = np.median(places, axis=0)
    if np.linalg.norm(middle) > FAR * np.median(np.linalg.norm(places - middle, axis=-1)) > 0:
        origin = np.round(middle)
        model.pose[:, :3, 3] += model.pose[:, :3, :3] @ origin
        model.xyz -= origin
        scene.about["origin"] = origin.tolist()


def find_photographs(names: list[str], place: Path) -> tuple[dict[str, Path], Path]:
    """The file of each name in the one folder near a place that has most of them, and that folder; names without a file are
    missing.

    A name is a path inside the folder. With another ending or none it is found where just one photograph there has its
    stem.
    """
    above = (place, place.parent, place.parent.parent)
    folders = dict.fromkeys(Path(os.path.normpath(folder / name)) for folder in above for name in INSIDE)
    best: tuple[dict[str, Path], Path] = ({}, place)
    listed = cache(_by_name)
    for folder in filter(os.path.isdir, folders):
        found = {name: file for name in names if (file := _in_folder(name, folder, listed)) is not None}
        if len(found) > len(best[0]):
            best = found, folder
        if len(found) == len(set(names)):
            break
    return best


def _in_folder(name: str, folder: Path, listed: Callable[[Path], dict[str, Path]]) -> Path | None:
    path = folder / name.replace("\\", "/")
    for place in (path.parent, folder):
        known = listed(place) if os.path.isdir(place) else {}
        if file := known.get(path.name) or known.get(path.stem):
            return file
    return None


def _by_name(folder: Path) -> dict[str, Path]:
    """The photographs of a folder by stem where that is there once, and by name."""
    files = [path for path in folder.iterdir() if is_photo(path)]
    number = Counter(file.stem for file in files)
    return {**{file.stem: file for file in files if number[file.stem] == 1}, **{file.name: file for file in files}}
