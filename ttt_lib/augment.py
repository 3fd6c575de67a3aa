"""Views of an image with the target carried into them: crop, mirror, another camera, other colours.

The geometry of a view is one camera: a rigid transform (with a reflection for a mirror) and intrinsics. Crop, mirror
and novel view are factors of that transform, so they compose by multiplication. Cameras that stay in place are one
homography warp; cameras that move go through the renderer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lib.config import CropConfig, ViewConfig
from ttt_lib.geometry import (
    MIRROR,
    look_at_transform,
    mirror_intrinsics,
    plain_crop,
    project,
    recentred_crop,
    transform_points,
    unproject,
    warp_view,
)
from ttt_lib.photometric import photometric
from ttt_lib.render import NovelViewRenderer

# Largest translation along x, y and z, as fractions of the scene's median depth, and largest roll in degrees.
CAMERA_SEVERITIES = {
    0: (0.0, 0.0, 0.0, 0.0),
    1: (0.02, 0.01, 0.02, 0.5),
    2: (0.05, 0.025, 0.05, 1.0),
    3: (0.08, 0.04, 0.08, 2.0),
    4: (0.12, 0.06, 0.12, 3.0),
    5: (0.18, 0.09, 0.18, 5.0),
}
OCCLUSION_TOLERANCE = 0.05  # relative depth by which a carried-back pixel may lie behind what the view shows


@dataclass
class View:
    """B views and what they should give.

    image (B,3,h,w) in [0,1]; points (B,h,w,3) the target in each view's camera, NaN where unknown; mask (B,h,w) True
    where the target is known; negative (B,h,w) True where the target says that nothing is there (sky); intrinsics
    (B,3,3); transform (B,4,4) original camera -> view camera; kind: e.g. "novel+crop+mirror"; stats: counts of views
    `drawn`, `novel`, `redrawn` (drawn again because too little was known) and `identity` (given up after all tries).
    """

    image: Tensor
    points: Tensor
    mask: Tensor
    negative: Tensor | None
    intrinsics: Tensor
    transform: Tensor
    kind: list[str]
    stats: dict[str, int] = field(default_factory=dict)


def sample_cameras(
    median_depth: Tensor | float, severity: int, count: int, generator: torch.Generator
) -> Tensor:
    """Cameras near the original one that keep looking at the scene: (count, 4, 4), original camera -> new camera.

    The new camera stands at an offset drawn uniformly up to `CAMERA_SEVERITIES[severity]` times `median_depth`, turned
    so that the point on the old optical axis at the median depth stays on the axis, and rolled a little.
    """
    *reach, roll = CAMERA_SEVERITIES[severity]
    draws = 2 * torch.rand(count, 4, generator=generator) - 1
    depth = torch.as_tensor(median_depth, dtype=torch.float32).cpu()
    offset = draws[:, :3] * torch.tensor(reach) * depth
    target = torch.stack([torch.zeros(()), torch.zeros(()), depth]).expand(count, 3)
    return look_at_transform(offset, target, roll=torch.deg2rad(draws[:, 3] * roll))


def sample_crops(
    intrinsics: Tensor, config: CropConfig, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random crops: rotation (count,4,4), intrinsics (count,3,3) and which are crops at all, (count,) bool.

    A crop's side is uniform in `config.scale` (of the image), its place uniform where it fits.
    """
    draws = torch.rand(count, 4, generator=generator)
    low, high = config.scale
    scale = low + (high - low) * draws[:, 0]
    centre = 0.5 + (draws[:, 1:3] - 0.5) * (1 - scale[:, None])
    chosen = draws[:, 3] < config.probability
    rotation = torch.eye(4).repeat(count, 1, 1)
    original = intrinsics.cpu().expand(count, 3, 3)
    if config.kind == "plain":
        cropped = plain_crop(original, centre, scale)
    else:
        turn, cropped = recentred_crop(original, centre, scale)
        rotation[:, :3, :3] = torch.where(chosen[:, None, None], turn, rotation[:, :3, :3])
    return rotation, torch.where(chosen[:, None, None], cropped, original), chosen


