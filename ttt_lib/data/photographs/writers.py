"""A scene as files that other programs take: a COLMAP model in text, and a `transforms.json` for nerfstudio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from ttt_lib.core.errors import DataError, UserError, reason
from ttt_lib.core.files import to_json, write_text
from ttt_lib.data.images import read_photo
from ttt_lib.data.photographs.colmap_files import OWN_MARK
from ttt_lib.data.photographs.scene import Photograph, Scene
from ttt_lib.data.photographs.transforms import FLIP
from ttt_lib.data.photographs.undistort import read_undistorted
from ttt_lib.data.photographs.upright import Turned, turn, turns_of

DEPTH_WEIGHT = 300.0  # of a track's depth against its place in the picture, when its point is found again


def _check(scene: Scene) -> None:
    if scene.refused or not scene.photographs or any(p.pose is None or p.intrinsics is None for p in scene.photographs):
        raise DataError("the scene has no cameras, so they cannot be written; it was not reconstructed.")


def _as_stored(photograph: Photograph, file: Path | None) -> Turned:
    """What other programs want: they take the pixels as they are stored, whatever EXIF says of up and down. Camera (fx, fy,
    cx, cy), size (width, height), pose, and uv (N,2) of the tracks; in pixels.

    file: that they will read; None: the one that the photograph is read from, if it is read from one.
    """
    height, width = photograph.image.shape[1:]
    (fx, _, cx), (_, fy, cy), _ = photograph.intrinsics.double().tolist()
    uv = photograph.tracks.uv.double().numpy() * [width, height]
    file = file or _file_of(photograph)
    try:
        turns = turns_of(file) if file is not None and file.is_file() else 0
    except UserError as error:
        raise DataError(f"{file}: {error}") from error
    pinhole = (fx * width, fy * height, cx * width, cy * height)
    return turn(-turns, pinhole, (width, height), photograph.pose.double().numpy(), uv)


def _file_of(photograph: Photograph) -> Path | None:
    """The file that a photograph is read from, if it is read from one."""
    source = photograph.source
    return Path(source.args[0]) if isinstance(source, partial) and source.func is read_photo else None


def _is_distorted(photograph: Photograph, file: Path) -> bool:
    """Whether a file is the one that the photograph is read from without the distortion of its lens."""
    source = photograph.source
    return isinstance(source, partial) and source.func is read_undistorted and file.samefile(source.args[0])


def _names(scene: Scene) -> list[str]:
    """Of the photographs' files, or of photographs that are no files, with underscores for spaces, and a number where two
    would be the same."""
    given = [file.name if (file := _file_of(p)) is not None else p.name for p in scene.photographs]
    plain = [Path("_".join(name.split())) for name in given]
    names: dict[int, str] = {}
    kept_first = sorted(range(len(plain)), key=lambda row: plain[row].name != given[row])  # those without spaces
    for row in kept_first:
        path = plain[row]
        others = (f"{path.stem}_{number}{path.suffix}" for number in range(2, len(plain) + 1))
        names[row] = next(name for name in (path.name, *others) if name not in names.values())
    return [names[row] for row in range(len(plain))]


def scene_points(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The points of a scene's tracks in the world: ids (T,) long, sorted, and xyz (T,3) float64.

    Least squares over the photographs that see a point: its depth in each, which is exact, and with much less weight its
    place in the picture, which it misses by the reprojection error.
    """
    ids = scene.track_ids().numpy()
    normal, right = np.zeros((len(ids), 3, 3)), np.zeros((len(ids), 3))
    for photograph in scene.photographs:
        tracks, pose = photograph.tracks, photograph.pose.double().numpy()
        at = np.searchsorted(ids, tracks.track_id.numpy())
        depth = tracks.depth.double().numpy()[:, None]
        homogeneous = np.concatenate([tracks.uv.double().numpy(), np.ones_like(depth)], -1)
        rays = (homogeneous @ np.linalg.inv(photograph.intrinsics.double().numpy()).T)[:, :2]
        x, y, z = pose[:3, :3]
        tx, ty, tz = pose[:3, 3]
        # Rows a and values b of a @ xyz = b: x - u z = 0 and y - v z = 0 over the depth, z = depth.
        across = np.stack([x - rays[:, :1] * z, y - rays[:, 1:] * z], 1) / depth[:, None]
        across_b = np.stack([rays[:, 0] * tz - tx, rays[:, 1] * tz - ty], 1) / depth
        rows = np.concatenate([across, (DEPTH_WEIGHT * z / depth)[:, None]], 1)
        values = np.concatenate([across_b, DEPTH_WEIGHT * (depth - tz) / depth], 1)
        np.add.at(normal, at, rows.transpose(0, 2, 1) @ rows)
        np.add.at(right, at, np.einsum("nij,ni->nj", rows, values))
    return ids, np.linalg.solve(normal, right[..., None])[..., 0] if len(ids) else right


