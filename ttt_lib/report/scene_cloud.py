"""One point cloud of all photographs of a scene, without what single predictions would put in front of another's surface."""

from __future__ import annotations

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
from ttt_lib.geometry.cameras import shrunk, transform_points, unproject
from ttt_lib.geometry.warp import EDGE_RTOL, depth_edges, sampling_grid

LONGEST_SIDE = 480  # pixels of the depth maps that are merged
ASKED = 24  # photographs from the nearest places are asked about each other's points: all of a small scene
IN_FRONT = 0.93  # of another photograph's depth: a point nearer than that would hide what it shows
VOXELS = 500  # along the scene's median depth: points in one of them become one
MOST = 2_000_000  # points
CUBES = 2**20  # on each side of the origin, along each axis


class _Surface(NamedTuple):
    """A photograph's small depth map (h,w) with unknown as NaN, colours (h,w,3), its camera."""

    depth: Tensor
    colour: Tensor
    intrinsics: Tensor
    pose: Tensor


def gathered(sums: Tensor, side: float) -> Tensor:
    """Sums (N,7) of points, their colours and their number, added up over the cubes that their means lie in: (M,7)."""
    cube = (sums[:, :3] / sums[:, 6:] / side).floor().clamp(-CUBES, CUBES - 1).long() + CUBES
    keys, place = ((cube[:, 0] * 2 * CUBES + cube[:, 1]) * 2 * CUBES + cube[:, 2]).unique(return_inverse=True)
    return torch.zeros(len(keys), 7).index_add_(0, place, sums)


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
        depths = [surface.depth[torch.isfinite(surface.depth)] for surface in self.surfaces]
        side = float(torch.cat([torch.zeros(0), *depths]).median()) / VOXELS
        sums = torch.zeros(0, 7)
        for number, surface in enumerate(self.surfaces):  # what is held depends on the cubes, not on the points
            known = torch.isfinite(surface.depth)
            local = unproject(surface.depth, surface.intrinsics)[known]
            world = transform_points(local, torch.linalg.inv(surface.pose))
            new = torch.cat([world, surface.colour[known], torch.ones(len(world), 1)], 1)
            sums = gathered(torch.cat([sums, new[self._not_in_front(world, number)]]), side)
            while len(sums) > MOST:
                side *= 1.5
                sums = gathered(sums, side)
        points, colours, count = sums.split([3, 3, 1], 1)
        return (points / count).numpy(), (colours / count * 255).clamp(0, 255).round().byte().numpy()

    def _not_in_front(self, world: Tensor, number: int) -> Tensor:
        """Which points (N,) hide nothing that more than half of the photographs nearby that look there show."""
        looks = torch.zeros(len(world))
        hides = torch.zeros(len(world))
        for surface in self._near(number):
            seen = transform_points(world, surface.pose)
            grid = sampling_grid(seen, surface.intrinsics)
            depth = F.grid_sample(surface.depth.nan_to_num(0.0)[None, None], grid[None, None], mode="nearest",
                                  align_corners=False)[0, 0, 0]  # fmt: skip
            looks += depth > 0
            hides += (depth > 0) & (seen[:, 2] < IN_FRONT * depth)
        return hides <= looks / 2

    def _near(self, number: int) -> list[_Surface]:
        places = torch.linalg.inv(torch.stack([surface.pose for surface in self.surfaces]))[:, :3, 3]
        distance = (places - places[number]).norm(dim=-1)
        distance[number] = -1.0  # itself comes first
        return [self.surfaces[k] for k in distance.argsort(stable=True)[1 : ASKED + 1].tolist()]


def write_points(points: np.ndarray, colours: np.ndarray, *paths: Path) -> None:
    """Write a merged cloud (y up, z backwards, as viewers expect) in the formats of the names; none of an empty one."""
    if not len(points):
        return
    cloud = trimesh.PointCloud(points * np.array([1, -1, -1], np.float32), colours)
    for path in paths:
        path.write_bytes(cloud.export(file_type=path.suffix[1:]))