def fill_unknown(image: Tensor, mask: Tensor) -> Tensor:
    """Fill unknown pixels with a smooth blend of the known ones around them (coarser with distance).

    image (B,3,h,w), mask (B,h,w) bool. The network should see neither holes of a made-up colour nor hard edges where
    the scene has none.
    """
    weight = mask[:, None].float()
    levels = [(image * weight, weight)]
    while min(levels[-1][0].shape[-2:]) > 1:
        colour, share = levels[-1]
        levels.append((F.avg_pool2d(colour, 2, ceil_mode=True), F.avg_pool2d(share, 2, ceil_mode=True)))
    filled = levels[-1][0] / levels[-1][1].clamp_min(1e-6)
    for colour, share in reversed(levels[:-1]):
        filled = F.interpolate(filled, colour.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(share > 0, colour / share.clamp_min(1e-6), filled)
    return filled.clamp(0, 1)


def _nothing_there(sky: Tensor, intrinsics: Tensor, transform: Tensor, new: Tensor, size: tuple[int, int]) -> Tensor:
    """Which view pixels look at directions that are sky in the image: (H,W) bool -> (B,h,w) bool.

    Sky is infinitely far, so only the rotation counts, also for cameras that move.
    """
    rays = unproject(torch.ones(*size, device=sky.device), new)
    back = rays @ transform[:, None, :3, :3]  # the inverse rotation
    uv = project(back, intrinsics[:, None, None])
    grid = torch.where(back[..., 2:] > 1e-6, 2 * uv - 1, torch.tensor(9.0, device=sky.device))
    source = sky[None, None].float().expand(len(transform), -1, -1, -1)
    return F.grid_sample(source, grid, mode="nearest", align_corners=False)[:, 0] > 0.5


def _render_moved(
    renderer: NovelViewRenderer, transform: Tensor, intrinsics: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    rendered = renderer.render(transform, intrinsics, size)
    return fill_unknown(rendered.image, rendered.mask), rendered.points, rendered.mask


def make_views(
    image: Tensor,
    points: Tensor,
    mask: Tensor | None,
    intrinsics: Tensor,
    config: ViewConfig,
    count: int,
    generator: torch.Generator,
    renderer: NovelViewRenderer | None = None,
    mirror_keeps_x: bool = False,
) -> View:
    """Draw `count` views of one image, on its device, with the target carried into each.

    image (3,H,W); points (H,W,3) the target in the image's camera; mask (H,W) bool, False where the target says there
    is no surface (None: all is surface); intrinsics (3,3). All randomness comes from `generator` (CPU). `renderer` is
    needed when `config.novel_view.probability` is above zero; its scene is set here when the target is a new one.
    `mirror_keeps_x` reproduces the public release: mirrored targets keep the sign of x.

    Novel views with less than `minimum_known` known pixels are drawn again, and stay in place after `tries` attempts.
    """
    device = image.device
    height, width = image.shape[-2:]
    size = tuple(config.size) if config.size is not None else (height, width)
    mask = torch.ones(height, width, dtype=torch.bool, device=device) if mask is None else mask
    surface = mask & torch.isfinite(points).all(-1) & (points[..., 2] > 0)
    novel = config.novel_view

    turn, new_intrinsics, cropped = sample_crops(intrinsics, config.crop, count, generator)
    flags = torch.rand(count, 2, generator=generator)
    mirrored = flags[:, 0] < config.mirror
    moved = flags[:, 1] < novel.probability
    reflect = torch.where(mirrored[:, None, None], MIRROR.cpu(), torch.eye(4))
    new_intrinsics = torch.where(mirrored[:, None, None], mirror_intrinsics(new_intrinsics), new_intrinsics)
    median = points[..., 2][surface].median() if bool(surface.any()) else torch.ones(())
    stats = {"drawn": count, "novel": int(moved.sum()), "redrawn": 0, "identity": 0}

    fixed = reflect @ turn
    transform = fixed.clone()
    out_image = torch.empty(count, 3, *size, device=device, dtype=image.dtype)
    out_points = torch.empty(count, *size, 3, device=device, dtype=points.dtype)
    out_mask = torch.zeros(count, *size, dtype=torch.bool, device=device)

    waiting = torch.nonzero(moved)[:, 0]
    if waiting.numel():
        if renderer is None:
            raise ValueError("views from other cameras are asked for, but there is no renderer")
        if getattr(renderer, "scene_points", None) is not points:
            renderer.set_scene(image, points, surface, intrinsics)
            renderer.scene_points = points
    for attempt in range(novel.tries):
        if not waiting.numel():
            break
        stats["redrawn"] += int(waiting.numel()) if attempt else 0
        # Draw for all views, so that one view's bad luck does not change the cameras of the others.
        cameras = sample_cameras(median, novel.severity, count, generator)
        transform[waiting] = fixed[waiting] @ cameras[waiting]
        rows = waiting.to(device)
        rendered = _render_moved(renderer, transform[waiting].to(device), new_intrinsics[waiting].to(device), size)
        out_image[rows], out_points[rows], out_mask[rows] = rendered
        share = rendered[2].flatten(1).float().mean(1).cpu()
        waiting = waiting[share < novel.minimum_known]
    if waiting.numel():
        stats["identity"] = int(waiting.numel())
        transform[waiting], moved[waiting] = fixed[waiting], False

    transform, new_intrinsics = transform.to(device), new_intrinsics.to(device)
    still = torch.nonzero(~moved)[:, 0].to(device)
    if still.numel():
        n = len(still)
        out_image[still], out_points[still], out_mask[still] = warp_view(
            image.expand(n, -1, -1, -1),
            points.expand(n, -1, -1, -1),
            surface.expand(n, -1, -1),
            intrinsics.expand(n, 3, 3),
            transform[still],
            new_intrinsics[still],
            size,
        )
    negative = _nothing_there(~mask, intrinsics.expand(count, 3, 3), transform, new_intrinsics, size) & ~out_mask
    out_points = torch.where(out_mask[..., None], out_points, torch.nan)
    if mirror_keeps_x:
        sign = torch.where(mirrored, -1.0, 1.0).to(device)
        out_points = out_points * torch.stack([sign, sign.abs(), sign.abs()], -1)[:, None, None, :]
    colour = config.photometric
    out_image = photometric(out_image, colour.severity, generator, colour.probability, colour.blur)
    names = (("novel", moved), ("crop", cropped), ("mirror", mirrored))
    kind = ["+".join(name for name, which in names if bool(which[i])) or "whole" for i in range(count)]
    return View(out_image, out_points, out_mask, negative, new_intrinsics, transform, kind, stats)


def carry_back(view: View, predicted: Tensor, points: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Bring predictions on the views back to the original camera.

    predicted (B,h,w,3): points in each view's camera; points (H,W,3): the geometry that says where each original pixel
    lies in the view (for cameras that stay in place its depth does not matter). Returns points (B,H,W,3) in the
    original camera and mask (B,H,W): inside the view and, where the target was rendered, not hidden there.
    """
    placed = transform_points(points.expand(len(predicted), -1, -1, -1), view.transform[:, None, None])
    uv = project(placed, view.intrinsics[:, None, None])
    grid = torch.where(placed[..., 2:] > 1e-6, 2 * uv - 1, torch.tensor(9.0, device=uv.device)).nan_to_num(9.0)
    # Points over depth, and one over depth, are linear in the pixel on planes: interpolation is exact there.
    z = predicted[..., 2:].clamp_min(1e-6)
    packed = torch.cat([predicted / z, 1 / z], -1).permute(0, 3, 1, 2)
    sampled = F.grid_sample(packed, grid, mode="bilinear", padding_mode="border", align_corners=False)
    sampled = sampled.permute(0, 2, 3, 1)
    found = sampled[..., :3] / sampled[..., 3:]
    inside = (grid.abs() <= 1).all(-1)
    target = F.grid_sample(view.points[..., 2][:, None].nan_to_num(0.0), grid, mode="nearest", align_corners=False)[:, 0]
    moved = view.transform[:, :3, 3].abs().amax(-1)[:, None, None] > 0
    hidden = placed[..., 2] > target * (1 + OCCLUSION_TOLERANCE)
    return transform_points(found, torch.linalg.inv(view.transform)[:, None, None]), inside & ~(moved & hidden)


def cutmix(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019, as Depth Anything uses it): put a rectangle of each image's successor into it.

    images (B,3,h,w) -> mixed images and the region (B,h,w), True where the successor (i + 1 modulo B) shows. The
    rectangle's area is uniform in 10 to 60 %. A loss is taken on both regions apart and weighted by area.
    """
    batch, _, height, width = images.shape
    draws = torch.rand(batch, 4, generator=generator).to(images)
    side = (0.1 + 0.5 * draws[:, 0]).sqrt()
    stretch = (0.6 + 0.8 * draws[:, 1]).sqrt()
    tall, wide = (side * stretch).clamp_max(0.95), (side / stretch).clamp_max(0.95)
    top, left = draws[:, 2] * (1 - tall), draws[:, 3] * (1 - wide)
    y = ((torch.arange(height, device=images.device) + 0.5) / height)[None, :, None]
    x = ((torch.arange(width, device=images.device) + 0.5) / width)[None, None, :]
    inside_y = (y >= top[:, None, None]) & (y < (top + tall)[:, None, None])
    region = inside_y & (x >= left[:, None, None]) & (x < (left + wide)[:, None, None])
    return torch.where(region[:, None], images.roll(-1, 0), images), region
