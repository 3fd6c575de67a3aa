"""Terms of the depth models around MoGe: what MiDaS, Depth Anything and ZoeDepth train with.

Models of points take part after the best scale and z-shift to the target, models of metric depth by its inverse.

All take maps (B,H,W) and `known` (B,H,W) bool and give one value a picture, (B,): the mean over the known pixels times
their share of the picture. So a picture that is half unknown counts half, as in MoGe's losses, and the two regions of
a CutMix are weighted by their area.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.losses.affine import best_scale_z_shift
from ttt_lib.adaptation.losses.moge_terms import GlobalSettings  # MoGe's terms are first in every sum
from ttt_lib.adaptation.losses.terms import LossInputs
from ttt_lib.core.registry import LOSSES
from ttt_lib.core.schema import LossConfig

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


def gradient_matching_loss(disparity: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Horizontal and vertical gradients of the normalised difference, summed over four halved resolutions. (B,).

    MiDaS, equation 11: `1/M sum_k sum_i |dx R_i^k| + |dy R_i^k|` with R the difference of the normalised maps.
    """
    difference = normalised_difference(disparity, target, known)
    total = torch.zeros(len(difference), device=difference.device)
    for step in (1, 2, 4, 8):
        d, k = difference[:, ::step, ::step], known[:, ::step, ::step]
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


# -------------------------------------------------------------------------------------------- as terms of a student's loss


def _aligned_depth(points: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """z after the best scale and z-shift to the target, (B,H,W), kept above a thousandth of the target's median."""
    side, trunc = GlobalSettings().align_resolution, 1.0
    scale, shift = best_scale_z_shift(points.detach(), target, known, side, trunc)
    z = scale[:, None, None] * points[..., 2] + shift[:, 2, None, None]
    median = torch.where(known, target[..., 2], torch.nan).flatten(1).nanmedian(1).values.nan_to_num(1.0)
    return torch.maximum(z, 1e-3 * median[:, None, None])


def _disparities(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Disparity of the student, of the target, and where it is known, (B,H,W) each; computed once a batch."""
    if "disparities" not in inputs.shared:
        output, depth = inputs.output, inputs.target[..., 2]
        if "disparity" in output:
            disparity = output["disparity"]
        elif "depth" in output:
            disparity = 1 / output["depth"].clamp_min(SMALLEST)
        else:
            disparity = 1 / _aligned_depth(output["points"], inputs.target, inputs.known)
        known = inputs.known & (depth > 0)
        wanted = torch.where(known, 1 / torch.where(known, depth, 1.0), torch.nan)
        inputs.shared["disparities"] = (disparity, wanted, known)
    return inputs.shared["disparities"]


@LOSSES.register("ssi", reads=(), settings=LossConfig)
def ssi(inputs: LossInputs) -> Tensor:
    """Scale-and-shift-invariant difference of disparity (MiDaS, Depth Anything)."""
    return scale_shift_invariant_loss(*_disparities(inputs))


@LOSSES.register("gradient", reads=(), settings=LossConfig)
def gradient(inputs: LossInputs) -> Tensor:
    """Gradients of that difference over four resolutions (MiDaS)."""
    return gradient_matching_loss(*_disparities(inputs))


@LOSSES.register("silog", needs=("depth",), reads=(), settings=LossConfig)
def silog(inputs: LossInputs) -> Tensor:
    """Scale-invariant logarithm of metric depth (ZoeDepth)."""
    return silog_loss(inputs.output["depth"], inputs.target[..., 2], inputs.known)


@LOSSES.register("feature", needs=("features",), reads=(), settings=LossConfig)
def feature(inputs: LossInputs) -> Tensor:
    """The encoder's features stay near the frozen ones (Depth Anything)."""
    return feature_alignment_loss(*inputs.features) * inputs.share
