"""The program that runs pycolmap, in a process of its own: `python worker.py FOLDER`.

FOLDER/job.json says what to do (`task`, the name of a function here, and its arguments); results are arrays in FOLDER.
It imports nothing but NumPy, pycolmap and the file beside it: it must start at once, and Pillow's PNG encoder breaks
where pycolmap was loaded first. One thread and fixed seeds: the same job gives the same result.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, whose modules are no libraries

import numpy as np
import pycolmap

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))  # last: no library is hidden
    import worker_mapping as mapping
else:
    from ttt_lib.data.photographs import worker_mapping as mapping

COARSE = 256  # of each picture's features, the largest, decide which pictures are compared
TWIN, TWIN_DISTANCE = 0.97, 0.03  # cosine of descriptors that look the same, of the picture how far apart they are
FLAT_ERROR = 0.003  # of the longer side: three times what features are off by, a third of what relief moves them by
FISHEYE = ("FISHEYE", "FOV", "EUCM", "EQUIRECTANGULAR")


# ------------------------------------------------------------------------------------------------ features, matches


def features(folder: Path, cameras: list[dict[str, Any]], camera_of: list[int], most: int) -> None:
    """SIFT of FOLDER/gray_0.npy, gray_1.npy, ... (H,W) uint8 into FOLDER/database.db.

    cameras: width, height, focal (pixels), known (whether that comes from somewhere); camera_of: of each photograph;
    most: features a photograph. Writes `features.npz`: how many each has, the coarse descriptors, and `twins` (`_twins`).
    """
    options = pycolmap.FeatureExtractionOptions(num_threads=1, use_gpu=False)
    options.sift.max_num_features = most
    extractor = pycolmap.FeatureExtractor.create(options, pycolmap.Device.cpu)
    database = pycolmap.Database.open(folder / "database.db")
    for number, camera in enumerate(cameras, 1):
        _write_camera(database, number, camera)
    counts, coarse, twins = [], [], []
    for index, number in enumerate(camera_of):
        keypoints, descriptors = extractor.extract_from_uint8_array(np.load(folder / f"gray_{index}.npy"))
        keypoints, data = pycolmap.keypoints_to_matrix(keypoints), descriptors.data
        image_id = database.write_image(pycolmap.Image(name=mapping.image_name(index), camera_id=number + 1))
        frame = pycolmap.Frame(rig_id=number + 1)
        frame.add_data_id(pycolmap.data_t(_sensor(number + 1), image_id))
        database.write_frame(frame)
        database.write_keypoints(image_id, keypoints)
        database.write_descriptors(image_id, descriptors)
        size = np.abs(keypoints[:, 2:6]).max(1, initial=0)
        largest = np.argsort(-size, kind="stable")[:COARSE]
        counts.append(len(keypoints))
        twins.append(_twins(keypoints[:, :2], data, size))
        coarse.append(np.pad(data[largest], ((0, COARSE - len(largest)), (0, 0))))
    database.close()
    np.savez(folder / "features.npz", counts=counts, coarse=np.array(coarse), twins=twins)


def _twins(places: np.ndarray, descriptors: np.ndarray, size: np.ndarray) -> float:
    """The share of a picture's features that look like another one elsewhere in it.

    Asked are at most 500 of its largest third: small ones (a speckle, the end of a twig) look alike in any picture.
    """
    if len(places) < 2:
        return 0.0
    unit = descriptors / np.maximum(np.linalg.norm(descriptors.astype(np.float32), axis=1, keepdims=True), 1e-6)
    third = np.argsort(-size, kind="stable")[: -(-len(size) // 3)]
    asked = third[:: -(-len(third) // 500)]
    alike = unit[asked] @ unit.T > TWIN
    apart = np.linalg.norm(places[asked, None] - places[None], axis=-1) > TWIN_DISTANCE * np.ptp(places, axis=0).max()
    return float((alike & apart).any(1).mean())


def _sensor(camera_id: int) -> pycolmap.sensor_t:
    return pycolmap.sensor_t(pycolmap.SensorType.CAMERA, camera_id)


def _camera(number: int, camera: dict[str, Any]) -> pycolmap.Camera:
    width, height = camera["width"], camera["height"]
    if "params" in camera:
        result = pycolmap.Camera(
            camera_id=number, model=camera["model"], width=width, height=height, params=camera["params"]
        )
    else:
        params = [camera["focal"], width / 2, height / 2]
        result = pycolmap.Camera(camera_id=number, model="SIMPLE_PINHOLE", width=width, height=height, params=params)
    result.has_prior_focal_length = camera["known"]
    return result


def _write_camera(database: pycolmap.Database, number: int, camera: dict[str, Any]) -> None:
    database.write_camera(_camera(number, camera), use_camera_id=True)
    rig = pycolmap.Rig(rig_id=number)
    rig.add_ref_sensor(_sensor(number))
    database.write_rig(rig, use_rig_id=True)


def match(folder: Path, pairs: list[list[int]], seed: int) -> None:
    """Mutual matching and guided geometric verification of pairs of photographs.

    Writes `matches.npz`, for each pair: inliers; moved, the distance in pixels that three quarters of them stay below;
    flat, the share of them that one homography explains (to FLAT_ERROR of the longer side).
    """
    lines = "".join(f"{mapping.image_name(i)} {mapping.image_name(j)}\n" for i, j in pairs)
    (folder / "pairs.txt").write_text(lines, encoding="utf-8")
    options = pycolmap.FeatureMatchingOptions(num_threads=1, use_gpu=False, guided_matching=True)
    verification = pycolmap.TwoViewGeometryOptions(detect_watermark=False)
    verification.ransac.random_seed = seed
    verification.max_H_inlier_ratio = 1.0  # never a plane alone: what lies off it would be lost
    longest = max(max(np.load(folder / f"gray_{k}.npy", mmap_mode="r").shape) for pair in pairs for k in pair)
    verification.ransac.max_error = mapping.tolerance(longest)
    pairing = pycolmap.ImportedPairingOptions(match_list_path=folder / "pairs.txt")
    pycolmap.set_random_seed(seed)
    pycolmap.match_image_pairs(folder / "database.db", options, pairing, verification, pycolmap.Device.cpu)
    ransac = pycolmap.RANSACOptions(max_error=FLAT_ERROR * longest, random_seed=seed, max_num_trials=2000)
    database = pycolmap.Database.open(folder / "database.db")
    inliers, moved, flat = np.zeros(len(pairs), int), np.full(len(pairs), np.inf), np.zeros(len(pairs))
    for row, (i, j) in enumerate(pairs):
        if not database.exists_two_view_geometry(i + 1, j + 1):
            continue
        matches = database.read_two_view_geometry(i + 1, j + 1).inlier_matches
        inliers[row] = len(matches)
        if len(matches) < 8:
            continue
        first, second = (
            database.read_keypoints(k + 1)[matches[:, side], :2].astype(float) for side, k in enumerate((i, j))
        )
        moved[row] = np.quantile(np.linalg.norm(first - second, axis=1), 0.75)
        homography = pycolmap.estimate_homography_matrix(first, second, ransac)
        flat[row] = homography["num_inliers"] / len(matches) if homography else 0
    database.close()
    np.savez(folder / "matches.npz", inliers=inliers, moved=moved, flat=flat)


# ------------------------------------------------------------------------------------------------ reconstructions


def reconstructions(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Reconstruct from the matches, once for each run; writes FOLDER/NAME.npz for those that give one.

    A run: name, seed, method (`incremental`, `global`), focals (pixels, one a camera), fixed (whether they stay),
    share of the matches that it sees, start (two photographs or null), min_angle (degrees), two_view (whether points
    seen by two photographs are taken), photographs (those that take part), profile: factors of the focal lengths, for
    each of which the result is fitted again with these held, in NAME@0.npz, NAME@1.npz, ...
    """
    for run in runs:
        path = folder / f"run_{run['name']}.db"
        shutil.copyfile(folder / "database.db", path)
        mapping.prepare(path, run)
        output = folder / f"run_{run['name']}"
        output.mkdir(exist_ok=True)
        pycolmap.set_random_seed(run["seed"])
        method = mapping.spread if run["method"] == "global" else mapping.grow
        models = method(path, output, run)
        if not models and run["start"] is not None:
            models = method(path, output, {**run, "start": None})
        path.unlink()
        if not models:
            continue
        best = max(models.values(), key=lambda model: (model.num_reg_images(), model.num_points3D()))
        mapping.fit(best, run["fixed"])
        database = pycolmap.Database.open(folder / "database.db")
        np.savez(folder / f"{run['name']}.npz", **_arrays(best), explained=mapping.explained(database, best))
        database.close()
        for number, factor in enumerate(run["profile"]):
            other = copy.deepcopy(best)
            mapping.fit(other, True, factor)
            np.savez(folder / f"{run['name']}@{number}.npz", **_arrays(other))


