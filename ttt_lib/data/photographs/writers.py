"""A scene as files that other programs take: a COLMAP model in text, and a `transforms.json` for nerfstudio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ttt_lib.core.errors import DataError, reason
from ttt_lib.core.files import first_repeated, write_json, write_text
from ttt_lib.data.images import read_photo
from ttt_lib.data.photographs.colmap_files import OWN_MARK
from ttt_lib.data.photographs.posed import CLOCKWISE, QUARTER, orientation_of
from ttt_lib.data.photographs.scene import Photograph, Scene
from ttt_lib.data.photographs.transforms import FLIP

DEPTH_WEIGHT = 300.0  # of a track's depth against its place in the picture, when its point is found again


def _check(scene: Scene, files: Sequence[str | os.PathLike] | None) -> None:
    if scene.refused or not scene.photographs or any(p.pose is None or p.intrinsics is None for p in scene.photographs):
        raise DataError("the scene has no cameras, so they cannot be written; it was not reconstructed.")
    if files is not None and len(files) != len(scene.photographs):
        raise DataError(
            f"{len(files)} files for {len(scene.photographs)} photographs; give one for each, in their order."
        )


@dataclass
class _AsStored:
    """A camera of the pixels as they lie in the file. pinhole: fx, fy, cx, cy; uv (N,2) of the tracks; all in pixels."""

    width: int
    height: int
    pinhole: list[float]
    pose: np.ndarray
    uv: np.ndarray


def _as_stored(photograph: Photograph, file: Path | None) -> _AsStored:
    """What other programs want: they take the pixels as they are stored, whatever EXIF says of up and down.

    file: that they will read; None: the one that the photograph is read from, if it is read from one.
    """
    height, width = photograph.image.shape[1:]
    (fx, _, cx), (_, fy, cy), _ = photograph.intrinsics.double().tolist()
    pose, uv = photograph.pose.double().numpy().copy(), photograph.tracks.uv.double().numpy()
    file = file or _file_of(photograph)
    orientation = orientation_of(file) if file is not None and file.is_file() else 1
    if orientation not in CLOCKWISE:
        raise DataError(f"{file}: is mirrored by its EXIF, which no camera can be; save it as it is to be seen.")
    for _ in range(-CLOCKWISE[orientation] % 4):
        width, height, fx, fy, cx, cy = height, width, fy, fx, 1 - cy, cx
        pose[:3] = QUARTER @ pose[:3]
        uv = np.stack([1 - uv[:, 1], uv[:, 0]], -1)
    pinhole = [fx * width, fy * height, cx * width, cy * height]
    return _AsStored(width, height, pinhole, pose, uv * [width, height])


def _file_of(photograph: Photograph) -> Path | None:
    """The file that a photograph is read from, if it is read from one."""
    source = photograph.source
    return Path(source.args[0]) if isinstance(source, partial) and source.func is read_photo else None


def _names(scene: Scene) -> list[str]:
    """Of the photographs' files; of photographs that are no files, or files of one name, those of the scene."""
    names = [file.name if (file := _file_of(p)) is not None else p.name for p in scene.photographs]
    return names if first_repeated(names) is None else [p.name for p in scene.photographs]


def scene_points(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The points of a scene's tracks in the world: ids (T,) long, sorted, and xyz (T,3) float64.

    Least squares over the photographs that see a point: its depth in each, which is exact, and with much less weight its
    place in the picture, which it misses by the reprojection error.
    """
    ids = scene.track_ids().numpy()
    normal, right = np.zeros((len(ids), 3, 3)), np.zeros((len(ids), 3))
    for photograph in scene.photographs:
        tracks = photograph.tracks
        at = np.searchsorted(ids, tracks.track_id.numpy())
        pose, matrix = photograph.pose.double().numpy(), photograph.intrinsics.double().numpy()
        depth = tracks.depth.double().numpy()[:, None]
        homogeneous = np.concatenate([tracks.uv.double().numpy(), np.ones_like(depth)], -1)
        rays = (homogeneous @ np.linalg.inv(matrix).T)[:, :2]
        x, y, z = pose[:3, :3]
        (tx, ty, tz) = pose[:3, 3]
        # Rows a and values b of a @ xyz = b: x - u z = 0 and y - v z = 0 over the depth, z = depth.
        across = (np.stack([x - rays[:, :1] * z, y - rays[:, 1:] * z], 1)) / depth[:, None]
        across_b = np.stack([rays[:, 0] * tz - tx, rays[:, 1] * tz - ty], 1) / depth
        along, along_b = DEPTH_WEIGHT * z / depth, DEPTH_WEIGHT * (depth[:, 0] - tz) / depth[:, 0]
        rows = np.concatenate([across, along[:, None]], 1)
        values = np.concatenate([across_b, along_b[:, None]], 1)
        np.add.at(normal, at, rows.transpose(0, 2, 1) @ rows)
        np.add.at(right, at, np.einsum("nij,ni->nj", rows, values))
    return ids, np.linalg.solve(normal, right[..., None])[..., 0] if len(ids) else right


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """(w,x,y,z) of a rotation matrix: the eigenvector of Bar-Itzhack's matrix, exact for matrices that are nearly one."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    symmetric = np.array(
        [[a - e - i, d + b, g + c, h - f], [d + b, e - a - i, h + f, c - g],
         [g + c, h + f, i - a - e, d - b], [h - f, c - g, d - b, a + e + i]]
    )  # fmt: skip
    x, y, z, w = np.linalg.eigh(symmetric / 3)[1][:, -1]
    return np.array([w, x, y, z]) * (1 if w >= 0 else -1)


