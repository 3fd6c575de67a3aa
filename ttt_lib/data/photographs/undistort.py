"""Pictures without the distortion of their lenses: as a pinhole camera of the same size and intrinsics would have taken them.

Everything behind a photograph (tracks, stereo, prediction, cloud, exported cameras) knows one pinhole camera; so the
picture is made to fit it, once, where it is read.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from ttt_lib.data.images import read_photo
from ttt_lib.data.photographs.job import Lens


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
