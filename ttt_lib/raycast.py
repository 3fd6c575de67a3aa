"""Exact pictures of scenes made of simple solids: which point each pixel sees, its normal, and a shaded colour.

Batched torch, no meshes: every pixel's ray is intersected with every solid in closed form, so the point map of a
scene is exact from any camera. `synthetic.py` composes the scenes; here they are only drawn.

World frame: metres, x right, y down, z forward (an OpenCV camera at the origin looks along +z; "up" is -y).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

FAR = 1e6
EPSILON = 1e-9
TEXTURE_SIZE = 128


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


@dataclass
class Lighting:
    """Light and air of B scenes: sky colours, sun, one lamp, ambient light, fog. Colours are linear RGB.

    horizon, zenith (B,3); sun_direction (B,3) unit, towards the sun; sun (B,3); lamp_position (B,3); lamp (B,3);
    ambient (B,3), and `evenness` (B,) of it over directions (1: the same from all sides); fog (B,) extinction a
    metre; fog_colour (B,3); exposure (B,) the mean linear brightness that the camera aims at (0: none).
    """

    horizon: Tensor
    zenith: Tensor
    sun_direction: Tensor
    sun: Tensor
    lamp_position: Tensor
    lamp: Tensor
    ambient: Tensor
    evenness: Tensor
    fog: Tensor
    fog_colour: Tensor
    exposure: Tensor


@dataclass
class Scenes:
    """B scenes: solids, lighting, and the texture atlas they share, a mip pyramid of (T, 3, S, S), linear RGB."""

    solids: Solids
    lighting: Lighting
    atlas: list[Tensor]

    @property
    def batch_size(self) -> int:
        """Number of scenes B."""
        return self.solids.centre.shape[0]

    def select(self, index: int | slice) -> Scenes:
        """The scenes at `index`, the batch dimension kept."""
        index = slice(index, index + 1) if isinstance(index, int) else index

        def pick(part):
            values = {f.name: getattr(part, f.name) for f in fields(part)}
            return type(part)(**{k: v[index] if isinstance(v, Tensor) else v for k, v in values.items()})

        return Scenes(pick(self.solids), pick(self.lighting), self.atlas)

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""

        def move(part):
            values = {f.name: getattr(part, f.name) for f in fields(part)}
            return type(part)(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()})

        return Scenes(move(self.solids), move(self.lighting), [level.to(device) for level in self.atlas])


@dataclass
class Picture:
    """What B cameras see: image (B,3,H,W) sRGB in [0,1], points and normals (B,H,W,3) in the camera's frame
    (NaN where nothing is hit), mask (B,H,W) True where something is, intrinsics (B,3,3) normalised,
    transform (B,4,4) world to camera."""

    image: Tensor
    points: Tensor
    normal: Tensor
    mask: Tensor
    intrinsics: Tensor
    transform: Tensor


def _local_rays(solids: Solids, slot: int, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Ray origins and directions in the frame of one solid, in units of its half extents: 2 x (B,N,3)."""
    rotation, half = solids.rotation[:, slot], solids.half[:, slot].clamp_min(EPSILON)
    to_local = rotation / half[:, None, :]
    return (origin - solids.centre[:, slot, None]) @ to_local, direction @ to_local


def _passes_near(solids: Solids, origin: Tensor, direction: Tensor) -> Tensor:
    """Which rays pass through the bounding sphere of which solid, (B,P,N) bool; a little generous for rounding."""
    centre = solids.centre
    ahead = direction / direction.norm(dim=-1, keepdim=True)
    along = centre @ ahead.transpose(1, 2) - (origin * ahead).sum(-1)[:, None]
    apart = (centre.square().sum(-1)[..., None] - 2 * centre @ origin.transpose(1, 2)) + origin.square().sum(-1)[
        :, None
    ]
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
    for slot, covered in enumerate(share):
        if covered == 0:
            continue
        if covered < 0.4:
            for b in range(direction.shape[0]):
                rays = torch.nonzero(near[b, slot])[:, 0]
                if rays.numel() == 0:
                    continue
                one = slice(b, b + 1)
                part = Solids(solids.centre[one], solids.rotation[one], solids.half[one], solids.sides[one],
                              solids.texture, solids.tile, solids.tint, solids.counts)  # fmt: skip
                o, d = _local_rays(part, slot, origin[one, rays], direction[one, rays])
                t = _hit(part, slot, o, d, part.sides[:, slot])[0]
                nearer = t < closest[b, rays]
                closest[b, rays[nearer]] = t[nearer]
                index[b, rays[nearer]] = slot
            continue
        o, d = _local_rays(solids, slot, origin, direction)
        t = _hit(solids, slot, o, d, solids.sides[:, slot])
        nearer = (t < closest) & present[:, slot, None]
        closest = torch.where(nearer, t, closest)
        index = torch.where(nearer, slot, index)
    return closest, index


