"""Photographs whose cameras somebody else computed: put beside their cameras, turned upright, and made a scene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ttt_lib.core.errors import UserError
from ttt_lib.data.images import exif_orientation, read_photo, readable_formats
from ttt_lib.data.photographs.colmap import Finished
from ttt_lib.data.photographs.colmap_files import Lens
from ttt_lib.data.photographs.features import Picture
from ttt_lib.data.photographs.job import Refusal
from ttt_lib.data.photographs.known import triangulate
from ttt_lib.data.photographs.process import SparseModel
from ttt_lib.data.photographs.scene import Photograph, Scene
from ttt_lib.data.photographs.signals import centres, moves_ahead
from ttt_lib.data.photographs.sources import distinct_names, thinned
from ttt_lib.data.photographs.tracks import Selection, select_tracks, summarize, to_photographs

CLOCKWISE = {1: 0, 6: 1, 3: 2, 8: 3}  # quarter turns from the stored picture to the upright one, by EXIF's orientation
SLACK_PIXELS, SLACK_SHAPE = 1.5, 0.01  # by which a resized picture's shape may differ from its camera's
FAR = 1000.0  # times their own spread: so far from the origin float32 would cost a ten-thousandth of it
QUARTER = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # a camera's axes after one turn


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) are of one shape, as those of a picture and its smaller copy.

    Example:
        >>> same_shape((4032, 3024), (1008, 756)), same_shape((4000, 3000), (3000, 4000))
        (True, False)
    """
    expected = one[1] * other[0] / one[0]
    return abs(other[1] - expected) <= max(SLACK_PIXELS, SLACK_SHAPE * expected)


@dataclass
class Posed:
    """A photograph with its camera. turns: quarter turns, clockwise, from the picture as the camera saw it to the
    upright one that `read_photo` gives; lens: of the picture as the camera saw it; pose (4,4) float64 world -> camera."""

    name: str
    file: Path
    turns: int
    lens: Lens
    pose: np.ndarray

    def as_seen(self) -> Tensor:
        """The picture (3,H,W) as the camera saw it."""
        return torch.rot90(read_photo(self.file), self.turns, (1, 2))


def orientation_of(file: Path) -> int:
    """1 to 8 by EXIF, of a file that can be read; of a TIFF nobody knows who turns it, so it counts as upright."""
    try:
        with Image.open(file, formats=readable_formats()) as image:
            return exif_orientation(image) if image.format != "TIFF" else 1
    except OSError:  # a picture that OpenCV reads and Pillow does not
        return 1


