"""One point cloud of all photographs of a scene, without what single predictions would put in front of another's surface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import trimesh
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.core.types import Prediction
from ttt_lib.data.photographs.scene import Photograph
from ttt_lib.geometry.cameras import project, shrunk, transform_points, unproject
from ttt_lib.geometry.warp import EDGE_RTOL, depth_edges

LONGEST_SIDE = 480  # pixels of the depth maps that are merged
IN_FRONT = 0.93  # of another photograph's depth: a point nearer than that would hide what it shows
VOXELS = 500  # along the scene's median depth: points in one of them become one
MOST = 2_000_000  # points


class _Surface(NamedTuple):
    """A photograph's small depth map (h,w) with unknown as NaN, colours (h,w,3), its camera."""

    depth: Tensor
    colour: Tensor
    intrinsics: Tensor
    pose: Tensor


@dataclass
class SceneCloud:
    """Collects photographs one after the other; `merged` makes one cloud of them."""

    surfaces: list[_Surface] = field(default_factory=list)

    def add(self, photograph: Photograph, image: Tensor, prediction: Prediction) -> None:
        """A photograph (3,H,W) with its prediction in the scene's scale."""
        size = shrunk(image.shape[-2:], LONGEST_SIDE)
        depth = torch.where(prediction.mask, prediction.depth, torch.nan).float().cpu()
        depth = F.interpolate(depth[None, None], size, mode="nearest-exact")[0, 0]
        known = torch.isfinite(depth) & (depth > 0)
        known &= ~depth_edges(torch.where(known, depth, 0.0), known, rtol=EDGE_RTOL)
        colour = F.interpolate(image[None].cpu(), size, mode="area")[0].permute(1, 2, 0)
        camera = photograph.intrinsics.float(), photograph.pose.float()
        self.surfaces.append(_Surface(torch.where(known, depth, torch.nan), colour, *camera))

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        """Points (N,3) float32 in the frame of the scene's world, and colours (N,3) uint8; N may be 0."""
        points, colours = [], []
        for number, surface in enumerate(self.surfaces):
            known = torch.isfinite(surface.depth)
            local = unproject(surface.depth, surface.intrinsics)[known]
            world = transform_points(local, torch.linalg.inv(surface.pose))
            kept = self._not_in_front(world, number)
            points.append(world[kept])
            colours.append(surface.colour[known][kept])
        if not points or not sum(map(len, points)):
            return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8)
        depths = torch.cat([s.depth[torch.isfinite(s.depth)] for s in self.surfaces])
        return _voxels(torch.cat(points), torch.cat(colours), float(depths.median()) / VOXELS)

    def _not_in_front(self, world: Tensor, number: int) -> Tensor:
        """Which points (N,) hide nothing that more than half of the photographs that look there show."""
        looks = torch.zeros(len(world))
        hides = torch.zeros(len(world))
        for other, surface in enumerate(self.surfaces):
            if other == number:
                continue
            seen = transform_points(world, surface.pose)
            uv = project(seen, surface.intrinsics)
            grid = torch.where((seen[:, 2:] > 1e-6) & torch.isfinite(uv), 2 * uv - 1, 9.0)
            depth = F.grid_sample(surface.depth.nan_to_num(0.0)[None, None], grid[None, None], mode="nearest",
                                  align_corners=False)[0, 0, 0]  # fmt: skip
            looks += depth > 0
            hides += (depth > 0) & (seen[:, 2] < IN_FRONT * depth)
        return hides <= looks / 2


def write_points(points: np.ndarray, colours: np.ndarray, *paths: Path) -> None:
    """Write a merged cloud (y up, z backwards, as viewers expect) in the formats of the names; none of an empty one."""
    if not len(points):
        return
    cloud = trimesh.PointCloud(points * np.array([1, -1, -1], np.float32), colours)
    for path in paths:
        path.write_bytes(cloud.export(file_type=path.suffix[1:]))


def _voxels(points: Tensor, colours: Tensor, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Means over cubes of this side; fewer and larger cubes until there are at most MOST points."""
    while True:
        cube = (points / side).floor().long()
        _, place, count = cube.unique(dim=0, return_inverse=True, return_counts=True)
        if len(count) <= MOST:
            break
        side *= 1.5

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(len(count), 3).index_add_(0, place, values) / count[:, None]

    return mean(points).numpy(), (mean(colours).clamp(0, 1) * 255).round().byte().numpy()


def thinned(points: np.ndarray, colours: np.ndarray, most: int, seed: int = 0) -> Sequence[np.ndarray]:
    """At most so many of the points, for a page."""
    if len(points) <= most:
        return points, colours
    chosen = np.random.default_rng(seed).choice(len(points), most, replace=False)
    return points[chosen], colours[chosen]
