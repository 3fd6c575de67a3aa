"""Procedural scenes with exact geometry: rooms, streets, open ground and tables, from any camera.

Layouts use sizes in metres that are plausible for the things they stand for; a scene is a few dozen solids
(`raycast.py`) with textures from noise, patterns and the photographs that scikit-image ships (never the motorcycle,
which is test data). Everything follows from an integer seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ttt_lib.raycast import TEXTURE_SIZE, Lighting, Picture, Scenes, Solids, draw, make_atlas

KINDS = ("room", "street", "ground", "table")
BOX, ELLIPSOID, CYLINDER, PRISM = range(4)
PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
               "immunohistochemistry", "moon", "page", "rocket", "text")  # fmt: skip
TEXTURES = 80


# ---------------------------------------------------------------------------------------------------- textures


def _noise(rng: np.random.Generator, roughness: float) -> np.ndarray:
    """Periodic fractal noise, (S, S) with values in [0, 1]."""
    total = np.zeros((TEXTURE_SIZE, TEXTURE_SIZE))
    for octave in range(1, 7):
        cells = 2**octave
        grid = torch.from_numpy(rng.standard_normal((cells, cells))).float()[None, None]
        grid = torch.nn.functional.pad(grid, (1, 1, 1, 1), mode="circular")
        scale = TEXTURE_SIZE // cells
        fine = torch.nn.functional.interpolate(grid, scale_factor=scale, mode="bilinear", align_corners=False)
        total += fine[0, 0, scale:-scale, scale:-scale].numpy() * roughness**octave
    total -= total.min()
    return total / max(total.max(), 1e-9)


def _pattern(rng: np.random.Generator) -> np.ndarray:
    """Tiles, planks, bricks, stripes, checks or dots, (S, S) with values in [0, 1]."""
    y, x = np.mgrid[0:TEXTURE_SIZE, 0:TEXTURE_SIZE] / TEXTURE_SIZE
    n = int(rng.choice([2, 4, 8]))
    kind = rng.integers(6)
    joint = rng.uniform(0.03, 0.12)
    if kind == 0:  # tiles
        return ((x * n % 1 > joint) & (y * n % 1 > joint)).astype(float)
    if kind == 1:  # bricks
        row = np.floor(y * n)
        return (((x * n / 2 + 0.5 * (row % 2)) % 1 > joint / 2) & (y * n % 1 > joint)).astype(float)
    if kind == 2:  # planks, each with its own brightness
        shade = rng.uniform(0.3, 1.0, n)
        return shade[np.floor(x * n).astype(int)] * (x * n % 1 > joint / 2)
    if kind == 3:  # stripes
        return 0.5 + 0.5 * np.sin(2 * math.pi * n * (x if rng.random() < 0.5 else y))
    if kind == 4:  # checks
        return ((np.floor(x * n) + np.floor(y * n)) % 2).astype(float)
    return ((x * n % 1 - 0.5) ** 2 + (y * n % 1 - 0.5) ** 2 < rng.uniform(0.05, 0.2)).astype(float)


def _photograph(rng: np.random.Generator) -> np.ndarray:
    """A random square cut from one of scikit-image's photographs, (S, S, 3) in [0, 1]."""
    import skimage.data
    from skimage.transform import resize

    image = np.asarray(getattr(skimage.data, str(rng.choice(PHOTOGRAPHS)))(), dtype=np.float32) / 255
    image = np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image[..., :3]
    side = int(rng.uniform(0.3, 0.95) * min(image.shape[:2]))
    top, left = (int(rng.integers(0, extent - side + 1)) for extent in image.shape[:2])
    cut = resize(image[top : top + side, left : left + side], (TEXTURE_SIZE, TEXTURE_SIZE), anti_aliasing=True)
    return np.rot90(cut, rng.integers(4)).copy()


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A colour as things indoors and outdoors have it: mostly muted, sometimes strong. (3,) in [0, 1]."""
    gray = rng.uniform(0.08, 0.95)
    chroma = rng.uniform(0.0, 0.25) if rng.random() < 0.75 else rng.uniform(0.3, 0.8)
    return np.clip(gray + chroma * rng.uniform(-0.6, 0.6, 3), 0.02, 1.0)


def make_textures(seed: int, count: int = TEXTURES) -> Tensor:
    """Texture atlas (count, 3, S, S), float32 linear RGB. The first `count // 8` are nearly plain (paint, plaster)."""
    rng = np.random.default_rng([seed, 1])
    images = []
    for i in range(count):
        first, second = _colour(rng), _colour(rng)
        if i < count // 8:
            value, second = _noise(rng, 0.7), np.clip(first * rng.uniform(0.75, 1.05), 0, 1)
        elif i % 3 == 0:
            images.append(_photograph(rng))
            continue
        elif i % 3 == 1:
            value = _noise(rng, rng.uniform(0.4, 0.95))
        else:
            value = 0.8 * _pattern(rng) + 0.2 * _noise(rng, 0.8)
        images.append(first + (second - first) * value[..., None])
    return torch.from_numpy(np.stack(images)).float().clamp(0, 1).pow(2.2).permute(0, 3, 1, 2).contiguous()


# ----------------------------------------------------------------------------------------------------- layouts


def _yaw(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _tilt(pitch: float, roll: float) -> np.ndarray:
    cp, sp, cr, sr = math.cos(pitch), math.sin(pitch), math.cos(roll), math.sin(roll)
    return np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]) @ np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])


@dataclass
class Layout:
    """One scene while it is put together; `y` arguments are heights above the floor (up is positive here)."""

    rng: np.random.Generator
    solids: list[tuple] = field(default_factory=list)
    camera: np.ndarray = field(default_factory=lambda: np.zeros(3))
    clearance: float = 0.5

    def add(self, kind, x, y, z, half, rotation=None, texture=None, tile=None, tint=None, keep=False) -> None:
        """Put a solid with its centre at (x, height y, z). Things too close to the camera are left out."""
        half = np.asarray(half, dtype=float)
        centre = np.array([x, -y, z])
        rotation = np.eye(3) if rotation is None else rotation
        if not keep:
            outside = np.abs((self.camera - centre) @ rotation) - half
            if np.linalg.norm(np.maximum(outside, 0)) < self.clearance:
                return
        rng = self.rng
        texture = int(rng.integers(TEXTURES)) if texture is None else texture
        tile = rng.uniform(0.4, 1.6) * max(half.max(), 0.05) if tile is None else tile
        tint = 0.45 + 0.55 * rng.random(3) if tint is None else np.asarray(tint, dtype=float)
        angles = np.sort(rng.uniform(-0.35, 0.35, 6) + np.arange(6) * math.pi / 3)
        sides = np.stack([np.cos(angles), np.sin(angles), rng.uniform(0.6, 0.95, 6)], -1)
        self.solids.append((kind, centre, rotation, half, sides, texture, tile, tint))

    def plain(self) -> int:
        """A texture index of the nearly plain ones."""
        return int(self.rng.integers(TEXTURES // 8))

    def wall_texture(self) -> int:
        """Plain paint two times of three, anything else otherwise."""
        return self.plain() if self.rng.random() < 0.65 else int(self.rng.integers(TEXTURES))


def _table(layout: Layout, x: float, z: float, width: float, depth: float, height: float, yaw: float) -> None:
    rng, turn = layout.rng, _yaw(yaw)
    texture, thick = int(rng.integers(TEXTURES)), rng.uniform(0.015, 0.04)
    layout.add(BOX, x, height - thick, z, (width / 2, thick, depth / 2), turn, texture)
    leg = rng.uniform(0.02, 0.04)
    for sx in (-1, 1):
        for sz in (-1, 1):
            foot = turn @ np.array([sx * (width / 2 - leg), 0, sz * (depth / 2 - leg)])
            kind = BOX if width > 1 else CYLINDER
            layout.add(
                kind, x + foot[0], (height - thick) / 2, z + foot[2], (leg, height / 2 - thick, leg), turn, texture
            )


def _things_on(layout: Layout, x: float, z: float, reach: float, height: float, count: int, size: tuple) -> None:
    """Small objects standing on a surface at `height`."""
    rng = layout.rng
    for _ in range(count):
        px, pz = x + rng.uniform(-reach, reach), z + rng.uniform(-reach, reach)
        h = rng.uniform(*size) * rng.uniform(0.5, 1.6) / 2
        w = rng.uniform(*size) / 2
        kind = int(rng.choice([BOX, BOX, ELLIPSOID, CYLINDER, CYLINDER, PRISM]))
        half = (w, h, w if kind in (CYLINDER, ELLIPSOID) else rng.uniform(*size) / 2)
        layout.add(kind, px, height + h, pz, half, _yaw(rng.uniform(0, math.pi)))


def _chair(layout: Layout, x: float, z: float, yaw: float) -> None:
    rng, turn = layout.rng, _yaw(yaw)
    seat, width, texture = rng.uniform(0.4, 0.5), rng.uniform(0.4, 0.55), int(rng.integers(TEXTURES))
    layout.add(BOX, x, seat, z, (width / 2, rng.uniform(0.02, 0.06), width / 2), turn, texture)
    back = turn @ np.array([0, 0, width / 2])
    layout.add(BOX, x + back[0], seat + 0.25, z + back[2], (width / 2, 0.25, 0.025), turn, texture)
    layout.add(CYLINDER, x, seat / 2, z, (0.04, seat / 2, 0.04), None, texture)


def _room(layout: Layout) -> None:
    rng = layout.rng
    wide, deep, high = rng.uniform(2.6, 8.0), rng.uniform(3.0, 9.0), rng.uniform(2.3, 3.4)
    layout.camera = np.array(
        [rng.uniform(-0.35, 0.35) * wide, -rng.uniform(0.9, 1.75), -rng.uniform(0.15, 0.45) * deep]
    )
    half_w, half_d = wide / 2, deep / 2
    # Four walls, floor and ceiling as slabs of their own, so that each has its own texture.
    for sign in (-1, 1):
        layout.add(BOX, sign * (half_w + 0.1), high / 2, 0, (0.1, high / 2 + 0.2, half_d + 0.2), None,
                   layout.wall_texture(), rng.uniform(0.8, 4), keep=True)  # fmt: skip
        layout.add(BOX, 0, high / 2, sign * (half_d + 0.1), (half_w + 0.2, high / 2 + 0.2, 0.1), None,
                   layout.wall_texture(), rng.uniform(0.8, 4), keep=True)  # fmt: skip
    layout.add(BOX, 0, -0.1, 0, (half_w + 0.2, 0.1, half_d + 0.2), None, None, rng.uniform(0.5, 3), keep=True)
    layout.add(BOX, 0, high + 0.1, 0, (half_w + 0.2, 0.1, half_d + 0.2), None, layout.plain(), 2.0, keep=True)

    for _ in range(rng.integers(1, 5)):  # pictures, doors, windows, shelves on the walls
        w, h, y = rng.uniform(0.2, 0.9), rng.uniform(0.2, 1.0), rng.uniform(0.8, high - 0.5)
        thick = rng.uniform(0.01, 0.04) if rng.random() < 0.7 else rng.uniform(0.1, 0.25)
        if rng.random() < 0.5:
            layout.add(BOX, rng.uniform(-1, 1) * half_w, y, half_d - thick, (w, h, thick))
        else:
            layout.add(BOX, rng.choice([-1, 1]) * (half_w - thick), y, rng.uniform(-0.6, 1) * half_d, (thick, h, w))
    for _ in range(rng.integers(1, 5)):  # cupboards, beds, sofas along the walls
        w, h, d = rng.uniform(0.3, 1.1), rng.uniform(0.2, 1.1), rng.uniform(0.2, 0.5)
        if rng.random() < 0.5:
            layout.add(BOX, rng.uniform(-1, 1) * (half_w - w), h, half_d - d, (w, h, d))
        else:
            layout.add(BOX, rng.choice([-1, 1]) * (half_w - d), h, rng.uniform(-0.5, 1) * (half_d - w), (d, h, w))
    for _ in range(rng.integers(0, 3)):
        x, z, yaw = rng.uniform(-0.8, 0.8) * half_w, rng.uniform(-0.2, 0.85) * half_d, rng.uniform(0, math.pi)
        if rng.random() < 0.6:
            width, height = rng.uniform(0.6, 1.8), rng.uniform(0.4, 0.95)
            _table(layout, x, z, width, rng.uniform(0.5, 1.0), height, yaw)
            _things_on(layout, x, z, 0.3, height, int(rng.integers(0, 4)), (0.06, 0.35))
        else:
            _chair(layout, x, z, yaw)
    if rng.random() < 0.4:  # a lamp, standing or hanging
        x, z, h = rng.uniform(-0.8, 0.8) * half_w, rng.uniform(0, 0.9) * half_d, rng.uniform(1.2, 1.8)
        y = h / 2 if rng.random() < 0.5 else high - h / 4
        layout.add(CYLINDER, x, y, z, (0.02, h / 2 if y == h / 2 else h / 4, 0.02))
        layout.add(ELLIPSOID, x, h if y == h / 2 else high - h / 2, z, (0.18, 0.14, 0.18))
    _things_on(layout, 0, 0.3 * half_d, 0.7 * min(half_w, half_d), 0, int(rng.integers(0, 4)), (0.1, 0.7))


def _car(layout: Layout, x: float, z: float, yaw: float) -> None:
    rng, turn = layout.rng, _yaw(yaw)
    length, width, height = rng.uniform(3.6, 5.0), rng.uniform(1.6, 1.95), rng.uniform(1.35, 1.9)
    if rng.random() < 0.12:  # a van or lorry
        length, width, height = rng.uniform(5, 9), rng.uniform(2, 2.5), rng.uniform(2.2, 3.6)
    paint, texture = _colour(rng) * 1.3, layout.plain()
    body = 0.32 * height
    layout.add(BOX, x, 0.22 + body, z, (width / 2, body, length / 2), turn, texture, 2.0, paint)
    cabin = turn @ np.array([0, 0, rng.uniform(-0.1, 0.1) * length])
    layout.add(BOX, x + cabin[0], 0.2 + 2 * body + 0.16 * height, z + cabin[2],
               (0.44 * width, 0.17 * height, 0.27 * length), turn, texture, 2.0, paint * rng.uniform(0.1, 0.6))  # fmt: skip
    axle = turn @ np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1.0]])
    for sz in (-0.3, 0.3):  # one cylinder a pair of wheels, its axis across the car
        at = turn @ np.array([0, 0, sz * length])
        layout.add(
            CYLINDER, x + at[0], 0.32, z + at[2], (0.32, width / 2 + 0.01, 0.32), axle, texture, 1.0, (0.05,) * 3
        )


def _tree(layout: Layout, x: float, z: float) -> None:
    rng = layout.rng
    height, crown = rng.uniform(2.5, 9), rng.uniform(0.8, 2.5)
    radius = rng.uniform(0.08, 0.25)
    layout.add(CYLINDER, x, height / 2, z, (radius, height / 2, radius), tint=(0.35, 0.28, 0.2))
    green = np.array([0.25, 0.45, 0.15]) * rng.uniform(0.5, 1.4) if rng.random() < 0.8 else _colour(rng)
    layout.add(ELLIPSOID, x, height, z, (crown, crown * rng.uniform(0.7, 1.5), crown), tile=1.5, tint=green)


def _person(layout: Layout, x: float, z: float) -> None:
    rng, height = layout.rng, layout.rng.uniform(1.5, 1.9)
    layout.add(CYLINDER, x, 0.23 * height, z, (0.14, 0.23 * height, 0.14))
    layout.add(ELLIPSOID, x, 0.62 * height, z, (0.23, 0.26 * height, 0.16), _yaw(rng.uniform(0, 3)))
    layout.add(ELLIPSOID, x, 0.93 * height, z, (0.1, 0.12, 0.1), tint=(0.8, 0.6, 0.5))


def _street(layout: Layout) -> None:
    rng = layout.rng
    layout.camera = np.array([rng.uniform(-2, 2), -rng.uniform(1.2, 2.2), 0.0])
    layout.clearance = 1.5
    road, walk = rng.uniform(3, 7), rng.uniform(1, 5)
    layout.add(BOX, 0, -0.5, 0, (300, 0.5, 300), None, None, rng.uniform(1, 4), keep=True)  # the ground itself
    layout.add(BOX, 0, 0.005, 0, (road, 0.005, 300), None, layout.plain(), rng.uniform(2, 6),
               (rng.uniform(0.2, 0.5),) * 3, keep=True)  # fmt: skip
    for sign in (-1, 1):
        layout.add(BOX, sign * (road + walk / 2), 0.06, 0, (walk / 2, 0.06, 300), tile=rng.uniform(0.5, 2), keep=True)
        if rng.random() < 0.8:  # houses
            z = rng.uniform(-8, 4)
            while z < rng.uniform(45, 90):
                length, tall, deep = rng.uniform(5, 18), rng.uniform(3, 18), rng.uniform(4, 9)
                x = sign * (road + walk + deep + rng.uniform(0, 6))
                layout.add(BOX, x, tall / 2, z + length / 2, (deep, tall / 2, length / 2), tile=rng.uniform(1.5, 6))
                z += length + (rng.uniform(2, 15) if rng.random() < 0.5 else 0.1)
        elif rng.random() < 0.6:  # a fence or hedge
            tall = rng.uniform(0.8, 2.2)
            layout.add(BOX, sign * (road + walk + 1), tall / 2, 30, (rng.uniform(0.05, 0.6), tall / 2, 60), tile=1.5)
        for _ in range(rng.integers(0, 4)):
            layout.add(
                CYLINDER,
                sign * (road + 0.5),
                3,
                rng.uniform(4, 45),
                (rng.uniform(0.05, 0.14), rng.uniform(1.5, 4), 0.1),
            )
        for _ in range(rng.integers(0, 4)):
            _tree(layout, sign * (road + walk * rng.uniform(0.2, 1.5)), rng.uniform(5, 50))
        for _ in range(rng.integers(0, 3)):
            _car(layout, sign * (road - 1.2), rng.uniform(4, 40), rng.uniform(-0.06, 0.06))
        for _ in range(rng.integers(0, 3)):
            _person(layout, sign * (road + rng.uniform(0, walk)), rng.uniform(4, 25))
    for _ in range(rng.integers(0, 3)):
        _car(layout, rng.uniform(-0.6, 0.6) * road, rng.uniform(7, 50), rng.uniform(-0.1, 0.1))
    if rng.random() < 0.5:  # something closes the street
        layout.add(
            BOX, rng.uniform(-10, 10), 6, rng.uniform(50, 120), (rng.uniform(8, 30), rng.uniform(4, 14), 5), tile=4
        )


def _ground(layout: Layout) -> None:
    rng = layout.rng
    layout.camera = np.array([0, -rng.uniform(0.8, 2.2), 0.0])
    slope = _tilt(rng.uniform(-0.08, 0.08), rng.uniform(-0.08, 0.08))
    layout.add(BOX, 0, -1.0, 0, (200, 1.0, 200), slope, None, rng.uniform(0.8, 5), keep=True)
    for _ in range(rng.integers(1, 4)):
        size = rng.uniform(10, 40)
        layout.add(
            ELLIPSOID, rng.uniform(-80, 80), 0, rng.uniform(60, 150), (size * 2, size * rng.uniform(0.2, 0.6), size)
        )
    spread = rng.uniform(0.15, 0.7)
    for _ in range(rng.integers(4, 16)):
        z = rng.uniform(1.5, 6) if rng.random() < 0.4 else rng.uniform(4, 30)
        x = rng.uniform(-spread, spread) * (z + 2)
        draw_of = rng.random()
        if draw_of < 0.25:
            _tree(layout, x, z + 2)
        elif draw_of < 0.4:
            _person(layout, x, z)
        else:
            kind = int(rng.integers(4))
            half = rng.uniform(0.15, 1.3, 3)
            turn = _yaw(rng.uniform(0, 3)) @ (_tilt(*rng.uniform(-0.3, 0.3, 2)) if rng.random() < 0.3 else np.eye(3))
            layout.add(kind, x, half[1] * rng.uniform(0.6, 1), z, half, turn)
    if rng.random() < 0.4:  # a wall or a house
        z = rng.uniform(6, 25)
        layout.add(BOX, rng.uniform(-8, 8), 2, z, (rng.uniform(2, 10), rng.uniform(1.5, 5), rng.uniform(0.1, 4)),
                   _yaw(rng.uniform(-0.7, 0.7)), tile=3)  # fmt: skip


def _tabletop(layout: Layout) -> None:
    rng = layout.rng
    layout.camera = np.array([0, -rng.uniform(0.25, 0.9), -rng.uniform(0.5, 1.1)])
    layout.clearance = 0.2
    layout.add(BOX, 0, -0.03, 0.3, (rng.uniform(0.6, 2), 0.03, rng.uniform(0.6, 1.2)), tile=rng.uniform(0.3, 1.5))
    layout.add(BOX, 0, -0.85, 1, (5, 0.1, 5), tile=rng.uniform(0.5, 2), keep=True)  # the floor below
    layout.add(BOX, 0, 0.5, rng.uniform(1.2, 3.5), (6, 3, 0.1), _yaw(rng.uniform(-0.4, 0.4)), layout.wall_texture(),
               rng.uniform(0.8, 3), keep=True)  # fmt: skip
    if rng.random() < 0.5:
        layout.add(BOX, rng.choice([-1, 1]) * rng.uniform(1.2, 2.5), 0.5, 1, (0.1, 3, 4), None, layout.wall_texture())
    _things_on(layout, 0, 0.2, 0.45, 0, int(rng.integers(4, 14)), (0.05, 0.3))
    for _ in range(rng.integers(0, 3)):  # thin upright things
        layout.add(
            CYLINDER, rng.uniform(-0.4, 0.4), 0.15, rng.uniform(-0.2, 0.6), (rng.uniform(0.004, 0.012), 0.15, 0.008)
        )


_LAYOUTS = {"room": _room, "street": _street, "ground": _ground, "table": _tabletop}


def _lighting(rng: np.random.Generator, kind: str, camera: np.ndarray) -> dict[str, np.ndarray]:
    indoors = kind in ("room", "table")
    warm = 1 + rng.uniform(-0.18, 0.18) * np.array([1, 0, -1])
    level = rng.uniform(0.5, 1.4)
    sun_up = np.array([rng.uniform(-1, 1), -rng.uniform(0.25, 1.2), rng.uniform(-1, 1)])
    overcast = rng.random() < 0.4
    sky = np.array([0.45, 0.62, 0.9]) * rng.uniform(0.4, 1.1) if not overcast else np.full(3, rng.uniform(0.4, 0.95))
    fog = 0.0 if indoors or rng.random() < 0.7 else rng.uniform(0.001, 0.02)
    horizon = np.clip(sky * 0.5 + rng.uniform(0.3, 0.55), 0, 1)
    return {
        "horizon": horizon,
        "zenith": sky,
        "sun_direction": sun_up / np.linalg.norm(sun_up),
        "sun": warm * level * (0.0 if indoors else 0.15 if overcast else rng.uniform(0.6, 1.3)),
        "lamp_position": camera + np.array([rng.uniform(-1.2, 1.2), -rng.uniform(0.3, 1.0), rng.uniform(0, 2.5)]),
        "lamp": warm * level * (rng.uniform(0.3, 1.4) if indoors else 0.0),
        "ambient": warm[::-1] * level * (rng.uniform(0.4, 1.0) if indoors or overcast else rng.uniform(0.25, 0.6)),
        "evenness": np.array(rng.uniform(0.5, 0.9) if indoors else 0.0),
        "fog": np.array(fog),
        "fog_colour": horizon,
        "exposure": np.array(rng.uniform(0.12, 0.32)),
    }


def make_scenes(kinds: list[str], seed: int, atlas: list[Tensor] | None = None) -> tuple[Scenes, Tensor]:
    """One scene for each entry of `kinds`, from `seed`.

    Returns the scenes and the place of a camera that fits each, (B, 3) metres in the world. `atlas` reuses textures
    (`make_atlas(make_textures(seed))` otherwise, about a second). Raises `ValueError` for an unknown kind.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown scene kind {sorted(unknown)}; there are {list(KINDS)}")
    atlas = make_atlas(make_textures(seed)) if atlas is None else atlas
    layouts, lights = [], []
    for i, kind in enumerate(kinds):
        layout = Layout(np.random.default_rng([seed, 2, i]))
        _LAYOUTS[kind](layout)
        layouts.append(layout)
        lights.append(_lighting(layout.rng, kind, layout.camera))

    by_kind = [[[s for s in layout.solids if s[0] == kind] for layout in layouts] for kind in range(4)]
    counts = tuple(max(len(scene) for scene in group) for group in by_kind)
    absent = (0, np.zeros(3), np.eye(3), np.zeros(3), np.ones((6, 3)), 0, 1.0, np.ones(3))
    rows = [
        [s for kind in range(4) for s in by_kind[kind][i] + [absent] * (counts[kind] - len(by_kind[kind][i]))]
        for i in range(len(layouts))
    ]

    def stack(place: int) -> Tensor:
        return torch.from_numpy(np.array([[solid[place] for solid in row] for row in rows]))

    floats = [stack(place).float() for place in (1, 2, 3, 4)]
    solids = Solids(*floats, texture=stack(5).long(), tile=stack(6).float(), tint=stack(7).float(), counts=counts)
    lighting = Lighting(**{k: torch.from_numpy(np.stack([light[k] for light in lights])).float() for k in lights[0]})
    cameras = torch.from_numpy(np.stack([layout.camera for layout in layouts])).float()
    return Scenes(solids, lighting, atlas), cameras


