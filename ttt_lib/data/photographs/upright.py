"""Pictures that are stored turned, and cameras that turn with them.

Structure from motion takes the pixels as they are stored, whatever EXIF says of up and down; here pictures are upright.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ttt_lib.core.errors import UserError
from ttt_lib.data.images import exif_orientation, read_photo, readable_formats
from ttt_lib.data.photographs.job import SparseModel

CLOCKWISE = {1: 0, 6: 1, 3: 2, 8: 3}  # quarter turns from the stored picture to the upright one, by EXIF's orientation
SLACK_PIXELS, SLACK_SHAPE = 1.5, 0.01  # by which a resized picture's shape may differ from its camera's
QUARTER = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # a camera's axes after one turn


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) are of one shape, as those of a picture and its smaller copy.

    Example:
        >>> same_shape((4032, 3024), (1008, 756)), same_shape((4000, 3000), (3000, 4000))
        (True, False)
    """
    expected = one[1] * other[0] / one[0]
    return abs(other[1] - expected) <= max(SLACK_PIXELS, SLACK_SHAPE * expected)


def turns_of_camera(file: Path, size: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
    """Quarter turns, clockwise, from the picture as its camera saw it to the one that `read_photo` gives, and the former's
    size (width, height).

    size: the camera's, None where nothing says it. Of a TIFF nobody knows who turns it, so it counts as upright.

    Raises:
        UserError: it cannot be read, is mirrored, or has another shape than its camera; the sentence is the reason.
    """
    height, width = read_photo(file).shape[1:]
    try:
        with Image.open(file, formats=readable_formats()) as image:
            orientation = exif_orientation(image) if image.format != "TIFF" else 1
    except OSError:  # a picture that OpenCV reads and Pillow does not
        orientation = 1
    if orientation not in CLOCKWISE:
        raise UserError("is mirrored by its EXIF; save it as it is to be seen.")
    turns = CLOCKWISE[orientation]
    stored = (height, width) if turns % 2 else (width, height)
    if size is None or same_shape(size, stored):
        return turns, stored
    if turns % 2 and same_shape(size, (width, height)):  # whoever made the cameras looked at EXIF
        return 0, (width, height)
    raise UserError(
        f"has {stored[0]} x {stored[1]} pixels, which is not the shape of its camera ({size[0]} x {size[1]}): give the "
        "pictures that the cameras were computed from, uncropped."
    )


def turn(model: SparseModel, row: int, turns: int) -> None:
    """Turn the camera of an image of a model, and what it sees, by quarter turns clockwise."""
    here = model.seen_by == row
    for _ in range(turns):
        (fx, fy, cx, cy), (width, height) = model.intrinsics[row], model.size[row]
        model.uv[here] = np.stack([height - model.uv[here, 1], model.uv[here, 0]], -1)
        model.intrinsics[row], model.size[row] = (fy, fx, height - cy, cx), (height, width)
        model.pose[row, :3] = QUARTER @ model.pose[row, :3]
