"""Tours: one procedural scene seen by several cameras, with exact depth and poses, for structure from motion.

The worlds are those of `generate.py` with the fine structure of `detail.py`, which matching needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lib.core.errors import ConfigError
from ttt_lib.core.types import Sample
from ttt_lib.data.samples import SampleSet
from ttt_lib.data.scenes.detail import Detail
from ttt_lib.data.scenes.generate import KINDS, SEVERITIES, SIZE, as_sample, make_scenes, place_cameras
from ttt_lib.data.scenes.raycast import Picture, Scenes, draw, make_atlas
from ttt_lib.data.scenes.textures import make_textures
from ttt_lib.data.shifts import check_shifts
from ttt_lib.geometry.cameras import look_at_transform, project, transform_points

GLANCE = (24, 32)  # pixels of the small pictures by which a path is chosen
CAMERAS, PATHS = 4, 4  # directions of view, and paths for each, that are tried
GOOD = 0.6  # of what a camera sees, its neighbour sees this much: the path is taken
RAYS = 2  # along each side of a pixel
TOUR_SEED = 700_000  # far from the seeds of training and of the held-out set


@dataclass
class Tour:
    """Cameras of one scene, and their photographs once they are drawn: `scenes` (one), `poses` (V,4,4) world to camera
    (OpenCV), `intrinsics` (3,3), the median depth (metres) that the baseline is a share of, and `samples` (V)."""

    scenes: Scenes
    poses: Tensor
    intrinsics: Tensor
    median_depth: float
    samples: list[Sample] = field(default_factory=list)


@lru_cache(maxsize=4)
def _atlas(seed: int) -> list[Tensor]:
    return make_atlas(make_textures(seed))


def path_offsets(views: int, step: float, distance: float, rng: np.random.Generator) -> Tensor:
    """Places of cameras (V,3) around a camera at the origin that looks along +z at something `distance` away.

    Neighbours in the list are `step` apart. They stand on an arc about what is looked at, or on a line; from five
    cameras on, in two rows. The direction is mostly sideways.
    """
    columns = views if views < 5 else math.ceil(views / 2)
    place = np.arange(columns) - (columns - 1) / 2
    order = [(place[i], 0.0) for i in range(columns)] + [(place[i], 1.0) for i in reversed(range(columns))]
    along, row = np.array(order[:views]).T
    tilt = rng.normal(0, 0.25) if rng.random() < 0.7 else rng.uniform(-1.5, 1.5)
    sideways, upward = np.array([math.cos(tilt), math.sin(tilt), 0]), np.array([-math.sin(tilt), math.cos(tilt), 0])
    if rng.random() < 0.5:
        angle = 2 * math.asin(min(step / (2 * distance), 1.0)) * along
        offset = distance * (np.sin(angle)[:, None] * sideways + (1 - np.cos(angle))[:, None] * [0, 0, 1])
    else:
        turn = rng.normal(0, 0.2)
        offset = step * along[:, None] * (math.cos(turn) * sideways + math.sin(turn) * np.array([0, 0, 1]))
    return torch.from_numpy(offset + step * (row - row.mean())[:, None] * upward).float()


def poses_on(offsets: Tensor, base: Tensor, distance: float, rng: np.random.Generator) -> Tensor:
    """World to camera (V,4,4) for cameras at `offsets` (V,3) in the frame of `base` (4,4), looking at about the point
    `distance` ahead of it, a degree off and a degree turned."""
    target = torch.tensor([0.0, 0.0, distance]) + torch.from_numpy(rng.normal(0, 0.015 * distance, (len(offsets), 3)))
    roll = torch.from_numpy(rng.normal(0, 0.02, len(offsets))).float()
    turned = look_at_transform(offsets, target.float(), roll)
    # `look_at_transform` keeps the target's direction in the picture: the middle, since `target` is nearly on the axis
    return turned @ base


def _shared(picture: Picture) -> Tensor:
    """The least share of what one camera sees that its neighbour in the list sees too, times the share of surface."""
    points, pose = picture.points, picture.transform
    world_to_next = pose[1:] @ torch.linalg.inv(pose[:-1])
    moved = transform_points(points[:-1], world_to_next[:, None, None])
    uv = project(moved, picture.intrinsics[1:, None, None])
    seen = F.grid_sample(points[1:, ..., 2][:, None], 2 * uv.nan_to_num(9) - 1, mode="nearest", align_corners=False)
    same = ((moved[..., 2] / seen[:, 0] - 1).abs() < 0.05) & ((uv > 0) & (uv < 1)).all(-1) & (moved[..., 2] > 0)
    known = picture.mask.float().mean((1, 2))
    if len(points) == 1:
        return known.min()
    return (same.float().mean((1, 2)) / known[:-1].clamp_min(1e-3)).min() * known.min()


def _plan(
    scenes: Scenes, kind: str, place: Tensor, seed: int, views: int, baseline: float, aspect_ratio: float
) -> Tour:
    """The first path on which neighbours see the same and nothing stands close before a camera, else the best."""
    bases, intrinsics = place_cameras([kind] * CAMERAS, place.expand(CAMERAS, 3), seed, aspect_ratio)
    glances = draw(scenes.select([0] * CAMERAS), bases, intrinsics, GLANCE, shadows=False)
    best, plan = -1.0, None
    for number in range(CAMERAS * PATHS):
        rng = np.random.default_rng([seed, 5, number])
        which = number % CAMERAS
        median = float(glances.points[which, ..., 2].nanmedian().nan_to_num(5.0))
        offsets = path_offsets(views, baseline * median, median, rng)
        poses = poses_on(offsets, bases[which], median, rng)
        glance = draw(scenes.select([0] * views), poses, intrinsics[which].expand(views, 3, 3), GLANCE, shadows=False)
        close = (glance.points[..., 2] < 0.25 * median).float().mean((1, 2)).max()
        score = float(_shared(glance) * (1 - close))
        if score > best or plan is None:
            best, plan = score, Tour(scenes, poses, intrinsics[which], median)
        if score > GOOD:
            break
    return plan


def _smooth_image(scenes: Scenes, pose: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
    """The picture (3,H,W) as the mean of `RAYS` x `RAYS` rays a pixel: without it, the steps of the edges move the
    features that matching finds, and with them the focal length by up to 15 %."""
    images = []
    for i in range(RAYS * RAYS):
        moved = intrinsics.clone()
        moved[0, 2] += ((i % RAYS + 0.5) / RAYS - 0.5) / size[1]
        moved[1, 2] += ((i // RAYS + 0.5) / RAYS - 0.5) / size[0]
        images.append(draw(scenes, pose[None], moved[None], size).image[0])
    return torch.stack(images).mean(0)


def photograph(
    scenes: Scenes, poses: Tensor, intrinsics: Tensor, size: tuple[int, int] = SIZE, shift: str | None = None,
    severity: int = 0, seed: int = 0, first: int = 0,
) -> list[Sample]:  # fmt: skip
    """One scene (a batch of one) from cameras `poses` (V,4,4) with the same intrinsics (3,3): samples `view_0`, ...

    A camera's picture does not depend on which others are drawn with it; first: the number of the first one.
    """
    samples, plain = [], replace(scenes, detail=None)
    for number, pose in enumerate(poses, first):
        truth = draw(plain, pose[None], intrinsics[None], size, shadows=False)
        image, own = _smooth_image(scenes, pose, intrinsics, size), 1000 * seed + number
        samples.append(as_sample(truth, f"view_{number}", "tours", shift, severity, own, image))
    return samples


@lru_cache(maxsize=2)
def plan_tour(kind: str, seed: int, views: int, baseline: float, aspect_ratio: float) -> Tour:
    """The scene of `make_tour` and its cameras, before anything is drawn."""
    if views < 1 or not 0 < baseline <= 1:
        raise ConfigError(f"tours: {views} views with baseline {baseline}; give views from 1 and baselines in (0, 1].")
    scenes, places = make_scenes([kind], TOUR_SEED + seed, _atlas(seed % 4))
    scenes.detail = Detail(TOUR_SEED + seed, scenes.atlas, rays=RAYS)
    return _plan(scenes, kind, places[0], TOUR_SEED + seed, views, baseline, aspect_ratio)


def make_tour(
    kind: str, seed: int, views: int = 4, baseline: float = 0.1, size: tuple[int, int] = SIZE,
    shift: str | None = None, severity: int = 0,
) -> Tour:  # fmt: skip
    """Photographs of one procedural scene, with exact depth (metres), points and poses; the same from the same seed.

    Args:
        kind: Of the scene: `room`, `street`, `ground` or `table`.
        seed: Of everything drawn at random.
        views: Number of cameras V. All have one focal length and look at about the same point.
        baseline: Distance between neighbouring cameras, as a share of the median depth of what they look at: 0.01 to
            0.3 is what photographs have.
        size: (H, W) in pixels.
        shift, severity: Of `data.shifts`, the same for all photographs.

    Returns:
        `Tour` of V samples named `view_0`, ... and poses (V,4,4).

    Raises:
        ConfigError: no views, or a baseline outside (0, 1].
        ValueError: an unknown kind.

    Example:
        >>> tour = make_tour("table", seed=1, views=2, baseline=0.1, size=(24, 32))
        >>> [sample.name for sample in tour.samples], tuple(tour.poses.shape)
        (['view_0', 'view_1'], (2, 4, 4))
    """
    plan = plan_tour(kind, seed, views, baseline, size[1] / size[0])
    samples = photograph(plan.scenes, plan.poses, plan.intrinsics, size, shift, severity, seed)
    return replace(plan, poses=plan.poses.clone(), samples=samples)


def open_tours(
    count: int = 12, seed: int = 0, views: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    baselines: Sequence[float] = (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3), shifts: Sequence[str] | None = None,
    severities: Sequence[int] | None = None, width: int = SIZE[1], height: int = SIZE[0], name: str | None = None,
) -> SampleSet:  # fmt: skip
    """The set `tours`: `count` scenes whose photographs are named `tour_003/view_0`, ... (`SampleSet.scenes`).

    The kinds of scene take turns; each tour has one of all combinations of `views`, `baselines`, `shifts` and
    `severities` (1 to 5 by default), in an order drawn from the seed. Without `shifts` the pictures are clean.
    Raises `UserError` for an unknown shift, no views or a baseline outside (0, 1].
    """
    check_shifts(shifts or ())
    if not views or not baselines or min(views) < 1 or not all(0 < b <= 1 for b in baselines):
        raise ConfigError("data: tours take `views` from 1 and `baselines` in (0, 1], at least one of each.")
    changes = list(product(shifts, severities or SEVERITIES)) if shifts else [(None, 0)]
    choices = list(product(views, baselines, changes))
    order = np.random.default_rng([seed, 6]).permutation(len(choices))
    plan: dict[str, tuple] = {}
    scenes: dict[str, list[str]] = {}
    for number in range(count):
        choice, scene = choices[order[number % len(choices)]], f"tour_{number:03d}"
        scenes[scene] = [f"{scene}/view_{view}" for view in range(choice[0])]
        plan |= {key: (number, view, *choice) for view, key in enumerate(scenes[scene])}

    def load(key: str) -> Sample:
        number, view, of, baseline, (shift, severity) = plan[key]
        own = 10_000 * seed + number
        tour = plan_tour(KINDS[number % len(KINDS)], own, of, baseline, width / height)
        pose = tour.poses[view : view + 1]
        sample = photograph(tour.scenes, pose, tour.intrinsics, (height, width), shift, severity, own, view)[0]
        return replace(sample, name=key, dataset=name or "tours")

    fingerprint = f"tours/{seed}/{width}x{height}/{list(plan.items())}"
    return SampleSet(name or "tours", list(plan), load, fingerprint, scenes=scenes)
