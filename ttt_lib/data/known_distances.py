"""True distances of a few pixels: from a CSV or a sparse depth PNG, or drawn from a sample's truth."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from moge.utils import io as moge_io
from PIL import Image
from scipy.spatial import cKDTree
from torch import Tensor

from ttt_lib.core.errors import UserError, reason
from ttt_lib.core.files import absolute
from ttt_lib.core.types import Sample
from ttt_lib.geometry.cameras import uv_map

# Metres a unit of sparse 16-bit depth PNGs; the first where none is said.
PNG_UNITS = {"kitti": 1 / 256, "mm": 1 / 1000}
OFF_ASPECT = 0.02  # of log(width / height), beside what rounding to whole pixels can do
PNG_MODES = ("I;16", "I;16B", "I;16L", "I")  # what Pillow calls one channel of 16 bits


@dataclass
class References:
    """Known distances: uv (N,2) image coordinates in [0,1] (pixel centres at (i + 0.5) / size), depth (N,) metres along
    the optical axis. unit: metres that a unit of the file was taken for; None where it says them itself."""

    uv: Tensor
    depth: Tensor
    unit: float | None = None

    def to(self, device: torch.device) -> References:
        """On another device."""
        return replace(self, uv=self.uv.to(device), depth=self.depth.to(device))

    def mirrored(self) -> References:
        """Of the mirrored picture."""
        return replace(self, uv=torch.stack([1 - self.uv[:, 0], self.uv[:, 1]], -1))


def parse_unit(text: str) -> float:
    """Metres a unit, as `--metric-unit` gives it: a name of `PNG_UNITS`, or a number. Raises `UserError`.

    Example:
        >>> parse_unit("mm"), parse_unit("0.01")
        (0.001, 0.01)
    """
    try:
        unit = PNG_UNITS[text] if text in PNG_UNITS else float(text)
    except ValueError:
        unit = 0.0
    if not 1e-6 <= unit <= 1e3:
        raise UserError(
            f"--metric-unit {text}: is no unit; use {', '.join(PNG_UNITS)}, or the metres of a unit such as 0.001."
        )
    return unit


def read_references(path: str | Path, size: tuple[int, int], unit: float | None = None) -> References:
    """From a CSV with columns u, v, metres (pixels of the image of `size` (H, W); the first pixel's centre is 0.5), or
    from a sparse 16-bit depth PNG of the image's shape and any size, metres = value * unit (None: 1/256, as KITTI's), 0:
    unknown; a PNG of this package or MoGe says itself how it is encoded.

    Raises `UserError` for a file that cannot be read, lacks a column, has rows with more values than columns, has no
    usable row, or has points outside; for a PNG that is not one channel of 16 bits or is turned against the image; and
    for a unit where the file says its own.
    """
    path = Path(absolute(path))
    where = f"--metric-points {path}"
    if not os.path.isfile(path):
        raise UserError(f"{where}: there is no such file; give a CSV (u, v, metres) or a sparse depth PNG.")
    if path.suffix.lower() == ".png":
        return _from_png(path, where, size, unit)
    if unit is not None:
        raise UserError(f"{where}: a CSV says metres; leave --metric-unit out, or convert the column.")
    import pandas as pd  # here: who has no such file need not wait for it

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


def _from_png(path: Path, where: str, size: tuple[int, int], unit: float | None) -> References:
    try:
        with Image.open(path) as image:
            image.load()
            mode, described = image.mode, {"near", "far"} <= {str(key).lower() for key in image.info}
            raw = np.asarray(image)
        with np.errstate(over="ignore"):  # of a far beyond all numbers
            depth = moge_io.read_depth(path) if described and mode in PNG_MODES else raw.astype(np.float64)
    except Exception as error:
        raise UserError(f"{where}: is not a readable depth PNG ({reason(error)}).") from error
    if mode not in PNG_MODES:
        raise UserError(f"{where}: must have one channel of 16 bits; this one is of Pillow's mode {mode}.")
    if described and unit is not None:
        raise UserError(f"{where}: says itself how its depth is encoded; leave --metric-unit out.")
    _check_shape(depth.shape[:2], size, where)
    if not described:
        unit = PNG_UNITS["kitti"] if unit is None else unit
        depth = depth * unit
    row, column = np.nonzero(np.isfinite(depth) & (depth > 0))
    if not len(row):
        raise UserError(f"{where}: every pixel is unknown.")
    uv = np.stack([(column + 0.5) / depth.shape[1], (row + 0.5) / depth.shape[0]], -1)
    metres = torch.tensor(depth[row, column], dtype=torch.float32)
    return References(torch.tensor(uv, dtype=torch.float32), metres, unit)


def _check_shape(found: tuple[int, int], size: tuple[int, int], where: str) -> None:
    """Raises `UserError` where a map (H, W) has another shape than the image, if not its size: it would be stretched."""

    def off(height: int, width: int) -> bool:
        difference = abs(np.log(width / height) - np.log(size[1] / size[0]))
        return difference > OFF_ASPECT + 1 / height + 1 / width

    if off(*found):
        sizes = f"{found[1]} x {found[0]} pixels, the photograph {size[1]} x {size[0]}"
        turned = not off(*found[::-1])
        what = "it is turned; turn one back" if turned else "it is of another shape; crop it as the photograph is"
        raise UserError(f"{where}: has {sizes}: {what}.")


def spread_distances(references: References, height: int, width: int) -> Tensor:
    """A dense map (height, width) of a few distances: the mean of each pixel's four nearest, weighted by nearness.

    Example:
        >>> spread_distances(References(torch.tensor([[0.25, 0.5], [0.75, 0.5]]), torch.tensor([1.0, 3.0])), 1, 2)
        tensor([[1., 3.]])
    """
    tree, grid = cKDTree(references.uv.cpu().numpy()), uv_map(height, width, dtype=torch.float64).numpy()
    distance, nearest = tree.query(grid, k=range(1, min(4, len(references.depth)) + 1))
    weight = 1 / np.maximum(distance, 1e-9)
    depth = references.depth.cpu().numpy()[nearest]
    return torch.tensor((weight * depth).sum(-1) / weight.sum(-1), dtype=torch.float32)


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
