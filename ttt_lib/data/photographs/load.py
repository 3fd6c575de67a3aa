"""One function by which a scene enters: `load_scene`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ttt_lib.core.errors import DataError
from ttt_lib.core.types import Sample
from ttt_lib.data.images import is_photo
from ttt_lib.data.photographs.job import Picture
from ttt_lib.data.photographs.known import find_cameras, scene_of_cameras
from ttt_lib.data.photographs.reconstruct import reconstruct
from ttt_lib.data.photographs.scene import Scene
from ttt_lib.data.photographs.sources import Given, Prior, checked_focal, from_list, guess, photographs_of, thinned


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
    points are triangulated. The scale is then that of these cameras. Photographs are read without the distortion of
    their lenses, given or, of three and more photographs that are no `Sample`s (whose truth is a pinhole's), found.

    Args:
        source: a list of photographs (files; or pairs of a name and a tensor (3,H,W) in [0,1], or `Sample`s), a folder
            of them; a clip, of which the sharpest frames are taken; a folder with a COLMAP model (`sparse/0`, ...) or a
            `transforms.json` and the photographs beside it, or that file.
        every: of a clip's frames, or of the photographs (of a folder in the order of their names), each so many.
        count: so many of them, spread evenly; of a clip some 14.
        seed: of the reconstruction; the same seed gives the same scene.
        focal: the focal length over the width where it is known: of the first photograph, and the same camera's for
            those that were held the other way. Without it that of EXIF counts.
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
    source = _path_or_list(source, "source")
    cameras = _path_or_list(cameras, "cameras") if cameras is not None else None
    known = find_cameras(source if cameras is None else cameras)
    if cameras is not None:
        _check_known(known, cameras, source)
    if known is not None:
        if focal is not None:
            raise DataError("focal: the cameras are known here, and their focal length with them; leave it out.")
        return scene_of_cameras(known, None if cameras is None else source, every, count, seed)
    given, where, in_order = _given(source, every, count, focal, prior)
    if len(given.pictures) < 2:
        why = next((f": {why}" for _, why in given.left_out if why.endswith(".")), ".")
        raise DataError(f"{where}: {len(given.pictures)} photographs can be read, at least two are needed{why}")
    straight = isinstance(source, list) and all(isinstance(item, Sample) for item in source)
    scene = reconstruct(given.pictures, seed, in_order, straight)
    _name_exif(scene, given.pictures if focal is None else [])
    scene.left_out = given.left_out + scene.left_out
    return scene


def _name_exif(scene: Scene, pictures: list[Picture]) -> None:
    """Add to a refusal what EXIF says of the focal length, where it came so far that one was used: a tag may lie."""
    said = sorted({f"{picture.focal:.2f}" for picture in pictures if picture.exact})
    if scene.refused and "focal" in scene.about and said:
        scene.refused = (
            f"{scene.refused.rstrip('.')}; EXIF says the focal length ({', '.join(said[:3])} of the width), --focal (in "
            "Python: focal) says another."
        )


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


def _check_known(known: Any, cameras: Any, source: Path | list[Any]) -> None:
    """Raises `DataError` where cameras that somebody names do not go with the photographs."""
    if isinstance(cameras, Path) and not os.path.exists(cameras):
        raise DataError(f"{cameras}: there is no such file or folder of cameras; check the name.")
    if known is None:
        raise DataError(f"{cameras}: holds neither a COLMAP model (cameras, images) nor a transforms.json.")
    if isinstance(source, Path) and not os.path.isdir(source):
        raise DataError(f"{source}: is no folder of photographs, which known cameras need.")
    if isinstance(source, list):
        if not all(isinstance(file, str | os.PathLike) for file in source):
            raise DataError(
                "photographs: known cameras belong to files, by their names; the list holds something else."
            )
        source[:] = map(Path, source)


def _given(
    source: Path | list[Any], every: int | None, count: int | None, focal: float | None, prior: Prior | None
) -> tuple[Given, str, bool]:
    """Pictures without cameras, where they are from, and whether they are in the order in which they were taken."""
    if isinstance(source, list):
        return from_list(thinned(source, every, count, "the list"), focal, prior), "the list", False
    if os.path.isdir(source):
        files, others = photographs_of(source)
        if not files:
            also = "; ".join(f"{name} {why}" for name, why in others[:1]) or "it is empty"
            raise DataError(f"{source}: holds no photographs ({also}); name the folder that they lie in.")
        given = from_list(thinned(files, every, count, source), focal, prior)
        return Given(given.pictures, given.left_out + others), str(source), False
    if not os.path.isfile(source):
        raise DataError(f"{source}: there is no such folder or file; check the name.")
    # Here and not above: OpenCV has an FFmpeg of its own, and two of them in one process are one too many for some systems.
    from ttt_lib.data.photographs.clips import is_moving_picture, read_clip

    if is_photo(source) and not is_moving_picture(source):
        raise DataError(f"{source}: is one photograph; name two or more of the same scene.")
    pictures = read_clip(source, every, count, focal).pictures
    for picture in pictures:
        if picture.focal is None and prior is not None:
            picture.focal = guess(prior, picture.name, picture.read())
    return Given(pictures, []), str(source), True
