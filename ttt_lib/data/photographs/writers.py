"""A scene as files that other programs take: a COLMAP model in text, and a `transforms.json` for nerfstudio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from ttt_lib.core.errors import DataError
from ttt_lib.core.files import write_json, write_text
from ttt_lib.data.photographs.colmap import OWN_MARK
from ttt_lib.data.photographs.scene import Photograph, Scene
from ttt_lib.data.photographs.transforms import FLIP

DEPTH_WEIGHT = 300.0  # of a track's depth against its place in the picture, when its point is found again


def _pinhole(photograph: Photograph) -> tuple[list[int], list[float]]:
    """Its width and height, and fx, fy, cx, cy in pixels. Raises `DataError` where it has no camera."""
    if photograph.pose is None or photograph.intrinsics is None:
        raise DataError("the scene has no cameras, so they cannot be written; it was not reconstructed.")
    height, width = photograph.image.shape[1:]
    (fx, _, cx), (_, fy, cy), _ = photograph.intrinsics.double().tolist()
    return [width, height], [fx * width, fy * height, cx * width, cy * height]


def scene_points(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The points of a scene's tracks in the world: ids (T,) long, sorted, and xyz (T,3) float64.

    Least squares over the photographs that see a point: its depth in each, which is exact, and with much less weight its
    place in the picture, which it misses by the reprojection error.
    """
    ids = scene.track_ids().numpy()
    normal, right = np.zeros((len(ids), 3, 3)), np.zeros((len(ids), 3))
    for photograph in scene.photographs:
        tracks, pose = photograph.tracks, photograph.pose.double().numpy()
        at, depth = np.searchsorted(ids, tracks.track_id.numpy()), tracks.depth.double().numpy()
        places = np.column_stack([tracks.uv.double().numpy(), np.ones_like(depth)])
        rays = places @ np.linalg.inv(photograph.intrinsics.double().numpy()).T
        # What the point (x, y, z) in the camera has to be: x - u z = 0 and y - v z = 0 over the depth, z = depth.
        wanted = np.tile(np.diag([1, 1, DEPTH_WEIGHT]), (len(depth), 1, 1))
        wanted[:, :2, 2] = -rays[:, :2]
        wanted /= depth[:, None, None]
        rows = wanted @ pose[:3, :3]
        values = [0, 0, DEPTH_WEIGHT] - wanted @ pose[:3, 3]
        np.add.at(normal, at, rows.transpose(0, 2, 1) @ rows)
        np.add.at(right, at, np.einsum("nij,ni->nj", rows, values))
    return ids, np.linalg.solve(normal, right[..., None])[..., 0]


def _numbers(values: np.ndarray | Sequence[float]) -> str:
    return " ".join(repr(float(value)) for value in values)


def write_colmap(folder: Path, scene: Scene, names: Sequence[str]) -> None:
    """Write `cameras.txt`, `images.txt` and `points3D.txt` of a scene; each photograph has a camera of its own.

    `load_scene` reads cameras and tracks back within float32; weights may differ a little where more photographs saw a
    point than have a track of it.

    Args:
        folder: made where it is not there.
        scene: with cameras and tracks.
        names: of the files that hold the photographs as the scene has them, upright and without distortion. COLMAP's text
            knows no spaces in names, so they become underscores.

    Raises:
        DataError: the scene has no cameras.

    Example:
        >>> import torch
        >>> write_colmap(Path("model"), Scene([Photograph("a", torch.zeros(3, 20, 20))]), ["a.png"])
        Traceback (most recent call last):
        ...
        ttt_lib.core.errors.DataError: the scene has no cameras, so they cannot be written; it was not reconstructed.
    """
    cameras = ["# Camera list: id, model, width, height, fx, fy, cx, cy."]
    images = [
        "# Images, two lines each: id, rotation w x y z and translation (world to camera), camera, name; points x, y, id."
    ]
    pinholes = [_pinhole(photograph) for photograph in scene.photographs]
    ids, xyz = scene_points(scene)
    seen: list[list[str]] = [[] for _ in ids]
    for number, (photograph, name, (size, pinhole)) in enumerate(zip(scene.photographs, names, pinholes), 1):
        cameras.append(f"{number} PINHOLE {size[0]} {size[1]} {_numbers(pinhole)}")
        pose, uv = photograph.pose.double().numpy(), photograph.tracks.uv.double().numpy() * size
        quaternion = np.roll(Rotation.from_matrix(pose[:3, :3]).as_quat(), 1)
        images.append(f"{number} {_numbers([*quaternion, *pose[:3, 3]])} {number} {name.replace(' ', '_')}")
        at = np.searchsorted(ids, photograph.tracks.track_id.numpy())
        images.append(" ".join(f"{_numbers(pixel)} {ids[k] + 1}" for pixel, k in zip(uv, at)))
        for place, k in enumerate(at):
            seen[k].append(f"{number} {place}")
    points = [OWN_MARK, "# Points: id, x, y, z, red, green, blue, no error, then image and place of each that sees it."]
    points += [f"{i + 1} {_numbers(place)} 128 128 128 -1 {' '.join(who)}" for i, place, who in zip(ids, xyz, seen)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in {"cameras.txt": cameras, "images.txt": images, "points3D.txt": points}.items():
        write_text(folder / name, "\n".join(lines) + "\n")


def write_transforms(path: Path, scene: Scene, names: Sequence[str]) -> None:
    """Write a scene's cameras as a `transforms.json` that nerfstudio takes as it is.

    Args:
        path: the file.
        scene: with cameras.
        names: of the files that hold the photographs as the scene has them, from the folder of `path`.

    Raises:
        DataError: the scene has no cameras.
    """
    frames, cameras = [], []
    for photograph, name in zip(scene.photographs, names):
        size, pinhole = _pinhole(photograph)
        to_world = np.linalg.inv(photograph.pose.double().numpy()) @ FLIP
        cameras.append(dict(zip(("w", "h", "fl_x", "fl_y", "cx", "cy"), size + pinhole)))
        frames.append({"file_path": name, "transform_matrix": to_world.tolist()})
    shared = cameras[0] if all(camera == cameras[0] for camera in cameras) else {}  # where every tool looks for it
    frames = frames if shared else [{**frame, **camera} for frame, camera in zip(frames, cameras)]
    write_json(path, {"camera_model": "OPENCV", **shared, "frames": frames})
