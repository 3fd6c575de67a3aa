"""Simple solids, and where rays meet them: boxes, ellipsoids, cylinders and prisms, each in closed form.

Batched torch, no meshes. World frame: metres, x right, y down, z forward ("up" is -y).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FAR = 1e6
EPSILON = 1e-9


@dataclass
class Solids:
    """P solids in each of B scenes. The four kinds stand in this order along P; `counts` says how many of each.

    centre (B,P,3), rotation (B,P,3,3) local to world, half (B,P,3) half extents in metres (0: not there),
    sides (B,P,6,3) for prisms: half-planes `a*x + b*z <= c` in units of the half extents,
    texture (B,P) index into the atlas, tile (B,P) metres a texture spans, tint (B,P,3) linear colour factor.
    """

    centre: Tensor
    rotation: Tensor
    half: Tensor
    sides: Tensor
    texture: Tensor
    tile: Tensor
    tint: Tensor
    counts: tuple[int, int, int, int]  # boxes, ellipsoids, cylinders (axis y), prisms (axis y)


def _local_rays(solids: Solids, slot: int, scenes: slice, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Ray origins and directions in the frame of one solid of these scenes, in units of its half extents: 2 x (B,N,3)."""
    to_local = solids.rotation[scenes, slot] / solids.half[scenes, slot].clamp_min(EPSILON)[:, None, :]
    return (origin - solids.centre[scenes, slot, None]) @ to_local, direction @ to_local


def _passes_near(solids: Solids, origin: Tensor, direction: Tensor) -> Tensor:
    """Which rays pass through the bounding sphere of which solid, (B,P,N) bool; a little generous for rounding."""
    centre = solids.centre
    ahead = direction / direction.norm(dim=-1, keepdim=True)
    along = centre @ ahead.transpose(1, 2) - (origin * ahead).sum(-1)[:, None]
    apart = centre.square().sum(-1)[..., None] - 2 * centre @ origin.transpose(1, 2)
    apart = apart + origin.square().sum(-1)[:, None]
    radius = solids.half.norm(dim=-1)[..., None] * 1.01 + 0.02
    return (apart - along.square() <= radius.square() + 1e-5 * apart) & (along > -radius)


def _entry(t_in: Tensor, t_out: Tensor) -> Tensor:
    """First hit in front of the ray: the entry, or the exit for rays that start inside (rooms); FAR for a miss."""
    hit = (t_in < t_out) & (t_out > EPSILON)
    return torch.where(hit, torch.where(t_in > EPSILON, t_in, t_out), FAR)


