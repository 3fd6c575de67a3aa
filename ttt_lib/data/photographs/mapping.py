"""Reconstructions from verified matches or known cameras, and finished ones, by pycolmap. Runs in a process of its own."""

from __future__ import annotations

import copy
import logging
import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pycolmap

from ttt_lib.data.photographs.job import Job, Lens, SparseModel
from ttt_lib.data.photographs.matching import database_of, image_name, tolerance

log = logging.getLogger(__name__)

MAPPED_ANGLE = 1.0  # degrees between two rays to a point: no more is asked, however few pixels that is
PLACED_ANGLE = 0.1  # the same of known cameras: far points count too when they and the matches are compared
EPIPOLAR_ERROR = 0.002  # of the longer side, and at least a pixel
LOSS_SCALE = 0.5  # pixels: from here on a residual counts by its length, not by its square
FISHEYE = ("FISHEYE", "FOV", "EUCM", "EQUIRECTANGULAR")
RETURNS = 0.1  # pixels that a place may miss itself by when its ray is seen again: else the ray is none


def attempt(
    job: Job, focals: np.ndarray, *, fixed: bool = True, start: Sequence[int] | None = None, number: int = 0,
    share: float = 1.0, at_once: bool = False,
) -> SparseModel | None:  # fmt: skip
    """Reconstruct from the job's matches; images are places in its list. None where that gives fewer than two.

    Args:
        job: with matches.
        focals: the focal length of each camera over the width; fixed: whether they stay.
        start: two photographs to begin with, if that goes.
        number: to be added to the job's seed.
        share: of the matches that are used.
        at_once: all photographs at once (`global` mapping), not one after the other; then with `fixed` and no start.
    """
    seed, models = job.seed + number, {}
    pixels = focals * [lens.width for lens in job.lenses]
    angle = min(MAPPED_ANGLE, math.degrees(job.needed.mapped / float(np.median(pixels))))
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        path = Path(shutil.copyfile(database_of(job), f"{folder}/run.db"))
        _prepare(path, job.lenses, pixels, share, seed)
        pycolmap.set_random_seed(seed)
        try:
            if at_once:
                models = _global(path, job, seed, angle)
            else:
                for first in dict.fromkeys([start, None]):
                    models = models or _incremental(path, job, seed, fixed, angle, first)
        except Exception as error:  # whatever a library of C++ may raise
            log.warning("a reconstruction failed: %s", error)
    best = max(models.values(), key=lambda model: (model.num_reg_images(), model.num_points3D()), default=None)
    if best is None or best.num_reg_images() < 2:
        return None
    _fit(best, fixed)
    result = as_arrays(best, 1)
    result.explained, result.made = _explained(job, best), best
    return result


def refitted(model: SparseModel, factor: float | None = None) -> SparseModel:
    """A model that `attempt` gave, fitted again with its focal lengths held at `factor` times what they are, or free; where
    the lenses bend, their distortion may make up for that."""
    other = copy.deepcopy(model.made)
    bends = any(len(camera.params) > 3 for camera in other.cameras.values())
    _fit(other, factor is not None, factor or 1.0, bends)
    return as_arrays(other, 1)


def with_distortion(model: SparseModel, held: bool = False) -> tuple[SparseModel, dict[int, Lens]]:
    """A model that `attempt` gave, fitted again with a radial distortion of each camera (COLMAP's SIMPLE_RADIAL), and its
    focal length if that is not held; and the lenses, by their number in the job."""
    other = copy.deepcopy(model.made)
    for camera in other.cameras.values():
        focal, cx, cy, k = [*camera.params, 0.0][:4]
        camera.model, camera.params = pycolmap.CameraModelId.SIMPLE_RADIAL, [focal, cx, cy, k]
    _fit(other, held, distorted=True)
    lenses = {
        number - 1: Lens(camera.model_name, camera.width, camera.height, tuple(map(float, camera.params)))
        for number, camera in other.cameras.items()
    }
    return as_arrays(other, 1), lenses


def _prepare(path: Path, lenses: list[Lens], focals: np.ndarray, share: float, seed: int) -> None:
    """The lenses with these focal lengths (pixels), and this share of the matches, into a database."""
    with closing(pycolmap.Database.open(path)) as database:
        for number, (lens, focal) in enumerate(zip(lenses, focals), 1):
            lens = lens._replace(params=(focal, *lens.params[1:]))
            camera = pycolmap.Camera(camera_id=number, **lens._asdict())
            camera.has_prior_focal_length = True  # else the global mapper finds its own
            database.update_camera(camera)
        generator = np.random.default_rng(seed)
        for pair, geometry in zip(*database.read_two_view_geometries()) if share < 1 else ():
            matches = geometry.inlier_matches
            count = round(share * len(matches))
            geometry.inlier_matches = matches[np.sort(generator.permutation(len(matches))[:count])]
            database.update_two_view_geometry(*pycolmap.pair_id_to_image_pair(pair), geometry)


