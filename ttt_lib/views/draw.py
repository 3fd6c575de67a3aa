"""Views of an image with the target carried into them: crop, mirror, another camera, other colours.

The geometry of a view is one camera: a rigid transform (with a reflection for a mirror) and intrinsics. Crop, mirror
and novel view are factors of that transform, so they compose by multiplication. Cameras that stay in place are one
homography warp; cameras that move go through the renderer.

Each view takes one row of random numbers of its own, whatever is switched on: with one seed, the first views of a
batch do not depend on how many follow, and a higher severity means more of the same change.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lib.core.registry import SHIFTS
from ttt_lib.core.schema import CropConfig, ShiftConfig, ViewConfig
from ttt_lib.geometry.cameras import (
    MIRROR,
    look_at_transform,
    mirror_intrinsics,
    plain_crop,
    recentred_crop,
)
from ttt_lib.geometry.warp import in_front, places_seen, warp_view
from ttt_lib.views.carry import View
from ttt_lib.views.color import DRAWS as COLOUR_DRAWS
from ttt_lib.views.color import recolour
from ttt_lib.views.renderer import NovelViewRenderer

# Largest translation along x, y and z, as fractions of the scene's median depth, and largest roll in degrees.
CAMERA_SEVERITIES = {
    0: (0.0, 0.0, 0.0, 0.0),
    1: (0.02, 0.01, 0.02, 0.5),
    2: (0.05, 0.025, 0.05, 1.0),
    3: (0.08, 0.04, 0.08, 2.0),
    4: (0.12, 0.06, 0.12, 3.0),
    5: (0.18, 0.09, 0.18, 5.0),
}
CROP_DRAWS, CAMERA_DRAWS, FLAG_DRAWS = 4, 4, 2  # random numbers a view takes; cameras: for each try


def sample_cameras(median_depth: Tensor | float, severity: int, count: int, generator: torch.Generator) -> Tensor:
    """Cameras near the original one that keep looking at the scene: (count, 4, 4), original camera -> new camera.

    The new camera stands at an offset drawn uniformly up to `CAMERA_SEVERITIES[severity]` times `median_depth`, turned
    so that the point on the old optical axis at the median depth stays on the axis, and rolled a little.
    """
    return _cameras(median_depth, severity, torch.rand(count, CAMERA_DRAWS, generator=generator))


def _cameras(median_depth: Tensor | float, severity: int, draws: Tensor) -> Tensor:
    """`sample_cameras` with the random numbers given: draws (B, `CAMERA_DRAWS`)."""
    *reach, roll = CAMERA_SEVERITIES[severity]
    signed = 2 * draws - 1
    depth = torch.as_tensor(median_depth, dtype=torch.float32).cpu()
    offset = signed[:, :3] * torch.tensor(reach) * depth
    target = torch.stack([torch.zeros(()), torch.zeros(()), depth]).expand(len(draws), 3)
    return look_at_transform(offset, target, roll=torch.deg2rad(signed[:, 3] * roll))


def _crops(intrinsics: Tensor, config: CropConfig, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Crops: rotation (B,4,4), intrinsics (B,3,3) and, on the CPU, which are crops at all, (B,) bool; draws (B, `CROP_DRAWS`).

    A crop's side is uniform in `config.scale` (of the image), its place uniform where it fits.
    """
    low, high = config.scale
    decided, draws = draws, draws.to(intrinsics.device, non_blocking=True)
    scale = low + (high - low) * draws[:, 0]
    centre = 0.5 + (draws[:, 1:3] - 0.5) * (1 - scale[:, None])
    chosen = draws[:, 3] < config.probability
    rotation = torch.eye(4, device=draws.device).repeat(len(draws), 1, 1)
    original = intrinsics.expand(len(draws), 3, 3)
    if config.kind == "plain":
        cropped = plain_crop(original, centre, scale)
    else:
        turn, cropped = recentred_crop(original, centre, scale)
        rotation[:, :3, :3] = torch.where(chosen[:, None, None], turn, rotation[:, :3, :3])
    cropped = torch.where(chosen[:, None, None], cropped, original)
    return rotation, cropped, decided[:, 3] < config.probability


