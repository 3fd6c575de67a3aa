"""MoGe's truncated alignments at a small part of their cost: what makes a step cheap.

`moge.utils.alignment` solves for the best scale with *every* point as anchor, O(N^2 log N). Nearly every anchor gives
nearly the same scale, though, and at one scale the best anchors are those whose residual lies in the middle of all. So a
few anchors are solved, those in the middle at the best scale found are compared, the best of them are solved, and that
once more. An anchor is solved with one sort: from the best of a few quantiles the scale goes down, step by step, to a
local optimum of the truncated objective. What comes out is an optimum of one anchor in MoGe's set; how rarely it is
not the very best one is measured in `tests/geometry/test_training_alignment.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

THOROUGH, QUICK = (6, 3, 3), (4, 4)  # anchors solved at the start and in each round after it
NEAR = 16  # anchors compared in a round
QUANTILES, STEPS = (0.2, 0.35, 0.5, 0.65, 0.8), 2  # of target / source, where a search begins; steps down from there
TIE = 1e-5  # relative difference of objectives that is taken for rounding
AT_ONCE, IN_CACHE = 2**24, 2**19  # numbers (problem, anchor, point, coordinate) at a time; the fewer on a CPU


def _argsort(x: Tensor) -> Tensor:
    """Order along the last dimension. On a CPU NumPy's vectorised sort takes a quarter of torch's time."""
    return x.argsort(-1) if x.device.type != "cpu" else torch.from_numpy(np.argsort(x.numpy(), -1))


def quantile(weight: Tensor, shares: Tensor | float) -> Tensor:
    """Where the sum of weights along the last dimension first reaches shares in (0, 1] of all: (...,N), (...,M) -> (...,M), an index.

    What has no weight is never there, unless nothing has.
    """
    total = weight.cumsum(-1)
    return torch.searchsorted(total, total[..., -1:] * shares).clamp_max(total.shape[-1] - 1)


def _solve(
    source: Tensor, target: Tensor, weight: Tensor, anchors: Tensor, shifts: Tensor, trunc: float | None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A good scale with each anchor: (P,N,3), (P,N,3), (P,N), (P,M) -> scale, loss, index of the second point (P,M).

    The best of a few quantiles of target / source (and of `start`, (P,)) goes down: the points within `trunc` of it
    decide the next scale, their weighted median. A truncated point costs at most `trunc` anywhere, so no step raises
    the truncated objective. Without `trunc` the first step is exact.
    """
    picked = anchors[..., None].expand(-1, -1, 3)
    x = (source[:, None] - (source.gather(1, picked) * shifts)[:, :, None]).flatten(2)
    y = (target[:, None] - (target.gather(1, picked) * shifts)[:, :, None]).flatten(2)
    w = weight[:, None, :, None].expand(-1, anchors.shape[1], -1, 3).flatten(2)
    ratio = torch.where(x != 0, y / x, 0.0)
    order = _argsort(ratio)
    ratio = ratio.gather(2, order)
    pull = (w * x.abs()).gather(2, order)
    reach = trunc / pull.clamp_min(1e-12) if trunc is not None else torch.inf

    def loss_at(scale: Tensor) -> Tensor:
        """(P,M,K) -> (P,M,K), but for what no scale changes."""
        loss = (ratio[:, :, None] - scale[..., None]).abs_().mul_(pull[:, :, None])
        return (loss if trunc is None else loss.clamp_max_(trunc)).sum(-1)

    place = quantile(pull, 0.5 if trunc is None else torch.tensor(QUANTILES).to(pull.device, non_blocking=True))
    scale = ratio.gather(2, place)
    if trunc is not None:
        if start is not None:
            scale = torch.cat([scale, start[:, None, None].expand(-1, scale.shape[1], 1)], -1)
        scale = scale.gather(2, loss_at(scale).argmin(-1, keepdim=True))
        for _ in range(STEPS):
            place = quantile(torch.where((ratio - scale).abs() < reach, pull, 0.0), 0.5)
            scale = ratio.gather(2, place)
    fixed = torch.where(x == 0, w * y.abs(), 0.0)
    loss = loss_at(scale)[..., 0] + (fixed if trunc is None else fixed.clamp_max(trunc)).sum(-1)
    # An anchor without weight is no anchor.
    loss = loss.masked_fill(weight.gather(1, anchors) <= 0, torch.inf)
    return scale[..., 0], loss, order.gather(2, place)[..., 0]


def _promising(
    source: Tensor, target: Tensor, weight: Tensor, held: Tensor, scale: Tensor, shifts: Tensor, trunc: float | None,
    count: int,
) -> Tensor:  # fmt: skip
    """The best anchors at one scale a problem, best first: (P,N,3), (P,N,3), (P,N), (P,), (P,) -> (P,count).

    At one scale the objective of an anchor is the sum of the residuals' distances from its own, so the best of all lie
    near the weighted median residual; those nearest to it are compared. What the anchor held so far truncates has no say.
    """
    residual = (scale[:, None, None] * source - target).mT.contiguous()  # (P,3,N)
    near = torch.arange(weight.shape[1], device=weight.device).expand(len(weight), -1)
    if weight.shape[1] > NEAR:
        say = weight[:, None].expand_as(residual)
        if trunc is not None:
            own = residual.gather(2, held[:, None, None].expand(-1, 3, 1)) * shifts[:, None]
            say = torch.where((residual - own).abs().mul_(say) < trunc, say, 0.0)
        order = _argsort(residual)
        middle = order.gather(2, quantile(say.gather(2, order), 0.5))
        away = ((residual - residual.gather(2, middle)).abs() * shifts[:, None]).sum(1)
        near = away.masked_fill(weight <= 0, torch.inf).topk(NEAR, largest=False)[1]
    loss = torch.zeros(near.shape, dtype=weight.dtype, device=weight.device)
    for axis in range(3):
        moved = residual[:, axis].gather(1, near)[..., None] * shifts[axis]
        error = (residual[:, axis, None] - moved).abs_().mul_(weight[:, None])
        loss += (error if trunc is None else error.clamp_max_(trunc)).sum(-1)
    loss = loss.masked_fill(weight.gather(1, near) <= 0, torch.inf)
    return near.gather(1, loss.topk(min(count, near.shape[1]), largest=False)[1])