def _incremental(
    path: Path, job: Job, seed: int, fixed: bool, angle: float, start: Sequence[int] | None
) -> dict[int, pycolmap.Reconstruction]:
    """Reconstructions of the photographs that take part, one after the other."""
    options = pycolmap.IncrementalPipelineOptions(
        random_seed=seed, num_threads=1, min_model_size=2, max_num_models=3, extract_colors=False
    )
    options.ba_refine_focal_length = not fixed
    options.ba_refine_extra_params = options.ba_refine_principal_point = False
    options.image_names = [image_name(index) for index in job.kept]
    if start is not None:
        options.init_image_id1, options.init_image_id2 = (index + 1 for index in start)
    mapper, points, error = options.mapper, options.triangulation, tolerance(job.longest)
    mapper.random_seed = points.random_seed = seed
    mapper.num_threads = 1
    mapper.abs_pose_refine_focal_length = mapper.abs_pose_refine_extra_params = False
    mapper.init_max_forward_motion = 1.0
    mapper.init_min_num_inliers, mapper.abs_pose_min_num_inliers = 30, 20
    mapper.init_min_tri_angle = mapper.filter_min_tri_angle = points.min_angle = angle
    mapper.ba_local_min_tri_angle = angle
    mapper.init_max_error = mapper.filter_max_reproj_error = error
    mapper.abs_pose_max_error = 3 * error
    points.merge_max_reproj_error = points.complete_max_reproj_error = error
    points.ignore_two_view_tracks = False
    return pycolmap.incremental_mapping(path, path.parent, path.parent, options)


def _global(path: Path, job: Job, seed: int, angle: float) -> dict[int, pycolmap.Reconstruction]:
    """Reconstructions of the photographs that take part, all at once."""
    options = pycolmap.GlobalPipelineOptions(random_seed=seed, num_threads=1, min_model_size=2)
    options.image_names = [image_name(index) for index in job.kept]
    mapper, adjustment = options.mapper, options.mapper.bundle_adjustment
    mapper.random_seed = mapper.rotation_averaging.random_seed = seed
    mapper.global_positioning.random_seed = mapper.retriangulation.random_seed = seed
    mapper.num_threads = adjustment.ceres.solver_options.num_threads = 1
    adjustment.refine_focal_length = False
    adjustment.refine_extra_params = adjustment.refine_principal_point = False
    adjustment.ceres.use_gpu = mapper.global_positioning.use_gpu = False
    adjustment.min_track_length = mapper.global_positioning.min_num_view_per_track = 2
    mapper.track_min_num_views_per_track = 2
    mapper.min_tri_angle_deg = mapper.retriangulation.min_angle = angle
    mapper.retriangulation.ignore_two_view_tracks = False
    return pycolmap.global_mapping(path, path.parent, path.parent, options)


def _fit(model: pycolmap.Reconstruction, fixed: bool, factor: float = 1.0, distorted: bool = False) -> None:
    """Fit cameras and points to the matches, robustly and to the end, which mapping does not; the focal lengths times
    `factor` first, and then held if `fixed`; the distortion too if `distorted`."""
    for camera in model.cameras.values():
        camera.params = [camera.params[0] * factor, *camera.params[1:]]
    options = pycolmap.BundleAdjustmentOptions(
        refine_focal_length=not fixed, refine_extra_params=distorted, print_summary=False
    )
    options.ceres.loss_function_type = pycolmap.LossFunctionType.SOFT_L1
    options.ceres.loss_function_scale = LOSS_SCALE
    solver = options.ceres.solver_options
    solver.num_threads, solver.max_num_iterations, solver.function_tolerance = 1, 50, 1e-6
    pycolmap.bundle_adjustment(model, options)


def _explained(job: Job, model: pycolmap.Reconstruction) -> np.ndarray:
    """Of each registered image, in order of its id, the share of its verified matches that fit the cameras.

    A match fits if it is within EPIPOLAR_ERROR (Sampson) of where the two cameras say it must lie. A point far off fits
    as well as a near one; in a scene that moved, or where a camera stands wrong, many do not.
    """
    with closing(pycolmap.Database.open(database_of(job))) as database:
        fits = {i: np.zeros(2) for i in sorted(model.reg_image_ids())}  # of matches: those that fit, and all
        places = {i: database.read_keypoints(i)[:, :2].astype(float) for i in fits}
        geometries = list(zip(*database.read_two_view_geometries()))
    for pair, geometry in geometries:
        one, other = pycolmap.pair_id_to_image_pair(pair)
        matches = geometry.inlier_matches
        if one not in fits or other not in fits or not len(matches):
            continue
        first, second = model.images[one], model.images[other]
        motion = second.cam_from_world() * first.cam_from_world().inverse()
        inner, outer = (np.linalg.inv(image.camera.calibration_matrix()) for image in (first, second))
        error = pycolmap.compute_squared_sampson_error(
            _unbent(first.camera, places[one][matches[:, 0]]), _unbent(second.camera, places[other][matches[:, 1]]),
            outer.T @ pycolmap.essential_matrix_from_pose(motion) @ inner,
        )  # fmt: skip
        longest = max(second.camera.width, second.camera.height)
        near = np.array(error) < max(1.0, EPIPOLAR_ERROR * longest) ** 2
        for image in (one, other):
            fits[image] += near.sum(), len(near)
    return np.array([fit / max(count, 1) for fit, count in fits.values()])


