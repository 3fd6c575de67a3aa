"""Photographs as they are given, files, tensors or samples, as `Picture`s: checked one by one, with what is known of
their focal length, by the user or by EXIF (`exif`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ttt_lib.core.errors import DataError, UserError, printable
from ttt_lib.core.types import Sample
from ttt_lib.data.images import as_image, content_of, read_photo
from ttt_lib.data.photographs.exif import ExifLens, read_lens
from ttt_lib.data.photographs.job import Picture, natural

log = logging.getLogger(__name__)

MOST = 300  # photographs of one scene: a mistake rather than a scene, and pairs grow with the square
SHOWN = 5  # of the files that are not read, so many are named


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


def from_list(items: list[Any], focal: float | None = None) -> Given:
    """Pictures of files, each read once and read again when it is asked for, damaged ones left out; or of (name, tensor)
    pairs and samples. The focal length is what the user says (see `load_scene`), else EXIF.

    Raises:
        DataError: for an item that is none of these, or a tensor that is no image.
    """
    given, first = Given([], []), None
    is_files = all(isinstance(item, str | os.PathLike) for item in items)
    for name, image, source, lens in _files(items, given.left_out) if is_files else _tensors(items):
        height, width = image.shape[1:]
        first = first or (width, height)
        picture = Picture(name, source, lens.focal(width, height), camera=lens.camera)
        picture.exact = picture.focal is not None and not lens.cropped
        if focal is not None:
            # One that was held the other way has the first one's focal length over its height.
            turned = (first[0] - first[1]) * (width - height) < 0
            picture.focal, picture.exact = focal * height / width if turned else focal, True
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


def photographs_of(folder: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """The photographs that lie in a folder, in the order of their names, and (name, reason) of what else lies there."""
    files, others = (sorted(paths, key=lambda path: natural(path.name)) for paths in content_of(folder))
    why = "no photographs that this can read; convert pictures to JPEG or PNG, name a clip or a folder by itself"
    return files, as_one([path.name for path in others], why)


def because(left_out: list[tuple[str, str]]) -> str:
    """The first reason, in brackets, for an error of which it may be the cause; "" where there is none."""
    return " ({} {})".format(*left_out[0]).replace(".)", ")") if left_out else ""


def as_one(names: list[str], why: str) -> list[tuple[str, str]]:
    """(name, reason) that stands for several, the first of them by name; nothing of none."""
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return [(printable(shown), why)] if names else []


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
