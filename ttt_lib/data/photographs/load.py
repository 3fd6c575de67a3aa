"""One function by which a scene enters: `load_scene`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ttt_lib.core.errors import DataError
from ttt_lib.data.images import is_photo
from ttt_lib.data.photographs.finished import find_cameras, scene_of_finished
from ttt_lib.data.photographs.reconstruct import reconstruct
from ttt_lib.data.photographs.scene import Scene
from ttt_lib.data.photographs.sources import (
    Given,
    Prior,
    checked_focal,
    from_files,
    from_list,
    guess,
    photos_in,
    thinned,
)


def load_scene(
    source: str | os.PathLike | Iterable[Any],
    *,
    every: int | None = None,
    count: int | None = None,
    seed: int = 0,
    focal: float | None = None,
    prior: Prior | None = None,
    cameras: str | os.PathLike | None = None,
) -> Scene:
    """Photographs of one scene with their cameras and with tracks whose depth is known up to one scale.

    Cameras are computed from the photographs, or taken as they are where somebody computed them before: from a finished
    COLMAP model, whose points are taken too, or from a `transforms.json` (nerfstudio, instant-ngp, Blender), by which
    points are triangulated. The scale is then that of these cameras.

    Args:
        source: a list of photographs (files; or pairs of a name and a tensor (3,H,W) in [0,1], or `Sample`s), a folder
            of them; a clip, of which the sharpest frames are taken; a folder with a COLMAP model (`sparse/0`, ...) or a
            `transforms.json` and the photographs beside it, or that file.
        every: of a clip's frames, or of the photographs (of a folder in the order of their names), each so many.
        count: so many of them, spread evenly; of a clip some 14.
        seed: of the reconstruction; the same seed gives the same scene.
        focal: the focal length over the width where it is known: of the first photograph, and the same camera's for
            those that were held the other way. Without it EXIF counts, where it says one.
        prior: a model's guess where neither is known: a function from an image (3,H,W) to the focal length over the
            width, or a table name -> focal length.
        cameras: a folder with a COLMAP model or a `transforms.json` for the photographs of `source`.

    Returns:
        The scene. Where the photographs tell nothing, `refused` says why; what was not read is in `left_out`.

    Raises:
        DataError: nothing to read there, fewer than two photographs, or an option that is none.

    Example:
        >>> import torch
        >>> load_scene([("a", torch.zeros(3, 64, 64)), ("b", torch.zeros(3, 64, 64))]).refused
        'b is a copy of a, or taken from the same place: take a second photograph a step to the side.'
    """
    focal, every, count = checked_focal(focal), _whole(every, "every", 1), _whole(count, "count", 2)
    source, cameras = (
        _path_or_list(source, "source"),
        _path_or_list(cameras, "cameras") if cameras is not None else None,
    )
    if cameras is not None:
        return _with_cameras(source, cameras, every, count, seed, focal)
    if isinstance(source, list):
        return _reconstructed(from_list(thinned(source, every, count, "the list"), focal, prior), "the list", seed)
    path = source
    if (finished := find_cameras(path)) is not None:
        return _finished(finished, None, every, count, seed, focal)
    if os.path.isdir(path):
        return _from_folder(path, every, count, seed, focal, prior)
    if os.path.isfile(path):
        return _from_clip(path, every, count, seed, focal, prior)
    raise DataError(f"{path}: there is no such folder or file; check the name.")


def _path_or_list(value: Any, name: str) -> Path | list[Any]:
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        return Path(value)
    if isinstance(value, str | os.PathLike) or not hasattr(value, "__iter__") and not hasattr(value, "__getitem__"):
        raise DataError(f"{name}: must be a path{' or a list of photographs' * (name == 'source')}, not {value!r}.")
    return list(value)


def _whole(value: Any, name: str, least: int) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise DataError(f"{name}: must be a whole number of at least {least}, not {value!r}.")
    return value


def _with_cameras(source: Any, cameras: Any, every: Any, count: Any, seed: int, focal: float | None) -> Scene:
    """Photographs of a folder or a list, with the cameras that a file gives."""
    finished = find_cameras(cameras) if isinstance(cameras, Path) else None
    if finished is None:
        raise DataError(f"{cameras}: holds neither a COLMAP model (cameras, images) nor a transforms.json.")
    if isinstance(source, Path):
        if not os.path.isdir(source):
            raise DataError(f"{source}: is no folder of photographs, which known cameras need.")
        return _finished(finished, source, every, count, seed, focal)
    if not all(isinstance(file, str | os.PathLike) for file in source):
        raise DataError("photographs: known cameras belong to files, by their names; the list holds something else.")
    return _finished(finished, [Path(file) for file in source], every, count, seed, focal)


def _finished(finished: Any, photographs: Any, every: Any, count: Any, seed: int, focal: float | None) -> Scene:
    if focal is not None:
        raise DataError("focal: the cameras are known here, and their focal length with them; leave it out.")
    return scene_of_finished(finished, photographs, every, count, seed)


def _from_folder(path: Path, every: int | None, count: int | None, seed: int, focal: Any, prior: Any) -> Scene:
    files, others = photos_in(path)
    if not files:
        also = "; ".join(f"{name} {why}" for name, why in others[:1]) or "it is empty"
        raise DataError(f"{path}: holds no photographs ({also}); name the folder that they lie in.")
    given = from_files(thinned(files, every, count, path), focal, prior)
    given.left_out += others
    return _reconstructed(given, str(path), seed)


def _from_clip(path: Path, every: int | None, count: int | None, seed: int, focal: Any, prior: Any) -> Scene:
    # Here and not above: OpenCV has an FFmpeg of its own, and two of them in one process are one too many for some systems.
    from ttt_lib.data.photographs.clips import is_moving_picture, read_clip

    if is_photo(path) and not is_moving_picture(path):
        raise DataError(f"{path}: is one photograph; name two or more of the same scene.")
    given = Given(read_clip(path, every, count, focal).pictures)
    for picture in given.pictures:
        if picture.focal is None and prior is not None:
            picture.focal = guess(prior, picture.name, picture.read())
    return _reconstructed(given, str(path), seed, in_order=True)


def _reconstructed(given: Given, where: str, seed: int, in_order: bool = False) -> Scene:
    """The scene of pictures without cameras, with what was left out before."""
    if len(given.pictures) < 2:
        damaged = next((f": {why}" for _, why in given.left_out if why.endswith(".")), ".")
        raise DataError(
            f"{where}: {len(given.pictures)} photographs can be read, at least two of one scene are needed{damaged}"
        )
    scene = reconstruct(given.pictures, seed, in_order)
    scene.left_out = given.left_out + scene.left_out
    return scene