def place(job: Job, poses: np.ndarray) -> SparseModel:
    """Points from the job's matches by cameras that stay: its lenses, and poses (N,4,4) world -> camera."""
    model = pycolmap.Reconstruction()
    with closing(pycolmap.Database.open(database_of(job))) as database:
        for camera in database.read_all_cameras():
            model.add_camera_with_trivial_rig(camera)
        for number, pose in enumerate(poses, 1):
            image = database.read_image(number)
            image.points2D = pycolmap.Point2DList(
                [pycolmap.Point2D(xy.astype(float)) for xy in database.read_keypoints(number)[:, :2]]
            )
            image.reset_frame_ptr() if image.has_frame_ptr() else None
            new = pycolmap.Image(name=image.name, image_id=number, camera_id=image.camera_id, points2D=image.points2D)
            model.add_image_with_trivial_frame(new, pycolmap.Rigid3d(pose[:3]))
    options = pycolmap.IncrementalPipelineOptions(random_seed=0, num_threads=1, extract_colors=False)
    options.mapper.filter_min_tri_angle = options.triangulation.min_angle = PLACED_ANGLE
    options.mapper.random_seed = options.triangulation.random_seed = 0
    options.triangulation.ignore_two_view_tracks = False
    folder = tempfile.mkdtemp(dir=job.folder)
    return as_arrays(pycolmap.triangulate_points(model, database_of(job), folder, folder, True, options, False), 1)


def read(folder: Path, memory: int) -> SparseModel:
    """A finished COLMAP model, whose images are ids. memory: bytes that this may take, where the system limits it."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError, OSError):  # not on every system
        pass
    return as_arrays(pycolmap.Reconstruction(folder), 0)


def as_arrays(model: pycolmap.Reconstruction, first: int) -> SparseModel:
    """Registered images with their cameras, and what each sees of the points; first: the id that becomes image 0.

    Where a lens has distortion the places are those of the pinhole picture (`_straight`); the errors stay those of the
    picture in which the points were found.
    """
    ids, points = sorted(model.reg_image_ids()), [point for _, point in sorted(model.points3D.items())]
    row_of = {image: row for row, image in enumerate(ids)}
    seen = [
        (row_of[element.image_id], element.point2D_idx, row)
        for row, point in enumerate(points)
        for element in point.track.elements
        if element.image_id in row_of
    ]
    seen_by, feature, point = np.array(seen, dtype=np.int64).reshape(-1, 3).T
    xyz = np.array([each.xyz for each in points]).reshape(-1, 3)
    uv, depth, error = np.zeros((len(point), 2)), np.zeros(len(point)), np.zeros(len(point))
    pose, size, intrinsics = np.tile(np.eye(4), (len(ids), 1, 1)), np.zeros((len(ids), 2), int), np.zeros((len(ids), 4))
    for row, image in enumerate(model.images[i] for i in ids):
        camera, which = image.camera, seen_by == row
        pose[row, :3], size[row] = image.cam_from_world().matrix(), (camera.width, camera.height)
        if any(word in camera.model_name for word in FISHEYE):
            intrinsics[row] = np.nan
        else:
            centre = camera.principal_point_x, camera.principal_point_y
            intrinsics[row] = camera.focal_length_x, camera.focal_length_y, *centre
        if which.any():
            places = image.points2D
            uv[which] = [places[int(k)].xy for k in feature[which]]
            local = xyz[point[which]] @ pose[row, :3, :3].T + pose[row, :3, 3]
            depth[which] = local[:, 2]
            error[which] = np.linalg.norm(camera.img_from_cam(local) - uv[which], axis=1)
            uv[which] = _straight(camera, uv[which])
    return SparseModel(np.array(ids) - first, pose, size, intrinsics, xyz, seen_by, feature, point, uv, depth, error)


def _straight(camera: pycolmap.Camera, uv: np.ndarray) -> np.ndarray:
    """`_unbent`, and NaN outside of the pinhole picture."""
    places = _unbent(camera, uv)
    if places is uv:
        return uv
    inside = ((places >= 0) & (places <= [camera.width, camera.height])).all(1)
    return np.where(inside[:, None], places, np.nan)


def _unbent(camera: pycolmap.Camera, uv: np.ndarray) -> np.ndarray:
    """Where the same camera without distortion sees what it sees at uv (N,2), in pixels; NaN where the distortion cannot
    be undone. Without distortion, and of a fisheye, uv itself."""
    lens = Lens(camera.model_name, camera.width, camera.height, tuple(camera.params))
    if not lens.distortion or any(word in lens.model for word in FISHEYE):
        return uv
    rays = camera.cam_from_img(uv)
    returned = camera.img_from_cam(np.concatenate([rays, np.ones_like(rays[:, :1])], 1))
    fx, fy, cx, cy = lens.pinhole.params
    good = np.linalg.norm(returned - uv, axis=1) < RETURNS
    return np.where(good[:, None], rays * [fx, fy] + [cx, cy], np.nan)
