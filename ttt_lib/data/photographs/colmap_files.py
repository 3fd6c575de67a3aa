"""The files of a finished COLMAP model: where they lie, what they list, and whether their counts can be true.

The model itself is read by pycolmap (`colmap.py`). Before it sees a file, every count in it is compared with the file's
length here, since memory is taken by those counts.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ttt_lib.core.errors import DataError, reason

PLACES = (".", "sparse/0", "sparse", "dense/sparse", "dense/0/sparse", "colmap/sparse/0", "colmap/sparse", "0")
LARGEST = 2**30  # bytes of a model's files together
PARAMS = {  # by COLMAP's number: the name of a camera's model and how many parameters it has
    0: ("SIMPLE_PINHOLE", 3), 1: ("PINHOLE", 4), 2: ("SIMPLE_RADIAL", 4), 3: ("RADIAL", 5), 4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8), 6: ("FULL_OPENCV", 12), 7: ("FOV", 5), 8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5), 10: ("THIN_PRISM_FISHEYE", 12), 11: ("RAD_TAN_THIN_PRISM_FISHEYE", 16),
    12: ("SIMPLE_DIVISION", 4), 13: ("DIVISION", 5), 14: ("SIMPLE_FISHEYE", 3), 15: ("FISHEYE", 4), 16: ("EUCM", 6),
    17: ("EQUIRECTANGULAR", 2),
}  # fmt: skip
COUNTS = dict(PARAMS.values())
OWN_MARK = "# Every observation is a track of ttt-depth."  # in points3D.txt of `writers.write_colmap`


@dataclass(frozen=True)
class Lens:
    """A camera: model, one of COLMAP's; width, height in pixels; params as COLMAP orders them, in pixels."""

    model: str
    width: int
    height: int
    params: tuple[float, ...]


@dataclass
class Listing:
    """What a model's files list. lenses: by id; images: id -> (name, id of its lens); points: how many; own: whether
    `writers.write_colmap` wrote it, so that every observation is a track."""

    lenses: dict[int, Lens] = field(default_factory=dict)
    images: dict[int, tuple[str, int]] = field(default_factory=dict)
    points: int = 0
    own: bool = False


@dataclass
class Model:
    """The files of a model in a folder, all binary or all text. points: None where there is no such file; others: folders
    of further models beside it, which are not read."""

    folder: Path
    cameras: Path
    images: Path
    points: Path | None
    others: list[Path] = field(default_factory=list)

    @property
    def is_binary(self) -> bool:
        """Whether these are COLMAP's binary files."""
        return self.cameras.suffix == ".bin"

    def bytes(self) -> int:
        """The length of the files together."""
        return sum(path.stat().st_size for path in (self.cameras, self.images, self.points) if path)


