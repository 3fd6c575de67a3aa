"""Photographs as they are given, files, tensors or samples, as `Picture`s: checked one by one, with what is known of
their focal length, by the user or by EXIF, and with the words by which EXIF tells one camera from another."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.ExifTags import IFD, Base
from torch import Tensor

from ttt_lib.core.errors import DataError, UserError, printable, reason
from ttt_lib.core.types import Sample
from ttt_lib.data.images import as_image, content_of, read_photo, readable_formats
from ttt_lib.data.photographs.job import Picture

log = logging.getLogger(__name__)

NUMBERS = Base.FocalLength, Base.FocalLengthIn35mmFilm, Base.ExifImageWidth, Base.ExifImageHeight
RESOLUTION_UNIT = Base.FocalPlaneResolutionUnit
UNITS = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # of the focal plane's resolution, in millimetres
DIAGONAL_35 = math.hypot(36, 24)  # millimetres: equivalents compare the diagonals of two frames
SHORTEST, LONGEST = 0.15, 40.0  # of the longer side: from a fisheye to a telescope, beyond that the tag lies
LARGE_PIXEL, LARGE_SENSOR = 0.0037, 17.0  # millimetres: pixels larger than that are on sensors longer than that alone,
SMALLEST_SENSOR = 3.0  # and this one is a telephone's
CROPPED = 0.03  # by how much the shape may differ from what the camera wrote
Prior = Callable[[Tensor], float | None] | Mapping[str, float]
MOST = 300  # photographs of one scene: a mistake rather than a scene, and pairs grow with the square
CLIPS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mts", ".3gp")
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
NO_PHOTOGRAPH = "is a picture that this cannot read; convert it to JPEG or PNG"
SHOWN = 20  # of the photographs that are not read, each is named; of more, their number
REASONABLE = 0.05, 15.0  # focal length over width that somebody may say; 26 would be millimetres


class ExifLens(NamedTuple):
    """What EXIF says of a camera.

    diagonal: focal length over the diagonal of the picture, longer: over its longer side; None where it says nothing.
    shape: longer over shorter side as the camera wrote it, or None. camera: make, model and focal length as words, the
    same for photographs of one camera at one zoom; "" where nothing is said.
    """

    diagonal: float | None = None
    longer: float | None = None
    shape: float | None = None
    camera: str = ""

    def focal(self, width: int, height: int) -> float | None:
        """Over the width of the upright picture of this size; None where it is not known.

        Example:
            >>> phone = ExifLens(diagonal=26 / DIAGONAL_35)
            >>> [round(phone.focal(*size), 3) for size in ((4000, 3000), (3000, 4000))]
            [0.751, 1.002]
        """
        pixels = (self.longer or 0.0) * max(width, height)
        if self.diagonal is not None:
            pixels = self.diagonal * math.hypot(width, height)
        return pixels / width if SHORTEST < pixels / max(width, height) < LONGEST else None

    def is_cropped(self, width: int, height: int) -> bool:
        """Whether the picture has another shape than the camera wrote, so that the focal length is a guess."""
        shape = max(width, height) / min(width, height)
        return self.shape is not None and abs(shape / self.shape - 1) > CROPPED


def _number(tags: Mapping[int, Any], tag: int) -> float | None:
    """A tag's value above 0; None for whatever else it may hold: text, 0, -1/0, nan, lists."""
    try:
        value = float(tags.get(tag))  # type: ignore[arg-type]
    except Exception:  # what Pillow makes of odd tags differs by tag
        return None
    return value if math.isfinite(value) and value > 0 else None


def _sensor(tags: Mapping[int, Any], longer: float) -> float | None:
    """Longer side, in millimetres, of the sensor whose picture has `longer` pixels; None where EXIF does not say it.

    Tools that shrink a picture write its new size and keep the pixels per inch of the sensor, which is then a seventh of
    its size with the pixels of a large one. Such a sensor does not exist.
    """
    plane, unit = _number(tags, Base.FocalPlaneXResolution), UNITS.get(int(_number(tags, RESOLUTION_UNIT) or 2))
    if plane is None or unit is None:
        return None
    pixel = unit / plane
    exists = pixel * longer >= (LARGE_SENSOR if pixel > LARGE_PIXEL else SMALLEST_SENSOR)
    return pixel * longer if exists else None


def _lens(own: Mapping[int, Any], tags: Mapping[int, Any]) -> ExifLens:
    focal, equivalent, width, height = (_number(tags, tag) for tag in NUMBERS)
    longer = max(width, height) if width and height else None
    sensor = _sensor(tags, longer) if longer else None
    on_sensor = focal / sensor if focal and sensor else None
    words = [" ".join(str(own[tag]).split()) for tag in (Base.Make, Base.Model) if isinstance(own.get(tag), str)]
    words += [f"{value:g} mm" for value in (focal, equivalent) if value]
    diagonal, shape = equivalent and equivalent / DIAGONAL_35, longer and longer / min(width, height)
    return ExifLens(diagonal, on_sensor, shape, printable(" ".join(words), 200))


def read_lens(path: str | Path) -> ExifLens:
    """What a photograph's EXIF says of its lens; nothing where there is none or it is damaged, which is no error.

    The focal length is FocalLengthIn35mmFilm, which compares diagonals, else FocalLength with the sensor's size by
    FocalPlaneXResolution, where there can be such a sensor. Nothing is looked up by a camera's name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     image, exif = Image.new("RGB", (400, 300)), Image.Exif()
        ...     exif.get_ifd(IFD.Exif)[Base.FocalLengthIn35mmFilm] = 26
        ...     image.save(f"{folder}/phone.jpg", exif=exif)
        ...     lens = read_lens(f"{folder}/phone.jpg")
        >>> round(lens.focal(400, 300), 3), lens.camera
        (0.751, '26 mm')
    """
    try:
        with Image.open(path, formats=readable_formats()) as image:
            own = image.getexif()
            return _lens(own, own.get_ifd(IFD.Exif))
    except Exception as error:  # odd tags, no image: whoever reads the pixels says so
        log.info("%s: EXIF that cannot be read is ignored (%s)", printable(path), reason(error))
        return ExifLens()


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
    reasons = [(printable(path.name, 100), why) for path in others if (why := _why_not(path))]
    plain = [path for path in others if not _why_not(path)]
    return files, first_of(reasons, "others", "are clips, folders and pictures that this cannot read") + _no_pictures(
        plain
    )


def _why_not(path: Path) -> str:
    """Why something that may hold photographs is not read; "" for what does not look so."""
    if path.is_dir():
        return "is a folder; its photographs are not read"
    if path.suffix.lower() in CLIPS:
        return "is a clip; name it by itself"
    return NO_PHOTOGRAPH if path.suffix.lower() in UNREAD else ""


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
