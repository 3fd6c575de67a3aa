"""Photographs from files: one, or a folder of them; and tensors that are to be photographs."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from ttt_lib.core.errors import DataError, UserError, printable, reason
from ttt_lib.core.files import absolute
from ttt_lib.core.types import Sample
from ttt_lib.data.samples import SampleSet, files_fingerprint
from ttt_lib.geometry.cameras import shrunk

log = logging.getLogger(__name__)

SMALLEST = 16  # pixels of the shorter side
SLACK = 1e-3  # beyond [0, 1] that is taken for rounding
WIDTH, HEIGHT, ORIENTATION = 256, 257, 274  # tags of TIFF; the third is EXIF's too
TURNS = {  # of (H,W,C) as stored to how it is seen, by EXIF's orientation
    2: lambda stored: stored[:, ::-1], 3: lambda stored: stored[::-1, ::-1], 4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1), 6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


@cache
def readable_formats() -> tuple[str, ...]:
    """What Pillow may read here: still pictures, of phones' HEIC too where pillow-heif is installed. PostScript is a program,
    which it would hand to Ghostscript; of films, and of formats that it knows by name only, it decodes nothing."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()

    def by_name_only(name: str) -> bool:
        factory = Image.OPEN[name][0]
        return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)

    return tuple(name for name in Image.ID if name not in ("EPS", "MPEG") and not by_name_only(name))


@cache
def image_suffixes() -> tuple[str, ...]:
    """Endings of the files that are taken for photographs, `.jpg` and so on: all that the installed Pillow reads."""
    formats = readable_formats()
    return tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in formats))


def is_photo(path: Path) -> bool:
    """Whether a file's name ends as a photograph's does."""
    return path.suffix.lower() in image_suffixes()


def install_or(path: Path) -> str:
    """Begins the advice for a picture that cannot be read: what to install for it, "" where nothing helps."""
    missing = path.suffix.lower() in (".heic", ".heif") and not is_photo(path)
    return "install pillow-heif (pip install pillow-heif) or " if missing else ""


def exif_orientation(image: Image.Image) -> int:
    """1 to 8, of an image that is not loaded yet; 1 where nothing is said or EXIF is damaged. No other tag counts."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
        return found if found in TURNS else 1
    except Exception as error:  # what Pillow makes of odd tags differs by tag
        log.info("EXIF that cannot be read is ignored (%s)", reason(error))
        return 1


def _is_deep_color(image: Image.Image) -> bool:
    """Whether a color picture that is not loaded yet has 16 bits a channel, of which Pillow would keep 8."""
    raw = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in image.tile]
    deep = any(";16" in str(part) or part == 65535 for parts in raw for part in parts)
    return deep and len(image.getbands()) > 1


def _in_unit_range(array: np.ndarray) -> np.ndarray:
    """Whole numbers by their type's largest; fractions as they are, or by their largest where that is above 1."""
    if array.dtype.kind in "ui":
        return array.astype(np.float32) / np.iinfo(array.dtype).max
    if not np.isfinite(array).all():
        raise ValueError("it has pixels that are not finite")
    return (array / max(float(array.max()), 1.0)).clip(0, 1).astype(np.float32)


def _decode_all_bits(path: Path) -> np.ndarray:
    """By OpenCV: (H,W,3) in [0,1], over white; a TIFF is turned as it says, another picture is as it lies in the file."""
    array = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        raise ValueError("it cannot be decoded")
    array = _in_unit_range(array if array.ndim == 3 else array[..., None].repeat(3, -1))
    color, cover = array[..., 2::-1], array[..., 3:]
    return color * cover + (1 - cover) if cover.size else color


def _decode_unknown_tiff(path: Path) -> np.ndarray:
    """A TIFF that Pillow does not know, such as float32 color: (H,W,3) in [0,1], upright."""
    with open(path, "rb") as file:
        directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(directory.next)
        directory.load(file)
    if directory[WIDTH] * directory[HEIGHT] > (Image.MAX_IMAGE_PIXELS or 2**30):
        raise ValueError(f"{directory[WIDTH]} x {directory[HEIGHT]} pixels")
    return _decode_all_bits(path)


def _decode(path: Path) -> np.ndarray:
    """(H,W,3) in [0,1], upright. Raises what the decoders raise."""
    try:
        opened = Image.open(path, formats=readable_formats())
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            if file.read(4) not in (b"II*\0", b"MM\0*"):
                raise
        return _decode_unknown_tiff(path)
    with opened as image:
        deep, turn = _is_deep_color(image), exif_orientation(image)
        image.load()
        if deep:
            array = _decode_all_bits(path)
        elif image.mode.startswith("I"):  # 16 bits of gray, which some decoders hand on as 32
            array = np.asarray(image).astype(np.int64).clip(0, 65535).astype(np.uint16)
            array = _in_unit_range(array)[..., None].repeat(3, -1)
        elif image.mode == "F":
            array = _in_unit_range(np.asarray(image))[..., None].repeat(3, -1)
        else:
            if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        # Pillow and OpenCV turn a TIFF while they load it.
        return array if opened.format == "TIFF" else TURNS.get(turn, np.asarray)(array)


