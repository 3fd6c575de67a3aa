"""A prediction corrected by the true distances of a few pixels, without any training.

The best of four corrections by left-out references, and a smooth field of factors where that pays.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from moge.utils.alignment import align_depth_scale
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.residual_field import folds, residual_field
from ttt_lib.core.types import Prediction
from ttt_lib.data.known_distances import References
from ttt_lib.geometry.cameras import unproject_far
from ttt_lib.geometry.exact_alignment import align_depth_affine

ENOUGH_FOR_SHIFT = 6  # points; fewer fix the scale alone
MOST = 5000  # references that the fit uses; of more, an even selection
BEYOND = 10.0  # times the farthest reference: as far as a corrected disparity may put a surface
CLIP = 1.0  # of |log ratio|: a wild reference counts as wrong, not as how wrong, when corrections are compared


def at_references(map_: Tensor, references: References) -> Tensor:
    """Bilinear values of maps (B,H,W) at the references, (B,N)."""
    grid = (2 * references.uv - 1).to(map_)[None, :, None].expand(len(map_), -1, -1, -1)
    return F.grid_sample(map_[:, None], grid, padding_mode="border", align_corners=False)[:, 0, :, 0]


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


def _correct_disparity(disparity: Tensor, surface: Tensor, found: Tensor, true: Tensor) -> tuple[Tensor, str] | None:
    """Depth (H,W) in metres of a disparity (H,W), and in words how; None where the references (N,) cannot tell.

    1/d = a * disparity + b by least absolute error; b = 0 where a shift cannot be told, or nearer would become farther.
    Fitted disparities of a surface are not below that of `BEYOND` times the farthest reference, so that its depth is
    positive and finite; elsewhere what is not positive is infinitely far.
    """
    wanted, same, a, b = 1 / true, torch.ones_like(true), 0.0, 0.0
    if len(true) >= ENOUGH_FOR_SHIFT and bool(found.max() > found.min()):
        a, b = (float(value) for value in align_depth_affine(found, wanted, same))
    if not (np.isfinite([a, b]).all() and a > 0):
        positive = found > 0
        if not bool(positive.any()):
            return None
        a, b = float(align_depth_scale(found[positive], wanted[positive], same[positive])), 0.0
    inverse = a * disparity + b
    inverse = torch.where(surface, inverse.clamp_min(float(1 / (BEYOND * true.max()))), inverse.clamp_min(0))
    return 1 / inverse, f"inverse depth is disparity times {a:.4g} plus {b:.4g} / m"


def _correct_depth(depth: Tensor, surface: Tensor, found: Tensor, true: Tensor) -> tuple[Tensor, str]:
    """The corrected depth (H,W) by the best of the four corrections, and in words which."""
    kinds = ["scale"] + (["affine", "inverse", "power"] if len(found) >= ENOUGH_FOR_SHIFT else [])
    visible = depth[surface & torch.isfinite(depth)]
    extremes = torch.stack(visible.aminmax()) if len(visible) else visible  # all corrections with a > 0 are monotone
    fits = {kind: _fit(kind, found, true) for kind in kinds}

    def possible(kind: str) -> bool:
        return fits[kind][0] > 0 and not bool(torch.isinf(_apply(kind, fits[kind], extremes)).any())

    def error(kind: str) -> float:
        left_out = []
        for test, rest in folds(found):
            again = _apply(kind, _fit(kind, found[rest], true[rest]), found[test])
            left_out.append((again / true[test]).log().abs().clamp_max(CLIP))
        return float(torch.cat(left_out).mean())

    kinds = [kind for kind in kinds if kind == "scale" or possible(kind)]
    errors = {kind: error(kind) for kind in kinds} if len(kinds) > 1 else dict.fromkeys(kinds, 0.0)
    best = next(kind for kind in kinds if errors[kind] <= 1.02 * min(errors.values()))
    fitted = fits[best]
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
    points = unproject_far(depth, prediction.intrinsics)
    corrected = replace(prediction, depth=depth, points=points, kind="metric", disparity=None)
    return corrected, f"{words}, from {len(found)} references"
