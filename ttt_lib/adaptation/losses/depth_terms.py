"""Losses of the depth models around MoGe: what MiDaS, Depth Anything and ZoeDepth train with.

All take maps (B,H,W) and `known` (B,H,W) bool and give one value a picture, (B,): the mean over the known pixels times
their share of the picture. So a picture that is half unknown counts half, as in MoGe's losses, and the two regions of
a CutMix are weighted by their area.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FEATURE_TOLERANCE = 0.85  # Depth Anything, section 3.3
SILOG_BETA = 0.15  # ZoeDepth's own value
SMALLEST = 1e-6


def _mean(value: Tensor, known: Tensor) -> Tensor:
    """Mean over known pixels times their share: the sum over the known ones by the number of all."""
    return torch.where(known, value, 0.0).flatten(1).mean(1)


def median_mad_normalised(disparity: Tensor, known: Tensor) -> Tensor:
    """(d - median) / mean |d - median| over the known pixels of each picture, (B,H,W).

    MiDaS (Ranftl et al. 2020), equation 5 and Depth Anything (Yang et al. 2024), equation 2: what is left does not
    change under `a * d + b` with a > 0. Pictures without known pixels give zeros.
    """
    values = torch.where(known, disparity, torch.nan).flatten(1)
    centre = values.nanmedian(dim=1).values.nan_to_num(0.0)[:, None, None]
    centred = torch.where(known, disparity - centre, 0.0)
    spread = centred.abs().flatten(1).sum(1) / known.flatten(1).sum(1).clamp_min(1)
    return centred / spread.clamp_min(SMALLEST)[:, None, None]


def normalised_difference(disparity: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """d - d* of both maps after `median_mad_normalised`, each in disparity (1 / depth): (B,H,W), 0 where unknown."""
    return median_mad_normalised(disparity, known) - median_mad_normalised(torch.where(known, target, 0.0), known)


def scale_shift_invariant_loss(disparity: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Mean |d - d*| of the `normalised_difference`. (B,)."""
    return _mean(normalised_difference(disparity, target, known).abs(), known)


def gradient_matching_loss(disparity: Tensor, target: Tensor, known: Tensor, scales: int = 4) -> Tensor:
    """Horizontal and vertical gradients of the normalised difference, summed over halved resolutions. (B,).

    MiDaS, equation 11: `1/M sum_k sum_i |dx R_i^k| + |dy R_i^k|` with R the difference of the normalised maps.
    """
    difference = normalised_difference(disparity, target, known)
    total = torch.zeros(len(difference), device=difference.device)
    for level in range(scales):
        d, k = difference[:, :: 2**level, :: 2**level], known[:, :: 2**level, :: 2**level]
        count = k[0].numel()
        across = torch.where(k[:, :, 1:] & k[:, :, :-1], (d[:, :, 1:] - d[:, :, :-1]).abs(), 0.0)
        down = torch.where(k[:, 1:] & k[:, :-1], (d[:, 1:] - d[:, :-1]).abs(), 0.0)
        total = total + (across.flatten(1).sum(1) + down.flatten(1).sum(1)) / count
    return total


def silog_loss(depth: Tensor, target: Tensor, known: Tensor, beta: float = SILOG_BETA) -> Tensor:
    """ZoeDepth's scale-invariant log loss, `10 * sqrt(Var(g) + beta * mean(g)^2)` with g = log d - log d*. (B,).

    beta = 0 does not see a common factor at all. Variance with n - 1 below, as `ZoeDepth/zoedepth/trainers/loss.py`.
    """
    known = known & (target > 0)
    g = depth.clamp_min(SMALLEST).log() - torch.where(known, target, 1.0).log()
    count = known.flatten(1).sum(1)
    mean = torch.where(known, g, 0.0).flatten(1).sum(1) / count.clamp_min(1)
    centred = torch.where(known, g - mean[:, None, None], 0.0)
    variance = centred.square().flatten(1).sum(1) / (count - 1).clamp_min(1)
    # The root has no derivative at zero: a perfect prediction would give NaN.
    return 10 * (variance + beta * mean.square()).clamp_min(1e-12).sqrt() * count / known[0].numel()


def feature_alignment_loss(features: Tensor, frozen: Tensor, tolerance: float = FEATURE_TOLERANCE) -> Tensor:
    """`1 - cos` between the student's and the frozen encoder's features; patches above the tolerance do not count.

    features and frozen (B,N,C) -> (B,), the mean over the patches that count, 0 if none does. Depth Anything, equation
    6, with its tolerance margin: two encoders need not agree more than that on what one object is.
    """
    cosine = F.cosine_similarity(features, frozen.detach(), dim=-1)
    counts = cosine < tolerance
    return torch.where(counts, 1 - cosine, 0.0).sum(1) / counts.sum(1).clamp_min(1)
