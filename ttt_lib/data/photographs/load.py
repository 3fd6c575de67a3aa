"""One function by which a scene enters: `load_scene`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt_lib.core.errors import DataError, printable
from ttt_lib.data.images import is_photo
from ttt_lib.data.photographs.job import Picture
from ttt_lib.data.photographs.known import find_cameras, scene_of_cameras
from ttt_lib.data.photographs.reconstruct import reconstruct
from ttt_lib.data.photographs.scene import Scene
from ttt_lib.data.photographs.sources import Given, because, from_list, photographs_of, thinned

Prior = Callable[[Tensor], float | None]
REASONABLE = 0.05, 15.0  # focal length over width that somebody may say; 26 would be millimetres


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
    points are triangulated. The scale is then that of these cameras, and photographs are read without the distortion of
    their lenses.

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
            width.
        cameras: a folder with a COLMAP model or a `transforms.json` for the photographs of `source`, which is their folder.

    Returns:
        The scene. Where the photographs tell nothing, `refused` says why; what was not read is in `left_out`.

    Raises:
        DataError: nothing to read there, fewer than two photographs, or an option that is none.

    Example:
        >>> import torch
        >>> load_scene([("a", torch.zeros(3, 64, 64)), ("b", torch.zeros(3, 64, 64))]).refused
        'b is a copy of a, or taken from the same place: take a second photograph a step to the side.'
    """
    source, focal = _checked(source, every, count), _checked_focal(focal)
    known = _known(source, cameras)
    if known is not None:
        if focal is not None:
            raise DataError("focal: the cameras are known here, and their focal length with them; leave it out.")
        return scene_of_cameras(known, None if cameras is None else source, every, count, seed)
    pictures, left_out = _given(source, every, count, focal)
    if len(pictures) < 2:
        raise DataError(
            f"{source if isinstance(source, Path) else 'the list'}: {len(pictures)} photographs can be read, at least two "
            f"are needed{because(left_out)}."
        )
    _add_guesses(pictures, prior)
    scene = reconstruct(pictures, seed, isinstance(source, Path) and not os.path.isdir(source))
    _name_exif(scene, pictures if focal is None else [])
    scene.left_out = left_out + scene.left_out
    return scene


def _checked(source: Any, every: Any, count: Any) -> Path | list[Any]:
    """The source as a path or a list. Raises `DataError` where it is none, or an option is none."""
    for name, value, least in (("every", every, 1), ("count", count, 2)):
        if value is not None and not (isinstance(value, int) and value >= least):
            raise DataError(f"{name}: must be a whole number of at least {least}, not {value!r}.")
    if isinstance(source, str | os.PathLike) and os.fspath(source):
        return Path(source)
    if isinstance(source, str | os.PathLike) or not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        raise DataError(f"source: must be a path or a list of photographs, not {source!r}.")
    return list(source)


def _checked_focal(value: Any) -> float | None:
    """A focal length over the width that somebody says. Raises `DataError` where it is none."""
    low, high = REASONABLE
    if value is None or isinstance(value, int | float) and low <= value <= high:
        return value
    raise DataError(
        f"focal: must be the focal length over the picture's width, a number from {low} to {high:.0f}, not {value!r}."
    )


def _add_guesses(pictures: list[Picture], prior: Prior | None) -> None:
    """What a model guesses of the focal lengths that are not known, where that is sensible."""
    for picture in pictures:
        if picture.focal is None and prior is not None:
            guess = prior(picture.read())
            picture.focal = guess if guess is not None and REASONABLE[0] <= guess <= REASONABLE[1] else None


def _name_exif(scene: Scene, pictures: list[Picture]) -> None:
    """Add to a refusal what EXIF says of the focal length, where it came so far that one was used: a tag may lie."""
    said = sorted({f"{picture.focal:.2f}" for picture in pictures if picture.exact})
    if scene.refused and "focal" in scene.about and said:
        scene.refused = (
            f"{scene.refused.rstrip('.')}; EXIF says the focal length ({', '.join(said[:3])} of the width), --focal (in "
            "Python: focal) says another."
        )


def _known(source: Path | list[Any], cameras: str | os.PathLike | None) -> Path | None:
    """The file or folder of cameras that somebody computed, if there are any."""
    if cameras is None:
        return find_cameras(source) if isinstance(source, Path) else None
    if isinstance(source, list) or not os.path.isdir(source):
        raise DataError(f"{printable(source)}: is no folder of photographs, which known cameras need.")
    known = find_cameras(Path(cameras))
    if known is None:
        raise DataError(
            f"{cameras}: there is no such file or folder, or it holds neither a COLMAP model (cameras, images) nor a "
            "transforms.json."
        )
    return known


def _given(source: Path | list[Any], every: int | None, count: int | None, focal: float | None) -> Given:
    """Pictures without cameras."""
    if isinstance(source, list):
        return from_list(thinned(source, every, count, "the list"), focal)
    if os.path.isdir(source):
        files, others = photographs_of(source)
        if not files:
            raise DataError(f"{source}: holds no photographs{because(others)}; name the folder that they lie in.")
        given = from_list(thinned(files, every, count, source), focal)
        return Given(given.pictures, given.left_out + others)
    if not os.path.isfile(source):
        raise DataError(f"{source}: there is no such folder or file; check the name.")
    if is_photo(source):
        raise DataError(f"{source}: is one photograph; name two or more of the same scene.")
    # Here and not above: OpenCV has an FFmpeg of its own, and two of them in one process are one too many for some systems.
    from ttt_lib.data.photographs.clips import read_clip

    return Given(read_clip(source, every, count, focal), [])
