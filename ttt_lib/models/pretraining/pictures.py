"""Pictures for training the base model: chunks of procedural scenes made in another process or on a GPU, and what cameras
do to them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lib.data.scenes.generate import KINDS, make_scenes, place_cameras
from ttt_lib.data.scenes.raycast import draw, make_atlas
from ttt_lib.data.scenes.textures import make_textures
from ttt_lib.geometry.cameras import uv_map

SIZES = ((192, 256), (192, 256), (256, 192), (160, 320), (128, 384), (224, 224))  # height, width; about 192 tokens
SHARES = {"room": 0.4, "street": 0.25, "ground": 0.2, "table": 0.15}
ATLAS_EVERY = 8  # chunks that share one set of textures
AHEAD = 3  # chunks made before they are asked for
TOGETHER = 32  # scenes drawn at once on a GPU; the largest tensor is then half a gigabyte at `scale` 2
assert set(SHARES) == set(KINDS)


class Chunk(NamedTuple):
    """Pictures of one size: image uint8 (N,3,H,W), depth float32 (N,H,W) with inf at the sky, intrinsics (N,3,3).

    Arrays from another process, tensors where they lie on a GPU.
    """

    image: np.ndarray | Tensor
    depth: np.ndarray | Tensor
    intrinsics: np.ndarray | Tensor


@lru_cache(1)
def _atlas(seed: int, family: int, device: torch.device) -> list[Tensor]:
    textures = make_textures(int(np.random.default_rng([seed, 11, family]).integers(2**31)))
    return [level.to(device) for level in make_atlas(textures)]


def make_chunk(seed: int, number: int, count: int, scale: int = 1, device: str = "cpu") -> Chunk:
    """Chunk `number` of the training set of `seed`, sides times `scale`, as arrays; runs in a generating process.

    A picture is some 3,000 small operations. A GPU does them for many scenes in the time of one (and lays textures otherwise
    on some solids); a CPU is faster with one scene at a time, which stays in its cache.
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, 10, number])
    target = torch.device(device)
    atlas = _atlas(seed, number // ATLAS_EVERY, target)
    height, width = (side * scale for side in SIZES[number % len(SIZES)])
    kinds = rng.choice(list(SHARES), count, p=list(SHARES.values()))
    scenes = [(str(kind), int(rng.integers(2**31)), bool(rng.random() < 0.8)) for kind in kinds]
    image = np.empty((count, 3, height, width), np.uint8)
    depth, intrinsics = np.empty((count, height, width), np.float32), np.empty((count, 3, 3), np.float32)
    for alike in _alike(scenes, 1 if target.type == "cpu" else TOGETHER):
        (kind, _, shadows), seeds = scenes[alike[0]], [scenes[i][1] for i in alike]
        there, places = make_scenes([kind] * len(alike), seeds, atlas)
        cameras = place_cameras([kind] * len(alike), places, seeds, width / height)
        picture = draw(there.to(target), *(part.to(target) for part in cameras), (height, width), shadows)
        image[alike] = (picture.image * 255).round().byte().cpu()
        depth[alike] = torch.where(picture.mask, picture.points[..., 2], torch.inf).cpu()
        intrinsics[alike] = picture.intrinsics.cpu()
    return Chunk(image, depth, intrinsics)


def _alike(scenes: list[tuple[str, int, bool]], most: int) -> list[list[int]]:
    """Places of scenes of one kind and both with or without shadows, at most so many together."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for i, (kind, _, shadows) in enumerate(scenes):
        groups.setdefault((kind, shadows), []).append(i)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


def chunks_in_order(seed: int, first: int, size: int, scale: int, device: str) -> Iterator[Chunk]:
    """Chunks from number `first` on, a few made ahead in another process.

    On a GPU three processes draw there too, beside the steps, and chunks lie on it as tensors.
    """
    pool = ProcessPoolExecutor(1 if device == "cpu" else 3, mp_context=get_context("spawn"))
    try:
        ahead = deque(pool.submit(make_chunk, seed, first + i, size, scale, device) for i in range(AHEAD))
        for number in itertools.count(first + AHEAD):
            ahead.append(pool.submit(make_chunk, seed, number, size, scale, device))
            chunk = ahead.popleft().result()
            yield chunk if device == "cpu" else Chunk(*(torch.as_tensor(part).to(device) for part in chunk))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def camera_effects(image: Tensor, generator: torch.Generator) -> Tensor:
    """What cameras and files do to a picture: white balance, contrast, blur, grain, vignette, rough quantisation.

    image (B,3,H,W) in [0,1]; each picture gets its own draw from `generator`. Returns the same shape and range.
    """
    batch, _, height, width = image.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(batch, *shape, 1, 1, generator=generator, device=generator.device)).to(
            image
        )

    def chance(probability: float) -> Tensor:
        return (torch.rand(batch, 1, 1, 1, generator=generator, device=generator.device) < probability).to(image.device)

    x = image * uniform(0.8, 1.25, 3) * uniform(0.6, 1.4, 1)
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * uniform(0.3, 1.5, 1)
    x = torch.where(chance(0.08), gray, x)
    x = (x - 0.45) * uniform(0.7, 1.3, 1) + 0.45
    x = x.clamp(1e-4, 1).pow(uniform(0.7, 1.4, 1))
    small = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    wide = F.avg_pool2d(small, 5, 1, 2, count_include_pad=False)
    x = torch.where(chance(0.3), small, x)
    x = torch.where(chance(0.12), wide, x)
    sharper = x + (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)) * uniform(0.3, 1.2, 1)
    x = torch.where(chance(0.2), sharper, x)
    v, u = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    x = x * (1 - uniform(0, 0.25, 1) * (u**2 + v**2).to(x) / 2)
    grain = torch.randn(image.shape, generator=generator, device=generator.device).to(x)
    x = x + grain * uniform(0, 1, 1).square() * 0.07
    levels = uniform(24, 255, 1).round()
    x = torch.where(chance(0.15), (x * levels).round() / levels, x)
    return x.clamp(0, 1)


def draw_batch(
    chunks: Sequence[Chunk], seed: int, batch_size: int, step: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of `step`: image (B,3,H,W), depth (B,H,W) (inf: sky), rays (B,H,W,2) = x/z, y/z."""
    rng = np.random.default_rng([seed, 20, step])
    chunk = chunks[int(rng.integers(len(chunks)))]
    chosen = rng.choice(len(chunk.image), batch_size, replace=len(chunk.image) < batch_size)
    image, depth, intrinsics = (torch.as_tensor(part[chosen]).to(device) for part in chunk)
    image = image.float() / 255
    focal = intrinsics.diagonal(dim1=1, dim2=2)[:, None, None, :2]
    rays = (uv_map(*image.shape[-2:], device=device) - 0.5) / focal
    if rng.random() < 0.5:  # centred cameras: a mirrored picture has mirrored depth and the very same rays
        image, depth = image.flip(-1), depth.flip(-1)
    noise = int(rng.integers(2**62))  # drawn on the device: on a CPU grain would take longer than a GPU's whole step
    return camera_effects(image, torch.Generator(device).manual_seed(noise)), depth, rays
