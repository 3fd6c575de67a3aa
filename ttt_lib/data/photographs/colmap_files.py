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
from io import BytesIO
from pathlib import Path

from ttt_lib.core.errors import DataError, reason
from ttt_lib.data.photographs.job import Lens

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


@dataclass
class Listing:
    """What a model's files list. lenses: by id; images: id -> (name, id of its lens); points: how many; own: whether
    `writers.write_colmap` wrote it, so that every observation is a track; unusable: id -> why an image has no camera."""

    lenses: dict[int, Lens] = field(default_factory=dict)
    images: dict[int, tuple[str, int]] = field(default_factory=dict)
    points: int = 0
    own: bool = False
    unusable: dict[int, str] = field(default_factory=dict)

    def taken_by(self, image: int) -> Lens | None:
        """The lens of an image (its id); None where it is not listed."""
        return self.lenses[self.images[image][1]] if image in self.images else None


@dataclass
class ModelFiles:
    """The files of a model in a folder, all binary or all text: cameras, images, and points if there are any; others:
    folders of further models beside it, which are not read."""

    folder: Path
    files: list[Path]
    others: list[Path] = field(default_factory=list)

    @property
    def is_binary(self) -> bool:
        """Whether these are COLMAP's binary files."""
        return self.files[0].suffix == ".bin"

    def bytes(self) -> int:
        """The length of the files together."""
        return sum(path.stat().st_size for path in self.files)


def find_model(folder: Path) -> ModelFiles | None:
    """The model in a folder, or where COLMAP and those who use it put one inside; None where there is none.

    Of several that one mapping gave (`sparse/0`, `sparse/1`, ...) it is the one with most of the images. Raises
    `DataError` where the folder cannot be read.
    """
    try:
        found = next(filter(None, (_model_in(folder / place) for place in PLACES)), None)
        if found is not None and found.folder.name == "0" and found.folder != folder:
            beside = [_model_in(p) for p in sorted(found.folder.parent.iterdir()) if p.name.isdecimal()]
            found = max(filter(None, beside), key=lambda model: model.files[1].stat().st_size)
            found.others = [model.folder for model in beside if model is not None and model is not found]
        return found
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({reason(error)}).") from error


def _model_in(folder: Path) -> ModelFiles | None:
    for suffix in (".bin", ".txt"):
        files = [folder / f"{name}{suffix}" for name in ("cameras", "images", "points3D")]
        files = [path for path in files if os.path.isfile(path)]
        if [path.stem for path in files[:2]] == ["cameras", "images"]:
            return ModelFiles(folder, files)
    return None


def list_model(model: ModelFiles) -> Listing:
    """What the files list, after their counts were compared with their lengths.

    Raises:
        DataError: a file is damaged, cut off, or says more than it can hold; a lens or an image that cannot be.
    """
    listing = Listing()
    if model.is_binary:
        steps = (_cameras_of_bytes, _images_of_bytes, _points_of_bytes)
    else:
        steps = (_cameras_of_text, _images_of_text, _points_of_text)
    try:
        if model.bytes() > LARGEST:
            raise DataError(f"{model.folder}: the model has {model.bytes() / 2**30:.1f} GiB, more than this reads.")
        for path, step in zip(model.files, steps):
            try:
                step(_Bytes(path.read_bytes()) if model.is_binary else _lines(path), listing)
            except (ValueError, KeyError, IndexError, struct.error, OverflowError) as error:
                raise DataError(f"{path}: is no file of a COLMAP model, or is damaged ({reason(error)}).") from error
    except OSError as error:
        raise DataError(f"{model.folder}: the model cannot be read ({reason(error)}).") from error
    _check(*model.files[:2], listing)
    return listing


def _check(cameras: Path, images: Path, listing: Listing) -> None:
    for number, lens in listing.lenses.items():
        sizes = 0 < lens.width < 2**17 and 0 < lens.height < 2**17
        if not sizes or not all(math.isfinite(value) for value in lens.params):
            raise DataError(
                f"{cameras}: camera {number} has {lens.width} x {lens.height} pixels or parameters that are no numbers."
            )
    for name, number in listing.images.values():
        if number not in listing.lenses:
            raise DataError(f"{images}: {name!r} was taken by camera {number}, which {cameras.name} lacks.")
    if not listing.images:
        raise DataError(f"{images}: lists no images.")


def _add_image(listing: Listing, number: int, name: str, camera: int) -> None:
    if number in listing.images:
        raise ValueError(f"image {number} is there twice")
    listing.images[number] = (name, camera)


# ------------------------------------------------------------------------------------------------ binary


class _Bytes(BytesIO):
    """A file's bytes from front to back; what asks for more than there is raises `ValueError`."""

    def pass_over(self, size: int) -> None:
        """The next bytes are not needed."""
        if size > len(self.getvalue()) - self.tell():
            raise ValueError("it is cut off, or its counts are wrong")
        self.seek(size, 1)

    def take(self, form: str) -> tuple:
        """The next values."""
        begin = self.tell()
        self.pass_over(struct.calcsize(form))
        return struct.unpack_from(form, self.getvalue(), begin)

    def count(self, each: int) -> int:
        """The next count, of things that have at least so many bytes each."""
        (number,) = self.take("<Q")
        begin = self.tell()
        self.pass_over(number * each)
        self.seek(begin)
        return number

    def word(self) -> str:
        """The text before the next zero byte."""
        end = self.getvalue().find(b"\0", self.tell())
        if end < 0:
            raise ValueError("a name has no end")
        return self.read(end + 1 - self.tell())[:-1].decode("utf-8", "surrogateescape")


def _cameras_of_bytes(data: _Bytes, listing: Listing) -> None:
    for _ in range(data.count(24)):
        number, kind, width, height = data.take("<IiQQ")
        if kind not in PARAMS:
            raise ValueError(f"camera {number} is of kind {kind}, which is not known")
        name, count = PARAMS[kind]
        listing.lenses[number] = Lens(name, width, height, data.take(f"<{count}d"))


def _images_of_bytes(data: _Bytes, listing: Listing) -> None:
    for _ in range(data.count(64)):
        number, *_, camera = data.take("<I7dI")
        _add_image(listing, number, data.word(), camera)
        data.pass_over(24 * data.count(24))


def _points_of_bytes(data: _Bytes, listing: Listing) -> None:
    listing.points = data.count(43 + 8)
    for _ in range(listing.points):
        data.pass_over(43)
        data.pass_over(8 * data.count(8))


# ------------------------------------------------------------------------------------------------ text


def _lines(path: Path) -> Iterator[str]:
    """Without the ends of the lines."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            yield line.rstrip("\r\n")


def _is_data(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#")


def _cameras_of_text(lines: Iterator[str], listing: Listing) -> None:
    for line in filter(_is_data, lines):
        number, model, width, height, *params = line.split()
        if len(params) != COUNTS.get(model):
            raise ValueError(f"camera {number} is no {model!r} with {len(params)} parameters")
        listing.lenses[int(number)] = Lens(model, int(width), int(height), tuple(map(float, params)))


def _images_of_text(lines: Iterator[str], listing: Listing) -> None:
    for line in filter(_is_data, lines):
        values = line.strip().split(None, 9)
        if len(values) != 10:
            raise ValueError(f"an image has too few values: {line[:60]!r}")
        _add_image(listing, int(values[0]), values[9], int(values[8]))
        next(lines, None)  # its points


def _points_of_text(lines: Iterator[str], listing: Listing) -> None:
    for line in lines:
        listing.own |= line.startswith(OWN_MARK)
        listing.points += _is_data(line)
