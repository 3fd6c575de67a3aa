"""What stands where in a procedural scene: rooms, streets, open ground and tables, with the things in them.

Sizes are in metres and plausible for the things they stand for. Every draw comes from the layout's own generator, in
the order of the code: moving a line changes every scene of a seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from ttt_lib.data.scenes.textures import TEXTURES, random_colour

BOX, ELLIPSOID, CYLINDER, PRISM = range(4)


def yaw_matrix(angle: float) -> np.ndarray:
    """Rotation by `angle` (radians) about the vertical axis, (3, 3)."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def tilt_matrix(pitch: float, roll: float) -> np.ndarray:
    """Rotation by `roll` about the z axis, then by `pitch` about the x axis (radians), (3, 3)."""
    cp, sp, cr, sr = math.cos(pitch), math.sin(pitch), math.cos(roll), math.sin(roll)
    return np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]) @ np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])


@dataclass
class Layout:
    """One scene while it is put together; `y` arguments are heights above the floor (up is positive here)."""

    rng: np.random.Generator
    solids: list[tuple] = field(default_factory=list)
    camera: np.ndarray = field(default_factory=lambda: np.zeros(3))
    clearance: float = 0.5

    def add(
        self, kind: int, x: float, y: float, z: float, half: ArrayLike, rotation: np.ndarray | None = None,
        texture: int | None = None, tile: float | None = None, tint: ArrayLike | None = None, keep: bool = False,
    ) -> None:  # fmt: skip
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


def _of(layout: Layout) -> tuple:
    """The generator, and what the functions below call most."""
    return layout.rng, layout.add, layout.rng.uniform


def _table(layout: Layout, x: float, z: float, width: float, depth: float, height: float, yaw: float) -> None:
    rng, add, uniform, turn = *_of(layout), yaw_matrix(yaw)
    texture, thick = int(rng.integers(TEXTURES)), uniform(0.015, 0.04)
    add(BOX, x, height - thick, z, (width / 2, thick, depth / 2), turn, texture)
    leg = uniform(0.02, 0.04)
    for sx, sz in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        foot = turn @ np.array([sx * (width / 2 - leg), 0, sz * (depth / 2 - leg)])
        kind = BOX if width > 1 else CYLINDER
        half = (leg, height / 2 - thick, leg)
        add(kind, x + foot[0], (height - thick) / 2, z + foot[2], half, turn, texture)


def _things_on(layout: Layout, x: float, z: float, reach: float, height: float, count: int, size: tuple) -> None:
    """Small objects standing on a surface at `height`."""
    rng, add, uniform = _of(layout)
    for _ in range(count):
        px, pz = x + uniform(-reach, reach), z + uniform(-reach, reach)
        h = uniform(*size) * uniform(0.5, 1.6) / 2
        w = uniform(*size) / 2
        kind = int(rng.choice([BOX, BOX, ELLIPSOID, CYLINDER, CYLINDER, PRISM]))
        half = (w, h, w if kind in (CYLINDER, ELLIPSOID) else uniform(*size) / 2)
        add(kind, px, height + h, pz, half, yaw_matrix(uniform(0, math.pi)))


def _chair(layout: Layout, x: float, z: float, yaw: float) -> None:
    rng, add, uniform, turn = *_of(layout), yaw_matrix(yaw)
    seat, width, texture = uniform(0.4, 0.5), uniform(0.4, 0.55), int(rng.integers(TEXTURES))
    add(BOX, x, seat, z, (width / 2, uniform(0.02, 0.06), width / 2), turn, texture)
    back = turn @ np.array([0, 0, width / 2])
    add(BOX, x + back[0], seat + 0.25, z + back[2], (width / 2, 0.25, 0.025), turn, texture)
    add(CYLINDER, x, seat / 2, z, (0.04, seat / 2, 0.04), None, texture)


