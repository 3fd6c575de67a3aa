"""A small world for the tests: textured rectangles, seen exactly by pinhole cameras, with true depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import skimage.data
import torch
from scipy.ndimage import map_coordinates

FOCAL = 0.9  # of the width


@dataclass
class View:
    """image (3,H,W), depth (H,W) with NaN where nothing is, intrinsics (3,3) normalised, pose (4,4) world -> camera."""

    image: torch.Tensor
    depth: torch.Tensor
    intrinsics: torch.Tensor
    pose: torch.Tensor


def textures() -> list[np.ndarray]:
    """Pictures with much to match, (H,W,3) in [0,1]."""
    names = ["coffee", "astronaut", "brick", "gravel", "grass", "rocket", "chelsea", "camera"]
    result = []
    for name in names:
        picture = np.asarray(getattr(skimage.data, name)()) / 255.0
        result.append(picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, -1))
    return result


def room() -> list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Rectangles (corner, two edges, texture): a back wall, side walls, floor and things that stand in front."""
    V = lambda *v: np.array(v, float)  # noqa: E731
    return [
        (V(-4, -3, 8), V(4, 0, 0), V(0, 4.5, 0), 1),
        (V(0, -3, 8), V(4, 0, 0), V(0, 4.5, 0), 0),
        (V(-4, -3, 2), V(0, 0, 6), V(0, 4.5, 0), 2),
        (V(4, -3, 8), V(0, 0, -6), V(0, 4.5, 0), 3),
        (V(-4, 1.5, 2), V(8, 0, 0), V(0, 0, 6), 4),
        (V(-2.2, -0.6, 5.5), V(1.5, 0, 0.6), V(0, 1.5, 0), 5),
        (V(0.6, -0.4, 4.2), V(1.2, 0, -0.4), V(0, 1.2, 0), 6),
        (V(-0.6, -2.0, 6.5), V(1.6, 0, 0.2), V(0, 1.6, 0), 7),
    ]


def poster() -> list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """One flat wall."""
    return [(np.array([-6.0, -5, 5]), np.array([12.0, 0, 0]), np.array([0.0, 10, 0]), 1)]


def camera(x: float = 0.0, y: float = 0.0, z: float = 0.0, turn: float = 0.0) -> torch.Tensor:
    """World -> camera of one that stands at (x, y, z) and is turned to the right by degrees."""
    a = np.radians(turn)
    rotation = np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, -rotation @ np.array([x, y, z])
    return torch.from_numpy(pose).float()


def render(pose: torch.Tensor, world=None, size: tuple[int, int] = (216, 320), noise: int = 0, k: float = 0.0) -> View:
    """The world seen by a camera; 2 x 2 rays a pixel, and a little noise that differs by `noise`. k: how its lens bends
    straight lines, as COLMAP's SIMPLE_RADIAL has it."""
    world, pictures = world or room(), textures()
    height, width = size
    matrix = pose.double().numpy()
    fx, fy = FOCAL * width, FOCAL * width
    color, depth = np.zeros((2 * height, 2 * width, 3)), np.full((2 * height, 2 * width), np.inf)
    v, u = np.meshgrid((np.arange(2 * height) + 0.5) / 2, (np.arange(2 * width) + 0.5) / 2, indexing="ij")
    rays = np.stack([(u - width / 2) / fx, (v - height / 2) / fy, np.ones_like(u)], -1)
    seen = rays[..., :2].copy()
    for _ in range(60 * bool(k)):  # until the lens puts them where they are seen
        rays[..., :2] = seen / (1 + k * (rays[..., :2] ** 2).sum(-1, keepdims=True))
    for corner, across, down, number in world:
        corner = matrix[:3, :3] @ corner + matrix[:3, 3]
        across, down = matrix[:3, :3] @ across, matrix[:3, :3] @ down
        normal = np.cross(across, down)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = (corner @ normal) / (rays @ normal)
            hit = rays * z[..., None] - corner
            s, t = hit @ across / (across @ across), hit @ down / (down @ down)
        seen = (z > 0.05) & (z < depth) & (s >= 0) & (s < 1) & (t >= 0) & (t < 1)
        picture = pictures[number]
        where = [t[seen] * (picture.shape[0] - 1), s[seen] * (picture.shape[1] - 1)]
        for channel in range(3):
            color[seen, channel] = map_coordinates(picture[..., channel], where, order=1)
        depth[seen] = z[seen]
    color = color.reshape(height, 2, width, 2, 3).mean((1, 3))
    color = (color + np.random.default_rng(noise).normal(0, 0.01, color.shape)).clip(0, 1)
    image = torch.from_numpy((color * 255).round() / 255).float().permute(2, 0, 1).contiguous()
    intrinsics = torch.tensor([[FOCAL, 0, 0.5], [0, FOCAL * width / height, 0.5], [0, 0, 1]])
    middle = depth.reshape(height, 2, width, 2).mean((1, 3))
    return View(image, torch.from_numpy(np.where(np.isfinite(middle), middle, np.nan)).float(), intrinsics, pose)


def walk(count: int, step: float = 0.5, turn: float = -2.0, **options) -> list[View]:
    """Views from cameras that step aside, each turned a little more towards the middle."""
    return [render(camera(x=i * step - 0.5, y=0.1 * (i % 2), turn=turn * i), noise=i, **options) for i in range(count)]


def depth_error(tracks, depth: torch.Tensor) -> float:
    """Median |log ratio| of the tracks' depth to the true one at their pixel, up to one factor."""
    height, width = depth.shape
    column, row = (tracks.uv * torch.tensor([width, height])).long().unbind(-1)
    ratio = (tracks.depth / depth[row.clamp(0, height - 1), column.clamp(0, width - 1)]).log()
    ratio = ratio[ratio.isfinite()]
    return float((ratio - ratio.median()).abs().median())