def triangulate(folder: Path, poses: list[Any], min_angle: float, two_view: bool) -> None:
    """Points from known cameras: those of the database, and poses (4x4 world -> camera), one a photograph."""
    model = pycolmap.Reconstruction()
    database = pycolmap.Database.open(folder / "database.db")
    for camera in database.read_all_cameras():
        model.add_camera_with_trivial_rig(camera)
    for index, pose in enumerate(poses):
        image = database.read_image(index + 1)
        keypoints = database.read_keypoints(index + 1)[:, :2]
        image.points2D = pycolmap.Point2DList([pycolmap.Point2D(xy.astype(float)) for xy in keypoints])
        image.reset_frame_ptr() if image.has_frame_ptr() else None
        new = pycolmap.Image(name=image.name, image_id=index + 1, camera_id=image.camera_id, points2D=image.points2D)
        model.add_image_with_trivial_frame(new, pycolmap.Rigid3d(np.array(pose, dtype=float)[:3]))
    database.close()
    options = pycolmap.IncrementalPipelineOptions(random_seed=0, num_threads=1, extract_colors=False)
    options.mapper.filter_min_tri_angle = options.triangulation.min_angle = min_angle
    options.mapper.random_seed = options.triangulation.random_seed = 0
    options.triangulation.ignore_two_view_tracks = not two_view
    output = folder / "triangulated"
    output.mkdir(exist_ok=True)
    result = pycolmap.triangulate_points(model, folder / "database.db", output, output, True, options, False)
    np.savez(folder / "triangulated.npz", **_arrays(result))


