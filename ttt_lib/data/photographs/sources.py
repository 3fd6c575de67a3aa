"""Photographs as they are given, files, tensors or samples, as `Picture`s: checked one by one, with what is known of
their focal length, by the user or by EXIF (`exif`)."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ttt_lib.core.errors import DataError, UserError, printable
from ttt_lib.core.types import Sample
from ttt_lib.data.images import as_image, content_of, install_or, read_photo
from ttt_lib.data.photographs.exif import ExifLens, read_lens
from ttt_lib.data.photographs.job import Picture

log = logging.getLogger(__name__)

Prior = Callable[[Tensor], float | None] | Mapping[str, float]
MOST = 300  # photographs of one scene: a mistake rather than a scene, and pairs grow with the square
CLIPS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mts", ".3gp")
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
SHOWN = 20  # of the photographs that are not read, each is named; of more, their number
REASONABLE = 0.05, 15.0  # focal length over width that somebody may say; 26 would be millimetres


class Given(NamedTuple):
    """Photographs that can be read, and (name, reason) of the others."""

    pictures: list[Picture]
    left_out: list[tuple[str, str]]


def distinct_names(files: list[Path]) -> list[str]:
    """Short names of files, no two alike on any file system: the stem; the whole name, or a number, where that is taken.

    Example:
        >>> distinct_names([Path("a/x.jpg"), Path("a/x.png"), Path("b/X.jpg"), Path("a/y.jpg")])
        ['x', 'x_png', 'X_jpg', 'y']
    """
    return _unlike([[file.stem, f"{file.stem}_{file.suffix[1:]}"] for file in files])


def _unlike(wishes: list[list[str]]) -> list[str]:
    """For each the first of its wishes that is free, else the first with a number."""
    taken: dict[str, str] = {}
    for wish in wishes:
        choices = [printable(name, 100) for name in wish]
        choices += [f"{choices[0]}_{number}" for number in range(2, len(wishes) + 2)]
        name = next(name for name in choices if name.casefold() not in taken)
        taken[name.casefold()] = name
    return list(taken.values())


def checked_focal(value: Any) -> float | None:
    """A focal length over the width that somebody says. Raises `DataError` where it is none."""
    if value is None:
        return None
    number = _reasonable(value)
    if number is None:
        low, high = REASONABLE
        raise DataError(
            f"focal: must be the focal length over the picture's width, a number from {low} to {high:.0f}, not {value!r}."
        )
    return number


def _reasonable(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if REASONABLE[0] <= number <= REASONABLE[1] else None


def guess(prior: Prior | None, name: str, image: Tensor) -> float | None:
    """What a model guesses; None where it has no sensible guess."""
    if prior is None:
        return None
    return _reasonable(prior.get(name) if isinstance(prior, Mapping) else prior(image))


def from_list(items: list[Any], focal: float | None = None, prior: Prior | None = None) -> Given:
    """Pictures of files, each read once and read again when it is asked for, damaged ones left out; or of (name, tensor)
    pairs and samples. The focal length is what the user says, else EXIF, else the model's guess.

    focal, prior: see `load_scene`.

    Raises:
        DataError: for an item that is none of these, or a tensor that is no image.
    """
    given, first = Given([], []), None
    is_files = all(isinstance(item, str | os.PathLike) for item in items)
    for name, image, source, lens in _files(items, given.left_out) if is_files else _tensors(items):
        height, width = image.shape[1:]
        first = first or (width, height)
        picture = Picture(name, source, lens.focal(width, height), camera=lens.camera)
        picture.exact = picture.focal is not None and not lens.is_cropped(width, height)
        if focal is not None:
            # One that was held the other way has the first one's focal length over its height.
            turned = (first[0] - first[1]) * (width - height) < 0
            picture.focal, picture.exact = focal * height / width if turned else focal, True
        elif picture.focal is None:
            picture.focal = guess(prior, name, image)
        given.pictures.append(picture)
    return given


def _files(items: list[Any], left_out: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor, Any, ExifLens]]:
    files = [Path(item) for item in items]
    for name, file in zip(distinct_names(files), files):
        try:
            yield name, read_photo(file), partial(read_photo, file), read_lens(file)
        except UserError as error:
            left_out.append((name, str(error)))


def _tensors(items: list[Any]) -> Iterator[tuple[str, Tensor, Tensor, ExifLens]]:
    parts = [(item.name, item.image) if isinstance(item, Sample) else item for item in items]
    for part in parts:
        if not (isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], Tensor)):
            raise DataError(
                "photographs: the list must hold files, or pairs of a name and a tensor (3, height, width), or samples, "
                f"not {type(part).__name__}; do not mix files with others."
            )
    for name, (_, tensor) in zip(_unlike([[str(name)] for name, _ in parts]), parts):
        image = as_image(tensor, name)
        yield name, image, image, ExifLens()


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key by which names are sorted as people do: numbers by their value.

    Example:
        >>> sorted(["a10", "a9", "b"], key=natural)
        ['a9', 'a10', 'b']
    """
    parts = re.split(r"([0-9]{1,18})", name)
    return [(0, int(part)) if k % 2 else (1, part) for k, part in enumerate(parts) if part]


