"""Scenes whose cameras somebody else computed: a COLMAP model, with points or without, or a `transforms.json`, and the
photographs that belong to the names in them."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttt_lib.core.errors import DataError, UserError, printable
from ttt_lib.data.images import read_photo
from ttt_lib.data.photographs.by_name import folders_near, in_folders, in_list
from ttt_lib.data.photographs.colmap import read_model
from ttt_lib.data.photographs.colmap_files import Listing, ModelFiles, find_model
from ttt_lib.data.photographs.job import SCANT, Lens, Picture, Selection, SparseModel
from ttt_lib.data.photographs.reconstruct import do_apart, to_photographs
from ttt_lib.data.photographs.scene import Photograph, Scene
from ttt_lib.data.photographs.signals import centres, moves_ahead, select_tracks, summarize
from ttt_lib.data.photographs.sources import distinct_names, first_of, from_list, photographs_of, thinned
from ttt_lib.data.photographs.transforms import find_transforms, lens_of, read_transforms, size_of
from ttt_lib.data.photographs.undistort import LASTING, can_be_undistorted, straightened
from ttt_lib.data.photographs.upright import turn, turns_of_camera

FAR = 1000.0  # times their own spread: so far from the origin float32 would cost a ten-thousandth of it
ANOTHER = "is another model, of fewer images, which is not read; name it to have it"


class Posed(NamedTuple):
    """A photograph with its camera. turns: quarter turns, clockwise, from the picture as the camera saw it to the
    upright one that `read_photo` gives; lens: of the picture as the camera saw it; pose (4,4) float64 world -> camera.

    Where the lens has distortion, `straight` and `as_seen` are without it, so that they fit to its pinhole camera.
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
    def straight(self) -> Photograph:
        """Without distortion, for where its camera counts."""
        return straightened(self.plain, self.lens, self.turns)

    def as_seen(self) -> Tensor:
        """The picture (3,H,W) without distortion, as the camera saw it before it was turned upright."""
        return torch.rot90(self.straight.image, self.turns, (1, 2))


def find_cameras(path: Any) -> ModelFiles | Path | None:
    """The files of a COLMAP model in a folder, else a `transforms.json` there or of this name; None without either."""
    if not isinstance(path, Path):
        return None
    return (find_model(path) if os.path.isdir(path) else None) or find_transforms(path)


def scene_of_cameras(
    cameras: ModelFiles | Path, photographs: Path | list[Path] | None, every: int | None, count: int | None, seed: int
) -> Scene:
    """The scene of a file of cameras.

    Args:
        cameras: as `find_cameras` gives it.
        photographs: the folder that they lie in, or their files; None: beside the cameras.
        every, count, seed: see `load_scene`.

    Raises:
        DataError: the files of cameras are damaged, or fewer than two of their photographs can be found.
    """
    scene = Scene([])  # which is filled in
    if isinstance(cameras, Path):
        frames, scene.left_out = read_transforms(cameras)
        if not frames:
            raise DataError(f"{cameras}: no frame has a camera ({' '.join(scene.left_out[0])}).")
        files = _files([frame.path for frame in frames], photographs, folders_near(cameras.parent), cameras, scene)
        frames = thinned([frame for frame in frames if frame.path in files], every, count, cameras)
        entries = [(files[frame.path], frame.pose, frame.values) for frame in frames]
        return _triangulated(_with_cameras(entries, cameras, scene), seed, scene)
    model, listing = read_model(cameras)
    scene.left_out = [(f"{path.parent.name}/{path.name}", ANOTHER) for path in cameras.others]
    names = [listing.images.get(image, ("", 0))[0] for image in model.image.tolist()]
    paths = _files(names, photographs, folders_near(cameras.folder), cameras.folder, scene)
    found = [(image, row) for row, image in enumerate(model.image.tolist()) if names[row] in paths][::every]
    files = {image: paths[names[row]] for image, row in found}
    if listing.points:
        return _with_points(model, listing, files, count, cameras.folder, scene)
    scene.left_out += [(files[image].stem, why) for image, why in listing.unusable.items() if image in files]
    usable = thinned([each for each in found if each[0] not in listing.unusable], None, count, cameras.folder)
    entries = [(files[image], model.pose[row], listing.taken_by(image)) for image, row in usable]
    return _triangulated(_with_cameras(entries, cameras.folder, scene), seed, scene)


def _files(
    names: list[str], photographs: Path | list[Path] | None, near: list[Path], what: Path, scene: Scene
) -> dict[str, Path]:
    """The photograph of each name. Raises `DataError` where fewer than two are there."""
    if isinstance(photographs, list):
        files, at = in_list(names, photographs), "the list"
        unused = from_list([file for file in photographs if file not in set(files.values())])
        scene.rest = [Photograph(picture.name, picture.source) for picture in unused.pictures]
        scene.left_out += unused.left_out + [(p.name, f"has no camera in {what}") for p in scene.rest]
    else:
        files, where = in_folders(names, folders_near(photographs) if photographs else near)
        others = sorted(set(photographs_of(where)[0]) - set(files.values())) if where else []
        unknown = [(printable(file.stem, 100), f"has no camera in {what}") for file in others]
        scene.left_out += first_of(unknown, "other photographs", f"have no camera in {what}")
        at = where or photographs or near[0]
    if len(files) < 2:
        raise DataError(
            f"{what}: of its {len(names)} photographs (such as {printable(names[0], 100)!r}) {len(files)} are in {at}; "
            "give the folder that they lie in."
        )
    scene.left_out += [(printable(name, 100), f"is not in {at}") for name in names if name not in files]
    return files


def _because(scene: Scene) -> str:
    return next((f" ({name} {why.rstrip('.')})" for name, why in scene.left_out), "")


