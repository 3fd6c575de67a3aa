"""Pictures without the distortion of their lenses: as a pinhole camera of the same size and intrinsics would have taken them.

Everything behind a photograph (tracks, stereo, prediction, cloud, exported cameras) knows one pinhole camera; so the
picture is made to fit it, once, where it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from ttt_lib.core.errors import DataError
from ttt_lib.data.images import read_photo
from ttt_lib.data.photographs.job import Lens
from ttt_lib.data.photographs.scene import Photograph

ROWS = 512  # that are computed at a time: maps of a whole picture would take as much memory as the picture
FOLDED = 0.01  # of the pinhole picture, where a lens may show again what lies elsewhere in it
BEYOND = 0.5  # of the pinhole picture, which may lie beyond the given one
LASTING = "has a lens whose distortion cannot be taken away: its parameters are wrong, or belong to another picture"
WIDEST = 2**15 - 2  # pixels of a side that OpenCV can resample


def places_in_picture(lens: Lens, size: tuple[int, int], rows: range | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where a lens shows what the pixels of the pinhole picture see, as the maps of `cv2.remap`.

    Args:
        lens: with distortion; OpenCV's formulas are those of COLMAP's (SIMPLE_)RADIAL, OPENCV and FULL_OPENCV, a
            (SIMPLE_)DIVISION has its own.
        size: width and height of the picture and of the result, the lens's own or another.
        rows: of the result; None: all.

    Returns:
        Column and row (R,W) float32 in the picture as the lens saw it; here the first pixel's centre is at 0, where
        COLMAP has it at 0.5.

    Example:
        >>> lens = Lens("SIMPLE_RADIAL", 640, 480, (500, 320, 240, -0.1))
        >>> column, row = places_in_picture(lens, (640, 480), range(240, 241))
        >>> round(float(column[0, 0]), 2), float(column[0, 320])
        (13.05, 320.0)
    """
    (width, height), rows = size, range(size[1]) if rows is None else rows
    fx, fy, cx, cy = np.array(lens.pinhole.params) * np.tile([width / lens.width, height / lens.height], 2)
    if "DIVISION" in lens.model:  # a ray from a place at r is r / (1 + k r^2); this solves it for r
        x, y = np.meshgrid((np.arange(width) + 0.5 - cx) / fx, (np.array(rows) + 0.5 - cy) / fy)
        longer = 2 / (1 + np.sqrt(np.maximum(1 - 4 * lens.distortion[-1] * (x * x + y * y), 0)))
        return (x * longer * fx + cx - 0.5).astype(np.float32), (y * longer * fy + cy - 0.5).astype(np.float32)
    matrix = np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]])
    part = matrix - [[0, 0, 0], [0, 0, rows.start], [0, 0, 0]]
    coefficients = np.zeros(8)  # k1, k2, p1, p2, k3, k4, k5, k6, of which the simpler models have the first
    coefficients[: len(lens.distortion)] = lens.distortion
    return cv2.initUndistortRectifyMap(matrix, coefficients, None, part, (width, len(rows)), cv2.CV_32FC1)


@cache
def can_be_undistorted(lens: Lens) -> bool:
    """Whether a lens has no distortion, or one that nearly everywhere in the pinhole picture can be taken away.

    Otherwise it shows there again what lies elsewhere, or most of the pinhole picture lies beyond the given one: such
    parameters were made up, or belong to another picture.
    """
    if not lens.distortion:
        return True
    side = 64
    with np.errstate(all="ignore"):
        places = np.stack(places_in_picture(lens, (side, side)), -1)
        across, down = np.diff(places[:-1], axis=1), np.diff(places[:, :-1], axis=0)
        folded = ~(across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0] > 0)
        beyond = ~covered(lens, 0, (side, side)).numpy()
    return bool(folded.mean() < FOLDED and beyond.mean() < BEYOND)


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
    height, width = image.shape[1:]
    array = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    result = torch.empty_like(image, memory_format=torch.contiguous_format)
    for top in range(0, height, ROWS):
        rows = range(top, min(top + ROWS, height))
        places = places_in_picture(lens, (width, height), rows)
        part = cv2.remap(array, *places, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        part = part.clip(0, 1)  # cubic weights go beyond it at edges
        result[:, top : rows.stop] = torch.from_numpy(part).permute(2, 0, 1)
    return result


def straightened(photograph: Photograph, lens: Lens, turns: int = 0) -> Photograph:
    """A photograph without the distortion of its lens; turns: see `read_undistorted`, of a file."""
    source: Tensor | Callable[[], Tensor] = photograph.source
    if not lens.distortion:
        return photograph
    if isinstance(source, Tensor):
        source = undistorted(source, lens)
    elif isinstance(source, partial) and source.func is read_photo:
        source = partial(read_undistorted, *source.args, lens, turns)
    else:
        source = partial(_undistorted_from, source, lens)
    return replace(photograph, source=source, seen=partial(covered, lens, turns))


def _undistorted_from(source: Callable[[], Tensor], lens: Lens) -> Tensor:
    return undistorted(source(), lens)


def covered(lens: Lens, turns: int, size: tuple[int, int]) -> Tensor:
    """Where `read_undistorted` shows what the camera saw, and not the border of that, which it repeats beyond.

    Args:
        lens, turns: see `read_undistorted`.
        size: height and width of the upright picture, its own or another.

    Returns:
        (H,W) bool; all True where the pinhole picture lies within the one taken, as for a barrel lens.
    """
    height, width = size if turns % 2 == 0 else size[::-1]
    inside = []
    for top in range(0, height, ROWS):
        column, row = places_in_picture(lens, (width, height), range(top, min(top + ROWS, height)))
        inside.append((column >= -0.5) & (column <= width - 0.5) & (row >= -0.5) & (row <= height - 0.5))
    return torch.rot90(torch.from_numpy(np.concatenate(inside)), -turns, (0, 1)).contiguous()


def read_undistorted(file: str | Path, lens: Lens, turns: int) -> Tensor:
    """A photograph (3,H,W) in [0,1], upright, without the distortion of its lens.

    Args:
        file: of the photograph.
        lens: of the picture as its camera saw it.
        turns: quarter turns, clockwise, from that to the upright one.

    Raises:
        DataError: what `read_photo` raises, or a side is longer than OpenCV can resample.
    """
    image = read_photo(file)
    if max(image.shape) > WIDEST:
        raise DataError(f"{file}: the picture is too large to take the distortion of its lens away; make it smaller.")
    straight = undistorted(torch.rot90(image, turns, (1, 2)), lens)
    return torch.rot90(straight, -turns, (1, 2)).contiguous()
