"""A scene whose cameras, tracks and depth are the truth: what a perfect reconstruction would give."""

from __future__ import annotations

import torch

from ttt_lib.core.types import Sample
from ttt_lib.data.photographs.measured import Measured
from ttt_lib.data.photographs.scene import Photograph, Scene, Tracks
from ttt_lib.data.scenes.tours import make_tour
from ttt_lib.geometry.cameras import project, transform_points


def true_scene(
    seed: int = 3, views: int = 3, kind: str = "table", scale: float = 1.0, points: int = 400, **options
) -> tuple[Scene, list[Sample]]:
    """A tour as a scene in a unit of 1 / scale metres, and its samples; tracks at pixels that two photographs see."""
    tour = make_tour(kind, seed, views, 0.1, options.pop("size", (120, 160)), **options)
    generator, samples = torch.Generator().manual_seed(seed), tour.samples
    rows: list[list[tuple[int, torch.Tensor, float]]] = [[] for _ in samples]
    number = 0
    for one, sample in enumerate(samples):
        place = torch.nonzero(sample.mask.flatten())[:, 0]
        place = place[torch.randperm(len(place), generator=generator)[:points]]
        world = transform_points(sample.points.reshape(-1, 3)[place], torch.linalg.inv(tour.poses[one]))
        seen = [_seen(world, other, pose) for other, pose in zip(samples, tour.poses)]
        for k in range(len(place)):
            visible = [view for view in range(len(samples)) if seen[view][1][k]]
            if len(visible) > 1:
                for view in visible:
                    rows[view].append((number, seen[view][0][k], float(seen[view][2][k])))
                number += 1
    photographs = []
    for sample, pose, found in zip(samples, tour.poses, rows):
        uv, depth = torch.stack([row[1] for row in found]), torch.tensor([row[2] for row in found])
        ids = torch.tensor([row[0] for row in found])
        pose = pose.clone()
        pose[:3, 3] *= scale
        tracks = Tracks(uv, depth * scale, ids, torch.ones(len(found)))
        photographs.append(Photograph(sample.name, sample.image, sample.intrinsics, tracks, pose))
    return Scene(photographs), samples


def _seen(world: torch.Tensor, sample: Sample, pose: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where a photograph sees points (N,3) of the world, whether it does, and their depth."""
    local = transform_points(world, pose)
    uv = project(local, sample.intrinsics)
    height, width = sample.mask.shape
    inside = ((uv > 0.02) & (uv < 0.98)).all(-1) & (local[:, 2] > 0)
    column, row = (uv.clamp(0, 0.999) * torch.tensor([width, height])).long().unbind(-1)
    surface = sample.depth[row, column]
    return uv, inside & ((surface / local[:, 2] - 1).abs() < 0.01), local[:, 2]


def unbounded(depth: torch.Tensor) -> Measured:
    """Measured depth (h,w) where matches say nothing of what is not known."""
    return Measured(depth, torch.zeros_like(depth), torch.full_like(depth, torch.inf))