def _numbers(values: np.ndarray | Sequence[float]) -> str:
    return " ".join(repr(float(value)) for value in values)


def write_colmap(folder: str | os.PathLike, scene: Scene) -> None:
    """Write `cameras.txt`, `images.txt` and `points3D.txt` of a scene; each photograph has a camera of its own.

    Images have the names of their files. COLMAP's text knows no spaces in names, so they become underscores.

    `load_scene` reads cameras and tracks back within float32; weights may differ a little where more photographs saw a
    point than have a track of it. Photographs that are read without the distortion of their lenses are in no file: the
    model has the scene's names for them, and what is beside it under these has to be saved from `Photograph.image`.

    Args:
        folder: made where it is not there.
        scene: with cameras and tracks.

    Raises:
        DataError: the scene has no cameras, or the folder cannot be written.

    Example:
        >>> write_colmap("model", Scene([]))
        Traceback (most recent call last):
        ...
        ttt_lib.core.errors.DataError: the scene has no cameras, so they cannot be written; it was not reconstructed.
    """
    _check(scene)
    ids, xyz = scene_points(scene)
    cameras = ["# Camera list: id, model, width, height, fx, fy, cx, cy."]
    images = [
        "# Images, two lines each: id, rotation w x y z and translation (world to camera), camera, name; points x, y, id."
    ]
    seen: list[list[str]] = [[] for _ in ids]
    errors, views = np.zeros(len(ids)), np.zeros(len(ids))
    for number, (photograph, name) in enumerate(zip(scene.photographs, _names(scene)), 1):
        pinhole, (width, height), pose, uv = _as_stored(photograph, None)
        cameras.append(f"{number} PINHOLE {width} {height} {_numbers(pinhole)}")
        quaternion = np.roll(Rotation.from_matrix(pose[:3, :3]).as_quat(), 1)
        images.append(f"{number} {_numbers([*quaternion, *pose[:3, 3]])} {number} {name}")
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
        f"{ids[k] + 1} {_numbers(xyz[k])} 128 128 128 {_numbers([errors[k] / views[k]])} {' '.join(seen[k])}"
        for k in range(len(ids))
    ]
    for name, lines in {"cameras.txt": cameras, "images.txt": images, "points3D.txt": points}.items():
        _write(Path(folder), name, "\n".join(lines))


def _write(folder: Path, name: str, text: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, f"{text}\n")
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
        DataError: the scene has no cameras, the files are not one for each, one still has the distortion of its lens that
            was taken away from the photograph, or the file cannot be written.
    """
    _check(scene)
    if len(files) != len(scene.photographs):
        raise DataError(
            f"{len(files)} files for {len(scene.photographs)} photographs; give one for each, in their order."
        )
    path = Path(path)
    frames, cameras = [], []
    for photograph, file in zip(scene.photographs, files):
        found = next((p for p in (path.parent / file, Path(file)) if p.is_file()), None)
        pinhole, size, pose, _ = _as_stored(photograph, found)
        if found is not None and _is_distorted(photograph, found):
            raise DataError(
                f"{found}: has the distortion of its lens still; save the photograph's `image` and name that."
            )
        keys = ("w", "h", "fl_x", "fl_y", "cx", "cy", "k1", "k2", "p1", "p2")
        cameras.append(dict(zip(keys, [*size, *pinhole, 0.0, 0.0, 0.0, 0.0])))
        to_world = np.linalg.inv(pose) @ FLIP
        frames.append({"file_path": _relative(file, path.parent), "transform_matrix": to_world.tolist()})
    shared = cameras[0] if all(camera == cameras[0] for camera in cameras) else {}
    frames = frames if shared else [{**frame, **camera} for frame, camera in zip(frames, cameras)]
    _write(path.parent, path.name, to_json({"camera_model": "OPENCV", **shared, "frames": frames}, indent=1))


def _relative(file: str | os.PathLike, folder: Path) -> str:
    """With forward slashes, as every system reads them."""
    plain = Path(file)
    if plain.is_absolute() or not (folder / plain).exists():
        try:
            plain = plain.resolve().relative_to(folder.resolve())
        except ValueError:  # elsewhere
            plain = Path(file)
    return plain.as_posix()
