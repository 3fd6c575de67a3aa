"""Predictions on views brought back to the image, and mixtures of views."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lib.geometry.cameras import inverse, transform_points, unproject, uv_map
from ttt_lib.geometry.warp import EDGE_RTOL, first_tap, in_front, sample_points, sampling_grid, within_centres

CUTMIX_DRAWS = 5  # random numbers a view takes
OCCLUSION_TOLERANCE = 0.05  # relative depth by which a carried-back pixel may lie behind what the view shows


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
    negative: Tensor
    intrinsics: Tensor
    transform: Tensor
    kind: list[str]
    stats: dict[str, int] = field(default_factory=dict)

    def part(self, chosen: slice) -> View:
        """Some of the views; the counts are those of all."""
        parts = {name: value[chosen] for name, value in vars(self).items() if name != "stats"}
        return View(**parts, stats=self.stats)


def carry_back(view: View, predicted: Tensor, points: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Bring predictions on the views back to the original camera.

    predicted (B,h,w,3): points in each view's camera; points (H,W,3): the geometry that says where each original pixel
    lies in the view, NaN where unknown (cameras that stay in place do not need it); intrinsics (3,3) of the original
    camera. Returns points (B,H,W,3) in the original camera and mask (B,H,W): True where the pixel lies inside the
    view, is not hidden there, and is not at a depth edge of the prediction, where interpolation would make up a point.
    """
    size = predicted.shape[1:3]
    known = in_front(points)
    rays = unproject(torch.ones_like(points[..., 2]), intrinsics)
    placed = transform_points(torch.where(known[..., None], points, rays), view.transform[:, None, None])
    grid = sampling_grid(placed, view.intrinsics[:, None, None])
    usable = in_front(predicted)
    found = sample_points(predicted, usable, grid)

    # Nearest and farthest of the four pixels around each position; an unknown one spoils both.
    z = predicted[..., 2]
    nearest = -F.max_pool2d(F.pad(-torch.where(usable, z, 0.0), (0, 1, 0, 1), mode="replicate"), 2, 1)
    farthest = F.max_pool2d(F.pad(torch.where(usable, z, torch.inf), (0, 1, 0, 1), mode="replicate"), 2, 1)
    row, column = first_tap(grid, size)
    place = (row * size[1] + column).flatten(1)
    smooth = (farthest <= nearest * (1 + EDGE_RTOL)).flatten(1).gather(1, place).reshape(grid.shape[:3])

    target = view.points[:, None, :, :, 2].nan_to_num(0.0)
    surface = F.grid_sample(target, grid, mode="nearest", align_corners=False)[:, 0]
    shown = known & (placed[..., 2] <= surface * (1 + OCCLUSION_TOLERANCE))
    moved = view.transform[:, :3, 3].abs().amax(-1)[:, None, None] > 0
    back = transform_points(found, inverse(view.transform)[:, None, None])
    return back, within_centres(grid, size) & smooth & (~moved | shown)


def cutmix(view: View, other: View, draws: Tensor, probability: float = 1.0) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019), as Depth Anything uses it: a rectangle of each image shows the other view.

    view and other: the same number B of views of one size (of two images, or of one: `view` with its rows rolled); draws
    (B, `CUTMIX_DRAWS`) uniform in [0, 1), on any device.
    Returns the mixed images (B,3,h,w) and the region (B,h,w) bool, True where `other` shows. The student sees the
    mixture; its loss is taken on each region with that view's target, aligned apart, and weighted by area. The
    rectangle's area is uniform in 10 to 60 % of the image, its shape in 3:4 to 4:3 of the image's. With 1 -
    `probability` a view stays as it is, and its region is empty.
    """
    draws = draws.to(view.image, non_blocking=True)
    height, width = view.image.shape[-2:]
    area, stretch = 0.1 + 0.5 * draws[:, 0], (4 / 3) ** (draws[:, 1] - 0.5)
    tall, wide = area.sqrt() * stretch, area.sqrt() / stretch
    top, left = draws[:, 2] * (1 - tall), draws[:, 3] * (1 - wide)
    u, v = uv_map(height, width, device=draws.device, dtype=draws.dtype).unbind(-1)

    def between(value: Tensor, start: Tensor, extent: Tensor) -> Tensor:
        return (value >= start[:, None, None]) & (value < (start + extent)[:, None, None])

    region = between(u, left, wide) & between(v, top, tall) & (draws[:, 4] < probability)[:, None, None]
    return torch.where(region[:, None], other.image, view.image), region
