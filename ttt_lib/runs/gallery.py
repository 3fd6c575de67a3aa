"""Small copies of predictions beside the tables of a run: what figures of single samples are made from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.files import replacing_file
from ttt_lib.core.types import Sample
from ttt_lib.geometry.cameras import shrunk

GALLERY_SIDE = 256  # pixels of the longer side of what is kept


def prediction_name(dataset: str, sample: str) -> str:
    """Name of a sample's file in a shard's folder `predictions`: another one for every other sample, and never too long.

    Example:
        >>> prediction_name("NYUv2", "a/b") == prediction_name("NYUv2", "a_b")
        False
    """
    digest = hashlib.sha256(f"{dataset}\0{sample}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{dataset}__{sample}")[:80]
    return f"{readable}.{digest}.npz"


def prediction_file(shards: Iterable[Path], dataset: str, sample: str) -> Path | None:
    """The first file of this sample in the folders of these shards; None if none has kept it."""
    files = (shard / "predictions" / prediction_name(dataset, sample) for shard in shards)
    return next((path for path in files if path.exists()), None)


def _small(map_: torch.Tensor) -> np.ndarray:
    small = F.interpolate(map_[None, None].float().cpu(), shrunk(map_.shape, GALLERY_SIDE), mode="nearest")
    return small[0, 0].numpy()


def gallery_content(sample: Sample, result: AdaptResult) -> dict[str, np.ndarray]:
    """Arrays of at most `GALLERY_SIDE` pixels: `image` uint8 (h,w,3), `depth_original`, `depth_final` and, where it is
    known, `depth_truth` float32 (h,w) in the prediction's and the truth's units, `mask` bool (h,w), `intrinsics` (3,3).
    Empty for predictions without depth."""
    if result.original.depth is None:
        return {}
    maps = {"original": result.original.depth, "final": result.final.depth, "truth": sample.depth}
    content = {f"depth_{name}": _small(depth) for name, depth in maps.items() if depth is not None}
    image = F.interpolate(sample.image[None], content["depth_original"].shape, mode="area")[0]
    content["image"] = (image.permute(1, 2, 0).cpu().numpy() * 255).astype(np.uint8)
    content["mask"] = _small(result.final.mask.float()) > 0.5
    content["intrinsics"] = result.final.intrinsics.cpu().numpy()
    return content


def write_gallery_file(folder: Path, sample: Sample, content: dict[str, np.ndarray]) -> None:
    """Write the arrays as a compressed npz into the folder `predictions` of a run's `folder`, in one step."""
    with replacing_file(folder / "predictions" / prediction_name(sample.dataset, sample.name)) as work:
        np.savez_compressed(work, **content)
