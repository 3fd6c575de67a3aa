"""Carrying an image and its points into a camera that turned in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import utils3d
from torch import Tensor

from ttt_lib.geometry.cameras import (
    project,
    transform_points,
    unproject,
)

EDGE_RTOL = 0.04  # relative depth step across a pixel's neighbourhood that counts as an edge, as MoGe's `infer` script


def depth_edges(depth: Tensor, mask: Tensor | None = None, rtol: float = EDGE_RTOL) -> Tensor:
    """Pixels at a depth discontinuity, (..., H, W) bool, by the relative test of `utils3d.torch.depth_map_edge`."""
    return utils3d.pt.depth_map_edge(depth, mask=mask, rtol=rtol)


def broken_steps(inverse_depth: Tensor, known: Tensor, rtol: float = EDGE_RTOL) -> Tensor:
    """Steps between neighbours along the last axis that cross a depth edge: (..., N) -> (..., N-1) bool.

    A step is broken when the depths differ by more than `rtol` (the test of utils3d), unless it continues a plane seen
    at a grazing angle: inverse depth is linear in the pixel on planes, so the two steps before and after are alike.
    """
    a, b = inverse_depth[..., :-1], inverse_depth[..., 1:]
    step = b - a
    large = torch.maximum(a, b) > torch.minimum(a, b) * (1 + rtol)
    pair = known[..., :-1] & known[..., 1:]
    step = torch.where(pair, step, torch.nan)
    padded = F.pad(step, (2, 2), value=float("nan"))
    around = torch.stack([padded[..., k : k + step.shape[-1]] for k in range(5)])
    plane = (around - step).abs().amax(0) <= 0.3 * step.abs()  # NaN, at borders and unknown neighbours, is False
    return large & ~plane | ~pair


def warp_view(
    image: Tensor,
    points: Tensor,
    mask: Tensor,
    intrinsics: Tensor,
    transform: Tensor,
    new_intrinsics: Tensor,
    size: tuple[int, int],
    edge_rtol: float = EDGE_RTOL,
) -> tuple[Tensor, Tensor, Tensor]:
    """See an image and its point map from a camera at the same place: crop, mirror, rotation, or any product of them.

    image (B,3,H,W); points (B,H,W,3) in the original camera; mask (B,H,W) bool; intrinsics and new_intrinsics
    (B,3,3); transform (B,4,4), original -> new camera, without translation (a reflection is fine); size (h, w).

    Returns image (B,3,h,w), points (B,h,w,3) in the new camera, mask (B,h,w). The map between the images is a
    homography. Points are interpolated as p/z and 1/z, which are linear in the pixel wherever the surface is a plane,
    so planes are carried exactly. A pixel is unknown where it looks outside the original image, where one of its four
    taps is unknown, or where these straddle a depth edge (`broken_steps` with `edge_rtol`).
    """
    height, width = image.shape[-2:]
    rays = unproject(torch.ones(*size, device=image.device, dtype=points.dtype), new_intrinsics)
    back = rays @ transform[:, None, :3, :3]  # rows times R: the inverse rotation
    uv = project(back, intrinsics[:, None, None])
    in_front = back[..., 2] > 1e-6
    grid = torch.where(in_front[..., None], 2 * uv - 1, 9.0)

    # How many source pixels a view pixel spans, for a prefilter against aliasing: one for the whole view.
    span = intrinsics[:, 0, 0] * width / (new_intrinsics[:, 0, 0] * size[1])
    warped = F.grid_sample(_smoothed(image, span), grid, mode="bilinear", padding_mode="border", align_corners=False)

    known = mask & torch.isfinite(points).all(-1) & (points[..., 2] > 0)
    z = torch.where(known, points[..., 2], torch.ones_like(points[..., 2]))
    packed = torch.cat([torch.where(known[..., None], points, 0.0) / z[..., None], 1 / z[..., None]], -1)
    sampled = F.grid_sample(
        packed.permute(0, 3, 1, 2), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    sampled = sampled.permute(0, 2, 3, 1)
    found = sampled[..., :3] / sampled[..., 3:].clamp_min(1e-12)

    # Half a pixel inside the frame: beyond the outermost centres there would be extrapolation.
    inside_x = grid[..., 0].abs() <= 1 - 1 / width + 1e-5
    inside_y = grid[..., 1].abs() <= 1 - 1 / height + 1e-5
    result_mask = in_front & inside_x & inside_y & _taps_agree(grid, 1 / z, known, edge_rtol)
    return warped, transform_points(found, transform[:, None, None]), result_mask


def _smoothed(image: Tensor, span: Tensor) -> Tensor:
    """The images (B,3,H,W), each averaged over as many of its pixels as `span` (B,) says, where that is two or more."""
    reach = torch.where(span > 1.5, span.round() / 2, 0).long()
    smooth = image
    for k in set(reach.tolist()) - {0}:
        filtered = F.avg_pool2d(image, 2 * k + 1, 1, k, count_include_pad=False)
        smooth = torch.where((reach == k)[:, None, None, None], filtered, smooth)
    return smooth


def _taps_agree(grid: Tensor, inverse: Tensor, known: Tensor, edge_rtol: float) -> Tensor:
    """Whether the four taps of each place of `grid` (B,h,w,2) are known and on one surface, (B,h,w).

    inverse (B,H,W): inverse depth; known (B,H,W). The outermost half pixel has its taps on the border.
    """
    height, width = known.shape[-2:]
    column = ((grid[..., 0] + 1) * width / 2 - 0.5).clamp(0, width - 1)
    row = ((grid[..., 1] + 1) * height / 2 - 0.5).clamp(0, height - 1)
    x0, y0 = column.floor().long(), row.floor().long()
    x1, y1 = (x0 + 1).clamp_max(width - 1), (y0 + 1).clamp_max(height - 1)
    batch = torch.arange(len(known), device=known.device)[:, None, None]
    # A step to the next column or row, False beyond the last one, where a tap meets itself.
    across = F.pad(broken_steps(inverse, known, edge_rtol), (0, 1))
    down = F.pad(broken_steps(inverse.mT, known.mT, edge_rtol), (0, 1)).mT
    one_surface = ~(across[batch, y0, x0] | across[batch, y1, x0] | down[batch, y0, x0] | down[batch, y0, x1])
    return one_surface & known[batch, y0, x0] & known[batch, y0, x1] & known[batch, y1, x0] & known[batch, y1, x1]
