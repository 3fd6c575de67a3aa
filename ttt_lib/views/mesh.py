"""The surface of a point map as triangles, cut at depth edges.

There is a vertex at each pixel centre, and half a pixel further at the image border. A triangle across a depth edge is not a
surface: it spans the space that the camera could not see into. Such triangles are kept as *curtains*, drawn like the others
but unknown, so that no view looks through a gap at something that may well be hidden. The same holds for back faces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_lib.geometry.cameras import unproject
from ttt_lib.geometry.warp import EDGE_RTOL, broken_steps, in_front

NEAR = 0.02  # what is nearer is cut off, by both backends; relative to the scene's nearest point
BEYOND = 50.0  # where unknown pixels (sky) stand for curtains, relative to the scene's farthest point


@dataclass
class Mesh:
    """Vertices (V,3) and colours (V,3) in [0,1]; faces (F,3) long; solid (F,) bool, False for curtains; the scene's nearest and
    farthest depth.

    Faces turn clockwise as the original camera sees them (y down): from there their signed area is positive.
    """

    vertices: Tensor
    colours: Tensor
    faces: Tensor
    solid: Tensor
    nearest: float
    farthest: float


def _extend(map_: Tensor) -> Tensor:
    """(H,W,C) -> (H+2,W+2,C): half a pixel more on each side, by linear extrapolation."""
    top, bottom = 1.5 * map_[:1] - 0.5 * map_[1:2], 1.5 * map_[-1:] - 0.5 * map_[-2:-1]
    map_ = torch.cat([top, map_, bottom])
    left, right = 1.5 * map_[:, :1] - 0.5 * map_[:, 1:2], 1.5 * map_[:, -1:] - 0.5 * map_[:, -2:-1]
    return torch.cat([left, map_, right], 1)


def _copy_border(map_: Tensor) -> Tensor:
    """(H,W,...) -> (H+2,W+2,...), the border repeated."""
    map_ = torch.cat([map_[:1], map_, map_[-1:]])
    return torch.cat([map_[:, :1], map_, map_[:, -1:]], 1)


def build_mesh(
    image: Tensor, points: Tensor, mask: Tensor, intrinsics: Tensor | None = None, edge_rtol: float = EDGE_RTOL
) -> Mesh:
    """image (3,H,W), points (H,W,3), mask (H,W) bool, intrinsics (3,3) -> mesh on the same device.

    With intrinsics, unknown pixels stand far away on their rays, so that curtains hang against the sky too.
    """
    known = mask & in_front(points)
    depth = points[..., 2][known]
    nearest, farthest = (float(depth.min()), float(depth.max())) if depth.numel() else (1.0, 1.0)
    z = torch.where(known, points[..., 2], BEYOND * farthest)
    ray = torch.where(known[..., None], points / z[..., None], 0.0)
    if intrinsics is not None:
        ray = torch.where(known[..., None], ray, unproject(torch.ones_like(z), intrinsics))
    inverse = 1 / z

    known_wide = _copy_border(known)
    copied = _copy_border(inverse)
    extrapolated = _extend(inverse[..., None])[..., 0]
    # No extrapolation where the border pixel's neighbour is unknown or far away in depth.
    inverse_wide = torch.where(
        (extrapolated > copied / (1 + edge_rtol)) & (extrapolated < copied * (1 + edge_rtol)), extrapolated, copied
    )
    ray_wide = _extend(ray)
    height, width = known_wide.shape
    vertices = (ray_wide / inverse_wide[..., None].clamp_min(1e-12)).reshape(-1, 3)
    colours = _copy_border(image.permute(1, 2, 0)).reshape(-1, 3)

    broken_h = broken_steps(inverse_wide, known_wide, edge_rtol)
    broken_v = broken_steps(inverse_wide.T, known_wide.T, edge_rtol).T
    index = torch.arange(height * width, device=points.device).reshape(height, width)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    upper, lower = torch.stack([a, b, c], -1).reshape(-1, 3), torch.stack([d, c, b], -1).reshape(-1, 3)
    solid = torch.cat([
        ~(broken_h[:-1] | broken_v[:, :-1]).reshape(-1),
        ~(broken_h[1:] | broken_v[:, 1:]).reshape(-1),
    ])  # fmt: skip
    faces = torch.cat([upper, lower])
    known_corners = known_wide.reshape(-1)[faces]
    used = known_corners.all(-1) if intrinsics is None else known_corners.any(-1)
    corners = faces[used].T.contiguous()  # one corner after the other: the rasteriser reads them that way
    return Mesh(vertices, colours, corners.T, solid[used], nearest, farthest)
