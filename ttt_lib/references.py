"""Metric references: true distances of a few pixels, as an extra loss and as a correction of the prediction.

A laser, a tape measure or a LiDAR that hits a hundred pixels says what the model cannot know, the scale; the study
names this as the way to make metric predictions improve.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from moge.utils import io as moge_io
from moge.utils.alignment import align_depth_scale
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.alignment import align_depth_affine
from ttt_lib.errors import UserError
from ttt_lib.geometry import unproject
from ttt_lib.models import GeometryModel, Prediction

if TYPE_CHECKING:
    from ttt_lib.data import Sample

ENOUGH_FOR_SHIFT = 6  # points; fewer fix the scale alone
FOLDS = 5
MOST = 5000  # references that the fit uses; of more, an even selection
PNG_SCALE = 256.0  # of sparse 16-bit depth PNGs as KITTI has them: value / 256 is metres


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

    Raises `UserError` for a file that cannot be read, lacks a column, has no usable row, or has points outside.
    """
    path = Path(path)
    where = f"--metric-points {path}"
    if not path.is_file():
        raise UserError(f"{where}: there is no such file; give a CSV (u, v, metres) or a sparse depth PNG.")
    if path.suffix.lower() == ".png":
        return _from_png(path, where)
    try:
        table = pd.read_csv(path, skipinitialspace=True)
    except Exception as error:
        raise UserError(f"{where}: is not a readable CSV ({str(error).splitlines()[0]}).") from error
    table.columns = [str(name).strip().lower() for name in table.columns]
    missing = [name for name in ("u", "v", "metres") if name not in table.columns]
    if missing:
        raise UserError(f"{where}: has no column {missing[0]!r}; its first line must be u,v,metres.")
    values = table[["u", "v", "metres"]].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    bad = np.nonzero(~np.isfinite(values).all(1) | (values[:, 2] <= 0))[0]
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
            described = {"near", "far"} <= {str(key).lower() for key in image.info}
            raw = np.asarray(image)
        depth = moge_io.read_depth(path) if described else raw.astype(np.float64) / PNG_SCALE
    except Exception as error:
        raise UserError(f"{where}: is not a readable depth PNG ({str(error).splitlines()[0]}).") from error
    depth = depth[0] if isinstance(depth, tuple) else depth
    if depth.ndim != 2:
        raise UserError(f"{where}: must have one channel of 16 bits, not {depth.shape[-1]} channels.")
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


def at_references(map_: Tensor, references: References) -> Tensor:
    """Bilinear values of maps (B,H,W) at the references, (B,N)."""
    grid = (2 * references.uv - 1).to(map_)[None, :, None].expand(len(map_), -1, -1, -1)
    return F.grid_sample(map_[:, None], grid, padding_mode="border", align_corners=False)[:, 0, :, 0]


def reference_loss(model: GeometryModel, image: Tensor, references: References) -> Tensor:
    """Mean |log d - log d*| of the metric depth at the references, on the clean image (3,H,W). ()."""
    depth = model.metric_depth(model.forward(image[None]), image[None])
    found = at_references(depth, references)[0].clamp_min(1e-6)
    return (found.log() - references.depth.to(found).log()).abs().mean()


def _fit(kind: str, found: Tensor, true: Tensor) -> tuple[float, float]:
    """Parameters (a, b) of one correction by least absolute relative error: d = a x + b, 1/d = a/x + b, or
    log d = a log x + b."""
    if kind == "scale":
        return float(align_depth_scale(found, true, 1 / true)), 0.0
    if kind == "affine":
        a, b = align_depth_affine(found, true, 1 / true)
    elif kind == "inverse":
        a, b = align_depth_affine(1 / found, 1 / true, true)
    else:
        a, b = align_depth_affine(found.log(), true.log(), torch.ones_like(true))
    return float(a), float(b)


def _apply(kind: str, parameters: tuple[float, float], depth: Tensor) -> Tensor:
    a, b = parameters
    depth = depth.clamp_min(1e-6)
    if kind == "power":
        return (a * depth.log() + b).exp()
    return 1 / (a / depth + b) if kind == "inverse" else a * depth + b


def correct(prediction: Prediction, references: References) -> tuple[Prediction, str]:
    """The prediction in metres by the references, and in words what was done.

    Four corrections compete: a factor; factor and shift of the depth; the same of its inverse; factor and exponent. The
    first whose mean error on left-out references (5 folds) is within 2 % of the best wins; fewer than
    `ENOUGH_FOR_SHIFT` references fix the factor alone. A correction that would make any depth non-positive is not
    considered. Points follow the depth along their rays. kind becomes `metric`.
    """
    found, true = at_references(prediction.depth[None], references)[0].double(), references.depth.to(prediction.depth)
    true = true.double()
    usable = torch.nonzero(torch.isfinite(found) & (found > 0))[:, 0]
    usable = usable[:: -(-len(usable) // MOST) or 1]
    found, true = found[usable], true[usable]
    if not len(found):
        return prediction, "no reference lies where the prediction is finite: not corrected"
    kinds = ["scale"] + (["affine", "inverse", "power"] if len(found) >= ENOUGH_FOR_SHIFT else [])
    visible = prediction.depth[torch.isfinite(prediction.depth)]
    errors: dict[str, float] = {}
    for kind in kinds:
        fitted = _fit(kind, found, true)
        if fitted[0] <= 0 or bool((_apply(kind, fitted, visible) <= 0).any()):
            continue
        left_out = []
        if len(kinds) > 1:
            for fold in range(FOLDS):
                test = torch.arange(len(found)) % FOLDS == fold
                again = _apply(kind, _fit(kind, found[~test], true[~test]), found[test])
                left_out.append((again / true[test] - 1).abs())
        errors[kind] = float(torch.cat(left_out).mean()) if left_out else 0.0
    best = next(kind for kind in errors if errors[kind] <= 1.02 * min(errors.values()))
    fitted = _fit(best, found, true)
    depth = _apply(best, fitted, prediction.depth.double()).to(prediction.depth)
    words = {
        "scale": f"depth times {fitted[0]:.4g}",
        "affine": f"depth times {fitted[0]:.4g} plus {fitted[1]:.4g} m",
        "inverse": f"inverse depth times {fitted[0]:.4g} plus {fitted[1]:.4g} / m",
        "power": f"depth to the power {fitted[0]:.4g} times {np.exp(fitted[1]):.4g}",
    }[best]
    corrected = replace(
        prediction, depth=depth, points=unproject(depth, prediction.intrinsics), kind="metric", disparity=None
    )
    return corrected, f"{words}, from {len(found)} references"
