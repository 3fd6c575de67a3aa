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
from ttt_lib.data.photographs.job import FARTHEST, LEAST_FOCAL, Lens

NAMES = ("transforms.json", "transforms_train.json")
FLIP = np.diag([1.0, -1, -1, 1])  # between the axes of OpenGL and OpenCV
DISTORTION = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")  # in the order of COLMAP's FULL_OPENCV
UNUSABLE = ("FISHEYE", "EQUIRECTANGULAR", "OMNI", "ORTHO", "VR180", "PANORAMA")
ROUND = 0.02  # by which a rotation's axes may differ from unit length and right angles, once its scale is taken away


class Frame(NamedTuple):
    """A photograph of the file. path: as the file names it; pose (4,4) float64, world -> camera in OpenCV's axes; values:
    what is said of its camera, see `lens_of`."""

    path: str
    pose: np.ndarray
    values: dict[str, float]


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
        try:
            pose = _pose(frame.get("transform_matrix"))
        except UserError as error:
            left_out.append((printable(frame["file_path"], 100), f"has a transform_matrix {error}"))
        else:
            result.append(Frame(frame["file_path"], pose, {**shared, **_values(frame, where)}))
    return result, left_out


def _pose(matrix: Any) -> np.ndarray:
    """World -> camera. Raises `UserError` that says why the matrix is none."""
    try:
        array = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError("that is none") from error
    if array.shape not in ((4, 4), (3, 4)) or not np.isfinite(array).all() or np.abs(array).max() > FARTHEST:
        raise UserError("that is not 4 x 4 numbers")
    axes = array[:3, :3]
    determinant = float(np.linalg.det(axes))
    scale = abs(determinant) ** (1 / 3)
    if scale < 1e-6 or np.abs(axes.T @ axes / scale**2 - np.eye(3)).max() > ROUND:
        raise UserError("whose axes are no rotation")
    if determinant < 0:
        raise UserError("that mirrors")
    u, _, v = np.linalg.svd(axes)
    to_world = np.eye(4)
    to_world[:3, :3], to_world[:3, 3] = u @ v, array[:3, 3]
    return np.linalg.inv(to_world @ FLIP)


def _values(content: Mapping[str, Any], where: str) -> dict[str, float]:
    """The numbers that say something of a camera."""
    model = str(content.get("camera_model", "")).upper()
    if any(word in model for word in UNUSABLE) or content.get("is_fisheye") is True:
        raise DataError(
            f"{where}: cameras of the kind {printable(content.get('camera_model', 'fisheye'), 40)!r} cannot be used; "
            "undistort the pictures first."
        )
    keys = ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "camera_angle_y", *DISTORTION)
    said = {key: content[key] for key in keys if content.get(key) is not None}
    for key, value in said.items():
        if not (isinstance(value, int | float) and abs(value) < 1e9):  # which NaN is not
            raise DataError(f"{where}: {key!r} must be a number, not {printable(value, 40)}.")
    return {key: float(value) for key, value in said.items()}


def size_of(values: Mapping[str, float]) -> tuple[int, int] | None:
    """Width and height that a frame says; None where it says neither."""
    size = round(values.get("w", 0)), round(values.get("h", 0))
    return size if min(size) > 0 else None


def lens_of(values: Mapping[str, float], size: tuple[int, int]) -> Lens:
    """The lens of a frame, of this size (width, height) in pixels.

    Raises:
        UserError: the focal length is missing or cannot be; the sentence is the reason.

    Example:
        >>> lens_of({"fl_x": 700, "k1": -0.1}, (800, 600))
        Lens(model='OPENCV', width=800, height=600, params=(700, 700, 400.0, 300.0, -0.1, 0.0, 0.0, 0.0))
    """
    width, height = size
    focal = _focal(values, "x", width)
    if focal is None:
        raise UserError("has no focal length in transforms.json (`fl_x` or `camera_angle_x`).")
    across = _focal(values, "y", height) or focal
    center = values.get("cx", width / 2), values.get("cy", height / 2)
    if not (LEAST_FOCAL < focal / max(size) < 100 and 0.5 < across / focal < 2):
        raise UserError("has a focal length in transforms.json that cannot be.")
    if not (-width < center[0] < 2 * width and -height < center[1] < 2 * height):
        raise UserError("has its optical centre far outside in transforms.json.")
    if 0 <= min(center) and max(center) <= 1:
        raise UserError("has an optical centre in transforms.json that is not in pixels, as its focal length is.")
    bent = [values.get(key, 0.0) for key in DISTORTION]
    model, count = ("PINHOLE", 0) if not any(bent) else ("OPENCV", 4) if not any(bent[4:]) else ("FULL_OPENCV", 8)
    return Lens(model, width, height, (focal, across, *center, *bent[:count]))


def _focal(values: Mapping[str, float], axis: str, pixels: int) -> float | None:
    """In pixels, of one axis."""
    focal, angle = values.get(f"fl_{axis}"), values.get(f"camera_angle_{axis}")
    if focal is None and angle is not None and 0 < angle < math.pi:
        focal = pixels / 2 / math.tan(angle / 2)
    return focal if focal is not None and focal > 0 else None