def _slab(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Entry and exit of the interval [-1, 1] along each given axis together: (B,N,A) -> 2 x (B,N)."""
    inverse = 1.0 / torch.where(direction.abs() < EPSILON, EPSILON, direction)
    middle, reach = -origin * inverse, inverse.abs()
    return (middle - reach).amax(-1), (middle + reach).amin(-1)


def _quadratic(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Entry and exit of the unit sphere (or circle, by the number of axes given): (B,N,A) -> 2 x (B,N)."""
    a = direction.square().sum(-1).clamp_min(EPSILON)
    b = (origin * direction).sum(-1)
    c = origin.square().sum(-1) - 1.0
    discriminant = b.square() - a * c
    root = discriminant.clamp_min(0).sqrt()
    miss = discriminant <= 0
    return torch.where(miss, FAR, (-b - root) / a), torch.where(miss, -FAR, (-b + root) / a)


def _prism(sides: Tensor, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Entry and exit of the half-planes `a*x + b*z <= c`; sides (B,6,3), rays (B,N,3) -> 2 x (B,N)."""
    normal, offset = sides[:, :, :2], sides[:, None, :, 2]
    along = direction[..., [0, 2]] @ normal.transpose(1, 2)
    distance = offset - origin[..., [0, 2]] @ normal.transpose(1, 2)
    parallel = along.abs() < 1e-6
    t = distance / torch.where(parallel, 1.0, along)
    t_in = torch.where(parallel, torch.where(distance < 0, FAR, -FAR), torch.where(along < 0, t, -FAR)).amax(-1)
    t_out = torch.where(parallel | (along < 0), FAR, t).amin(-1)
    return t_in, t_out


def _hit(solids: Solids, slot: int, o: Tensor, d: Tensor, sides: Tensor) -> Tensor:
    """First hit of local rays (B,N,3) with the solid of this slot; the slot says which kind it is."""
    boxes, ellipsoids, cylinders, _ = solids.counts
    if slot < boxes:
        return _entry(*_slab(o, d))
    if slot < boxes + ellipsoids:
        return _entry(*_quadratic(o, d))
    caps_in, caps_out = _slab(o[..., 1:2], d[..., 1:2])
    if slot < boxes + ellipsoids + cylinders:
        t_in, t_out = _quadratic(o[..., [0, 2]], d[..., [0, 2]])
    else:
        t_in, t_out = _prism(sides, o, d)
    return _entry(torch.maximum(t_in, caps_in), torch.minimum(t_out, caps_out))


def intersect(solids: Solids, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Distance along each ray (in units of `direction`) to the first surface, and the index of the solid.

    origin and direction (B,N,3) in the world; returns (B,N) with FAR for a miss, and (B,N) long with -1. On a CPU,
    small solids are tried only with the rays that pass near them.
    """
    closest = torch.full(direction.shape[:2], FAR, dtype=direction.dtype, device=direction.device)
    index = torch.full(direction.shape[:2], -1, dtype=torch.long, device=direction.device)
    present = solids.half.amin(-1) > 0
    sparse = direction.device.type == "cpu"
    near = _passes_near(solids, origin, direction) & present[..., None] if sparse else None
    share = near.float().mean(dim=(0, 2)).tolist() if sparse else [1.0] * present.shape[1]
    every = slice(None)
    for slot, covered in enumerate(share):
        if covered == 0:
            continue
        parts = [(every, every)]
        if covered < 0.4:
            parts = [(slice(b, b + 1), torch.nonzero(rays)[:, 0]) for b, rays in enumerate(near[:, slot])]
        for one, rays in parts:
            o, d = _local_rays(solids, slot, one, origin[one, rays], direction[one, rays])
            t = _hit(solids, slot, o, d, solids.sides[one, slot])
            nearer = (t < closest[one, rays]) & present[one, slot, None]
            closest[one, rays] = torch.where(nearer, t, closest[one, rays])
            index[one, rays] = torch.where(nearer, slot, index[one, rays])
    return closest, index


def surface_at(solids: Solids, index: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Local point (metres), local outward normal and rotation at each hit: (B,N,3), (B,N,3), (B,N,3,3)."""
    batch = torch.arange(index.shape[0], device=index.device)[:, None]
    index = index.clamp_min(0)
    rotation, half = solids.rotation[batch, index], solids.half[batch, index].clamp_min(EPSILON)
    local = ((position - solids.centre[batch, index])[..., None, :] @ rotation)[..., 0, :]
    unit = local / half

    boxes, ellipsoids, cylinders, _ = solids.counts
    box_normal = F.one_hot(unit.abs().argmax(-1), 3) * unit.sign()
    round_normal = unit / half
    on_cap = unit[..., 1].abs() > 0.9999
    cap_normal = unit.sign() * torch.tensor([0.0, 1.0, 0.0], device=unit.device)
    sides = solids.sides[batch, index]
    violation = sides[..., 0] * unit[..., 0, None] + sides[..., 1] * unit[..., 2, None] - sides[..., 2]
    chosen = torch.gather(sides, 2, violation.argmax(-1)[..., None, None].expand(-1, -1, 1, 3))[..., 0, :]
    prism_normal = torch.stack([chosen[..., 0], torch.zeros_like(chosen[..., 0]), chosen[..., 1]], -1) / half
    tube_normal = round_normal * torch.tensor([1.0, 0.0, 1.0], device=unit.device)

    kind = index[..., None]  # in the order along P
    normal = torch.where(kind < boxes + ellipsoids + cylinders, tube_normal, prism_normal)
    normal = torch.where(on_cap[..., None], cap_normal, normal)
    normal = torch.where(kind < boxes + ellipsoids, round_normal, normal)
    normal = torch.where(kind < boxes, box_normal.to(normal), normal)
    return local, F.normalize(normal, dim=-1), rotation