def photographs_of(folder: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """The photographs that lie in a folder, in the order of their names, and (name, reason) of what else lies there."""
    files, others = (sorted(paths, key=lambda path: natural(path.name)) for paths in content_of(folder))
    why = {path: _why_not(path) for path in others}
    reasons = [(printable(path.name, 100), why[path]) for path in others if why[path]]
    left_out = first_of(reasons, "others", "are clips, folders and pictures that this cannot read")
    return files, left_out + _no_pictures([path for path in others if not why[path]])


def _why_not(path: Path) -> str:
    """Why something that may hold photographs is not read; "" for what does not look so."""
    if path.is_dir():
        return "is a folder; its photographs are not read"
    if path.suffix.lower() in CLIPS:
        return "is a clip; name it by itself"
    advice = f"{install_or(path)}convert it to JPEG or PNG"
    return f"is a picture that this cannot read; {advice}" if path.suffix.lower() in UNREAD else ""


def _no_pictures(files: list[Path]) -> list[tuple[str, str]]:
    """(name, reason) of files that are no pictures: of several, one for all of them."""
    if len(files) < 2:
        return [(printable(file.name, 100), "is no photograph") for file in files]
    endings = sorted({file.suffix.lower() or "no ending" for file in files})
    shown = ", ".join(endings[:5]) + (", ..." if len(endings) > 5 else "")
    return [(f"{len(files)} other files ({printable(shown, 100)})", "are no photographs")]


def first_of(left_out: list[tuple[str, str]], others: str, why: str) -> list[tuple[str, str]]:
    """The first SHOWN (name, reason), and of more their number with a reason."""
    more = len(left_out) - SHOWN
    return left_out[:SHOWN] + ([(f"{more} {others}", why)] if more > 0 else [])


def evenly(count: int | None, total: int) -> list[int]:
    """`count` places spread evenly over 0..total-1, first and last among them; all where that is None or too many.

    Example:
        >>> evenly(3, 9), evenly(None, 2)
        ([0, 4, 8], [0, 1])
    """
    if count is None or count >= total:
        return list(range(total))
    return [round(k * (total - 1) / (count - 1)) for k in range(count)]


def thinned(items: list[Any], every: int | None, count: int | None, where: object) -> list[Any]:
    """Each `every`-th, and of these `count`, spread evenly. Raises `DataError` where more than MOST are left."""
    items = items[::every]
    items = [items[place] for place in evenly(count, len(items))]
    if len(items) > MOST:
        raise DataError(
            f"{where}: {len(items)} photographs are too many for one scene, at most {MOST}; take some by `count` or `every`."
        )
    return items
