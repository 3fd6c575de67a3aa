"""Procedural scenes with exact geometry: rooms, streets, open ground and tables, from any camera.

A scene is a few dozen solids (`solids.py`), placed by `layouts.py`, with textures (`textures.py`), light and a camera
that fit it; `raycast.py` draws it. Everything follows from an integer seed. Sets of them: held-out ones, and the same
under domain shifts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ttt_lib.core.types import Sample
from ttt_lib.data.samples import SampleSet
from ttt_lib.data.scenes.layouts import LAYOUTS, Layout, tilt_matrix, yaw_matrix
from ttt_lib.data.scenes.raycast import Picture, Scenes, draw, make_atlas
from ttt_lib.data.scenes.solids import Solids
from ttt_lib.data.scenes.textures import make_textures
from ttt_lib.data.shifts import BUILT_IN, apply_shift, check_shifts

KINDS = tuple(LAYOUTS)
PITCH_DOWN = {"room": (-0.12, 0.45), "street": (-0.1, 0.15), "ground": (-0.08, 0.35), "table": (0.25, 0.8)}  # radians
HELD_OUT_SEED = 900_000  # far from the seeds that training chunks use
SIZE = (240, 320)
SEVERITIES = (1, 2, 3, 4, 5)


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
        "horizon": horizon, "zenith": sky, "sun_direction": sun_up / np.linalg.norm(sun_up),
        "sun": warm * level * (0.0 if indoors else 0.15 if overcast else rng.uniform(0.6, 1.3)),
        "lamp_position": camera + np.array([rng.uniform(-1.2, 1.2), -rng.uniform(0.3, 1.0), rng.uniform(0, 2.5)]),
        "lamp": warm * level * (rng.uniform(0.3, 1.4) if indoors else 0.0),
        "ambient": warm[::-1] * level * (rng.uniform(0.4, 1.0) if indoors or overcast else rng.uniform(0.25, 0.6)),
        "evenness": np.array(rng.uniform(0.5, 0.9) if indoors else 0.0), "fog": np.array(fog), "fog_colour": horizon,
        "exposure": np.array(rng.uniform(0.12, 0.32)),
    }  # fmt: skip


def _generators(seed: int | Sequence[int], stream: int, count: int) -> list[np.random.Generator]:
    """Random numbers for each scene of a batch: by its place, or as the only scene of its own seed."""
    own = [[seed, stream, i] for i in range(count)] if isinstance(seed, int) else [[s, stream, 0] for s in seed]
    return [np.random.default_rng(key) for key in own]


def make_scenes(
    kinds: list[str], seed: int | Sequence[int], atlas: list[Tensor] | None = None
) -> tuple[Scenes, Tensor]:
    """One scene for each entry of `kinds`, from `seed`; or from a seed each, as if it were alone (needs `atlas`).

    Returns the scenes and the place of a camera that fits each, (B, 3) metres in the world. `atlas` reuses textures
    (`make_atlas(make_textures(seed))` otherwise, about a second). Raises `ValueError` for an unknown kind.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown scene kind {sorted(unknown)}; there are {list(KINDS)}")
    atlas = make_atlas(make_textures(seed)) if atlas is None else atlas
    layouts, lights = [], []
    for rng, kind in zip(_generators(seed, 2, len(kinds)), kinds):
        layout = Layout(rng)
        LAYOUTS[kind](layout)
        layouts.append(layout)
        lights.append(_lighting(layout.rng, kind, layout.camera))

    by_kind = [[[s for s in layout.solids if s[0] == kind] for kind in range(4)] for layout in layouts]
    counts = tuple(max(map(len, group)) for group in zip(*by_kind))
    absent = (0, np.zeros(3), np.eye(3), np.zeros(3), np.ones((6, 3)), 0, 1.0, np.ones(3))
    rows = [[s for group, n in zip(scene, counts) for s in group + [absent] * (n - len(group))] for scene in by_kind]
    _, *parts = (torch.from_numpy(np.array([[s[place] for s in row] for row in rows])).float() for place in range(8))
    parts[4] = parts[4].long()  # the texture
    solids = Solids(*parts, counts=counts)
    lighting = {key: torch.from_numpy(np.stack([light[key] for light in lights])).float() for key in lights[0]}
    cameras = torch.from_numpy(np.stack([layout.camera for layout in layouts])).float()
    return Scenes(solids, lighting, atlas), cameras