def _surface(solids: Solids, index: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    cap_normal = torch.zeros_like(unit)
    cap_normal[..., 1] = unit[..., 1].sign()
    sides = solids.sides[batch, index]
    violation = sides[..., 0] * unit[..., 0, None] + sides[..., 1] * unit[..., 2, None] - sides[..., 2]
    chosen = torch.gather(sides, 2, violation.argmax(-1)[..., None, None].expand(-1, -1, 1, 3))[..., 0, :]
    prism_normal = torch.stack([chosen[..., 0], torch.zeros_like(chosen[..., 0]), chosen[..., 1]], -1) / half
    tube_normal = round_normal * torch.tensor([1.0, 0.0, 1.0], device=unit.device)

    is_box, is_ellipsoid = index < boxes, (index >= boxes) & (index < boxes + ellipsoids)
    is_cylinder = (index >= boxes + ellipsoids) & (index < boxes + ellipsoids + cylinders)
    side_normal = torch.where(is_cylinder[..., None], tube_normal, prism_normal)
    normal = torch.where(on_cap[..., None], cap_normal, side_normal)
    normal = torch.where(is_ellipsoid[..., None], round_normal, normal)
    normal = torch.where(is_box[..., None], box_normal.to(normal), normal)
    return local, F.normalize(normal, dim=-1), rotation


def make_atlas(textures: Tensor) -> list[Tensor]:
    """Mip pyramid, (T,3,S,S) down to (T,3,1,1), each flattened to (T*s*s, 3) rows for fast look-up."""
    levels = []
    while True:
        levels.append(textures.permute(0, 2, 3, 1).reshape(-1, 3).contiguous())
        if textures.shape[-1] == 1:
            return levels
        textures = F.avg_pool2d(textures, 2)


def _look_up(atlas: list[Tensor], texture: Tensor, uv: Tensor, footprint: Tensor) -> Tensor:
    """Colour of `texture` (...,) at `uv` (...,2), in repeats, blurred to `footprint` (...,) repeats a pixel."""
    colour = torch.zeros(*uv.shape[:-1], 3, device=uv.device, dtype=uv.dtype)
    chosen = (footprint * TEXTURE_SIZE).clamp_min(1e-6).log2().round().clamp(0, len(atlas) - 1).long()
    for level, table in enumerate(atlas):
        where = torch.nonzero(chosen == level, as_tuple=True)
        if where[0].numel() == 0:
            continue
        size = TEXTURE_SIZE >> level
        place = uv[where] * size - 0.5
        corner = place.floor()
        fraction = place - corner
        corner = corner.long()
        base = texture[where] * size * size
        u0, v0 = corner[:, 0] % size, corner[:, 1] % size
        u1, v1 = (u0 + 1) % size, (v0 + 1) % size
        fu, fv = fraction[:, 0:1], fraction[:, 1:2]
        top = table[base + v0 * size + u0] * (1 - fu) + table[base + v0 * size + u1] * fu
        bottom = table[base + v1 * size + u0] * (1 - fu) + table[base + v1 * size + u1] * fu
        colour[where] = top * (1 - fv) + bottom * fv
    return colour


def _shade(scenes: Scenes, origin: Tensor, position: Tensor, index: Tensor, pixel: Tensor, shadows: bool) -> tuple:
    """Linear colour and world normal of each hit. position (B,N,3); pixel (B,N) metres a pixel spans there."""
    solids, light = scenes.solids, scenes.lighting
    local, local_normal, rotation = _surface(solids, index, position)
    normal = (rotation @ local_normal[..., None])[..., 0]
    towards = F.normalize(origin - position, dim=-1)
    facing = (normal * towards).sum(-1, keepdim=True)
    normal = torch.where(facing < 0, -normal, normal)

    batch = torch.arange(index.shape[0], device=index.device)[:, None]
    safe = index.clamp_min(0)
    dominant = local_normal.abs().argmax(-1)
    uv = torch.where(dominant[..., None] == 0, local[..., [2, 1]], local[..., [0, 1]])
    uv = torch.where(dominant[..., None] == 1, local[..., [0, 2]], uv)
    tile = solids.tile[batch, safe]
    footprint = pixel / tile / facing[..., 0].abs().clamp_min(0.15)
    albedo = _look_up(
        scenes.atlas, solids.texture[batch, safe], uv / tile[..., None] + 0.37 * safe[..., None], footprint
    )
    albedo = albedo * solids.tint[batch, safe]

    sun_direction = light.sun_direction[:, None].expand_as(normal)
    sun = (normal * sun_direction).sum(-1).clamp_min(0)
    to_lamp = light.lamp_position[:, None] - position
    lamp_distance = to_lamp.norm(dim=-1).clamp_min(0.3)
    lamp = (normal * to_lamp).sum(-1).clamp_min(0) / lamp_distance / (1 + 0.15 * lamp_distance.square())
    if shadows:
        start = position + 2e-3 * normal * (1 + pixel[..., None])
        lit_by_sun = (light.sun.amax(-1) >= light.lamp.amax(-1))[:, None]
        ray = torch.where(lit_by_sun[..., None], sun_direction, to_lamp)
        reach = torch.where(lit_by_sun, FAR / 2, 0.98)
        blocked = intersect(solids, start, ray)[0] < reach
        sun = torch.where(blocked & lit_by_sun, 0.0, sun)
        lamp = torch.where(blocked & ~lit_by_sun, 0.15 * lamp, lamp)
    sky_share = 0.65 - 0.35 * (1 - light.evenness[:, None, None]) * normal[..., 1:2]
    received = light.ambient[:, None] * sky_share + light.sun[:, None] * sun[..., None]
    return albedo * (received + light.lamp[:, None] * lamp[..., None]), normal


def srgb(linear: Tensor) -> Tensor:
    """Linear light to display values in [0, 1] by the usual power law (1 / 2.2)."""
    return linear.clamp(0, 1).clamp_min(1e-8).pow(1 / 2.2)


def draw(scenes: Scenes, transform: Tensor, intrinsics: Tensor, size: tuple[int, int], shadows: bool = True) -> Picture:
    """Draw each scene from its camera.

    transform (B,4,4) world to camera, intrinsics (B,3,3) normalised, size (H, W). Exact up to rounding: points are
    ray times distance. Rays that hit nothing see the sky: mask False, points and normals NaN.
    """
    height, width = size
    device, dtype = transform.device, transform.dtype
    v, u = torch.meshgrid(
        (torch.arange(height, device=device, dtype=dtype) + 0.5) / height,
        (torch.arange(width, device=device, dtype=dtype) + 0.5) / width,
        indexing="ij",
    )
    pixels = torch.stack([u, v, torch.ones_like(u)], -1).reshape(1, -1, 3)
    rays = pixels @ torch.linalg.inv(intrinsics).transpose(1, 2)  # z = 1 in the camera's frame
    rotation, translation = transform[:, :3, :3], transform[:, :3, 3]
    direction = rays @ rotation  # R^T applied to each ray
    origin = -(translation[:, None, :] @ rotation).expand_as(direction)

    depth, index = intersect(scenes.solids, origin, direction)
    hit = index >= 0
    position = origin + direction * torch.where(hit, depth, 1.0)[..., None]
    pixel = depth.clamp_max(1e4) / (intrinsics[:, 0, 0] * width)[:, None]
    colour, normal = _shade(scenes, origin, position, index, pixel, shadows)

    light = scenes.lighting
    upward = (-F.normalize(direction, dim=-1)[..., 1:2]).clamp(0, 1).sqrt()
    sky = light.horizon[:, None] * (1 - upward) + light.zenith[:, None] * upward
    distance = (position - origin).norm(dim=-1)
    seen = torch.exp(-light.fog[:, None] * distance)[..., None]
    colour = colour * seen + light.fog_colour[:, None] * (1 - seen)
    colour = torch.where(hit[..., None], colour, sky)
    gain = light.exposure / colour.clamp_max(1.5).mean(dim=(1, 2)).clamp_min(1e-3)
    colour = colour * torch.where(light.exposure > 0, gain.clamp(0.4, 4.0), 1.0)[:, None, None]

    def to_map(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], height, width, *x.shape[2:])

    nan = torch.tensor(float("nan"), device=device, dtype=dtype)
    points = torch.where(hit[..., None], rays * depth[..., None], nan)
    normal = torch.where(hit[..., None], normal @ rotation.transpose(1, 2), nan)
    image = to_map(srgb(colour)).permute(0, 3, 1, 2).contiguous()
    return Picture(image, to_map(points), to_map(normal), to_map(hit), intrinsics, transform)
