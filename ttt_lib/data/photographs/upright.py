"""Pictures that are stored turned, and cameras that turn with them.

Structure from motion takes the pixels as they are stored, whatever EXIF says of up and down; here pictures are upright.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ttt_lib.core.errors import UserError
from ttt_lib.data.images import exif_orientation, read_photo, readable_formats

CLOCKWISE = {1: 0, 6: 1, 3: 2, 8: 3}  # quarter turns from the stored picture to the upright one, by EXIF's orientation
SLACK_PIXELS, SLACK_SHAPE = 1.5, 0.01  # by which a resized picture's shape may differ from its camera's
QUARTER = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # a camera's axes after one turn

Turned = tuple[tuple[float, ...], tuple[int, int], np.ndarray, np.ndarray]


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) are of one shape, as those of a picture and its smaller copy.

    Example:
        >>> same_shape((4032, 3024), (1008, 756)), same_shape((4000, 3000), (3000, 4000))
        (True, False)
    """
    expected = one[1] * other[0] / one[0]
    return abs(other[1] - expected) <= max(SLACK_PIXELS, SLACK_SHAPE * expected)


def turns_of(file: Path) -> int:
    """Quarter turns, clockwise, from the picture that a file stores to the one that `read_photo` gives.

    Of a TIFF nobody knows who turns it, so it counts as upright. Raises `UserError` for a mirrored one; the sentence is
    the reason.
    """
    try:
        with Image.open(file, formats=readable_formats()) as image:
            orientation = exif_orientation(image) if image.format != "TIFF" else 1
    except OSError:  # a picture that OpenCV reads and Pillow does not
        orientation = 1
    if orientation not in CLOCKWISE:
        raise UserError("is mirrored by its EXIF; save it as it is to be seen.")
    return CLOCKWISE[orientation]


def turns_of_camera(file: Path, size: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
    """How a photograph is turned before it is seen, and its size (width, height) as its camera saw it.

    size: the camera's, None where nothing says it.

    Raises:
        UserError: it cannot be read, is mirrored, or has another shape than its camera; the sentence is the reason.
    """
    height, width = read_photo(file).shape[1:]
    turns = turns_of(file)
    stored = (height, width) if turns % 2 else (width, height)
    if size is None or same_shape(size, stored):
        return turns, stored
    if turns % 2 and same_shape(size, (width, height)):  # whoever made the cameras looked at EXIF
        return 0, (width, height)
    raise UserError(
        f"has {stored[0]} x {stored[1]} pixels, which is not the shape of its camera ({size[0]} x {size[1]}): give the "
        "pictures that the cameras were computed from, uncropped."
    )


def turn(turns: int, pinhole: tuple[float, ...], size: tuple[int, int], pose: np.ndarray, uv: np.ndarray) -> Turned:
    """A camera (fx, fy, cx, cy; width, height; pose (4,4) world -> camera) and what it sees, uv (N,2), after quarter turns
    clockwise; all in pixels."""
    (fx, fy, cx, cy), (width, height) = pinhole, size
    for _ in range(turns % 4):
        uv = np.stack([height - uv[:, 1], uv[:, 0]], -1)
        fx, fy, cx, cy, width, height = fy, fx, height - cy, cx, height, width
        pose = np.concatenate([QUARTER @ pose[:3], pose[3:]])
    return (fx, fy, cx, cy), (width, height), pose, uv