def _numbers(values: np.ndarray | Sequence[float]) -> str:
    return " ".join(repr(float(value)) for value in values)


def write_colmap(folder: str | os.PathLike, scene: Scene, files: Sequence[str | os.PathLike] | None = None) -> None:
    """Write `cameras.txt`, `images.txt` and `points3D.txt` of a scene; each photograph has a camera of its own.

    `load_scene` reads cameras and tracks back within float32; weights may differ a little where more photographs saw a
    point than have a track of it. Of a lens with distortion only the pinhole part is known and written, and its tracks do
    not fit to that.

    Args:
        folder: made where it is not there.
        scene: with cameras and tracks.
        files: names of the photographs as COLMAP is to know them, relative to its folder of images; default: those of
            their files. COLMAP's text knows no spaces in names, so they become underscores.

    Raises:
        DataError: the scene has no cameras, or the folder cannot be written.

    Example:
        >>> write_colmap("model", Scene([]))
        Traceback (most recent call last):
        ...
        ttt_lib.core.errors.DataError: the scene has no cameras, so they cannot be written; it was not reconstructed.
    """
    _check(scene, files)
    ids, xyz = scene_points(scene)
    names = ["_".join(os.fspath(file).split()) for file in files or _names(scene)]
    cameras, images = ["# Camera list: id, model, width, height, fx, fy, cx, cy."], [
        "# Images, two lines each: id, rotation w x y z and translation (world to camera), camera, name; points x, y, id."
    ]  # fmt: skip
    seen: list[list[str]] = [[] for _ in ids]
    errors, views = np.zeros(len(ids)), np.zeros(len(ids))
    for number, (photograph, name) in enumerate(zip(scene.photographs, names), 1):
        stored = _as_stored(photograph, None)
        cameras.append(f"{number} PINHOLE {stored.width} {stored.height} {_numbers(stored.pinhole)}")
        pose, uv, pinhole = stored.pose, stored.uv, stored.pinhole
        images.append(f"{number} {_numbers(_quaternion(pose[:3, :3]))} {_numbers(pose[:3, 3])} {number} {name}")
        at = np.searchsorted(ids, photograph.tracks.track_id.numpy())
        images.append(" ".join(f"{_numbers(pixel)} {ids[k] + 1}" for pixel, k in zip(uv, at)))
        for place, k in enumerate(at):
            seen[k].append(f"{number} {place}")
        local = xyz[at] @ pose[:3, :3].T + pose[:3, 3]
        projected = local[:, :2] / local[:, 2:] * pinhole[:2] + pinhole[2:]
        np.add.at(errors, at, np.linalg.norm(projected - uv, axis=-1))
        np.add.at(views, at, 1)
    points = [OWN_MARK, "# Points: id, x, y, z, red, green, blue, error, then image and place of each that sees it."]
    points += [
        f"{ids[k] + 1} {_numbers(xyz[k])} 128 128 128 {float(errors[k] / views[k])!r} {' '.join(seen[k])}"
        for k in range(len(ids))
    ]
    _write(Path(folder), {"cameras.txt": cameras, "images.txt": images, "points3D.txt": points})


def _write(folder: Path, texts: dict[str, list[str]]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in texts.items():
            write_text(folder / name, "\n".join(lines) + "\n")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({reason(error)}).") from error


def write_transforms(path: str | os.PathLike, scene: Scene, files: Sequence[str | os.PathLike]) -> None:
    """Write a scene's cameras as a `transforms.json` that nerfstudio takes as it is: those of the pixels as stored.

    Args:
        path: the file.
        scene: with cameras.
        files: the photographs, in the scene's order, as paths relative to the folder of the file or as they are found
            from here; the file names them relative to its folder where they lie below it.

    Raises:
        DataError: the scene has no cameras, the files are not one for each, or the file cannot be written.
    """
    _check(scene, files)
    path = Path(path)
    frames = []
    for photograph, file in zip(scene.photographs, files):
        found = next((p for p in (path.parent / file, Path(file)) if p.is_file()), None)
        stored = _as_stored(photograph, found)
        fx, fy, cx, cy = stored.pinhole
        to_world = np.linalg.inv(stored.pose) @ FLIP
        frames.append({
            "file_path": _relative(file, path.parent), "w": stored.width, "h": stored.height,
            "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0,
            "transform_matrix": to_world.tolist(),
        })  # fmt: skip
    shared = {key: frames[0][key] for key in frames[0] if key not in ("file_path", "transform_matrix")}
    if all(frame[key] == value for frame in frames for key, value in shared.items()):
        frames = [{key: frame[key] for key in ("file_path", "transform_matrix")} for frame in frames]
        content = {"camera_model": "OPENCV", **shared, "frames": frames}
    else:
        content = {"camera_model": "OPENCV", "frames": frames}
    try:
        write_json(path, content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({reason(error)}).") from error


def _relative(file: str | os.PathLike, folder: Path) -> str:
    """With forward slashes, as every system reads them."""
    plain = Path(file)
    if plain.is_absolute() or not (folder / plain).exists():
        try:
            plain = plain.resolve().relative_to(folder.resolve())
        except ValueError:  # elsewhere
            plain = Path(file)
    return plain.as_posix()
