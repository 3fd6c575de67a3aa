"""True distances of a few pixels: from a CSV or a sparse depth PNG, or drawn from a sample's truth."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from moge.utils import io as moge_io
from torch import Tensor

from ttt_lib.core.errors import UserError, reason
from ttt_lib.core.types import Sample

PNG_SCALE = 256.0  # of sparse 16-bit depth PNGs as KITTI has them: value / 256 is metres


PNG_MODES = ("I;16", "I;16B", "I;16L", "I")  # what Pillow calls one channel of 16 bits


@dataclass
class References:
    """Known distances: uv (N,2) image coordinates in [0,1] (pixel centres at (i + 0.5) / size), depth (N,) metres along
    the optical axis."""

    uv: Tensor
    depth: Tensor

    def to(self, device: torch.device) -> References:
        """On another device."""
        return References(self.uv.to(device), self.depth.to(device))


def read_references(path: Path, size: tuple[int, int]) -> References:
    """From a CSV with columns u, v, metres (pixels of the image of `size` (H, W); the first pixel's centre is 0.5), or
    from a sparse 16-bit depth PNG of any size, metres = value / 256, 0: unknown (as KITTI's); a PNG of this package or
    MoGe says itself how it is encoded.

    Raises `UserError` for a file that cannot be read, lacks a column, has rows with more values than columns, has no
    usable row, or has points outside; and for a PNG that is not one channel of 16 bits.
    """
    path = Path(path)
    where = f"--metric-points {path}"
    if not os.path.isfile(path):
        raise UserError(f"{where}: there is no such file; give a CSV (u, v, metres) or a sparse depth PNG.")
    if path.suffix.lower() == ".png":
        return _from_png(path, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # By default values that no column is named for shift the others: the first becomes the index.
            table = pd.read_csv(path, skipinitialspace=True, index_col=False)
    except pd.errors.ParserWarning as error:
        raise UserError(f"{where}: has lines with more values than its first line names columns.") from error
    except Exception as error:
        raise UserError(f"{where}: is not a readable CSV ({reason(error)}).") from error
    table.columns = [str(name).strip().lower() for name in table.columns]
    if len(set(table.columns)) < len(table.columns):
        raise UserError(f"{where}: names a column twice; its first line must be u,v,metres.")
    missing = [name for name in ("u", "v", "metres") if name not in table.columns]
    if missing:
        raise UserError(f"{where}: has no column {missing[0]!r}; its first line must be u,v,metres.")
    values = table[["u", "v", "metres"]].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    plausible = (values[:, 2] > 1e-6) & (values[:, 2] < 1e9)  # float32 carries no others
    bad = np.nonzero(~np.isfinite(values).all(1) | ~plausible)[0]
    if len(bad):
        raise UserError(f"{where}: line {bad[0] + 2} is not two pixel coordinates and a distance above 0.")
    if not len(values):
        raise UserError(f"{where}: holds no points.")
    height, width = size
    outside = np.nonzero((values[:, :2] < 0).any(1) | (values[:, 0] > width) | (values[:, 1] > height))[0]
    if len(outside):
        raise UserError(f"{where}: line {outside[0] + 2} lies outside the image ({width} x {height} pixels).")
    uv = torch.tensor(values[:, :2] / [width, height], dtype=torch.float32)
    return References(uv, torch.tensor(values[:, 2], dtype=torch.float32))


def _from_png(path: Path, where: str) -> References:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            mode, described = image.mode, {"near", "far"} <= {str(key).lower() for key in image.info}
            raw = np.asarray(image)
        with np.errstate(over="ignore"):  # of a far beyond all numbers
            depth = moge_io.read_depth(path) if described and mode in PNG_MODES else raw.astype(np.float64) / PNG_SCALE
    except Exception as error:
        raise UserError(f"{where}: is not a readable depth PNG ({reason(error)}).") from error
    if mode not in PNG_MODES:
        raise UserError(f"{where}: must have one channel of 16 bits; this one is of Pillow's mode {mode}.")
    depth = depth[0] if isinstance(depth, tuple) else depth
    row, column = np.nonzero(np.isfinite(depth) & (depth > 0))
    if not len(row):
        raise UserError(f"{where}: every pixel is unknown.")
    uv = np.stack([(column + 0.5) / depth.shape[1], (row + 0.5) / depth.shape[0]], -1)
    return References(torch.tensor(uv, dtype=torch.float32), torch.tensor(depth[row, column], dtype=torch.float32))


def sample_references(sample: Sample, count: int, generator: torch.Generator) -> tuple[References, Sample]:
    """`count` known pixels of a metric sample (half of them if there are fewer than twice as many), and the sample
    without them.

    The scores of what is left are about pixels whose distance the method was not told. Raises `UserError` for samples
    whose truth is not metric.
    """
    if sample.mask is None or sample.depth is None or not sample.is_metric:
        raise UserError(f"{sample.dataset}/{sample.name}: references need metric truth; set references to 0.")
    height, width = sample.mask.shape
    known = torch.nonzero((sample.mask & torch.isfinite(sample.depth)).cpu().flatten())[:, 0]
    chosen = known[torch.randperm(len(known), generator=generator)[: min(count, len(known) // 2)]]
    row, column = chosen // width, chosen % width
    uv = torch.stack([(column + 0.5) / width, (row + 0.5) / height], -1)
    mask = sample.mask.clone()
    mask.view(-1)[chosen.to(mask.device)] = False
    return References(uv, sample.depth.flatten().cpu()[chosen]), replace(sample, mask=mask)