def _spread(weight: Tensor, count: int) -> Tensor:
    """`count` anchors evenly over the points that have weight, (P,N) -> (P,count)."""
    order = (weight > 0).long().cumsum(-1)  # 1, 2, ... over the points with weight
    ranks = (torch.arange(count, device=weight.device) + 0.5) / count * order[:, -1:] + 1
    return torch.searchsorted(order, ranks.floor().long().clamp_max(order[:, -1:])).clamp_max(weight.shape[1] - 1)


def _best_pair(
    source: Tensor, target: Tensor, weight: Tensor, shifts: Tensor, trunc: float | None, rounds: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Anchor (P,) and second point, an index into N * 3, (P,), of the best alignment found."""

    def best_of(anchors: Tensor, scale: Tensor, loss: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        # Of anchors that are equally good (the median of an even number is an interval) the first, not one by rounding.
        place = (loss <= loss.amin(1, keepdim=True) * (1 + TIE)).int().argmax(1, keepdim=True)
        return tuple(value.gather(1, place)[:, 0] for value in (anchors, scale, loss, index))

    problem = (source, target, weight)
    anchors = _spread(weight, rounds[0])
    held = best_of(anchors, *_solve(*problem, anchors, shifts, trunc))
    for count in rounds[1:]:
        anchors = _promising(*problem, held[0], held[1], shifts, trunc, count)
        found = best_of(anchors, *_solve(*problem, anchors, shifts, trunc, held[1]))
        better = found[2] < held[2] * (1 - TIE)
        held = tuple(torch.where(better, new, old) for new, old in zip(found, held))
    return held[0], held[3]


def _align(
    source: Tensor,
    target: Tensor,
    weight: Tensor,
    trunc: float | None,
    shifts: Tensor,
    rounds: tuple[int, ...] = THOROUGH,
) -> tuple[Tensor, Tensor]:
    """Scale (...) and shift (...,3) of points (...,N,3); shifts (3,): 1 along the axes that may shift, else 0."""
    batch_shape, points = source.shape[:-2], source.shape[-2]
    source, target = source.reshape(-1, points, 3), target.reshape(-1, points, 3)
    weight = weight.reshape(-1, points)
    with torch.no_grad():
        numbers = IN_CACHE if source.device.type == "cpu" else AT_ONCE
        size = max(1, numbers // (points * 3 * max(NEAR, rounds[0] * len(QUANTILES))))
        pairs = [
            _best_pair(s, t, w, shifts, trunc, rounds)
            for s, t, w in zip(source.split(size), target.split(size), weight.split(size))
        ]
        anchor, second = (torch.cat(part) for part in zip(*pairs))
    # Written out again by indexing, with the gradient that MoGe's functions have.
    first = anchor[:, None, None].expand(-1, 1, 3)
    source_1, target_1 = (map_.gather(1, first)[:, 0] * shifts for map_ in (source, target))
    axis = (second % 3)[:, None]
    rise = target.flatten(1).gather(1, second[:, None])[:, 0] - target_1.gather(1, axis)[:, 0]
    run = source.flatten(1).gather(1, second[:, None])[:, 0] - source_1.gather(1, axis)[:, 0]
    scale = rise / torch.where(run != 0, run, 1.0)
    usable = (weight > 0).any(-1)
    scale = torch.where(usable, scale, 0.0)
    shift = torch.where(usable[:, None], target_1 - scale[:, None] * source_1, 0.0)
    return scale.reshape(batch_shape), shift.reshape(*batch_shape, 3)


def align_points_scale_z_shift(
    points_src: Tensor, points_tgt: Tensor, weight: Tensor, trunc: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `moge.utils.alignment.align_points_scale_z_shift`: (...,N,3) x 2, (...,N) -> scale (...), shift (...,3)."""
    along_z = torch.tensor([0.0, 0.0, 1.0]).to(points_src.device, non_blocking=True)
    return _align(points_src, points_tgt, weight, trunc, along_z)


def align_points_scale_xyz_shift(
    points_src: Tensor,
    points_tgt: Tensor,
    weight: Tensor,
    trunc: float | None = None,
    rounds: tuple[int, ...] = THOROUGH,
) -> tuple[Tensor, Tensor]:
    """As `moge.utils.alignment.align_points_scale_xyz_shift`: (...,N,3) x 2, (...,N) -> scale (...), shift (...,3).

    0 for both where nothing has weight. rounds: `QUICK` for many small problems, of which each counts little.
    """
    return _align(points_src, points_tgt, weight, trunc, torch.ones(3, device=points_src.device), rounds)