def _room(layout: Layout) -> None:
    rng, add, uniform = _of(layout)
    wide, deep, high = uniform(2.6, 8.0), uniform(3.0, 9.0), uniform(2.3, 3.4)
    layout.camera = np.array([uniform(-0.35, 0.35) * wide, -uniform(0.9, 1.75), -uniform(0.15, 0.45) * deep])
    half_w, half_d = wide / 2, deep / 2
    # Four walls, floor and ceiling as slabs of their own, so that each has its own texture.
    for sign in (-1, 1):
        add(BOX, sign * (half_w + 0.1), high / 2, 0, (0.1, high / 2 + 0.2, half_d + 0.2), None, layout.wall_texture(),
            uniform(0.8, 4), keep=True)  # fmt: skip
        add(BOX, 0, high / 2, sign * (half_d + 0.1), (half_w + 0.2, high / 2 + 0.2, 0.1), None, layout.wall_texture(),
            uniform(0.8, 4), keep=True)  # fmt: skip
    add(BOX, 0, -0.1, 0, (half_w + 0.2, 0.1, half_d + 0.2), None, None, uniform(0.5, 3), keep=True)
    add(BOX, 0, high + 0.1, 0, (half_w + 0.2, 0.1, half_d + 0.2), None, layout.plain(), 2.0, keep=True)

    for _ in range(rng.integers(1, 5)):  # pictures, doors, windows, shelves on the walls
        w, h, y = uniform(0.2, 0.9), uniform(0.2, 1.0), uniform(0.8, high - 0.5)
        thick = uniform(0.01, 0.04) if rng.random() < 0.7 else uniform(0.1, 0.25)
        if rng.random() < 0.5:
            add(BOX, uniform(-1, 1) * half_w, y, half_d - thick, (w, h, thick))
        else:
            add(BOX, rng.choice([-1, 1]) * (half_w - thick), y, uniform(-0.6, 1) * half_d, (thick, h, w))
    for _ in range(rng.integers(1, 5)):  # cupboards, beds, sofas along the walls
        w, h, d = uniform(0.3, 1.1), uniform(0.2, 1.1), uniform(0.2, 0.5)
        if rng.random() < 0.5:
            add(BOX, uniform(-1, 1) * (half_w - w), h, half_d - d, (w, h, d))
        else:
            add(BOX, rng.choice([-1, 1]) * (half_w - d), h, uniform(-0.5, 1) * (half_d - w), (d, h, w))
    for _ in range(rng.integers(0, 3)):
        x, z, yaw = uniform(-0.8, 0.8) * half_w, uniform(-0.2, 0.85) * half_d, uniform(0, math.pi)
        if rng.random() < 0.6:
            width, height = uniform(0.6, 1.8), uniform(0.4, 0.95)
            _table(layout, x, z, width, uniform(0.5, 1.0), height, yaw)
            _things_on(layout, x, z, 0.3, height, int(rng.integers(0, 4)), (0.06, 0.35))
        else:
            _chair(layout, x, z, yaw)
    if rng.random() < 0.4:  # a lamp, standing or hanging
        x, z, h = uniform(-0.8, 0.8) * half_w, uniform(0, 0.9) * half_d, uniform(1.2, 1.8)
        y = h / 2 if rng.random() < 0.5 else high - h / 4
        add(CYLINDER, x, y, z, (0.02, h / 2 if y == h / 2 else h / 4, 0.02))
        add(ELLIPSOID, x, h if y == h / 2 else high - h / 2, z, (0.18, 0.14, 0.18))
    _things_on(layout, 0, 0.3 * half_d, 0.7 * min(half_w, half_d), 0, int(rng.integers(0, 4)), (0.1, 0.7))


