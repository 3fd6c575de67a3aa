"""Exact pictures of scenes made of simple solids: which point each pixel sees, its normal, and a shaded colour.

Every pixel's ray is intersected with every solid in closed form (`solids.py`), so the point map of a scene is exact
from any camera. `generate.py` composes the scenes; here they are only drawn.

World frame: metres, x right, y down, z forward (an OpenCV camera at the origin looks along +z; "up" is -y).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lib.data.scenes.solids import FAR, Solids, intersect, surface_at
from ttt_lib.data.scenes.textures import TEXTURE_SIZE
from ttt_lib.geometry.cameras import uv_map


@dataclass
class Scenes:
    """B scenes: solids, lighting, and the texture atlas they share, a mip pyramid of (T, 3, S, S), linear RGB.

    `lighting`: light and air by name, colours are linear RGB: sky colours `horizon`, `zenith` (B,3); `sun_direction`
    (B,3) unit, towards the sun; `sun` (B,3); one lamp, `lamp_position`, `lamp` (B,3); `ambient` light (B,3), and
    `evenness` (B,) of it over directions (1: the same from all sides); `fog` (B,) extinction a metre; `fog_colour` (B,3);
    `exposure` (B,), the mean linear brightness that the camera aims at (0: none).

    `detail`, where there is one, lays more onto the surfaces (`detail.py`): it takes the albedo (N,3), the solid's index
    (N,), the axis (N,) its face looks along, metres on the face (N,2), metres a pixel spans (N,), and the extent (N,) of
    the solid, half its longest side in metres; it gives the albedo.
    """

    solids: Solids
    lighting: dict[str, Tensor]
    atlas: list[Tensor]
    detail: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None

    def _changed(self, change: Callable[[Tensor], Tensor], atlas: list[Tensor]) -> Scenes:
        """With every tensor of solids and lighting changed."""
        solids = {key: change(value) for key, value in vars(self.solids).items() if isinstance(value, Tensor)}
        lighting = {key: change(value) for key, value in self.lighting.items()}
        return replace(self, solids=replace(self.solids, **solids), lighting=lighting, atlas=atlas)

    def select(self, index: list[int]) -> Scenes:
        """The scenes at `index`, the batch dimension kept."""
        return self._changed(lambda value: value[index], self.atlas)

    def to(self, device: torch.device | str) -> Scenes:
        """The scenes on a device."""
        return self._changed(lambda value: value.to(device), [level.to(device) for level in self.atlas])


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


def make_atlas(textures: Tensor) -> list[Tensor]:
    """Mip pyramid, (T,3,S,S) down to (T,3,1,1), each flattened to (T*s*s, 3) rows for fast look-up."""
    levels = []
    while True:
        levels.append(textures.permute(0, 2, 3, 1).reshape(-1, 3).contiguous())
        if textures.shape[-1] == 1:
            return levels
        textures = F.avg_pool2d(textures, 2)


def look_up(atlas: list[Tensor], texture: Tensor, uv: Tensor, footprint: Tensor) -> Tensor:
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
        (u0, v0), (u1, v1) = (corner % size).T, ((corner + 1) % size).T
        fu, fv = fraction[:, 0:1], fraction[:, 1:2]
        top, bottom = (table[base + v * size + u0] * (1 - fu) + table[base + v * size + u1] * fu for v in (v0, v1))
        colour[where] = top * (1 - fv) + bottom * fv
    return colour


def _shade(scenes: Scenes, origin: Tensor, position: Tensor, index: Tensor, pixel: Tensor, shadows: bool) -> tuple:
    """Linear colour and world normal of each hit. position (B,N,3); pixel (B,N) metres a pixel spans there."""
    solids, light = scenes.solids, scenes.lighting
    local, local_normal, rotation = surface_at(solids, index, position)
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
    place = uv / tile[..., None] + 0.37 * safe[..., None]
    albedo = look_up(scenes.atlas, solids.texture[batch, safe], place, footprint) * solids.tint[batch, safe]
    if scenes.detail is not None:
        extent = solids.half[batch, safe].amax(-1)
        span = pixel / facing[..., 0].abs().clamp_min(0.05)
        flat = (x.flatten(0, 1) for x in (albedo, safe, dominant, uv, span, extent))
        albedo = scenes.detail(*flat).view_as(albedo)

    sun_direction = light["sun_direction"][:, None].expand_as(normal)
    sun = (normal * sun_direction).sum(-1).clamp_min(0)
    to_lamp = light["lamp_position"][:, None] - position
    lamp_distance = to_lamp.norm(dim=-1).clamp_min(0.3)
    lamp = (normal * to_lamp).sum(-1).clamp_min(0) / lamp_distance / (1 + 0.15 * lamp_distance.square())
    if shadows:
        start = position + 2e-3 * normal * (1 + pixel[..., None])
        lit_by_sun = (light["sun"].amax(-1) >= light["lamp"].amax(-1))[:, None]
        ray = torch.where(lit_by_sun[..., None], sun_direction, to_lamp)
        reach = torch.where(lit_by_sun, FAR / 2, 0.98)
        blocked = intersect(solids, start, ray)[0] < reach
        sun = torch.where(blocked & lit_by_sun, 0.0, sun)
        lamp = torch.where(blocked & ~lit_by_sun, 0.15 * lamp, lamp)
    sky_share = 0.65 - 0.35 * (1 - light["evenness"][:, None, None]) * normal[..., 1:2]
    received = light["ambient"][:, None] * sky_share + light["sun"][:, None] * sun[..., None]
    return albedo * (received + light["lamp"][:, None] * lamp[..., None]), normal


def draw(scenes: Scenes, transform: Tensor, intrinsics: Tensor, size: tuple[int, int], shadows: bool = True) -> Picture:
    """Draw each scene from its camera.

    transform (B,4,4) world to camera, intrinsics (B,3,3) normalised, size (H, W). Exact up to rounding: points are
    ray times distance. Rays that hit nothing see the sky: mask False, points and normals NaN.
    """
    height, width = size
    device, dtype = transform.device, transform.dtype
    uv = uv_map(height, width, device=device, dtype=dtype)
    pixels = torch.cat([uv, torch.ones_like(uv[..., :1])], -1).reshape(1, -1, 3)
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
    sky = light["horizon"][:, None] * (1 - upward) + light["zenith"][:, None] * upward
    distance = (position - origin).norm(dim=-1)
    seen = torch.exp(-light["fog"][:, None] * distance)[..., None]
    colour = colour * seen + light["fog_colour"][:, None] * (1 - seen)
    colour = torch.where(hit[..., None], colour, sky)
    gain = light["exposure"] / colour.clamp_max(1.5).mean(dim=(1, 2)).clamp_min(1e-3)
    colour = colour * torch.where(light["exposure"] > 0, gain.clamp(0.4, 4.0), 1.0)[:, None, None]

    def to_map(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], height, width, *x.shape[2:])

    points = torch.where(hit[..., None], rays * depth[..., None], torch.nan)
    normal = torch.where(hit[..., None], normal @ rotation.transpose(1, 2), torch.nan)
    image = to_map(colour.clamp(1e-8, 1).pow(1 / 2.2)).permute(0, 3, 1, 2).contiguous()  # sRGB, by the usual power law
    return Picture(image, to_map(points), to_map(normal), to_map(hit), intrinsics, transform)
