"""Photographs from files: one, or a folder of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ttt_lib.core.errors import UserError, printable, reason
from ttt_lib.core.types import Sample
from ttt_lib.data.samples import (
    SampleSet,
    _file_fingerprint,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def _formats() -> list[str]:
    """What Pillow may read: PostScript is a program, which it would hand to Ghostscript."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def read_photo(path: str | Path) -> Tensor:
    """Any photograph as (3,H,W) float32 in [0,1].

    Turned as its EXIF orientation says; gray becomes three equal channels; 16-bit keeps its precision; transparency
    is laid over white; of several frames the first counts. Raises `UserError` naming the file when it cannot be read.
    """
    path = Path(path)
    try:
        if not os.path.isfile(path):
            raise UserError(f"{path}: there is no such file.")
        with Image.open(path, formats=_formats()) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
                array = np.asarray(image, dtype=np.float32)
                if not np.isfinite(array).all():
                    raise ValueError("it has pixels that are not finite")
                top = 65535.0 if image.mode != "F" else max(float(array.max()), 1e-6)
                array = np.repeat((array / top).clip(0, 1)[..., None], 3, axis=-1)
            else:
                if "A" in image.getbands() or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: is not an image this can read; convert it to JPEG or PNG.") from error
    except UserError:
        raise
    except Exception as error:  # what a decoder makes of damaged bytes differs by format
        raise UserError(f"{path}: the image is damaged or too large ({reason(error)}).") from error
    if min(array.shape[:2]) < 16:
        raise UserError(
            f"{path}: the image has {array.shape[1]} x {array.shape[0]} pixels; at least 16 x 16 are needed."
        )
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def open_images(path: str | Path, name: str | None = None, count: int | None = None) -> SampleSet:
    """A folder of plain images (or one image), without truth. Raises `UserError` if there are none."""
    folder = Path(path)
    if os.path.isdir(folder):  # os.path also answers for names that no file system takes
        files = {printable(p.name): p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES}
    elif os.path.isfile(folder):
        files = {printable(folder.name): folder}
    else:
        raise UserError(f"{folder}: there is no such folder or image.")
    if not files:
        raise UserError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    title, names = name or printable(folder.resolve().stem), list(files)[:count]
    load = lambda sample: Sample(sample, title, read_photo(files[sample]))  # noqa: E731
    return SampleSet(title, names, load, _file_fingerprint(files.values()))