def _car(layout: Layout, x: float, z: float, yaw: float) -> None:
    rng, add, uniform, turn = *_of(layout), yaw_matrix(yaw)
    length, width, height = uniform(3.6, 5.0), uniform(1.6, 1.95), uniform(1.35, 1.9)
    if rng.random() < 0.12:  # a van or lorry
        length, width, height = uniform(5, 9), uniform(2, 2.5), uniform(2.2, 3.6)
    paint, texture = random_colour(rng) * 1.3, layout.plain()
    body = 0.32 * height
    add(BOX, x, 0.22 + body, z, (width / 2, body, length / 2), turn, texture, 2.0, paint)
    cabin = turn @ np.array([0, 0, uniform(-0.1, 0.1) * length])
    add(BOX, x + cabin[0], 0.2 + 2 * body + 0.16 * height, z + cabin[2], (0.44 * width, 0.17 * height, 0.27 * length),
        turn, texture, 2.0, paint * uniform(0.1, 0.6))  # fmt: skip
    axle = turn @ np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1.0]])
    for sz in (-0.3, 0.3):  # one cylinder a pair of wheels, its axis across the car
        at = turn @ np.array([0, 0, sz * length])
        add(CYLINDER, x + at[0], 0.32, z + at[2], (0.32, width / 2 + 0.01, 0.32), axle, texture, 1.0, (0.05,) * 3)


def _tree(layout: Layout, x: float, z: float) -> None:
    rng, add, uniform = _of(layout)
    height, crown = uniform(2.5, 9), uniform(0.8, 2.5)
    radius = uniform(0.08, 0.25)
    add(CYLINDER, x, height / 2, z, (radius, height / 2, radius), tint=(0.35, 0.28, 0.2))
    green = np.array([0.25, 0.45, 0.15]) * uniform(0.5, 1.4) if rng.random() < 0.8 else random_colour(rng)
    add(ELLIPSOID, x, height, z, (crown, crown * uniform(0.7, 1.5), crown), tile=1.5, tint=green)


def _person(layout: Layout, x: float, z: float) -> None:
    rng, add, uniform = _of(layout)
    height = uniform(1.5, 1.9)
    add(CYLINDER, x, 0.23 * height, z, (0.14, 0.23 * height, 0.14))
    add(ELLIPSOID, x, 0.62 * height, z, (0.23, 0.26 * height, 0.16), yaw_matrix(uniform(0, 3)))
    add(ELLIPSOID, x, 0.93 * height, z, (0.1, 0.12, 0.1), tint=(0.8, 0.6, 0.5))


def _street(layout: Layout) -> None:
    rng, add, uniform = _of(layout)
    layout.camera = np.array([uniform(-2, 2), -uniform(1.2, 2.2), 0.0])
    layout.clearance = 1.5
    road, walk = uniform(3, 7), uniform(1, 5)
    add(BOX, 0, -0.5, 0, (300, 0.5, 300), None, None, uniform(1, 4), keep=True)  # the ground itself
    add(BOX, 0, 0.005, 0, (road, 0.005, 300), None, layout.plain(), uniform(2, 6), (uniform(0.2, 0.5),) * 3, keep=True)
    for sign in (-1, 1):
        add(BOX, sign * (road + walk / 2), 0.06, 0, (walk / 2, 0.06, 300), tile=uniform(0.5, 2), keep=True)
        if rng.random() < 0.8:  # houses
            z = uniform(-8, 4)
            while z < uniform(45, 90):
                length, tall, deep = uniform(5, 18), uniform(3, 18), uniform(4, 9)
                x = sign * (road + walk + deep + uniform(0, 6))
                add(BOX, x, tall / 2, z + length / 2, (deep, tall / 2, length / 2), tile=uniform(1.5, 6))
                z += length + (uniform(2, 15) if rng.random() < 0.5 else 0.1)
        elif rng.random() < 0.6:  # a fence or hedge
            tall = uniform(0.8, 2.2)
            add(BOX, sign * (road + walk + 1), tall / 2, 30, (uniform(0.05, 0.6), tall / 2, 60), tile=1.5)
        for _ in range(rng.integers(0, 4)):
            add(CYLINDER, sign * (road + 0.5), 3, uniform(4, 45), (uniform(0.05, 0.14), uniform(1.5, 4), 0.1))
        for _ in range(rng.integers(0, 4)):
            _tree(layout, sign * (road + walk * uniform(0.2, 1.5)), uniform(5, 50))
        for _ in range(rng.integers(0, 3)):
            _car(layout, sign * (road - 1.2), uniform(4, 40), uniform(-0.06, 0.06))
        for _ in range(rng.integers(0, 3)):
            _person(layout, sign * (road + uniform(0, walk)), uniform(4, 25))
    for _ in range(rng.integers(0, 3)):
        _car(layout, uniform(-0.6, 0.6) * road, uniform(7, 50), uniform(-0.1, 0.1))
    if rng.random() < 0.5:  # something closes the street
        add(BOX, uniform(-10, 10), 6, uniform(50, 120), (uniform(8, 30), uniform(4, 14), 5), tile=4)