# ----------------------------------------------------------------------------------------------------- cameras


def sample_cameras(kinds: list[str], places: Tensor, seed: int, aspect_ratio: float) -> tuple[Tensor, Tensor]:
    """A tilted camera with a field of view from 30 to 100 degrees at each place.

    The angle is that of the longer side of the image. Returns transform (B,4,4) world to camera and intrinsics
    (B,3,3), normalised, principal point in the middle.
    """
    transforms, intrinsics = [], []
    for i, kind in enumerate(kinds):
        rng = np.random.default_rng([seed, 3, i])
        fov = math.radians(rng.uniform(30, 100) if rng.random() < 0.3 else rng.normal(62, 10))
        fov = min(max(fov, math.radians(30)), math.radians(100))
        pitch_down = {"room": (-0.12, 0.45), "street": (-0.1, 0.15), "ground": (-0.08, 0.35), "table": (0.25, 0.8)}[
            kind
        ]
        pitch = rng.uniform(*pitch_down)
        yaw = rng.uniform(-0.25, 0.25) if kind in ("street", "table") else rng.uniform(-0.7, 0.7)
        roll = rng.normal(0, 0.035)
        rotation = _tilt(pitch, roll).T @ _yaw(yaw).T
        if kind == "table":  # look at the middle of the table
            ahead = np.array([0, 0, 0.25]) - places[i].numpy() + rng.uniform(-0.15, 0.15, 3)
            pitch = math.atan2(ahead[1], math.hypot(ahead[0], ahead[2]))
            rotation = _tilt(0, roll).T @ _tilt(-pitch, 0).T @ _yaw(math.atan2(ahead[0], ahead[2])).T
        else:
            rotation = _tilt(0, roll).T @ _tilt(-pitch, 0).T @ _yaw(yaw).T
        matrix = np.eye(4)
        matrix[:3, :3] = rotation
        matrix[:3, 3] = -rotation @ places[i].numpy()
        focal = 0.5 / math.tan(fov / 2)
        fx, fy = (focal, focal * aspect_ratio) if aspect_ratio >= 1 else (focal / aspect_ratio, focal)
        transforms.append(matrix)
        intrinsics.append(np.array([[fx, 0, 0.5], [0, fy, 0.5], [0, 0, 1]]))
    return torch.from_numpy(np.stack(transforms)).float(), torch.from_numpy(np.stack(intrinsics)).float()


def make_pictures(
    kinds: list[str], seed: int, size: tuple[int, int], atlas: list[Tensor] | None = None, shadows: bool = True
) -> Picture:
    """Scenes of the given kinds, each seen once by a camera of its own: what training and the test sets consume."""
    scenes, places = make_scenes(kinds, seed, atlas)
    transform, intrinsics = sample_cameras(kinds, places, seed, size[1] / size[0])
    return draw(scenes, transform, intrinsics, size, shadows)