def fill_unknown(image: Tensor, mask: Tensor) -> Tensor:
    """Fill unknown pixels with a smooth blend of the known ones around them (coarser with distance).

    image (B,3,h,w), mask (B,h,w) bool. The network should see neither holes of a made-up colour nor hard edges where
    the scene has none. Gray where nothing at all is known.
    """
    weight = mask[:, None].to(image)
    levels = [(image * weight, weight)]
    while max(levels[-1][0].shape[-2:]) > 1:
        colour, share = levels[-1]
        levels.append((F.avg_pool2d(colour, 2, ceil_mode=True), F.avg_pool2d(share, 2, ceil_mode=True)))
    filled = torch.full_like(levels[-1][0], 0.5)
    for colour, share in reversed(levels):
        filled = F.interpolate(filled, colour.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(share > 0, colour / share.clamp_min(1e-6), filled)
    return filled.clamp(0, 1)


class Target(NamedTuple):
    """What views are made of: image (3,H,W), points (H,W,3), where they are a surface and where there is sky (H,W) bool, and
    intrinsics (3,3)."""

    image: Tensor
    points: Tensor
    surface: Tensor
    sky: Tensor
    intrinsics: Tensor


def _views(
    target: Target, transform: Tensor, lens: Tensor, renderer: NovelViewRenderer | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views from cameras that moved, drawn by the renderer, or by a warp from the camera's own place: image without holes,
    points, mask, and where the sky is seen.

    The sky is infinitely far, so only a camera's rotation counts, also where it moves.
    """
    count, size = len(transform), target.image.shape[-2:]
    pictures, intrinsics = target.image.expand(count, -1, -1, -1), target.intrinsics.expand(count, 3, 3)
    if renderer is not None:
        image, points, mask = renderer.render(transform, lens, size)
    else:
        once = target.points[None], target.surface[None]
        image, points, mask = warp_view(pictures, *once, intrinsics, transform, lens, size)
    is_sky = torch.zeros_like(mask)
    if target.sky.is_cuda or bool(target.sky.any()):  # a GPU draws no sky faster than it can be asked
        grid = places_seen(transform, intrinsics, lens, size)
        sky = target.sky.float().expand(count, 1, -1, -1)
        is_sky = (F.grid_sample(sky, grid, mode="nearest", align_corners=False)[:, 0] > 0.5) & ~mask
        if renderer is not None:
            colours = F.grid_sample(pictures, grid, align_corners=False)
            image = torch.where(is_sky[:, None], colours, image)
    if renderer is not None:
        image = fill_unknown(image, mask | is_sky)
    return image, points, mask, is_sky


def _shift(images: Tensor, depth: Tensor, config: ShiftConfig, draws: Tensor) -> tuple[Tensor, list[str]]:
    """Each view under one of the shifts, or as it is: images (B,3,h,w), depth (B,h,w), and the names ("": none).

    The seed of a view is made of its own `draws` (B,n): what other views use does not change with the shifts.
    """
    shifted, names = images.clone(), []
    for i, row in enumerate(draws):
        generator = torch.Generator().manual_seed(zlib.crc32(row.numpy().tobytes()))
        chance, which = torch.rand(2, generator=generator).tolist()
        active = chance < config.probability and config.severity > 0
        names.append(config.names[int(which * len(config.names))] if active else "")
        if active:
            shifted[i] = SHIFTS[names[-1]](images[i], depth[i], config.severity, generator).clamp(0, 1)
    return shifted, names


class Plan(NamedTuple):
    """What is drawn for B views before any pixel is: the way to each from the image's camera when it stays in its place,
    transform (B,4,4) and lens (B,3,3) on the image's device; what is done to it, (B,) bool each; numbers for the rest."""

    transform: Tensor
    lens: Tensor
    moved: Tensor
    cropped: Tensor
    mirrored: Tensor
    coloured: Tensor
    colour_draws: Tensor
    camera_draws: Tensor

    def kinds(self, shifts: list[str]) -> list[str]:
        """What was done to each view, in words."""
        names = ("novel", self.moved), ("crop", self.cropped), ("mirror", self.mirrored), ("photometric", self.coloured)
        parts = [[name for name, which in names if bool(which[i])] + [shift] for i, shift in enumerate(shifts)]
        return ["+".join(filter(None, words)) or "whole" for words in parts]


def _parts(config: ViewConfig) -> list[int]:
    """How many numbers a view takes for its crop, its flags, its colours, and its cameras."""
    return [CROP_DRAWS, FLAG_DRAWS, COLOUR_DRAWS, CAMERA_DRAWS * config.novel_view.tries]


def view_draws(config: ViewConfig, count: int, generator: torch.Generator) -> Tensor:
    """All that `count` views take at random, (count, N) in [0, 1), for `views_of`; generator on the CPU."""
    return torch.rand(count, sum(_parts(config)), generator=generator)


def _plan(intrinsics: Tensor, config: ViewConfig, draws: Tensor) -> Plan:
    crop_draws, flags, colour_draws, camera_draws = draws.split(_parts(config), 1)
    fixed, lens, cropped = _crops(intrinsics, config.crop, crop_draws)
    mirrored = flags[:, 0] < config.mirror
    there = mirrored[:, None, None].to(fixed.device, non_blocking=True)
    return Plan(
        transform=torch.where(there, MIRROR.to(fixed, non_blocking=True) @ fixed, fixed),
        lens=torch.where(there, mirror_intrinsics(lens), lens),
        moved=(flags[:, 1] < config.novel_view.probability) & (config.novel_view.severity > 0),
        cropped=cropped,
        mirrored=mirrored,
        coloured=(colour_draws[:, 0] < config.photometric.probability) & (config.photometric.severity > 0),
        colour_draws=colour_draws,
        camera_draws=camera_draws,
    )


def _put(maps: tuple[Tensor, ...], rows: Tensor, values: tuple[Tensor, ...]) -> None:
    """Values of some rows into the maps of all."""
    for map_, value in zip(maps, values):
        map_[rows] = value


def make_views(
    image: Tensor, points: Tensor, mask: Tensor | None, intrinsics: Tensor, config: ViewConfig, count: int,
    generator: torch.Generator, renderer: NovelViewRenderer | None = None, mirror_keeps_x: bool = False,
) -> View:  # fmt: skip
    """Draw `count` views of one image: `views_of` with the `view_draws` of `generator`."""
    draws = view_draws(config, count, generator)
    return views_of(image, points, mask, intrinsics, config, draws, renderer, mirror_keeps_x)


def views_of(
    image: Tensor, points: Tensor, mask: Tensor | None, intrinsics: Tensor, config: ViewConfig, draws: Tensor,
    renderer: NovelViewRenderer | None = None, mirror_keeps_x: bool = False,
) -> View:  # fmt: skip
    """Views of one image, on its device, with the target carried into each.

    image (3,H,W); points (H,W,3) the target in the image's camera; mask (H,W) bool, False where the target says there
    is no surface (None: all is surface); intrinsics (3,3); draws (B,N) of `view_draws`, a row a view: on the CPU. `renderer`
    is needed when `config.novel_view.probability` is above zero; its scene is set here when the target is a new one.
    `mirror_keeps_x` reproduces the public release: mirrored targets keep the sign of x.

    What a novel view shows and nobody has seen is unknown; its colours are blended in from around (`fill_unknown`).
    The sky counts as infinitely far and keeps its colours. A view of which less than `minimum_known` is surface or sky
    is drawn again, and its camera stays in place after `tries` attempts. Raises `ValueError` without a renderer.
    """
    device, novel, colour = image.device, config.novel_view, config.photometric
    count, size = len(draws), tuple(image.shape[-2:])
    mask = torch.ones(size, dtype=torch.bool, device=device) if mask is None else mask
    target = Target(image, points, mask & in_front(points), ~mask, intrinsics)
    plan = _plan(intrinsics, config, draws)
    fixed, lens, moved = plan.transform, plan.lens, plan.moved
    transform = fixed.clone()
    stats = {"drawn": count, "novel": int(moved.sum()), "redrawn": 0, "identity": 0}

    shapes = ((3, *size), image.dtype), ((*size, 3), points.dtype), (size, torch.bool), (size, torch.bool)
    out = tuple(torch.zeros(count, *shape, device=device, dtype=dtype) for shape, dtype in shapes)
    waiting = torch.nonzero(moved)[:, 0]
    if waiting.numel():
        if renderer is None:
            raise ValueError("views from other cameras are asked for, but there is no renderer")
        if not renderer.holds(image, points):
            renderer.set_scene(image, points, target.surface, intrinsics)
        depths = points[..., 2][target.surface]
        median = depths.median() if len(depths) else torch.ones(())
    for attempt, draw in enumerate(plan.camera_draws.split(CAMERA_DRAWS, 1)):
        if not waiting.numel():
            break
        stats["redrawn"] += int(waiting.numel()) if attempt else 0
        rows = waiting.to(device)
        transform[rows] = fixed[rows] @ _cameras(median, novel.severity, draw[waiting]).to(device)
        _put(out, rows, _views(target, transform[rows], lens[rows], renderer))
        waiting = waiting[(out[2] | out[3])[rows].flatten(1).float().mean(1).cpu() < novel.minimum_known]
    if waiting.numel():
        stats["identity"] = int(waiting.numel())
        transform[waiting.to(device)], moved[waiting] = fixed[waiting.to(device)], False

    still = torch.nonzero(~moved)[:, 0].to(device, non_blocking=True)
    if still.numel():
        _put(out, still, _views(target, fixed[still], lens[still]))

    out_image, out_points, out_mask, negative = out
    out_points = torch.where(out_mask[..., None], out_points, torch.nan)
    if mirror_keeps_x:
        wrong = out_points * MIRROR.diagonal()[:3].to(out_points)
        out_points = torch.where(plan.mirrored.to(device)[:, None, None, None], wrong, out_points)
    shifts = [""] * count
    if config.shift.names:
        out_image, shifts = _shift(out_image, out_points[..., 2], config.shift, plan.colour_draws)
    out_image = recolour(out_image, colour.severity, plan.colour_draws, colour.probability, colour.blur)
    return View(out_image, out_points, out_mask, negative, lens, transform, plan.kinds(shifts), stats)
