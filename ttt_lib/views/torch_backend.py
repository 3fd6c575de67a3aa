"""A z-buffered rasteriser in torch: the part of novel views that needs no GL, and stays on the tensors' device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lib.views.mesh import NEAR, Mesh

CHUNK = 2**18  # about as many candidate (triangle, pixel) pairs at a time: on a CPU they should stay in its cache
CUDA_CHUNK = 2**23
EMPTY = torch.iinfo(torch.int64).max  # in the z-buffer, where nothing is drawn


def rasterise(
    mesh: Mesh, transform: Tensor, intrinsics: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the mesh from B cameras: colour (B,3,h,w), depth (B,h,w) and mask (B,h,w).

    transform (B,4,4) proper rigid motions; intrinsics (B,3,3); size (h, w). The mask is True where the nearest
    triangle at the pixel's centre is solid and seen from its front. Colour and depth are 0 where nothing is drawn.
    Triangles are cut at the near plane, `NEAR`. Each view has buffers of its own: none depends on its batch.
    """
    if not len(mesh.faces):
        blank = torch.zeros(len(transform), *size, device=transform.device)
        return blank[:, None].repeat(1, 3, 1, 1), blank, blank > 0
    views = [_draw(mesh, t, k, size) for t, k in zip(transform, intrinsics)]
    colour, depth, mask = (torch.stack(maps) for maps in zip(*views))
    return colour, depth, mask


