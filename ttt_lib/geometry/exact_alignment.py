"""MoGe's alignments for evaluation, the same optimum in a hundredth of the time.

`moge.utils.alignment` tries every point as an anchor (its residual is zero) and solves for the best scale with each:
O(N^2 log N). For one scale, however, the objective of *all* anchors follows from one sort and prefix sums, O(N log N);
and each anchor's objective is convex in the scale, so values and slopes on a grid of scales bound its minimum from
below. Anchors that cannot win are dropped, and MoGe's own `align` decides among the few that are left.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

import torch
from moge.test import metrics as moge_metrics
from moge.utils.alignment import align
from torch import Tensor

SLACK = 1e-5  # relative; wider than the rounding of a float32 sum, so that ties are left to MoGe's own arithmetic
ENOUGH = 48  # anchors few enough to be solved one by one


def _objective(scale: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Objective and slope of every anchor at each scale.

    scale (K,), source and target (N,C), weight (N,) -> (K,N), (K,N): F_i(a) = sum_j w_j |r_j(a) - r_i(a)|_1 with
    r(a) = a * source - target, and dF_i/da.
    """
    residual = scale[:, None, None] * source.T - target.T  # (K, C, N)
    residual, order = residual.sort(dim=-1)
    w, x = weight[order], source.T[None].expand_as(residual).gather(-1, order)
    below, r_below, x_below = w.cumsum(-1), (w * residual).cumsum(-1), (w * x).cumsum(-1)
    above, r_above, x_above = (c[..., -1:] - c for c in (below, r_below, x_below))
    value = residual * (below - above) - r_below + r_above
    slope = x * (below - above) - x_below + x_above
    back = order.argsort(dim=-1)
    return value.gather(-1, back).sum(1), slope.gather(-1, back).sum(1)


def _lower_bounds(scale: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """Lower bound of each convex function's minimum from its tangents: (K,), (K,N), (K,N) -> (N,)."""
    rising = slope >= 0
    right = rising.float().argmax(0)  # the first rising point; 0 also when none is
    outside = rising[0] | ~rising[-1]
    left = (right - 1).clamp_min(0)
    f0, f1 = (value.gather(0, i[None])[0] for i in (left, right))
    g0, g1 = (slope.gather(0, i[None])[0] for i in (left, right))
    a0, a1 = scale[left], scale[right]
    meet = (f0 - f1 + g1 * a1 - g0 * a0) / (g1 - g0).clamp_min(1e-30)
    return torch.where(outside, -torch.inf, f0 + g0 * (meet - a0))


def _surviving_anchors(source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Indices of the anchors whose best objective may be the smallest of all."""
    x, y, w = source.double(), target.double(), weight.double()
    usable = torch.nonzero(w > 0)[:, 0]
    off_x, off_y = ((points - points.median(0).values).abs() for points in (x, y))
    centre = (off_y.mean() / off_x.mean().clamp_min(1e-30)).clamp_min(1e-30)
    steps = torch.linspace(-6, 6, 25, dtype=torch.float64, device=x.device)
    ends = torch.tensor([-1e4, -1e2, -1.0, 0.0, 1e4], dtype=torch.float64, device=x.device)
    scale = torch.cat([centre * 2.0**steps, centre * ends]).sort().values
    value, slope = _objective(scale, x, y, w)
    rounding = 1e-9 * float((w[:, None] * off_y).sum())  # matters where the optimum is zero
    best = torch.inf
    for _ in range(6):
        best = min(best, float(value[:, usable].min()))
        bound = _lower_bounds(scale, value[:, usable], slope[:, usable])
        usable = usable[bound <= best + SLACK * abs(best) + rounding]
        if len(usable) <= ENOUGH:
            break
        at = int(value[:, usable].min(1).values.argmin())
        low, high = scale[max(at - 1, 0)], scale[min(at + 1, len(scale) - 1)]
        finer = low + (high - low) * torch.linspace(0, 1, 19, dtype=torch.float64, device=x.device)[1:-1]
        new_value, new_slope = _objective(finer, x, y, w)
        scale, order = torch.cat([scale, finer]).sort()
        value, slope = torch.cat([value, new_value])[order], torch.cat([slope, new_slope])[order]
    return usable


def align_points_scale_xyz_shift_exact(source: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `moge.utils.alignment.align_points_scale_xyz_shift` without truncation, for one set of points.

    source and target (N,C), weight (N,) >= 0 -> scale () and shift (C,) that minimise `sum_j w_j |s x_j + t - y_j|_1`. C is
    3, or 1 for `align_depth_affine`.
    """
    anchors = _surviving_anchors(source, target, weight)
    axes = source.shape[1]
    losses, indices = [], []
    for chunk in anchors.split(64):
        x = source[None] - source[chunk, None]
        y = target[None] - target[chunk, None]
        w = weight[None, :, None].expand(len(chunk), -1, axes)
        _, loss, index = align(x.flatten(1), y.flatten(1), w.flatten(1))
        losses.append(loss)
        indices.append(index)
    loss, index = torch.cat(losses), torch.cat(indices)
    best = torch.nonzero(loss == loss.min())[-1, 0]  # the last of equals, as moge's scatter_min takes it
    anchor, second = anchors[best], index[best]
    first = anchor * axes + second % axes
    run, rise = (values.flatten()[second] - values.flatten()[first] for values in (source, target))
    fallback = 1.0 if axes > 1 else 1e-7  # of the two functions that this must agree with
    scale = rise / torch.where(run != 0, run, fallback)
    return scale, target[anchor] - scale * source[anchor]


def align_depth_affine(source: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `moge.utils.alignment.align_depth_affine` without truncation, for one set: (N,) x 3 -> scale (), shift ()."""
    scale, shift = align_points_scale_xyz_shift_exact(source[:, None], target[:, None], weight)
    return scale, shift[0]


def align_affine_lstsq(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of least squares, `a x + b` nearest to `y`; (N,) x 2 -> () x 2, in the dtype of x.

    As `moge.utils.alignment.align_affine_lstsq` without weights, in closed form and double precision: LAPACK's result
    changes in its last bits with where the numbers lie in memory, and one and the same prediction must score the same.
    """
    x64, y64 = x.double(), y.double()
    centred = x64 - x64.mean()
    scale = (centred * (y64 - y64.mean())).sum() / centred.square().sum().clamp_min(1e-300)
    return scale.to(x), (y64.mean() - scale * x64.mean()).to(x)


def fast_alignment() -> AbstractContextManager[None]:
    """Inside, `moge.test.metrics.compute_metrics` uses the three functions of this module."""
    return mock.patch.multiple(
        moge_metrics,
        align_points_scale_xyz_shift=align_points_scale_xyz_shift_exact,
        align_depth_affine=align_depth_affine,
        align_affine_lstsq=align_affine_lstsq,
    )
