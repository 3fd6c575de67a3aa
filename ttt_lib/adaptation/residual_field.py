"""What is left of the error after one correction of the whole picture, as a smooth field over it.

A model that has one wall too near and another too far needs more than a factor and a shift. Where there are enough known
distances, the logarithms of their residuals are averaged with weights that fall with the distance in the picture and
in depth, so that a reference on a table says nothing of the wall behind it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.geometry.cameras import shrunk, uv_map

ENOUGH = 20  # references
MOST = 1000  # that the field uses; of more, an even selection
REACH = (0.04, 0.08, 0.16, 0.32)  # standard deviations in the picture, relative to its longer side
DEPTH_REACH = (0.05, 0.15, 0.5)  # and in log depth
PRIOR = 0.3  # weight of "no residual": far from all references nothing changes
FOLDS = 5
WORTHWHILE = 0.9  # of the error without a field, on left-out references
USUAL, MARGIN = (0.15, 0.85), 0.75  # quantiles of the residuals; what lies farther outside than this share is cut off
ELEMENTS = 2**22
LONGEST_SIDE = 256  # pixels at which the field is computed; it is smooth, and enlarged to the picture


def _place(uv: Tensor, size: tuple[int, int]) -> Tensor:
    """Image coordinates in units of the longer side, (...,2)."""
    height, width = size
    return uv * torch.tensor([width, height], device=uv.device, dtype=uv.dtype) / max(height, width)


def _average(
    place: Tensor, depth: Tensor, at: Tensor, at_depth: Tensor, residual: Tensor, reach: float, depth_reach: float
) -> Tensor:
    """Weighted mean residual: place (M,2) and log depth (M,) where it is wanted; at (N,2), at_depth, residual (N,)."""
    exponent = torch.cdist(place, at).square() / (2 * reach**2)
    exponent = exponent + (depth[:, None] - at_depth).square() / (2 * depth_reach**2)
    weight = torch.exp(-exponent)
    return (weight * residual).sum(1) / (weight.sum(1) + PRIOR)


def folds(values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """`FOLDS` times which of the values (N,) are left out, every so many-th one, and the rest: (N,) bool each."""
    fold = torch.arange(len(values), device=values.device) % FOLDS
    for number in range(FOLDS):
        yield fold == number, fold != number


def residual_field(depth: Tensor, uv: Tensor, found: Tensor, true: Tensor) -> Tensor | None:
    """Log of the factor by which to multiply `depth` (H,W), or None where a field does not pay.

    uv (N,2): references in image coordinates; found, true (N,): the depth there and their distances, all positive. The
    reaches are those with the smallest mean absolute log error on left-out references (5 folds); None when that is not
    below `WORTHWHILE` of the error without a field, or with fewer than `ENOUGH` references.
    """
    if len(true) < ENOUGH:
        return None
    step = -(-len(true) // MOST)
    uv, found, true = uv[::step].to(depth), found[::step].to(depth), true[::step].to(depth)
    size = tuple(depth.shape)
    at, at_depth = _place(uv, size), found.log()
    residual = true.log() - found.log()
    low, high = torch.quantile(residual, torch.tensor(USUAL).to(residual)).tolist()
    residual = residual.clamp(low - MARGIN * (high - low), high + MARGIN * (high - low))

    def left_out(reach: float, depth_reach: float) -> float:
        errors = []
        for test, rest in folds(residual):
            guess = _average(at[test], at_depth[test], at[rest], at_depth[rest], residual[rest], reach, depth_reach)
            errors.append((residual[test] - guess).abs())
        return float(torch.cat(errors).mean())

    scores = {(reach, across): left_out(reach, across) for reach in REACH for across in DEPTH_REACH}
    best = min(scores, key=scores.__getitem__)
    if scores[best] >= WORTHWHILE * float(residual.abs().mean()):
        return None
    small = shrunk(size, LONGEST_SIDE)
    nearest = F.interpolate(depth[None, None].float(), small, mode="nearest-exact")[0, 0]
    place = _place(uv_map(*small, device=depth.device).reshape(-1, 2), size)
    logs = torch.where(torch.isfinite(nearest) & (nearest > 0), nearest, 1.0).log().reshape(-1)
    at, at_depth, residual = at.float(), at_depth.float(), residual.float()
    rows = max(1, ELEMENTS // len(at))
    parts = [_average(p, d, at, at_depth, residual, *best) for p, d in zip(place.split(rows), logs.split(rows))]
    field = torch.cat(parts).reshape(1, 1, *small)
    return F.interpolate(field, size, mode="bilinear", align_corners=False)[0, 0].to(depth)
