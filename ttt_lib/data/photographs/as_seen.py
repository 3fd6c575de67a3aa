"""Pictures as their cameras saw them, and as they are shown: upright, and without the distortion of the lens.

Structure from motion takes the pixels as they are stored, whatever EXIF says of up and down; here pictures are upright, and
cameras turn with them. Everything behind a photograph (tracks, stereo, prediction, cloud, exported cameras) knows one
pinhole camera of the same size and intrinsics; so the picture is made to fit it, once, where it is read.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ttt_lib.core.errors import UserError
from ttt_lib.data.images import exif_orientation, read_photo, readable_formats
from ttt_lib.data.photographs.job import Lens, SparseModel

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


def places_in_picture(lens: Lens, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where a lens shows what the pixels of the pinhole picture see, as the maps of `cv2.remap`.

    Args:
        lens: with distortion; OpenCV's formulas are those of COLMAP's (SIMPLE_)RADIAL, OPENCV and FULL_OPENCV.
        size: width and height of the picture and of the result, the lens's own or another.

    Returns:
        Column and row (H,W) float32 in the picture as the lens saw it; here the first pixel's centre is at 0, where
        COLMAP has it at 0.5.

    Example:
        >>> lens = Lens("SIMPLE_RADIAL", 640, 480, (500, 320, 240, -0.1))
        >>> column, row = places_in_picture(lens, (640, 480))
        >>> round(float(column[240, 0]), 2), float(column[240, 320])
        (13.05, 320.0)
    """
    fx, fy, cx, cy = np.array(lens.pinhole.params) * np.tile([size[0] / lens.width, size[1] / lens.height], 2)
    matrix = np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]])
    coefficients = np.zeros(8)  # k1, k2, p1, p2, k3, k4, k5, k6, of which the simpler models have the first
    coefficients[: len(lens.distortion)] = lens.distortion
    return cv2.initUndistortRectifyMap(matrix, coefficients, None, matrix, size, cv2.CV_32FC1)


def undistorted(image: Tensor, lens: Lens) -> Tensor:
    """The picture that the same camera without distortion takes; where it sees beyond the given one, that one's border.

    Args:
        image: (3,H,W) in [0,1] as the lens saw it, or a smaller copy of that.
        lens: in pixels of its own size, which may be another.

    Returns:
        (3,H,W) in [0,1], with the lens's focal lengths and centre; the same object where the lens has no distortion.
    """
    if not lens.distortion:
        return image
    array = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    places = places_in_picture(lens, array.shape[1::-1])
    straight = cv2.remap(array, *places, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return torch.from_numpy(straight.clip(0, 1)).permute(2, 0, 1).contiguous()  # cubic weights go beyond it at edges


def read_undistorted(file: str | Path, lens: Lens, turns: int) -> Tensor:
    """A photograph (3,H,W) in [0,1], upright, without the distortion of its lens.

    Args:
        file: of the photograph.
        lens: of the picture as its camera saw it.
        turns: quarter turns, clockwise, from that to the upright one.
    """
    straight = undistorted(torch.rot90(read_photo(file), turns, (1, 2)), lens)
    return torch.rot90(straight, -turns, (1, 2)).contiguous()
