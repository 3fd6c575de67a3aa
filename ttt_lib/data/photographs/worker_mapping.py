"""The reconstructions of `worker.py`: how pycolmap is set. It belongs to that program; nothing else imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

LOSS_SCALE = 0.5  # pixels: from here on a residual counts by its length, not by its square


def image_name(index: int) -> str:
    """The name of photograph `index` in the database; its id there is index + 1."""
    return f"{index:06d}"


def prepare(path: Path, run: dict[str, Any]) -> None:
    """The run's focal lengths, and its share of the matches."""
    database = pycolmap.Database.open(path)
    for camera in database.read_all_cameras():
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