def stored_turns(file: Path, size: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
    """How a photograph is turned before it is seen, and its size (width, height) as its camera saw it.

    Structure from motion takes the pixels as they are stored, whatever EXIF says of up and down. size: the camera's,
    None where nothing says it.

    Raises:
        UserError: it cannot be read, is mirrored, or has another shape than its camera; the sentence is the reason.
    """
    height, width = read_photo(file).shape[1:]
    orientation = orientation_of(file)
    if orientation not in CLOCKWISE:
        raise UserError("is mirrored by its EXIF; save it as it is to be seen.")
    turns = CLOCKWISE[orientation]
    stored = (height, width) if turns % 2 else (width, height)
    if size is None or same_shape(size, stored):
        return turns, stored
    if turns % 2 and same_shape(size, (width, height)):  # whoever made the cameras looked at EXIF
        return 0, (width, height)
    raise UserError(
        f"has {stored[0]} x {stored[1]} pixels, which is not the shape of its camera ({size[0]} x {size[1]}): give the "
        "pictures that the cameras were computed from, uncropped."
    )


def turn(model: SparseModel, row: int, turns: int) -> None:
    """Turn one image of a model, its camera and what it sees, by quarter turns clockwise."""
    here = model.seen_by == row
    for _ in range(turns):
        (fx, fy, cx, cy), (width, height) = model.intrinsics[row], model.size[row]
        model.intrinsics[row], model.size[row] = (fy, fx, height - cy, cx), (height, width)
        model.pose[row, :3] = QUARTER @ model.pose[row, :3]
        model.uv[here] = np.stack([height - model.uv[here][:, 1], model.uv[here][:, 0]], -1)


@dataclass
class Found:
    """What is known when a scene is put together. left_out (name, reason); rest, about: see `Scene`."""

    left_out: list[tuple[str, str]] = field(default_factory=list)
    rest: list[Photograph] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def scene_of_model(finished: Finished, files: dict[int, Path], count: int | None, where: Path, found: Found) -> Scene:
    """A scene of a model that has points, and of the photographs that belong to it.

    Args:
        finished: the model, whose images are ids.
        files: id -> photograph, of the images that were found.
        count: photographs at most, spread evenly over the model's images in their order.
        where: the model's folder.
        found: what was left out before.
    """
    model = finished.model
    picked = select_tracks(model, moves_ahead(model))
    if finished.listing.own:  # each observation is a track already
        picked = replace(picked, which=np.isfinite(model.depth) & (model.depth > 0), weak={})
    picked.weak.update(finished.unusable)
    usable = [int(image) for image in model.image if int(image) in files and int(image) not in picked.weak]
    taken = set(thinned(usable, None, count, where))
    names = dict(zip(files, distinct_names(list(files.values()))))
    for row, image in enumerate(map(int, model.image)):
        if image in taken:
            try:
                turns, _ = stored_turns(files[image], tuple(map(int, model.size[row])))
            except UserError as error:
                found.left_out.append((names.pop(image), str(error)))
                taken.remove(image)
            else:
                turn(model, row, turns)
    sources: dict[int, Callable[[], Tensor]] = {image: partial(read_photo, file) for image, file in files.items()}
    return put_together(model, picked, names, sources, taken, found)


def _near_origin(model: SparseModel, found: Found) -> None:
    """Move the world where the cameras stand far from its origin, as in geographic coordinates: poses are float32.

    `about["origin"]` says what has to be added to have the old coordinates again.
    """
    places = centres(model)
    middle = np.median(places, axis=0)
    if np.linalg.norm(middle) > FAR * np.median(np.linalg.norm(places - middle, axis=-1)) > 0:
        origin = np.round(middle)
        model.pose[:, :3, 3] += model.pose[:, :3, :3] @ origin
        model.xyz -= origin
        found.about["origin"] = origin.tolist()


def _can_be_read(source: Callable[[], Tensor]) -> bool:
    try:
        source()
    except UserError:
        return False
    return True


def put_together(
    model: SparseModel, picked: Selection, names: dict[int, str], sources: dict[int, Any], taken: set[int], found: Found
) -> Scene:
    """The scene of the images that were taken; the others are left out with their reasons, if they have any."""
    _near_origin(model, found)
    out = [image for image in names if image in picked.weak]
    found.left_out += [(names[image], picked.weak[image]) for image in out]
    seen = np.isin(model.image, list(taken))[model.seen_by]
    weak = {int(image): picked.weak.get(int(image), "") for image in model.image if int(image) not in taken}
    whole = replace(picked, which=picked.which & seen, weak=weak)
    found.about.update(summarize(model, whole))
    rows = [row for row, image in enumerate(model.image) if int(image) in taken]
    found.about["focal"] = sorted({round(float(model.intrinsics[r, 0] / model.size[r, 0]), 4) for r in rows})
    listed = [names.get(int(image), "") for image in model.image]
    photographs = to_photographs(model, whole, listed, [sources.get(int(image)) for image in model.image])
    rest = [Photograph(names[image], sources[image]) for image in out if _can_be_read(sources[image])] + found.rest
    if len(photographs) >= 2:
        return Scene(photographs, found.left_out, found.about, "", rest)
    first = next((f" ({name} {why.rstrip('.')})" for name, why in found.left_out), "")
    refused = (
        f"fewer than two photographs have a camera and points enough{first}: give more of them, from places apart."
    )
    return Scene(rest + [Photograph(p.name, p.source) for p in photographs], found.left_out, found.about, refused)


def scene_of_cameras(posed: list[Posed], seed: int, in_order: bool, found: Found) -> Scene:
    """A scene of photographs whose cameras are known and stay as they are; its scale is that of the poses."""
    pictures = [Picture(each.name, each.as_seen) for each in posed]
    poses = np.stack([each.pose for each in posed])
    upright = [partial(read_photo, each.file) for each in posed]
    found.about["scale"] = "as the cameras have it"
    try:
        model, wrong = triangulate(pictures, [each.lens for each in posed], poses, seed, in_order, found.about)
    except Refusal as refusal:
        photographs = [Photograph(each.name, source) for each, source in zip(posed, upright)]
        return Scene(photographs + found.rest, found.left_out, found.about, str(refusal))
    picked = select_tracks(model, moves_ahead(model))
    picked.weak.update(wrong)
    for row, image in enumerate(map(int, model.image)):
        turn(model, row, posed[image].turns)
    names = {index: each.name for index, each in enumerate(posed)}
    taken = {int(image) for image in model.image if int(image) not in picked.weak}
    return put_together(model, picked, names, dict(enumerate(upright)), taken, found)
