"""Predictions on views brought back to the image, and mixtures of views."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lib.geometry.cameras import (
    inverse,
    project,
    transform_points,
    unproject,
    uv_map,
)
from ttt_lib.geometry.warp import EDGE_RTOL

OCCLUSION_TOLERANCE = 0.05  # relative depth by which a carried-back pixel may lie behind what the view shows


OUTSIDE = 9.0  # a sampling position (the image is -1 to 1) for directions that the image does not hold


def carry_back(view: View, predicted: Tensor, points: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Bring predictions on the views back to the original camera.

    predicted (B,h,w,3): points in each view's camera; points (H,W,3): the geometry that says where each original pixel
    lies in the view, NaN where unknown (cameras that stay in place do not need it); intrinsics (3,3) of the original
    camera. Returns points (B,H,W,3) in the original camera and mask (B,H,W): True where the pixel lies inside the
    view, is not hidden there, and is not at a depth edge of the prediction, where interpolation would make up a point.
    """
    batch, height, width = predicted.shape[:3]
    known = torch.isfinite(points).all(-1) & (points[..., 2] > 0)
    rays = unproject(torch.ones_like(points[..., 2]), intrinsics)
    placed = transform_points(torch.where(known[..., None], points, rays), view.transform[:, None, None])
    grid = torch.where(placed[..., 2:] > 1e-6, 2 * project(placed, view.intrinsics[:, None, None]) - 1, OUTSIDE)
    # Beyond the outermost pixel centres there would be extrapolation.
    inside = (grid.abs() <= 1 - 1 / torch.tensor([width, height]).to(grid) + 1e-5).all(-1)

    # Points over depth, and one over depth, are linear in the pixel on planes: interpolation is exact there.
    usable = torch.isfinite(predicted).all(-1) & (predicted[..., 2] > 0)
    z = torch.where(usable, predicted[..., 2], 1.0)
    packed = torch.cat([torch.where(usable[..., None], predicted, 0.0) / z[..., None], 1 / z[..., None]], -1)
    sampled = F.grid_sample(packed.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=False)
    found = (sampled[:, :3] / sampled[:, 3:]).permute(0, 2, 3, 1)

    # Nearest and farthest of the four pixels around each position; an unknown one spoils both.
    nearest = -F.max_pool2d(F.pad(-torch.where(usable, z, 0.0), (0, 1, 0, 1), mode="replicate"), 2, 1)
    farthest = F.max_pool2d(F.pad(torch.where(usable, z, torch.inf), (0, 1, 0, 1), mode="replicate"), 2, 1)
    column = ((grid[..., 0] + 1) * width / 2 - 0.5).clamp(0, width - 1).long()
    row = ((grid[..., 1] + 1) * height / 2 - 0.5).clamp(0, height - 1).long()
    place = (row * width + column).flatten(1)
    smooth = (farthest <= nearest * (1 + EDGE_RTOL)).flatten(1).gather(1, place).reshape(batch, *points.shape[:2])

    target = view.points[:, None, :, :, 2].nan_to_num(0.0)
    surface = F.grid_sample(target, grid, mode="nearest", align_corners=False)[:, 0]
    shown = known & (placed[..., 2] <= surface * (1 + OCCLUSION_TOLERANCE))
    moved = view.transform[:, :3, 3].abs().amax(-1)[:, None, None] > 0
    back = transform_points(found, inverse(view.transform)[:, None, None])
    return back, inside & smooth & (~moved | shown)


def cutmix(view: View, other: View, generator: torch.Generator, probability: float = 1.0) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019), as Depth Anything uses it: a rectangle of each image shows the other view.

    view and other: the same number B of views of one size (of two images, or of one: `view` with its rows rolled).
    Returns the mixed images (B,3,h,w) and the region (B,h,w) bool, True where `other` shows. The student sees the
    mixture; its loss is taken on each region with that view's target, aligned apart, and weighted by area. The
    rectangle's area is uniform in 10 to 60 % of the image, its shape in 3:4 to 4:3 of the image's. With 1 -
    `probability` a view stays as it is, and its region is empty.
    """
    draws = torch.rand(len(view.image), 5, generator=generator).to(view.image)
    height, width = view.image.shape[-2:]
    area, stretch = 0.1 + 0.5 * draws[:, 0], (4 / 3) ** (draws[:, 1] - 0.5)
    tall, wide = area.sqrt() * stretch, area.sqrt() / stretch
    top, left = draws[:, 2] * (1 - tall), draws[:, 3] * (1 - wide)
    u, v = uv_map(height, width, device=draws.device, dtype=draws.dtype).unbind(-1)

    def between(value: Tensor, start: Tensor, extent: Tensor) -> Tensor:
        return (value >= start[:, None, None]) & (value < (start + extent)[:, None, None])

    region = between(u, left, wide) & between(v, top, tall) & (draws[:, 4] < probability)[:, None, None]
    return torch.where(region[:, None], other.image, view.image), region


@dataclass
class View:
    """B views and what they should give.

    image (B,3,h,w) in [0,1]; points (B,h,w,3) the target in each view's camera, NaN where unknown; mask (B,h,w) True
    where the target is known; negative (B,h,w) True where the target says that nothing is there (sky); intrinsics
    (B,3,3); transform (B,4,4) original camera -> view camera; kind: e.g. "novel+crop+mirror+photometric", or "whole";
    stats: counts of views `drawn`, `novel`, `redrawn` (drawn again because too little was known) and `identity` (their
    camera stayed in place after all tries).
    """

    image: Tensor
    points: Tensor
    mask: Tensor
    negative: Tensor | None
    intrinsics: Tensor
    transform: Tensor
    kind: list[str]
    stats: dict[str, int] = field(default_factory=dict)