def _draw(mesh: Mesh, transform: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """One view: colour (3,h,w), depth (h,w), mask (h,w)."""
    (height, width), near, device = size, mesh.nearest * NEAR, transform.device
    x, y, z = (mesh.vertices @ transform[:3, :3].mT + transform[:3, 3]).unbind(-1)
    focal, centre = intrinsics.diagonal()[:2], intrinsics[:2, 2]
    safe = z.clamp_min(near)
    # A vertex as (x, y, w, s) with pixel position (x, y) / w and inverse depth s / w; without w it is one.
    table = [(focal[0] * x / safe + centre[0]) * width, (focal[1] * y / safe + centre[1]) * height, None, 1 / safe]
    corners = mesh.faces.T  # (3, F)
    low_x, high_x = _extent(table[0], corners)
    low_y, high_y = _extent(table[1], corners)
    cut = hidden = None
    if bool((z <= near).any()):
        # Triangles that cross the near plane: their vertices undivided, and the extent of what lies before the plane.
        nearest, farthest = _extent(z, corners)
        hidden, cut = farthest <= near, (nearest <= near) & (farthest > near)
        one = torch.ones_like(z)
        undivided = [(focal[0] * x + centre[0] * z) * width, (focal[1] * y + centre[1] * z) * height, z, one]
        bounds = _cut_extent([part[corners[:, cut]] for part in undivided[:3]], near)
        for extent, bound in zip((low_x, high_x, low_y, high_y), bounds):
            extent[cut] = bound
        table = [torch.cat(parts) for parts in zip([*table[:2], one, table[3]], undivided)]
        corners = corners + cut * len(z)

    low_x, high_x = (low_x - 0.5).ceil().clamp(0, width), (high_x - 0.5).floor().clamp(-1, width - 1)
    low_y, high_y = (low_y - 0.5).ceil().clamp(0, height), (high_y - 0.5).floor().clamp(-1, height - 1)
    wide = (high_x - low_x + 1).clamp_min(0)
    boxes = (wide * (high_y - low_y + 1).clamp_min(0)).long()
    if hidden is not None:
        boxes[hidden] = 0
    buffer = _nearest_faces(table, corners, (low_x, low_y, wide, boxes), size, near)
    drawn = buffer != EMPTY
    number = torch.where(drawn, buffer & 0xFFFFFFFF, 0)
    depth = torch.where(drawn, buffer >> 32, 0).int().view(torch.float32)
    column = (torch.arange(width, device=device) + 0.5).repeat(height)
    row = (torch.arange(height, device=device) + 0.5).repeat_interleave(width)
    at = [corner.index_select(0, number) for corner in corners]
    whole, weights, _ = _weights(table, at, column, row)
    at = [corner.index_select(0, number) for corner in mesh.faces.T]
    colour = sum(mesh.colours.index_select(0, c) * (share * depth)[:, None] for c, share in zip(at, weights))
    colour = torch.where(drawn, colour.T, 0.0)
    mask = drawn & (whole > 0) & mesh.solid.index_select(0, number)
    return colour.reshape(3, height, width), depth.reshape(height, width), mask.reshape(height, width)


def _nearest_faces(
    table: list[Tensor | None], corners: Tensor, boxes: tuple[Tensor, ...], size: tuple[int, int], near: float
) -> Tensor:
    """The z-buffer (h*w,): the depth's bits above the face's number, so of equally near triangles the first one wins.

    boxes: of each face (F,), the lowest column and row it may cover, how many columns, and how many pixels (none: the
    face is not drawn). Faces go through in parts that hold a bounded number of pixels.
    """
    (height, width), device = size, corners.device
    face = torch.nonzero(boxes[3])[:, 0]
    low_x, low_y, wide, count = (part.index_select(0, face) for part in boxes)
    ends = count.cumsum(0)
    starts = ends - count
    total = int(ends[-1]) if len(ends) else 0
    buffer = torch.full((height * width,), EMPTY, device=device)
    steps = torch.arange(0, total, CUDA_CHUNK if device.type == "cuda" else CHUNK, device=device)
    borders = F.pad(torch.searchsorted(ends, steps, right=True), (0, 1), value=len(face))
    # Faces and pixels before each border, read back together: a GPU is waited for once.
    borders, pixels = torch.stack([borders, F.pad(ends, (1, 0)).index_select(0, borders)]).tolist()
    for first, last, start, stop in zip(borders, borders[1:], pixels, pixels[1:]):
        if first == last:
            continue
        slot = torch.repeat_interleave(count[first:last], output_size=stop - start) + first
        within = torch.arange(start, stop, device=device) - starts.index_select(0, slot)
        span = wide.index_select(0, slot)
        row = (within / span).floor()
        column = low_x.index_select(0, slot) + (within - row * span)
        row = low_y.index_select(0, slot) + row
        number = face.index_select(0, slot)
        at = [corner.index_select(0, number) for corner in corners]
        _, weights, covered = _weights(table, at, column + 0.5, row + 0.5)
        depth = 1 / (weights[0] + weights[1] + weights[2])
        key = (depth.view(torch.int32).long() << 32) | number
        key = torch.where(covered & (depth > near), key, EMPTY)
        buffer.scatter_reduce_(0, (row * width + column).long(), key, "amin")
    return buffer


def _extent(values: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of the values (V,) at a triangle's corners (3,F): two times (F,)."""
    a, b, c = (values.index_select(0, corner) for corner in corners)
    return torch.minimum(torch.minimum(a, b), c), torch.maximum(torch.maximum(a, b), c)


def _cut_extent(corners: list[Tensor], near: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lowest and highest x, lowest and highest y of what lies beyond the near plane of triangles that cross it.

    corners: x * w, y * w and the depth w, each (3,N).
    """
    corners = torch.stack(corners)
    after = corners.roll(-1, 1)
    share = (near - corners[2]) / (after[2] - corners[2])
    points = torch.cat([corners, corners + share * (after - corners)], 1)  # and where the sides meet the plane
    ahead = torch.cat([corners[2] > near, (corners[2] > near) != (after[2] > near)])
    place = points[:2] / torch.cat([corners[2], torch.full_like(share, near)])
    low = torch.where(ahead, place, torch.inf).amin(1)
    high = torch.where(ahead, place, -torch.inf).amax(1)
    return low[0], high[0], low[1], high[1]


def _weights(
    table: list[Tensor | None], corners: list[Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Where pixel positions x, y (N,) lie in their triangles: three corners (N,), vertex numbers in `table`.

    Returns twice the signed areas (N,), positive in front; a weight (N,) for each corner, perspective-correct, which
    add up to the inverse depth; and whether the position is inside (N,).
    """
    dx, dy, w, s = ([part.index_select(0, c) for c in corners] if part is not None else None for part in table)
    if w is None:
        dx, dy = [corner - x for corner in dx], [corner - y for corner in dy]
    else:
        dx = [corner - x * scale for corner, scale in zip(dx, w)]
        dy = [corner - y * scale for corner, scale in zip(dy, w)]
    # Twice the signed areas of the triangles (pixel, next corner, corner after): barycentric coordinates.
    a, b, c = (dx[i - 2] * dy[i - 1] - dx[i - 1] * dy[i - 2] for i in range(3))
    whole = a + b + c if w is None else a * w[0] + b * w[1] + c * w[2]
    inside = ((a >= 0) & (b >= 0) & (c >= 0)) | ((a <= 0) & (b <= 0) & (c <= 0))
    weights = [area / whole * scale for area, scale in zip((a, b, c), s)]
    return whole, weights, inside