# ------------------------------------------------------------------------------------------------ results as arrays


def read(folder: Path, model: str, memory: int) -> None:
    """A finished COLMAP model as arrays in `model.npz`. memory: bytes that reading may take, where the system limits it."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError, OSError):  # not on every system
        pass
    np.savez(folder / "model.npz", **_arrays(pycolmap.Reconstruction(model)))


def _arrays(model: pycolmap.Reconstruction) -> dict[str, Any]:
    """Registered images with their cameras, and what each sees of the points.

    image (I,) id, name (I,), camera (I,) id, pose (I,4,4), size (I,2), intrinsics (I,4) fx, fy, cx, cy in pixels,
    fisheye (I,), xyz (P,3); an observation is row k of: seen_by (M,) row of the image, feature (M,), point (M,) row of
    xyz, uv (M,2) in pixels, depth (M,), error (M,) in pixels, NaN where the camera cannot project it.
    """
    ids = sorted(model.reg_image_ids())
    images = [model.images[i] for i in ids]
    row_of = {image_id: row for row, image_id in enumerate(ids)}
    point_ids = sorted(model.points3D)
    seen_by, feature, point = [], [], []
    xyz = np.zeros((len(point_ids), 3))
    for row, point_id in enumerate(point_ids):
        point3d = model.points3D[point_id]
        xyz[row] = point3d.xyz
        for element in point3d.track.elements:
            if element.image_id in row_of:
                seen_by.append(row_of[element.image_id])
                feature.append(element.point2D_idx)
                point.append(row)
    seen_by, feature, point = (np.array(values, dtype=np.int64) for values in (seen_by, feature, point))
    uv, depth, error = np.zeros((len(point), 2)), np.zeros(len(point)), np.zeros(len(point))
    pose, intrinsics, size, fisheye = np.tile(np.eye(4), (len(ids), 1, 1)), [], [], []
    for row, image in enumerate(images):
        camera, which = image.camera, seen_by == row
        pose[row, :3] = image.cam_from_world().matrix()
        intrinsics.append(
            [camera.focal_length_x, camera.focal_length_y, camera.principal_point_x, camera.principal_point_y]
            if not any(word in camera.model_name for word in FISHEYE)
            else [np.nan] * 4
        )
        fisheye.append(any(word in camera.model_name for word in FISHEYE))
        size.append([camera.width, camera.height])
        points2d = image.points2D
        uv[which] = [points2d[int(k)].xy for k in feature[which]] if which.any() else np.zeros((0, 2))
        local = xyz[point[which]] @ pose[row, :3, :3].T + pose[row, :3, 3]
        depth[which] = local[:, 2]
        error[which] = np.linalg.norm(camera.img_from_cam(local) - uv[which], axis=1) if which.any() else 0
    return {
        "image": np.array(ids), "name": np.array([image.name for image in images], dtype=str), "pose": pose,
        "camera": np.array([image.camera_id for image in images]), "size": np.array(size).reshape(-1, 2),
        "intrinsics": np.array(intrinsics).reshape(-1, 4), "fisheye": np.array(fisheye, dtype=bool), "xyz": xyz,
        "seen_by": seen_by, "feature": feature, "point": point, "uv": uv, "depth": depth, "error": error,
    }  # fmt: skip


TASKS = {task.__name__: task for task in (features, match, reconstructions, triangulate, read)}


def main() -> None:
    """Do the job of the folder that the command line names."""
    folder = Path(sys.argv[1])
    pycolmap.logging.minloglevel = pycolmap.logging.ERROR.value if hasattr(pycolmap.logging.ERROR, "value") else 2
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    TASKS[job.pop("task")](folder, **job)


if __name__ == "__main__":
    main()
