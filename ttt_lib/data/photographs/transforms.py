"""Cameras of a `transforms.json`, as nerfstudio, instant-ngp and Blender's exporters write it.

The file's matrices go from the camera to the world, with the camera's axes as in OpenGL (x right, y up, z backward); here
poses go from the world to the camera, with OpenCV's axes (x right, y down, z forward).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_lib.core.errors import DataError, UserError, printable
from ttt_lib.core.files import read_json
from ttt_lib.data.photographs.job import FARTHEST, Lens

NAMES = ("transforms.json", "transforms_train.json")
FLIP = np.diag([1.0, -1, -1, 1])  # between the axes of OpenGL and OpenCV
DISTORTION = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")  # in the order of COLMAP's FULL_OPENCV
NUMBERS = ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "camera_angle_y", *DISTORTION)
UNUSABLE = ("FISHEYE", "EQUIRECTANGULAR", "OMNI", "ORTHO", "VR180", "PANORAMA")
ROUND = 0.02  # by which the lengths of a rotation's axes may differ, and their angles from right ones


class Frame(NamedTuple):
    """A photograph of the file. path: as the file names it; pose (4,4) float64, world -> camera in OpenCV's axes; values:
    what is said of its camera."""

    path: str
    pose: np.ndarray
    values: dict[str, float]

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height that the file says; None where it says neither."""
        size = round(self.values.get("w", 0)), round(self.values.get("h", 0))
        return size if min(size) > 0 else None

    def lens(self, width: int, height: int) -> Lens:
        """The lens of the frame, of a picture of this size in pixels.

        Raises `UserError` where its focal length is missing; the sentence is the reason.

        Example:
            >>> Frame("a", np.eye(4), {"fl_x": 700, "k1": -0.1}).lens(800, 600)
            Lens(model='OPENCV', width=800, height=600, params=(700, 700, 400.0, 300.0, -0.1, 0.0, 0.0, 0.0))
        """
        focal = _focal(self.values, "x", width)
        if focal is None:
            raise UserError("has no focal length in transforms.json (`fl_x` or `camera_angle_x`).")
        across = _focal(self.values, "y", height) or focal
        center = self.values.get("cx", width / 2), self.values.get("cy", height / 2)
        bent = [self.values.get(key, 0.0) for key in DISTORTION]
        model, count = ("PINHOLE", 0) if not any(bent) else ("OPENCV", 4) if not any(bent[4:]) else ("FULL_OPENCV", 8)
        return Lens(model, width, height, (focal, across, *center, *bent[:count]))


def find_transforms(path: Path) -> Path | None:
    """The file itself, or that of a folder; None where there is none."""
    if os.path.isfile(path):
        return path if path.suffix.lower() == ".json" else None
    return next((path / name for name in NAMES if os.path.isfile(path / name)), None)


def read_transforms(path: Path) -> tuple[list[Frame], list[tuple[str, str]]]:
    """The frames of a file, and (name, reason) of those whose camera is none.

    Raises:
        DataError: it is no such file, lists no frames, or its lenses are none that this can use.
    """
    try:
        content = read_json(path)
    except UserError as error:
        raise DataError(str(error), path=str(path)) from error
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames:
        raise DataError(f"{path}: holds no list of `frames`; it is no transforms.json of nerfstudio or instant-ngp.")
    shared = _values(content, str(path))
    result, left_out = [], []
    for number, frame in enumerate(frames):
        where = f"{path}: frame {number}"
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise DataError(f"{where} names no file (`file_path`).")
        pose = _pose(frame.get("transform_matrix"))
        if pose is None:
            why = "has a transform_matrix that is not 4 x 4 numbers with a rotation that does not mirror"
            left_out.append((printable(frame["file_path"], 100), why))
        else:
            result.append(Frame(frame["file_path"], pose, {**shared, **_values(frame, where)}))
    return result, left_out


def _pose(matrix: Any) -> np.ndarray | None:
    """World -> camera; None where the matrix is no rotation, of any scale, with a place."""
    try:
        array = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    if array.shape not in ((4, 4), (3, 4)) or not (np.abs(array) < FARTHEST).all():  # which NaN is not
        return None
    u, lengths, v = np.linalg.svd(array[:3, :3])
    if not lengths[0] >= lengths[2] > max(1e-6, (1 - ROUND) * lengths[0]) or np.linalg.det(u @ v) < 0:
        return None
    to_world = np.eye(4)
    to_world[:3, :3], to_world[:3, 3] = u @ v, array[:3, 3]
    return np.linalg.inv(to_world @ FLIP)


def _values(content: Mapping[str, Any], where: str) -> dict[str, float]:
    """The numbers that say something of a camera."""
    model = str(content.get("camera_model", "")).upper()
    if any(word in model for word in UNUSABLE) or content.get("is_fisheye") is True:
        raise DataError(
            f"{where}: cameras of the kind {printable(model or 'fisheye', 40)!r} cannot be used; undistort the pictures first."
        )
    said = {key: content[key] for key in NUMBERS if content.get(key) is not None}
    for key, value in said.items():
        if not (isinstance(value, int | float) and abs(value) < 1e9):  # which NaN is not
            raise DataError(f"{where}: {key!r} must be a number, not {printable(value, 40)}.")
    return {key: float(value) for key, value in said.items()}


def _focal(values: Mapping[str, float], axis: str, pixels: int) -> float | None:
    """In pixels, of one axis."""
    focal, angle = values.get(f"fl_{axis}"), values.get(f"camera_angle_{axis}")
    if focal is None and angle is not None and 0 < angle < math.pi:
        focal = pixels / 2 / math.tan(angle / 2)
    return focal if focal is not None and focal > 0 else None