def read_photo(path: str | Path) -> Tensor:
    """Any photograph as (3,H,W) float32 in [0,1].

    Turned as its EXIF orientation says, the only tag that counts; gray becomes three equal channels; 16 bits and floats
    keep their precision (floats above 1 are divided by the largest); transparency is laid over white; of several frames
    the first counts.

    Raises:
        DataError: the file is missing, no image, damaged, too large or smaller than 16 x 16; the sentence names it.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (40, 30), "red").save(f"{folder}/red.png")
        ...     image = read_photo(f"{folder}/red.png")
        >>> image.shape, image[:, 0, 0].tolist()
        (torch.Size([3, 30, 40]), [1.0, 0.0, 0.0])
    """
    path = Path(path if os.path.lexists(path) else os.path.expanduser(path))
    try:
        if not os.path.isfile(path):  # also answers for names that no file system takes
            raise DataError(f"{path}: there is no such file; check the name.", path=str(path))
        array = _decode(path)
    except UnidentifiedImageError as error:
        advice = f"{install_or(path)}convert it to JPEG or PNG"
        raise DataError(f"{path}: is not an image this can read; {advice}.", path=str(path)) from error
    except UserError:
        raise
    except Exception as error:  # what a decoder makes of damaged bytes differs by format
        raise DataError(f"{path}: the image is damaged or too large ({reason(error)}).", path=str(path)) from error
    height, width = array.shape[:2]
    if min(height, width) < SMALLEST:
        raise DataError(
            f"{path}: the image has {width} x {height} pixels; at least {SMALLEST} x {SMALLEST} are needed."
        )
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))


def as_image(image: Tensor, where: str = "image") -> Tensor:
    """A tensor that is to be a photograph as (3,H,W) float32 in [0,1]; one that is so already comes back as it is.

    Args:
        image: (3,H,W); floats of any precision in [0,1], or whole numbers: 0..255, of uint16 0..65535.
        where: begins the sentence of the error.

    Raises:
        DataError: another shape; values out of range or not finite, such as floats from 0 to 255.

    Example:
        >>> as_image(torch.full((3, 20, 20), 51, dtype=torch.uint8))[0, 0, 0].item()
        0.20000000298023224
    """
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or image.is_complex():
        found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise DataError(f"{where}: must be a tensor (3, height, width) of red, green and blue, not {found}.")
    image = image.detach()
    if image.is_inference():  # such a tensor can take no part in training
        with torch.inference_mode(False):
            image = image.clone()
    top = 1.0 if image.is_floating_point() else 65535.0 if image.dtype == torch.uint16 else 255.0
    values = image.to(torch.float32) if top == 1.0 else image.to(torch.float32) / top
    if not bool(torch.isfinite(values).all()):
        raise DataError(f"{where}: holds values that are not finite.")
    low, high = (float(value) for value in values.aminmax())
    if low < -SLACK or high > 1 + SLACK:
        advice = "divide by 255" if top == 1.0 and low >= 0 and high <= 255 else "scale them"
        raise DataError(
            f"{where}: values go from {low * top:.4g} to {high * top:.4g}, not from 0 to {top:.0f}; {advice}."
        )
    return values if low >= 0 and high <= 1 else values.clamp(0, 1)


def shrink(picture: np.ndarray, longest: int) -> np.ndarray:
    """A picture (H,W) or (H,W,C) whose longer side has at most so many pixels, by the mean over areas; a smaller one as
    it is."""
    height, width = shrunk(picture.shape[:2], longest)
    if (height, width) == picture.shape[:2]:
        return picture
    return cv2.resize(np.ascontiguousarray(picture), (width, height), interpolation=cv2.INTER_AREA)


@cache
def _say_skipped(folder: Path, names: tuple[str, ...]) -> None:
    """Once a process: a set is opened by each experiment."""
    shown = ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")
    log.warning("%s: %d files are skipped, as no images that this can read: %s", folder, len(names), shown)


def content_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """The photographs of a folder, and what else is in it, both by name; hidden files and folders are left out.

    Raises `DataError` if the folder cannot be read.
    """
    photographs: list[Path] = []
    others: list[Path] = []
    try:
        for path in sorted(folder.iterdir()):
            if not path.name.startswith("."):
                (photographs if is_photo(path) and path.is_file() else others).append(path)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({reason(error)}).", path=str(folder)) from error
    return photographs, others


def photographs_in(folder: str | Path) -> list[Path]:
    """The photographs of a folder by name, hidden ones left out; what else is in it is skipped, with a warning.

    Raises `DataError` if there are none, or the folder cannot be read.
    """
    folder = Path(folder)
    found, others = content_of(folder)
    skipped = tuple(path.name for path in others if path.is_file())
    if not found:
        also = f", only {len(skipped)} other files such as {skipped[0]!r}" if skipped else ""
        inner = " (folders in it are not looked into)" if len(others) > len(skipped) else ""
        raise DataError(f"{folder}: holds no images that this can read{also}{inner}; JPEG and PNG always work.")
    if skipped:
        _say_skipped(folder.resolve(), skipped)
    return found


def open_images(path: str | Path, name: str | None = None, count: int | None = None) -> SampleSet:
    """A folder of plain images (or one image), without truth; what else is in the folder is skipped, with a warning.

    Raises `DataError` if there are none.
    """
    folder = Path(absolute(path))
    if os.path.isdir(folder):  # os.path also answers for names that no file system takes
        files: dict[str, Path] = {}
        for photo in photographs_in(folder):
            label, again = printable(photo.name), 1
            while label in files:  # of names that differ in what cannot be printed
                again += 1
                label = f"{printable(photo.name)} ({again})"
            files[label] = photo
    elif os.path.isfile(folder):
        files = {printable(folder.name): folder}
    else:
        raise DataError(f"{folder}: there is no such folder or image.")
    title, names = name or printable(folder.resolve().stem), list(files)[:count]
    load = lambda sample: Sample(sample, title, read_photo(files[sample]))  # noqa: E731
    return SampleSet(title, names, load, files_fingerprint(files[sample] for sample in names))
