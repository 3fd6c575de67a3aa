"""Photographs from which no reconstruction should be believed: one small, deterministic scene for each known trap.

`FAILURES[name](seed, size)` gives samples with their exact truth; see each function for what is wrong with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ttt_lib.core.types import Sample
from ttt_lib.data.scenes.detail import Detail
from ttt_lib.data.scenes.layouts import yaw_matrix
from ttt_lib.data.scenes.tours import RAYS, SIZE, Tour, make_tour, photograph, plan_tour

Trap = Callable[[int, tuple[int, int]], list[Sample]]
# Of two of a room's solids, their place among these: half extents (metres) without end, and how far before the first camera.
WALL, FLOOR = (3, [60.0, 40.0, 0.1], [0.0, 0.0, 3.1]), (4, [60.0, 0.1, 60.0], [0.0, 1.4, 0.0])


def _moved(offsets: Tensor, poses: Tensor) -> Tensor:
    """World to camera (V,4,4) of cameras that stand `offsets` (V,3), in their own frame, from `poses` (4,4)."""
    step = torch.eye(4).repeat(len(offsets), 1, 1)
    step[:, :3, 3] = -offsets
    return step @ poses


def _plan(kind: str, seed: int, size: tuple[int, int]) -> Tour:
    return plan_tour(kind, seed, 2, 0.1, size[1] / size[0])


def rotation(seed: int = 0, size: tuple[int, int] = SIZE) -> list[Sample]:
    """Four photographs from one place: the camera turns by 8 degrees each time, so there is no parallax at all."""
    plan = _plan("room", seed, size)
    turns = torch.eye(4).repeat(4, 1, 1)
    for number in range(4):
        turns[number, :3, :3] = torch.from_numpy(yaw_matrix(math.radians(8 * number)))
    return photograph(plan.scenes, turns @ plan.poses[0], plan.intrinsics, size)


def copies(seed: int = 0, size: tuple[int, int] = SIZE) -> list[Sample]:
    """One photograph four times."""
    plan = _plan("room", seed, size)
    sample = photograph(plan.scenes, plan.poses[:1], plan.intrinsics, size)[0]
    return [replace(sample, name=f"view_{number}") for number in range(4)]


def _facing(
    solids_left: list[tuple], step: float, seed: int, size: tuple[int, int], repeat: float | None = None
) -> list[Sample]:
    """Only these solids of a room are left, before four cameras that look straight ahead, `step` metres apart."""
    plan = _plan("room", seed, size)
    solids, place = plan.scenes.solids, torch.linalg.inv(plan.poses[0])[:3, 3]
    half, centre, tile = torch.zeros_like(solids.half), solids.centre.clone(), solids.tile.clone()
    for slot, extent, ahead in solids_left:
        half[:, slot], centre[:, slot] = torch.tensor(extent), place + torch.tensor(ahead)
        if repeat:
            tile[:, slot] = repeat
    detail = Detail(seed, plan.scenes.atlas, repeat, RAYS)
    scenes = replace(plan.scenes, solids=replace(solids, half=half, centre=centre, tile=tile), detail=detail)
    straight = torch.eye(4)
    straight[:3, 3] = -place
    offsets = torch.tensor([[step * number, 0, 0] for number in range(4)])
    return photograph(scenes, _moved(offsets, straight), plan.intrinsics, size)


def poster(seed: int = 0, size: tuple[int, int] = SIZE) -> list[Sample]:
    """A flat wall, full of print and pictures, from four places: homographies explain everything, for any focal
    length."""
    return _facing([WALL], 0.35, seed, size)


def repeated(seed: int = 0, size: tuple[int, int] = SIZE) -> list[Sample]:
    """A wall and a floor whose pattern comes again every 0.4 m, from places 0.3 m apart: matches that agree with each
    other and are wrong."""
    return _facing([WALL, FLOOR], 0.3, seed, size, repeat=0.4)


def moving(seed: int = 0, size: tuple[int, int] = SIZE) -> list[Sample]:
    """Between four photographs everything moves on its own, things and walls, by some 7 % of the median depth."""
    plan = plan_tour("table", seed, 4, 0.08, size[1] / size[0])
    samples, solids = [], plan.scenes.solids
    for number, pose in enumerate(plan.poses):
        push = np.random.default_rng([seed, 7, number]).normal(0, 0.04 * plan.median_depth, tuple(solids.centre.shape))
        scenes = replace(plan.scenes, solids=replace(solids, centre=solids.centre + torch.from_numpy(push).float()))
        samples += photograph(scenes, pose[None], plan.intrinsics, size, first=number)
    return samples


def forward(seed: int = 0, size: tuple[int, int] = SIZE, count: int = 5) -> list[Sample]:
    """A camera on a street that drives ahead, by 5 % of the median depth at a time: hardly any parallax in the middle
    of the picture. With more photographs (`count`) it may be reconstructed."""
    plan = _plan("street", seed, size)
    offsets = torch.zeros(count, 3)
    offsets[:, 2] = 0.05 * plan.median_depth * torch.arange(count)
    return photograph(plan.scenes, _moved(offsets, plan.poses[0]), plan.intrinsics, size)


def stranger(seed: int = 0, size: tuple[int, int] = SIZE) -> list[Sample]:
    """Four photographs of one room, and in their middle, `view_2`, one of another room."""
    own, other = make_tour("room", seed, 4, 0.1, size).samples, make_tour("room", seed + 500, 1, 0.1, size).samples
    samples = [*own[:2], *other, *own[2:]]
    return [replace(sample, name=f"view_{number}") for number, sample in enumerate(samples)]


def parallax(seed: int = 0, size: tuple[int, int] = SIZE) -> list[Sample]:
    """Three photographs whose places lie 0.8 % of the depth apart: an angle of less than one degree in all."""
    return make_tour("room", seed, 3, 0.008, size).samples


def plain(seed: int = 0, size: tuple[int, int] = SIZE) -> list[Sample]:
    """Four photographs of a room that is painted in one color all over, without anything that could be matched."""
    plan = plan_tour("room", seed, 4, 0.1, size[1] / size[0])
    solids = plan.scenes.solids
    painted = replace(solids, texture=torch.zeros_like(solids.texture), tint=torch.full_like(solids.tint, 0.8),
                      tile=torch.full_like(solids.tile, 30.0))  # fmt: skip
    return photograph(replace(plan.scenes, solids=painted, detail=None), plan.poses, plan.intrinsics, size)


TRAPS = (rotation, copies, poster, moving, repeated, forward, stranger, parallax, plain)
FAILURES: dict[str, Trap] = {trap.__name__: trap for trap in TRAPS}
