"""From photographs to matched features: small gray pictures, cameras they share, pairs worth comparing."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

LONGEST_SIDE = 1200  # pixels of the pictures that are matched
USUAL_FOCAL = 0.85  # of the width, where nothing is known: a phone, a small camera
ALL_PAIRS = 16  # up to so many photographs, each is compared with each
PARTNERS, NEIGHBORS = 8, 4  # with more: the likeliest, and in a clip those before and after


@dataclass
class Picture:
    """A photograph before anything is known of it.

    source: the image (3,H,W) in [0,1] or a function that reads it; focal: over its width, from EXIF or from the caller,
    or None; exact: whether that comes from EXIF; camera: pictures of one size with the same word share one camera.
    """

    name: str
    source: Tensor | Callable[[], Tensor]
    focal: float | None = None
    exact: bool = False
    camera: str = ""

    def read(self) -> Tensor:
        """The image, (3,H,W) in [0,1]."""
        return self.source if isinstance(self.source, Tensor) else self.source()


@dataclass
class Gray:
    """A gray picture on disk: its size, and a hash of its pixels."""

    width: int
    height: int
    digest: str


def write_gray(image: Tensor, path: Path) -> Gray:
    """The luma of an image (3,H,W) in [0,1], at most LONGEST_SIDE long, as uint8 array in a file."""
    array = image.detach().cpu().float().permute(1, 2, 0).numpy()
    height, width = array.shape[:2]
    factor = min(1.0, LONGEST_SIDE / max(height, width))
    if factor < 1:
        size = max(1, round(width * factor)), max(1, round(height * factor))
        array = cv2.resize(np.ascontiguousarray(array), size, interpolation=cv2.INTER_AREA)
    gray = array @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    gray = np.ascontiguousarray((gray.clip(0, 1) * 255).round().astype(np.uint8))
    np.save(path, gray)
    return Gray(gray.shape[1], gray.shape[0], hashlib.sha256(gray.tobytes()).hexdigest())


def shared_cameras(pictures: list[Picture], grays: list[Gray]) -> list[int]:
    """The number of each picture's camera, from 0: one for all pictures of one size and one word."""
    keys = [(gray.width, gray.height, picture.camera) for picture, gray in zip(pictures, grays)]
    order = list(dict.fromkeys(keys))
    return [order.index(key) for key in keys]


def _likeness(one: np.ndarray, other: np.ndarray) -> int:
    """How many of the largest features (K,128) of two pictures find each other."""
    product = one.astype(np.float32) @ other.astype(np.float32).T
    there, back = product.argmax(1), product.argmax(0)
    ordered = np.partition(product, -2, axis=1)
    clear = ordered[:, -1] * 0.95 > ordered[:, -2]  # cosines: the second best is clearly further away
    return int(((back[there] == np.arange(len(one))) & clear).sum())


def choose_pairs(coarse: np.ndarray, in_order: bool) -> list[tuple[int, int]]:
    """Which pictures to compare, by their largest features (N,K,128); in_order: frames of a clip."""
    count = len(coarse)
    everything = list(itertools.combinations(range(count), 2))
    if count <= ALL_PAIRS:
        return everything
    likeness = np.zeros((count, count), dtype=np.int64)
    for i, j in everything:
        likeness[i, j] = likeness[j, i] = _likeness(coarse[i], coarse[j])
    chosen = {
        tuple(sorted((i, int(j)))) for i in range(count) for j in np.argsort(-likeness[i], kind="stable")[:PARTNERS]
    }
    if in_order:
        chosen |= {(i, j) for i, j in everything if j - i <= NEIGHBORS}
    return sorted((i, j) for i, j in chosen if i != j)
