"""What a photograph's EXIF says of its lens: the focal length, and the words that tell one camera from another."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.ExifTags import IFD, Base

from ttt_lib.core.errors import printable, reason
from ttt_lib.data.images import readable_formats

log = logging.getLogger(__name__)

NUMBERS = Base.FocalLength, Base.FocalLengthIn35mmFilm, Base.ExifImageWidth, Base.ExifImageHeight
UNITS = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # of the focal plane's resolution, in millimetres
DIAGONAL_35 = math.hypot(36, 24)  # millimetres: equivalents compare the diagonals of two frames
SHORTEST, LONGEST = 0.15, 40.0  # of the longer side: from a fisheye to a telescope, beyond that the tag lies
LARGE_PIXEL, LARGE_SENSOR = 0.0037, 17.0  # millimetres: pixels larger than that are on sensors longer than that alone,
SMALLEST_SENSOR = 3.0  # and this one is a telephone's
CROPPED = 0.03  # by how much the shape may differ from what the camera wrote


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
    plane = _number(tags, Base.FocalPlaneXResolution)
    unit = UNITS.get(int(_number(tags, Base.FocalPlaneResolutionUnit) or 2))
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
