"""Metric references: true distances of a few pixels, as an extra loss and as a correction of the prediction.

A laser, a tape measure or a LiDAR that hits a hundred pixels says what the model cannot know, the scale; the study
names this as the way to make metric predictions improve.
"""

from __future__ import annotations

import os
import warnings
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

from ttt_lib.adaptation.residual_field import residual_field
from ttt_lib.core.errors import UserError, reason
from ttt_lib.core.types import Prediction
from ttt_lib.geometry.cameras import unproject
from ttt_lib.geometry.exact_alignment import align_depth_affine
from ttt_lib.models.base import GeometryModel

if TYPE_CHECKING:
    from ttt_lib.core.types import Sample

ENOUGH_FOR_SHIFT = 6  # points; fewer fix the scale alone
FOLDS = 5
MOST = 5000  # references that the fit uses; of more, an even selection
BEYOND = 10.0  # times the farthest reference: as far as a corrected disparity may put a surface
CLIP = 1.0  # of |log ratio|: a wild reference counts as wrong, not as how wrong, when corrections are compared
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
    """Parameters (a, b) of one correction of depths (N,) by least absolute error: d = a x + b, 1/d = a/x + b, or
    log d = a log x + b.

    Errors are relative to the prediction x: relative to the truth, a reference that is far too small would outweigh
    all others.
    """
    if kind == "scale":
        return float(align_depth_scale(found, true, 1 / found)), 0.0
    if kind == "affine":
        a, b = align_depth_affine(found, true, 1 / found)
    elif kind == "inverse":
        a, b = align_depth_affine(1 / found, 1 / true, found)
    else:
        a, b = align_depth_affine(found.log(), true.log(), torch.ones_like(true))
    return float(a), float(b)


def _apply(kind: str, parameters: tuple[float, float], depth: Tensor) -> Tensor:
    """Corrected depths; infinite where the correction gives no positive depth."""
    a, b = parameters
    depth = depth.clamp_min(1e-6)
    if kind == "power":
        return (a * depth.log() + b).exp()
    corrected = 1 / (a / depth + b) if kind == "inverse" else a * depth + b
    return torch.where(corrected <= 0, torch.inf, corrected)


def _fit_disparity(disparity: Tensor, true: Tensor) -> tuple[float, float] | None:
    """(a, b) of 1/d = a * disparity + b by least absolute error, or of b = 0 where a shift cannot be told; None where
    nearer would become farther. disparity, true (N,)."""
    inverse, same = 1 / true, torch.ones_like(true)
    if len(true) >= ENOUGH_FOR_SHIFT and bool(disparity.max() > disparity.min()):
        a, b = (float(value) for value in align_depth_affine(disparity, inverse, same))
        if np.isfinite([a, b]).all() and a > 0:
            return a, b
    positive = disparity > 0
    if not bool(positive.any()):
        return None
    return float(align_depth_scale(disparity[positive], inverse[positive], same[positive])), 0.0


def _correct_disparity(disparity: Tensor, surface: Tensor, found: Tensor, true: Tensor) -> tuple[Tensor, str] | None:
    """Depth (H,W) in metres of a disparity (H,W), and in words how; None where the references cannot tell.

    Fitted disparities of a surface are not below that of `BEYOND` times the farthest reference, so that its depth is
    positive and finite; elsewhere what is not positive is infinitely far.
    """
    fitted = _fit_disparity(found, true)
    if fitted is None:
        return None
    inverse = fitted[0] * disparity + fitted[1]
    inverse = torch.where(surface, inverse.clamp_min(float(1 / (BEYOND * true.max()))), inverse.clamp_min(0))
    return 1 / inverse, f"inverse depth is disparity times {fitted[0]:.4g} plus {fitted[1]:.4g} / m"


