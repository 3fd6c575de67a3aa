"""The reconstructions of `worker.py`: how pycolmap is set. It belongs to that program; nothing else imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

EPIPOLAR_ERROR = 0.002  # of the longer side, and at least a pixel
LOSS_SCALE = 0.5  # pixels: from here on a residual counts by its length, not by its square


def image_name(index: int) -> str:
    """The name of photograph `index` in the database; its id there is index + 1."""
    return f"{index:06d}"


def tolerance(longest: int) -> float:
    """How far from its place a match may lie (pixels) in pictures of this longer side: the usual 4 of large ones make
    planes of whole streets in small ones."""
    return min(4.0, max(1.5, longest / 300))


def prepare(path: Path, run: dict[str, Any]) -> None:
    """The run's focal lengths, and its share of the matches; sets its `tolerance`."""
    database = pycolmap.Database.open(path)
    cameras = database.read_all_cameras()
    run["tolerance"] = tolerance(max(max(camera.width, camera.height) for camera in cameras))
    for camera in cameras:
        params = camera.params
        params[0] = run["focals"][camera.camera_id - 1]
        camera.params = params
        camera.has_prior_focal_length = True  # else the global mapper finds its own
        database.update_camera(camera)
    if run["share"] < 1:
        generator = np.random.default_rng(run["seed"])
        for pair, geometry in zip(*database.read_two_view_geometries()):
            matches = geometry.inlier_matches
            count = round(run["share"] * len(matches))
            geometry.inlier_matches = matches[np.sort(generator.permutation(len(matches))[:count])]
            database.update_two_view_geometry(*pycolmap.pair_id_to_image_pair(pair), geometry)
    database.close()


def grow(path: Path, output: Path, run: dict[str, Any]) -> dict[int, pycolmap.Reconstruction]:
    """Reconstructions of a run, one photograph after the other."""
    options = pycolmap.IncrementalPipelineOptions(
        random_seed=run["seed"], num_threads=1, min_model_size=2, max_num_models=3, extract_colors=False
    )
    options.ba_refine_focal_length = not run["fixed"]
    options.ba_refine_extra_params = options.ba_refine_principal_point = False
    options.image_names = [image_name(index) for index in run["photographs"]]
    if run["start"] is not None:
        options.init_image_id1, options.init_image_id2 = (index + 1 for index in run["start"])
    mapper, points = options.mapper, options.triangulation
    mapper.random_seed = points.random_seed = run["seed"]
    mapper.num_threads = 1
    mapper.abs_pose_refine_focal_length = mapper.abs_pose_refine_extra_params = False
    mapper.init_max_forward_motion = 1.0
    mapper.init_min_num_inliers, mapper.abs_pose_min_num_inliers = 30, 20
    mapper.init_min_tri_angle = mapper.filter_min_tri_angle = points.min_angle = run["min_angle"]
    mapper.ba_local_min_tri_angle = run["min_angle"]
    mapper.init_max_error = mapper.filter_max_reproj_error = run["tolerance"]
    mapper.abs_pose_max_error = 3 * run["tolerance"]
    points.merge_max_reproj_error = points.complete_max_reproj_error = run["tolerance"]
    points.ignore_two_view_tracks = not run["two_view"]
    return pycolmap.incremental_mapping(path, output, output, options)


def spread(path: Path, output: Path, run: dict[str, Any]) -> dict[int, pycolmap.Reconstruction]:
    """Reconstructions of a run, all photographs at once."""
    options = pycolmap.GlobalPipelineOptions(random_seed=run["seed"], num_threads=1, min_model_size=2)
    options.image_names = [image_name(index) for index in run["photographs"]]
    mapper, views = options.mapper, 2 if run["two_view"] else 3
    mapper.random_seed = mapper.rotation_averaging.random_seed = run["seed"]
    mapper.global_positioning.random_seed = mapper.retriangulation.random_seed = run["seed"]
    mapper.num_threads = 1
    adjustment = mapper.bundle_adjustment
    adjustment.refine_focal_length = not run["fixed"]
    adjustment.refine_extra_params = adjustment.refine_principal_point = False
    adjustment.ceres.solver_options.num_threads = 1
    adjustment.ceres.use_gpu = mapper.global_positioning.use_gpu = False
    adjustment.min_track_length = mapper.global_positioning.min_num_view_per_track = views
    mapper.track_min_num_views_per_track = views
    mapper.min_tri_angle_deg = mapper.retriangulation.min_angle = run["min_angle"]
    mapper.retriangulation.ignore_two_view_tracks = not run["two_view"]
    return pycolmap.global_mapping(path, output, output, options)


def fit(model: pycolmap.Reconstruction, fixed: bool, factor: float = 1.0) -> None:
    """Fit cameras and points to the matches, robustly and to the end, which mapping does not; the focal lengths times
    `factor` first, and then held if `fixed`."""
    for camera in model.cameras.values():
        params = camera.params
        params[0] *= factor
        camera.params = params
    options = pycolmap.BundleAdjustmentOptions(
        refine_focal_length=not fixed, refine_extra_params=False, print_summary=False
    )
    options.ceres.loss_function_type = pycolmap.LossFunctionType.SOFT_L1
    options.ceres.loss_function_scale = LOSS_SCALE
    solver = options.ceres.solver_options
    solver.num_threads, solver.max_num_iterations, solver.function_tolerance = 1, 50, 1e-6
    pycolmap.bundle_adjustment(model, options)


def explained(database: pycolmap.Database, model: pycolmap.Reconstruction) -> np.ndarray:
    """Of each registered image, in order of its id, the share of its verified matches that fit the cameras.

    A match fits if it is within EPIPOLAR_ERROR (Sampson) of where the two cameras say it must lie. A point far off fits
    as well as a near one; in a scene that moved, or where a camera stands wrong, many do not.
    """
    ids = sorted(model.reg_image_ids())
    fits, count = dict.fromkeys(ids, 0), dict.fromkeys(ids, 0)
    places = {i: database.read_keypoints(i)[:, :2].astype(float) for i in ids}
    for pair, geometry in zip(*database.read_two_view_geometries()):
        one, other = pycolmap.pair_id_to_image_pair(pair)
        matches = geometry.inlier_matches
        if one not in fits or other not in fits or not len(matches):
            continue
        lines, sides = [], []
        for image, column in ((one, 0), (other, 1)):
            camera = model.images[image].camera
            sides.append(np.linalg.inv(camera.calibration_matrix()))
            lines.append(np.pad(places[image][matches[:, column]], ((0, 0), (0, 1)), constant_values=1))
        motion = model.images[other].cam_from_world() * model.images[one].cam_from_world().inverse()
        x, y, z = motion.translation
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        matrix = sides[1].T @ cross @ motion.rotation.matrix() @ sides[0]
        there, back = lines[0] @ matrix.T, lines[1] @ matrix
        slope = np.sqrt((there[:, :2] ** 2).sum(-1) + (back[:, :2] ** 2).sum(-1))
        near = np.abs((lines[1] * there).sum(-1)) < slope * max(1.0, EPIPOLAR_ERROR * max(camera.width, camera.height))
        for image in (one, other):
            fits[image] += int(near.sum())
            count[image] += len(near)
    return np.array([fits[i] / max(count[i], 1) for i in ids])
