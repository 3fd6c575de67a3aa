"""Textures of the procedural scenes: noise, patterns, and cuts from the photographs that scikit-image ships.

The photographs leave out the motorcycle, which is test data.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

TEXTURE_SIZE = 128  # texels a side
PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
               "immunohistochemistry", "moon", "page", "rocket", "text")  # fmt: skip
TEXTURES = 80


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


@cache
def _shipped(name: str) -> np.ndarray:
    """One of scikit-image's photographs, uint8, read once a process."""
    import skimage.data

    return getattr(skimage.data, name)()


def _photograph(rng: np.random.Generator) -> np.ndarray:
    """A random square cut from one of scikit-image's photographs, (S, S, 3) in [0, 1]."""
    from skimage.transform import resize

    image = np.asarray(_shipped(str(rng.choice(PHOTOGRAPHS))), dtype=np.float32) / 255
    image = np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image[..., :3]
    side = int(rng.uniform(0.3, 0.95) * min(image.shape[:2]))
    top, left = (int(rng.integers(0, extent - side + 1)) for extent in image.shape[:2])
    cut = resize(image[top : top + side, left : left + side], (TEXTURE_SIZE, TEXTURE_SIZE), anti_aliasing=True)
    return np.rot90(cut, rng.integers(4)).copy()


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """A colour as things indoors and outdoors have it: mostly muted, sometimes strong. (3,) in [0, 1]."""
    gray = rng.uniform(0.08, 0.95)
    chroma = rng.uniform(0.0, 0.25) if rng.random() < 0.75 else rng.uniform(0.3, 0.8)
    return np.clip(gray + chroma * rng.uniform(-0.6, 0.6, 3), 0.02, 1.0)


def make_textures(seed: int) -> Tensor:
    """Texture atlas (TEXTURES, 3, S, S), float32 linear RGB. The first eighth is nearly plain (paint, plaster)."""
    rng = np.random.default_rng([seed, 1])
    images = []
    for i in range(TEXTURES):
        first, second = random_colour(rng), random_colour(rng)
        if i < TEXTURES // 8:
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