def _with_cameras(
    entries: list[tuple[Path, np.ndarray, Lens | dict[str, float]]], where: Path, scene: Scene
) -> list[Posed]:
    """Photographs with their cameras, those that can be read. entries: file, pose, and the lens or what a transforms.json
    says of it."""
    result = []
    for name, (file, pose, camera) in zip(distinct_names([entry[0] for entry in entries]), entries):
        try:
            size = (camera.width, camera.height) if isinstance(camera, Lens) else size_of(camera)
            turns, stored = turns_of_camera(file, size)
            lens = camera if isinstance(camera, Lens) else lens_of(camera, size or stored)
            if not can_be_undistorted(lens):
                raise UserError(f"{LASTING}.")
            result.append(Posed(name, file, turns, lens, pose))
        except UserError as error:
            scene.left_out.append((name, str(error)))
    if len(result) < 2:
        raise DataError(
            f"{where}: {len(result)} photographs with a camera can be used, two are needed{_because(scene)}."
        )
    return result


def _triangulated(posed: list[Posed], seed: int, scene: Scene) -> Scene:
    """A scene of photographs whose cameras are known and stay as they are; its scale is that of the poses."""
    pictures = [Picture(each.name, each.as_seen) for each in posed]
    lenses = [each.lens.pinhole if each.lens.distortion else each.lens for each in posed]
    poses = np.stack([each.pose for each in posed])
    job = do_apart("agreement.triangulate", pictures, seed, False, lenses, poses)
    scene.about = {"scale": "as the cameras have it", **job.about}
    plain = [each.plain for each in posed]
    if job.refused:
        return replace(scene, photographs=plain + scene.rest, refused=job.refused, rest=[])
    picked = _select(job.model, job.left_out)
    picked.weak.update(job.left_out)
    taken = {image: posed[image] for image in job.model.image.tolist() if image not in picked.weak}
    return _scene_of_images(job.model, picked, dict(enumerate(plain)), taken, scene)


def _with_points(
    model: SparseModel, listing: Listing, files: dict[int, Path], count: int | None, where: Path, scene: Scene
) -> Scene:
    """A scene of a model that has points. files: id -> photograph, of the images that were found; of those that can be
    used at most `count` are taken."""
    picked = _select(model, listing.unusable)
    if listing.own:  # each observation is a track already
        picked = replace(picked, which=np.isfinite(model.depth) & (model.depth > 0), weak={})
    picked.weak.update(listing.unusable)
    named = zip(files.items(), distinct_names(list(files.values())))
    photographs = {image: Photograph(name, partial(read_photo, file)) for (image, file), name in named}
    row_of = {image: row for row, image in enumerate(model.image.tolist())}
    taken = {}
    for image in thinned([i for i in row_of if i in files and i not in picked.weak], None, count, where):
        row, lens = row_of[image], listing.taken_by(image)
        try:
            turns, _ = turns_of_camera(files[image], model.size[row].tolist())
            taken[image] = Posed(photographs[image].name, files[image], turns, lens, model.pose[row])
        except UserError as error:
            scene.left_out.append((photographs.pop(image).name, str(error)))
    return _scene_of_images(model, picked, photographs, taken, scene)


def _select(model: SparseModel, unusable: dict[int, str]) -> Selection:
    """Its tracks; with little parallax too where fewer than two usable photographs have enough others."""
    ahead = moves_ahead(model)
    picked = select_tracks(model, ahead)
    strong = set(model.image.tolist()) - picked.weak.keys() - unusable.keys()
    return picked if len(strong) >= 2 else select_tracks(model, ahead, SCANT)


def _scene_of_images(
    model: SparseModel, picked: Selection, photographs: dict[int, Photograph], posed: dict[int, Posed], scene: Scene
) -> Scene:
    """The scene of the images that `posed` has; the others are left out with their reasons, if they have any.

    photographs: as they were taken. So stay those that are left out or of a refused scene, where no camera counts; the
    others are read without the distortion of their lenses, as the model's cameras and places are.
    """
    for row, image in enumerate(model.image.tolist()):
        here, camera = model.seen_by == row, (model.intrinsics[row], model.size[row], model.pose[row])
        turned = turn(posed[image].turns if image in posed else 0, *camera, model.uv[here])
        model.intrinsics[row], model.size[row], model.pose[row], model.uv[here] = turned
    _near_origin(model, scene)
    out = [image for image in photographs if image in picked.weak]
    scene.left_out += [(photographs[image].name, picked.weak[image]) for image in out]
    taken = np.isin(model.image, list(posed))
    weak = dict.fromkeys(model.image[~taken].tolist(), "")
    whole = replace(picked, which=picked.which & taken[model.seen_by], weak=weak)
    scene.about.update(summarize(model, whole))
    focals = model.intrinsics[taken, 0] / model.size[taken, 0]
    scene.about["focal"] = sorted({round(focal, 4) for focal in focals.tolist()})
    rest = [photographs[image] for image in out if _can_be_read(photographs[image])] + scene.rest
    if len(posed) >= 2:
        if undistorted := sum(bool(each.lens.distortion) for each in posed.values()):
            scene.about["undistorted"] = undistorted
        straight = {image: each.straight for image, each in posed.items()}
        found = to_photographs(model, whole, [straight.get(image) for image in model.image.tolist()])
        return replace(scene, photographs=found, rest=rest)
    refused = (
        f"fewer than two photographs have a camera and points enough{_because(scene)}: give more of them, from places "
        "apart."
    )
    return replace(scene, photographs=rest + [photographs[image] for image in posed], refused=refused, rest=[])


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


def _can_be_read(photograph: Photograph) -> bool:
    try:
        return photograph.image is not None
    except UserError:
        return False
