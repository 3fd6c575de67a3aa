"""Carrying an image and its points into a camera that turned in place, and what that has in common with the way back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import utils3d
from torch import Tensor

from ttt_lib.geometry.cameras import project, transform_points, unproject

EDGE_RTOL = 0.04  # relative depth step across a pixel's neighbourhood that counts as an edge, as MoGe's `infer` script
OUTSIDE = 9.0  # a sampling position (the image is -1 to 1) for directions that the image does not hold


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


def in_front(points: Tensor) -> Tensor:
    """Which points (..., 3) are known, that is finite, and in front of the camera: (...) bool."""
    return torch.isfinite(points).all(-1) & (points[..., 2] > 0)


def sampling_grid(points: Tensor, intrinsics: Tensor) -> Tensor:
    """Where a camera sees points (..., 3), as `F.grid_sample` wants it, (..., 2): -1 to 1 across the image, `OUTSIDE` behind."""
    return torch.where(points[..., 2:] > 1e-6, 2 * project(points, intrinsics) - 1, OUTSIDE)


def places_seen(transform: Tensor, intrinsics: Tensor, new_intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
    """Where in the image of the original camera the pixels of cameras at the same place look: a `sampling_grid` (B,h,w,2).

    transform (B,4,4), original -> new camera; intrinsics and new_intrinsics (B,3,3); size (h, w).
    """
    rays = unproject(torch.ones(*size, device=transform.device, dtype=transform.dtype), new_intrinsics)
    back = rays @ transform[:, None, :3, :3]  # rows times R: the inverse rotation
    return sampling_grid(back, intrinsics[:, None, None])


def within_centres(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Places of a `sampling_grid` not beyond the outermost pixel centres of an image (H, W): there is no extrapolation."""
    height, width = size
    return (grid[..., 0].abs() <= 1 - 1 / width + 1e-5) & (grid[..., 1].abs() <= 1 - 1 / height + 1e-5)


def first_tap(grid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of the pixel above and left of each place of a `sampling_grid`, in an image (H, W)."""
    height, width = size
    column = ((grid[..., 0] + 1) * width / 2 - 0.5).clamp(0, width - 1)
    row = ((grid[..., 1] + 1) * height / 2 - 0.5).clamp(0, height - 1)
    return row.long(), column.long()


def sample_points(points: Tensor, known: Tensor, grid: Tensor) -> Tensor:
    """Points (B,H,W,3) between the pixels, at the places of `grid` (B,h,w,2), each with four pixels of `known` (B,H,W).

    One map of points (1,H,W,3) may do for all. Points over depth, and one over depth, are linear in the pixel on planes:
    interpolation is exact there. (B,h,w,3).
    """
    z = torch.where(known, points[..., 2], 1.0)
    packed = torch.cat([torch.where(known[..., None], points, 0.0) / z[..., None], 1 / z[..., None]], -1)
    packed = packed.permute(0, 3, 1, 2).expand(len(grid), -1, -1, -1)
    sampled = F.grid_sample(packed, grid, padding_mode="border", align_corners=False)
    sampled = sampled.permute(0, 2, 3, 1)
    return sampled[..., :3] / sampled[..., 3:].clamp_min(1e-12)


def warp_view(
    image: Tensor,
    points: Tensor,
    mask: Tensor,
    intrinsics: Tensor,
    transform: Tensor,
    new_intrinsics: Tensor,
    size: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """See an image and its point map from a camera at the same place: crop, mirror, rotation, or any product of them.

    image (B,3,H,W); points (B,H,W,3) in the original camera; mask (B,H,W) bool; both may be one for all; intrinsics and
    new_intrinsics (B,3,3); transform (B,4,4), original -> new camera, without translation (a reflection is fine); size (h, w).

    Returns image (B,3,h,w), points (B,h,w,3) in the new camera, mask (B,h,w). The map between the images is a
    homography; planes are carried exactly. A pixel is unknown where it looks outside the original image, where one of its
    four taps is unknown, or where these straddle a depth edge (`broken_steps`). There is no filter against aliasing: a
    pixel of a crop spans no more than one of its image.
    """
    grid = places_seen(transform, intrinsics, new_intrinsics, size)
    warped = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    known = mask & in_front(points)
    found = sample_points(points, known, grid)
    seen = within_centres(grid, image.shape[-2:]) & _taps_agree(grid, 1 / points[..., 2], known)
    return warped, transform_points(found, transform[:, None, None]), seen


def _next(maps: Tensor, dim: int) -> Tensor:
    """Of each place of maps (B,H,W) what the next one along `dim` holds, of the last one its own."""
    length = maps.shape[dim]
    return torch.cat([maps.narrow(dim, 1, length - 1), maps.narrow(dim, length - 1, 1)], dim)


def _taps_agree(grid: Tensor, inverse_depth: Tensor, known: Tensor) -> Tensor:
    """Whether the four taps of each place of `grid` (B,h,w,2) are known and on one surface, (B,h,w).

    inverse_depth, known (B,H,W), or one for all. The outermost half pixel has its taps on the border.
    """
    # A step to the next column or row, False beyond the last one, where a tap meets itself.
    across = F.pad(broken_steps(inverse_depth, known), (0, 1))
    down = F.pad(broken_steps(inverse_depth.mT, known.mT), (0, 1)).mT
    broken = across | _next(across, 1) | down | _next(down, 2)
    pair = known & _next(known, 2)
    row, column = first_tap(grid, known.shape[-2:])
    batch = torch.arange(len(known), device=known.device)[:, None, None]
    return (pair & _next(pair, 1) & ~broken)[batch, row, column]