def _ground(layout: Layout) -> None:
    rng, add, uniform = _of(layout)
    layout.camera = np.array([0, -uniform(0.8, 2.2), 0.0])
    slope = tilt_matrix(uniform(-0.08, 0.08), uniform(-0.08, 0.08))
    add(BOX, 0, -1.0, 0, (200, 1.0, 200), slope, None, uniform(0.8, 5), keep=True)
    for _ in range(rng.integers(1, 4)):
        size = uniform(10, 40)
        add(ELLIPSOID, uniform(-80, 80), 0, uniform(60, 150), (size * 2, size * uniform(0.2, 0.6), size))
    spread = uniform(0.15, 0.7)
    for _ in range(rng.integers(4, 16)):
        z = uniform(1.5, 6) if rng.random() < 0.4 else uniform(4, 30)
        x = uniform(-spread, spread) * (z + 2)
        draw_of = rng.random()
        if draw_of < 0.25:
            _tree(layout, x, z + 2)
        elif draw_of < 0.4:
            _person(layout, x, z)
        else:
            kind = int(rng.integers(4))
            half = uniform(0.15, 1.3, 3)
            turn = yaw_matrix(uniform(0, 3)) @ (
                tilt_matrix(*uniform(-0.3, 0.3, 2)) if rng.random() < 0.3 else np.eye(3)
            )
            add(kind, x, half[1] * uniform(0.6, 1), z, half, turn)
    if rng.random() < 0.4:  # a wall or a house
        z = uniform(6, 25)
        add(BOX, uniform(-8, 8), 2, z, (uniform(2, 10), uniform(1.5, 5), uniform(0.1, 4)),
            yaw_matrix(uniform(-0.7, 0.7)), tile=3)  # fmt: skip


def _tabletop(layout: Layout) -> None:
    rng, add, uniform = _of(layout)
    layout.camera = np.array([0, -uniform(0.25, 0.9), -uniform(0.5, 1.1)])
    layout.clearance = 0.2
    add(BOX, 0, -0.03, 0.3, (uniform(0.6, 2), 0.03, uniform(0.6, 1.2)), tile=uniform(0.3, 1.5))
    add(BOX, 0, -0.85, 1, (5, 0.1, 5), tile=uniform(0.5, 2), keep=True)  # the floor below
    add(BOX, 0, 0.5, uniform(1.2, 3.5), (6, 3, 0.1), yaw_matrix(uniform(-0.4, 0.4)), layout.wall_texture(),
        uniform(0.8, 3), keep=True)  # fmt: skip
    if rng.random() < 0.5:
        add(BOX, rng.choice([-1, 1]) * uniform(1.2, 2.5), 0.5, 1, (0.1, 3, 4), None, layout.wall_texture())
    _things_on(layout, 0, 0.2, 0.45, 0, int(rng.integers(4, 14)), (0.05, 0.3))
    for _ in range(rng.integers(0, 3)):  # thin upright things
        add(CYLINDER, uniform(-0.4, 0.4), 0.15, uniform(-0.2, 0.6), (uniform(0.004, 0.012), 0.15, 0.008))


LAYOUTS = {"room": _room, "street": _street, "ground": _ground, "table": _tabletop}
