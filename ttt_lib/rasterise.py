"""Point map to triangle mesh, and a z-buffered rasteriser in torch: the part of novel views that needs no GL.

The mesh has a vertex at each pixel centre (and half a pixel further at the image border). A triangle across a depth
edge is not a surface: it spans the space that the camera could not see into. Such triangles are kept as *curtains*,
drawn like the others but unknown, so that no view looks through a gap at something that may well be hidden. The same
holds for back faces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_lib.geometry import EDGE_RTOL, broken_steps, unproject

CHUNK = 4_000_000  # candidate (triangle, pixel) pairs at a time
NEAR = 1e-3  # relative to the scene's nearest point
BEYOND = 50.0  # where unknown pixels (sky) stand for curtains, relative to the scene's farthest point


@dataclass
class Mesh:
    """Vertices (V,3) and colours (V,3) in [0,1]; faces (F,3) long; solid (F,) bool, False for curtains.

    Faces turn clockwise as the original camera sees them (y down), so that `orientation` below is positive in front.
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
    known = mask & torch.isfinite(points).all(-1) & (points[..., 2] > 0)
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
    return Mesh(vertices, colours, faces[used], solid[used], nearest, farthest)


def rasterise(
    mesh: Mesh, transform: Tensor, intrinsics: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the mesh from B cameras: colour (B,3,h,w), depth (B,h,w) and mask (B,h,w).

    transform (B,4,4) proper rigid motions; intrinsics (B,3,3); size (h, w). The mask is True where the nearest
    triangle at the pixel's centre is solid and seen from its front. Colour and depth are 0 where nothing is drawn.
    """
    height, width = size
    count, device = len(transform), transform.device
    camera = mesh.vertices @ transform[:, :3, :3].mT + transform[:, None, :3, 3]  # (B, V, 3)
    z = camera[..., 2]
    safe = z.clamp_min(mesh.nearest * NEAR)
    x = (intrinsics[:, 0, 0, None] * camera[..., 0] / safe + intrinsics[:, 0, 2, None]) * width
    y = (intrinsics[:, 1, 1, None] * camera[..., 1] / safe + intrinsics[:, 1, 2, None]) * height
    inverse = 1 / safe

    best = torch.full((count * height * width,), torch.inf, device=device)
    winner = torch.full((count * height * width,), -1, dtype=torch.long, device=device)
    weights = torch.zeros(count * height * width, 3, device=device)
    front = torch.zeros(count * height * width, dtype=torch.bool, device=device)
    for view in range(count):
        corners_x, corners_y = x[view][mesh.faces], y[view][mesh.faces]  # (F, 3)
        low_x = (corners_x.amin(-1) - 0.5).ceil().clamp(0, width).long()
        high_x = (corners_x.amax(-1) - 0.5).floor().clamp(-1, width - 1).long()
        low_y = (corners_y.amin(-1) - 0.5).ceil().clamp(0, height).long()
        high_y = (corners_y.amax(-1) - 0.5).floor().clamp(-1, height - 1).long()
        wide, tall = (high_x - low_x + 1).clamp_min(0), (high_y - low_y + 1).clamp_min(0)
        in_front = (z[view][mesh.faces] > mesh.nearest * NEAR).all(-1)
        boxes = torch.where(in_front, wide * tall, 0)
        chosen = torch.nonzero(boxes)[:, 0]
        ends = boxes[chosen].cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        for start in range(0, total, CHUNK):
            stop = min(start + CHUNK, total)
            pair = torch.arange(start, stop, device=device)
            slot = torch.searchsorted(ends, pair, right=True)
            face = chosen[slot]
            within = pair - (ends[slot] - boxes[face])
            px = low_x[face] + within % wide[face]
            py = low_y[face] + within // wide[face]
            fx, fy = corners_x[face], corners_y[face]
            gx, gy = px + 0.5, py + 0.5
            # Twice the signed areas of the triangles (pixel, next corner, corner after): barycentric coordinates.
            ax, ay = fx - gx[:, None], fy - gy[:, None]
            area = ax[:, [1, 2, 0]] * ay[:, [2, 0, 1]] - ax[:, [2, 0, 1]] * ay[:, [1, 2, 0]]
            whole = area.sum(-1)
            inside = ((area >= 0).all(-1) | (area <= 0).all(-1)) & (whole != 0)
            face, px, py, area, whole = face[inside], px[inside], py[inside], area[inside], whole[inside]
            share = area / whole[:, None] * inverse[view][mesh.faces[face]]  # perspective-correct
            depth = 1 / share.sum(-1)
            share = share * depth[:, None]
            pixel = view * height * width + py * width + px
            nearest = best.scatter_reduce(0, pixel, depth, "amin")
            wins = depth == nearest[pixel]
            # Of equally near triangles (a shared edge) the first: the result does not depend on the order of writes.
            face, pixel, share, whole = face[wins], pixel[wins], share[wins], whole[wins]
            first = torch.full_like(winner, len(mesh.faces)).scatter_reduce(0, pixel, face, "amin")
            keep = (face == first[pixel]) & (nearest[pixel] < best[pixel])
            winner[pixel[keep]], weights[pixel[keep]] = face[keep], share[keep]
            front[pixel[keep]] = whole[keep] > 0
            best = nearest

    drawn = winner >= 0
    face = mesh.faces[winner.clamp_min(0)]
    colour = (mesh.colours[face] * weights[..., None]).sum(1) * drawn[:, None]
    mask = drawn & front & mesh.solid[winner.clamp_min(0)]
    depth = torch.where(drawn, best, 0.0)
    shape = (count, height, width)
    return colour.reshape(*shape, 3).permute(0, 3, 1, 2).contiguous(), depth.reshape(shape), mask.reshape(shape)