def find_model(folder: Path) -> Model | None:
    """The model in a folder, or where COLMAP and those who use it put one inside; None where there is none.

    Of several that one mapping gave (`sparse/0`, `sparse/1`, ...) it is the one with most of the images. Raises
    `DataError` where the folder cannot be read.
    """
    try:
        return _find(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({reason(error)}).") from error


def _find(folder: Path) -> Model | None:
    for place in PLACES:
        found = _model_in(folder / place)
        if found is not None and place.endswith("0"):
            beside = [p for p in (folder / place).parent.iterdir() if p.name.isdecimal()]
            models = [model for p in sorted(beside) if (model := _model_in(p)) is not None]
            found = max(models, key=lambda model: model.images.stat().st_size)
            found.others = [model.folder for model in models if model is not found]
        if found is not None:
            return found
    return None


def _model_in(folder: Path) -> Model | None:
    for suffix in (".bin", ".txt"):
        cameras, images, points = (folder / f"{name}{suffix}" for name in ("cameras", "images", "points3D"))
        if os.path.isfile(cameras) and os.path.isfile(images):
            return Model(cameras.parent, cameras, images, points if os.path.isfile(points) else None)
    return None


def list_model(model: Model) -> Listing:
    """What the files list, after their counts were compared with their lengths.

    Raises:
        DataError: a file is damaged, cut off, or says more than it can hold; a lens or an image that cannot be.
    """
    try:
        if model.bytes() > LARGEST:
            raise DataError(f"{model.folder}: the model has {model.bytes() / 2**30:.1f} GiB, more than this reads.")
        listing = Listing()
        read = (_read_cameras, _read_images, _read_points) if model.is_binary else (_cameras, _images, _points)
        for path, step in zip((model.cameras, model.images, model.points), read):
            if path is not None:
                _step(path, step, listing)
    except OSError as error:
        raise DataError(f"{model.folder}: the model cannot be read ({reason(error)}).") from error
    _check(model, listing)
    return listing


def _step(path: Path, step, listing: Listing) -> None:
    try:
        step(path, listing)
    except (ValueError, KeyError, IndexError, struct.error, OverflowError) as error:
        raise DataError(f"{path}: is no file of a COLMAP model, or is damaged ({reason(error)}).") from error


def _check(model: Model, listing: Listing) -> None:
    for number, lens in listing.lenses.items():
        sizes = 0 < lens.width < 2**17 and 0 < lens.height < 2**17
        if not sizes or not all(math.isfinite(value) for value in lens.params):
            raise DataError(
                f"{model.cameras}: camera {number} has {lens.width} x {lens.height} pixels or parameters that are no "
                "numbers."
            )
    for name, number in listing.images.values():
        if number not in listing.lenses:
            raise DataError(f"{model.images}: {name!r} was taken by camera {number}, which {model.cameras.name} lacks.")
    if not listing.images:
        raise DataError(f"{model.images}: lists no images.")


# ------------------------------------------------------------------------------------------------ binary


class _Bytes:
    """A file's bytes from front to back; what asks for more than there is raises `ValueError`."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.at = 0

    def take(self, format_: struct.Struct) -> tuple:
        """The next values."""
        self.need(format_.size)
        values = format_.unpack_from(self.content, self.at)
        self.at += format_.size
        return values

    def need(self, size: int) -> None:
        """Raises where fewer bytes are left."""
        if size > len(self.content) - self.at:
            raise ValueError("it is cut off, or its counts are wrong")

    def skip(self, size: int) -> None:
        """Pass over so many bytes."""
        self.need(size)
        self.at += size

    def count(self, each: int) -> int:
        """The next count, of things that have at least so many bytes each."""
        (number,) = self.take(COUNT)
        self.need(number * each)
        return number

    def word(self) -> str:
        """The text before the next zero byte."""
        end = self.content.find(b"\0", self.at)
        if end < 0:
            raise ValueError("a name has no end")
        text = self.content[self.at : end].decode("utf-8", "surrogateescape")
        self.at = end + 1
        return text


COUNT, CAMERA = struct.Struct("<Q"), struct.Struct("<IiQQ")
IMAGE, POINT = struct.Struct("<I7dI"), struct.Struct("<Q3d3Bd")


def _read_cameras(path: Path, listing: Listing) -> None:
    data = _Bytes(path)
    for _ in range(data.count(CAMERA.size)):
        number, kind, width, height = data.take(CAMERA)
        if kind not in PARAMS:
            raise ValueError(f"camera {number} is of kind {kind}, which is not known")
        name, count = PARAMS[kind]
        listing.lenses[number] = Lens(name, width, height, data.take(struct.Struct(f"<{count}d")))


def _read_images(path: Path, listing: Listing) -> None:
    data = _Bytes(path)
    for _ in range(data.count(IMAGE.size)):
        number, *_, camera = data.take(IMAGE)
        _add_image(listing, number, data.word(), camera)
        data.skip(24 * data.count(24))


def _read_points(path: Path, listing: Listing) -> None:
    data = _Bytes(path)
    listing.points = data.count(POINT.size)
    for _ in range(listing.points):
        data.skip(POINT.size)
        data.skip(8 * data.count(8))


def _add_image(listing: Listing, number: int, name: str, camera: int) -> None:
    if number in listing.images:
        raise ValueError(f"image {number} is there twice")
    listing.images[number] = (name, camera)


# ------------------------------------------------------------------------------------------------ text


def _lines(path: Path) -> Iterator[str]:
    """Without the ends of the lines."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            yield line.rstrip("\r\n")


def _cameras(path: Path, listing: Listing) -> None:
    for line in _lines(path):
        if not line.strip() or line.startswith("#"):
            continue
        number, model, width, height, *params = line.split()
        if len(params) != COUNTS.get(model):
            raise ValueError(f"camera {number} is no {model!r} with {len(params)} parameters")
        listing.lenses[int(number)] = Lens(model, int(width), int(height), tuple(map(float, params)))


def _images(path: Path, listing: Listing) -> None:
    lines = _lines(path)
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        number, *_, camera, name = line.strip().split(None, 9)
        if len(line.split(None, 9)) != 10:
            raise ValueError(f"an image has too few values: {line[:60]!r}")
        _add_image(listing, int(number), name, int(camera))
        next(lines, None)  # its points


def _points(path: Path, listing: Listing) -> None:
    for line in _lines(path):
        if line.startswith(OWN_MARK):
            listing.own = True
        elif line.strip() and not line.startswith("#"):
            listing.points += 1