def _correct_depth(depth: Tensor, surface: Tensor, found: Tensor, true: Tensor) -> tuple[Tensor, str]:
    """The corrected depth (H,W) by the best of the four corrections, and in words which."""
    kinds = ["scale"] + (["affine", "inverse", "power"] if len(found) >= ENOUGH_FOR_SHIFT else [])
    visible = depth[surface & torch.isfinite(depth)]
    errors: dict[str, float] = {}
    for kind in kinds:
        fitted = _fit(kind, found, true)
        if kind != "scale" and (fitted[0] <= 0 or bool(torch.isinf(_apply(kind, fitted, visible)).any())):
            continue
        left_out = []
        if len(kinds) > 1:
            for fold in range(FOLDS):
                test = torch.arange(len(found), device=found.device) % FOLDS == fold
                again = _apply(kind, _fit(kind, found[~test], true[~test]), found[test])
                left_out.append((again / true[test]).log().abs().clamp_max(CLIP))
        errors[kind] = float(torch.cat(left_out).mean()) if left_out else 0.0
    best = next(kind for kind in errors if errors[kind] <= 1.02 * min(errors.values()))
    fitted = _fit(best, found, true)
    words = {
        "scale": f"depth times {fitted[0]:.4g}",
        "affine": f"depth times {fitted[0]:.4g} plus {fitted[1]:.4g} m",
        "inverse": f"inverse depth times {fitted[0]:.4g} plus {fitted[1]:.4g} / m",
        "power": f"depth to the power {fitted[0]:.4g} times {np.exp(fitted[1]):.4g}",
    }[best]
    return _apply(best, fitted, depth), words


def correct(prediction: Prediction, references: References) -> tuple[Prediction, str]:
    """The prediction (H,W) in metres by the references, and in words what was done.

    Four corrections compete: a factor; factor and shift of the depth; the same of its inverse; factor and exponent. The
    first whose mean |log ratio|, clipped at `CLIP`, on left-out references (5 folds, every fifth reference) is within
    2 % of the best wins; fewer than `ENOUGH_FOR_SHIFT` references fix the factor alone. A correction that would make
    any depth of the surface (`mask`) non-positive is not considered; outside of it such depths become infinite.

    For models of disparity there is one correction, factor and shift of `disparity` (the depth of such predictions is
    clamped), the factor alone for few references; no part of the surface is then farther than `BEYOND` times the
    farthest reference. What is then left of the error is taken back as a smooth field of factors where that pays on
    left-out references (`residual_field.py`). Points follow the depth along their rays. kind becomes `metric`. A prediction of which no
    reference says anything stays as it was.
    """
    relative = prediction.kind == "disparity" and prediction.disparity is not None
    values = prediction.disparity if relative else prediction.depth
    found, true = at_references(values[None], references)[0].double(), references.depth.to(values).double()
    usable = torch.nonzero(torch.isfinite(found) & (relative | (found > 0)))[:, 0]
    usable = usable[:: -(-len(usable) // MOST) or 1]
    found, true = found[usable], true[usable]
    if not len(found):
        return prediction, "no reference lies where the prediction is finite: not corrected"
    surface = torch.ones_like(values, dtype=torch.bool) if prediction.mask is None else prediction.mask
    done = (_correct_disparity if relative else _correct_depth)(values.double(), surface, found, true)
    if done is None:
        return prediction, "the predicted disparity is positive at no reference: not corrected"
    depth, words = done[0], done[1]
    at = at_references(depth[None], references)[0][usable]
    field = residual_field(depth, references.uv.to(depth)[usable], at.clamp_min(1e-6), true)
    if field is not None:
        depth, words = depth * field.exp(), f"{words}, and a smooth field of factors"
    depth = depth.to(values)
    # A ray's zero coordinate times infinity is no number.
    points = torch.where(torch.isinf(depth)[..., None], torch.inf, unproject(depth, prediction.intrinsics))
    corrected = replace(prediction, depth=depth, points=points, kind="metric", disparity=None)
    return corrected, f"{words}, from {len(found)} references"
