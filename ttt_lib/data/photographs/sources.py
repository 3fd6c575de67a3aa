"""Photographs as they are given, files, tensors or samples, as `Picture`s: checked one by one, with what is known of
their focal length."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt_lib.core.errors import DataError, UserError, printable
from ttt_lib.core.types import Sample
from ttt_lib.data.images import as_image, is_photo, read_photo
from ttt_lib.data.photographs.exif import Lens, read_lens
from ttt_lib.data.photographs.features import Picture

log = logging.getLogger(__name__)

Prior = Callable[[Tensor], float | None] | Mapping[str, float]
MOST = 300  # photographs of one scene: a mistake rather than a scene, and pairs grow with the square
CLIPS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mts", ".3gp")
NO_PHOTOGRAPH = "is no photograph that this can read; convert it to JPEG or PNG if it is one"
SHOWN = 20  # of the files that are not read, each is named; of more, their number
REASONABLE = 0.05, 15.0  # focal length over width that somebody may say; 26 would be millimetres


@dataclass
class Given:
    """Photographs that can be read, and why the others cannot.

    pictures; sizes (width, height) of each; left_out (name, reason).
    """

    pictures: list[Picture] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def distinct_names(files: list[Path]) -> list[str]:
    """Short names of files, no two alike on any file system: the stem; the whole name, or a number, where that is taken.

    Example:
        >>> distinct_names([Path("a/x.jpg"), Path("a/x.png"), Path("b/X.jpg"), Path("a/y.jpg")])
        ['x', 'x_png', 'X_jpg', 'y']
    """
    return _unlike([[file.stem, f"{file.stem}_{file.suffix[1:]}"] for file in files])


def _unlike(wishes: list[list[str]]) -> list[str]:
    """For each the first of its wishes that is free, else the first with a number."""
    taken: set[str] = set()
    result = []
    for wish in wishes:
        choices = [printable(name, 100) for name in wish]
        choices += [f"{choices[0]}_{number}" for number in range(2, len(wishes) + 2)]
        result.append(next(name for name in choices if name.casefold() not in taken))
        taken.add(result[-1].casefold())
    return result


def checked_focal(value: Any, where: str = "focal") -> float | None:
    """A focal length over the width that somebody says. Raises `DataError` where it is none."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not REASONABLE[0] <= number <= REASONABLE[1]:
        low, high = REASONABLE
        raise DataError(
            f"{where}: must be the focal length over the picture's width, a number from {low} to {high:.0f}, "
            f"not {value!r}."
        )
    return number


def guess(prior: Prior | None, name: str, image: Tensor) -> float | None:
    """What a model guesses; None where it has no sensible guess."""
    if prior is None:
        return None
    value = prior.get(name) if isinstance(prior, Mapping) else prior(image)
    value = math.nan if value is None else float(value)
    return value if REASONABLE[0] <= value <= REASONABLE[1] else None


def _turned(focal: float, size: tuple[int, int], first: tuple[int, int]) -> float:
    """The first photograph's focal length over its width, for one that may have been held the other way."""
    is_turned = (size[0] > size[1]) != (first[0] > first[1]) and size[0] != size[1] and first[0] != first[1]
    return focal * size[1] / size[0] if is_turned else focal


def _picture(given: Given, name: str, image: Tensor, source: Any, lens: Lens, focal: float | None, prior: Any) -> None:
    """Add a picture with what is known of its focal length: by the user, by EXIF, by the model's guess."""
    height, width = image.shape[1:]
    given.sizes.append((width, height))
    picture = Picture(name, source, camera=lens.camera)
    from_exif = lens.focal(width, height)
    if focal is not None:
        picture.focal, picture.exact = _turned(focal, (width, height), given.sizes[0]), True
    elif from_exif is not None:
        picture.focal, picture.exact = from_exif, not lens.is_cropped(width, height)
    else:
        picture.focal = guess(prior, name, image)
    given.pictures.append(picture)


def from_files(files: list[Path], focal: float | None = None, prior: Prior | None = None) -> Given:
    """Pictures of files, each read once and read again when it is asked for; damaged ones are left out.

    focal, prior: see `load_scene`.
    """
    given = Given()
    for name, file in zip(distinct_names(files), files):
        try:
            image = read_photo(file)
        except UserError as error:
            given.left_out.append((name, str(error)))
            continue
        _picture(given, name, image, partial(read_photo, file), read_lens(file), focal, prior)
    return given


def from_memory(items: list[Any], focal: float | None = None, prior: Prior | None = None) -> Given:
    """Pictures of (name, tensor) pairs and samples, in their order.

    Raises:
        DataError: for an item that is neither, or a tensor that is no image.
    """
    given = Given()
    parts = [(item.name, item.image) if isinstance(item, Sample) else item for item in items]
    for part in parts:
        if not (isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], Tensor)):
            raise DataError(
                "photographs: the list must hold files, or pairs of a name and a tensor (3, height, width), or samples, "
                f"not {type(part).__name__}; do not mix files with others."
            )
    for name, (_, tensor) in zip(_unlike([[str(name)] for name, _ in parts]), parts):
        image = as_image(tensor, name)
        _picture(given, name, image, image, Lens(), focal, prior)
    return given


def from_list(items: list[Any], focal: float | None = None, prior: Prior | None = None) -> Given:
    """Pictures of a list of files, or of pairs and samples."""
    if all(isinstance(item, str | os.PathLike) for item in items):
        return from_files([Path(item) for item in items], focal, prior)
    return from_memory(items, focal, prior)


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key by which names are sorted as people do: numbers by their value.

    Example:
        >>> sorted(["a10", "a9", "b"], key=natural)
        ['a9', 'a10', 'b']
    """
    parts = re.split(r"([0-9]{1,18})", name)
    return [(0, int(part)) if k % 2 else (1, part) for k, part in enumerate(parts) if part]


def photos_in(folder: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """The photographs that lie in a folder, sorted by name, and (name, reason) of what else lies there."""
    try:
        visible = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: natural(p.name))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}).") from error
    files = [p for p in visible if is_photo(p) and p.is_file()]
    others = [p for p in visible if p not in set(files)]
    left_out = [(printable(p.name, 100), _why_not(p)) for p in others[:SHOWN]]
    if len(others) > SHOWN:
        left_out.append((f"{len(others) - SHOWN} other files", NO_PHOTOGRAPH))
    return files, left_out


def _why_not(path: Path) -> str:
    if path.is_dir():
        return "is a folder; its photographs are not read"
    return "is a clip; name it by itself" if path.suffix.lower() in CLIPS else NO_PHOTOGRAPH


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