def place_cameras(
    kinds: list[str], places: Tensor, seed: int | Sequence[int], aspect_ratio: float
) -> tuple[Tensor, Tensor]:
    """A tilted camera with a field of view from 30 to 100 degrees at each place.

    The angle is that of the longer side of the image. Returns transform (B,4,4) world to camera and intrinsics
    (B,3,3), normalised, principal point in the middle.
    """
    transforms, intrinsics = [], []
    for i, (rng, kind) in enumerate(zip(_generators(seed, 3, len(kinds)), kinds)):
        fov = math.radians(rng.uniform(30, 100) if rng.random() < 0.3 else rng.normal(62, 10))
        fov = min(max(fov, math.radians(30)), math.radians(100))
        pitch = rng.uniform(*PITCH_DOWN[kind])
        yaw = rng.uniform(-0.25, 0.25) if kind in ("street", "table") else rng.uniform(-0.7, 0.7)
        roll = rng.normal(0, 0.035)
        if kind == "table":  # look at the middle of the table
            ahead = np.array([0, 0, 0.25]) - places[i].numpy() + rng.uniform(-0.15, 0.15, 3)
            pitch = math.atan2(ahead[1], math.hypot(ahead[0], ahead[2]))
            yaw = math.atan2(ahead[0], ahead[2])
        matrix = np.eye(4)
        matrix[:3, :3] = rotation = tilt_matrix(0, roll).T @ tilt_matrix(-pitch, 0).T @ yaw_matrix(yaw).T
        matrix[:3, 3] = -rotation @ places[i].numpy()
        focal = 0.5 / math.tan(fov / 2)
        fx, fy = (focal, focal * aspect_ratio) if aspect_ratio >= 1 else (focal / aspect_ratio, focal)
        transforms.append(matrix)
        intrinsics.append(np.array([[fx, 0, 0.5], [0, fy, 0.5], [0, 0, 1]]))
    return torch.from_numpy(np.stack(transforms)).float(), torch.from_numpy(np.stack(intrinsics)).float()


def make_pictures(kinds: list[str], seed: int, size: tuple[int, int]) -> Picture:
    """Scenes of the given kinds, each seen once by a camera of its own."""
    scenes, places = make_scenes(kinds, seed)
    transform, intrinsics = place_cameras(kinds, places, seed, size[1] / size[0])
    return draw(scenes, transform, intrinsics, size)


def as_sample(
    picture: Picture, name: str, dataset: str, shift: str | None, severity: int, seed: int, image: Tensor | None = None
) -> Sample:
    """The first of a batch of pictures, or another image of it, as a file would hold it, with its exact truth.

    shift, severity, seed: see `data.shifts.apply_shift`; it changes the image alone.
    """
    mask, points = picture.mask[0], picture.points[0]
    image = ((picture.image[0] if image is None else image).clamp(0, 1) * 255).round() / 255
    if shift:
        image = apply_shift(shift, image, torch.where(mask, points[..., 2], torch.inf), severity, seed)
    depth = torch.where(mask, points[..., 2], torch.nan)
    return Sample(name, dataset, image, depth, points, mask, picture.intrinsics[0], True, has_sharp_boundary=True)


@lru_cache(maxsize=16)  # the jobs of an ablation see the same few, one experiment after the other in one process
def _held_out(number: int, seed: int, size: tuple[int, int]) -> Picture:
    """Scene `number` of the held-out set of `seed`."""
    return make_pictures([KINDS[number % len(KINDS)]], HELD_OUT_SEED + 10_000 * seed + number, size)


def open_synthetic(
    kind: str, count: int = 40, seed: int = 0, shifts: list[str] | None = None, severities: list[int] | None = None,
    width: int = SIZE[1], height: int = SIZE[0], name: str | None = None, draw: int = 0,
) -> SampleSet:  # fmt: skip
    """The sets `synthetic` (clean) and `shifted`, of `count` scenes, as a `data.SampleSet`.

    `shifted` gives each scene one shift and one severity, so that all names and severities take turns; `shifts` and
    `severities` restrict them; `draw` numbers the draws of what is random in a shift. Raises `UserError` for an unknown shift.
    """
    shifts, severities = shifts or list(BUILT_IN), severities or SEVERITIES
    check_shifts(shifts)
    plan: dict[str, tuple] = {}
    for number in range(count):
        if kind == "shifted":
            turn = number // len(shifts)  # each turn pairs shifts with other kinds of scene and other severities
            which = (number + turn) % len(shifts)
            shift, severity = shifts[which], severities[(which + turn) % len(severities)]
            plan[f"{number:03d}_{shift}_{severity}"] = (number, shift, severity)
        else:
            plan[f"{number:03d}"] = (number, None, 0)

    def load(key: str) -> Sample:
        number, shift, severity = plan[key]
        picture = _held_out(number, seed, (height, width))
        shift_seed = seed * 1000 + number + 10**9 * draw
        return as_sample(picture, key, name or kind, shift, severity, shift_seed)

    return SampleSet(name or kind, list(plan), load, f"{kind}/{seed}/{width}x{height}/{sorted(plan.items())}")
