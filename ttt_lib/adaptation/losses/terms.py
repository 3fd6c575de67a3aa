"""What the student minimises: the terms that the configuration chooses and weights, over the whole batch.

Formulas and implementations are those of `moge.train.losses` (MoGe, CVPR 2025; MoGe-2, 2025). The published study
uses the affine-invariant terms: `sum_i 1/z_i * || s p_i + t - q_i ||` with the best scale s and shift t, over the
whole image and over patches of three sizes. Terms of other models are in `depth_losses.py`; added ones are registered
in `LOSSES`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import utils3d
from moge.train import losses as moge_losses
from torch import Tensor

from ttt_lib.adaptation.losses.depth_terms import (
    feature_alignment_loss,
    gradient_matching_loss,
    scale_shift_invariant_loss,
    silog_loss,
)
from ttt_lib.core.errors import UserError
from ttt_lib.core.registry import LOSSES
from ttt_lib.core.schema import LossConfig
from ttt_lib.geometry.fast_alignment import align_points_scale_z_shift, cheap_alignment

# Of MoGe-1's training configuration; an experiment overrides any of them.
DEFAULTS: dict[str, dict[str, float | int]] = {
    "global": {"align_resolution": 32, "beta": 0.0, "trunc": 1.0},
    "local_4": {"align_resolution": 16, "num_patches": 16, "beta": 0.0, "trunc": 1.0},
    "local_16": {"align_resolution": 8, "num_patches": 256, "beta": 0.0, "trunc": 1.0},
    "local_64": {"align_resolution": 4, "num_patches": 4096, "beta": 0.0, "trunc": 1.0},
}


@dataclass(frozen=True)
class LossInputs:
    """What an added loss is computed from.

    output: what the student's `forward` gives (`points`, `depth` or `disparity`, and what else the network has); target
    (B,H,W,3): the teacher's points in the views' cameras, NaN where unknown; known (B,H,W) bool; negative (B,H,W) bool
    or None: sky; intrinsics (B,3,3) of the views.
    """

    output: dict[str, Tensor]
    target: Tensor
    known: Tensor
    negative: Tensor | None
    intrinsics: Tensor


def parameters(name: str, config: LossConfig) -> dict[str, float | int]:
    """The term's defaults with what the experiment sets laid over them. Raises `UserError` for a key it lacks."""
    values = dict(DEFAULTS.get(name, {}))
    for key, value in config.model_dump(exclude_none=True, exclude={"weight"}).items():
        if key not in values:
            raise UserError(f"losses.{name}.{key}: this term has no such setting; it has {sorted(values) or 'none'}.")
        values[key] = value
    return values


def focal_of(intrinsics: Tensor) -> Tensor:
    """Focal length relative to half the image diagonal, (..., 3, 3) -> (...), as MoGe's local loss wants it."""
    return 1 / (1 / intrinsics[..., 0, 0].square() + 1 / intrinsics[..., 1, 1].square()).sqrt()


def draw_seeds(rows: int, generator: torch.Generator) -> Tensor:
    """The random numbers that the loss of each row takes, (rows, 3): seeds of the patches of the three local terms."""
    return torch.randint(2**31, (rows, 3), generator=generator)


def unused_outputs(terms: dict[str, LossConfig]) -> tuple[str, ...]:
    """Which of a network's outputs no term reads, `normal` and `mask`; an added loss may read all of them."""
    active = {name for name, config in terms.items() if config.weight > 0}
    if active & LOSSES.keys():
        return ()
    return ("normal",) if "mask" in active else ("normal", "mask")


def compute_loss(
    output: dict[str, Tensor],
    target: Tensor,
    negative: Tensor | None,
    intrinsics: Tensor,
    terms: dict[str, LossConfig],
    seeds: Tensor,
    mask_positive_and_negative: bool = False,
    features: tuple[Tensor, Tensor] | None = None,
    cheap: bool = True,
    row_share: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the terms, averaged over the batch.

    output: what the student's `forward` gives: `points` (B,H,W,3), up to scale and z-shift, and where the network has
    them `mask` (B,H,W) and `metric_scale` (B,); or `depth` (B,H,W) in metres (with `points`); or `disparity` (B,H,W) up
    to scale and shift. target: the teacher's points (B,H,W,3) in the views' cameras, NaN where unknown. negative:
    (B,H,W) True where the teacher says there is no surface (sky); neither known nor negative: no mask loss. intrinsics
    (B,3,3) of the views. seeds (B,3) of `draw_seeds` place the patches of the local terms; the global random state is
    left alone. `mask_positive_and_negative` gives the mask loss one mask for both sides, as the public release does.
    features: the student's and the frozen encoder's, (B,N,C) each. row_share (B,): part of its picture that each row is
    (regions of a CutMix), for the terms that are means over patches; the others count unknown pixels as zero. cheap:
    alignment and patch sampling of `training_alignment.py`; else MoGe's at full cost.

    Returns the total (scalar) and each unweighted term (B-averaged, detached). A term of weight 0 is not computed, one
    that the model cannot have (`mask` without a mask) is left out. Raises `UserError` for a term that needs points,
    depth or features that the model does not predict.
    """
    known = torch.isfinite(target).all(-1)
    target = torch.where(known[..., None], target, torch.nan)
    active = {name: config for name, config in terms.items() if config.weight > 0}
    share = torch.ones(len(target), device=target.device) if row_share is None else row_share
    values = _point_terms(output, target, intrinsics, active, terms, seeds.tolist(), cheap, share)
    values |= _depth_terms(output, target, known, active)
    if "feature" in active and features is not None:
        values["feature"] = (feature_alignment_loss(*features) * share).mean()
    if "mask" in active and output.get("mask") is not None:
        nothing = torch.zeros_like(known) if negative is None else negative & ~known
        nothing = known if mask_positive_and_negative else nothing
        values["mask"] = moge_losses.mask_l2_loss(output["mask"], known, nothing)[0].mean()
    for name in active.keys() & LOSSES.keys():
        values[name] = LOSSES[name](LossInputs(output, target, known, negative, intrinsics)).mean()

    anything = next(output[name] for name in ("points", "depth", "disparity") if name in output)
    total = anything.sum() * 0.0
    for name, value in values.items():
        total = total + active[name].weight * value
    return total, {name: value.detach() for name, value in values.items()}


def _point_terms(
    output: dict[str, Tensor], target: Tensor, intrinsics: Tensor, active: dict[str, LossConfig],
    terms: dict[str, LossConfig], seeds: list[list[int]], cheap: bool, share: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """MoGe's terms on points."""
    wanted = [name for name in active if name in (*DEFAULTS, "normal", "edge", "metric_scale")]
    if not wanted:
        return {}
    if "points" not in output:
        raise UserError(f"losses.{wanted[0]}: this model predicts no points; use ssi, gradient, silog or feature.")
    points, focal = output["points"], focal_of(intrinsics)
    values: dict[str, Tensor] = {}
    scale: Tensor | None = None
    if any(name.startswith("local") or name in ("global", "metric_scale") for name in wanted):
        settings = parameters("global", terms.get("global", LossConfig()))
        with cheap_alignment() if cheap else nullcontext():
            value, _, scale = moge_losses.affine_invariant_global_loss(points, target, **settings)
        if "global" in active:
            values["global"] = value.mean()
    with torch.random.fork_rng(devices=[points.device] if points.device.type == "cuda" else []):
        for place, level in enumerate((4, 16, 64)):
            name = f"local_{level}"
            if name not in active:
                continue
            settings = parameters(name, active[name])
            each = []
            # One view at a time, as in MoGe's own training: the function cannot take several focal lengths.
            for i in range(len(points)):
                torch.manual_seed(seeds[i][place])
                with cheap_alignment(int(settings["num_patches"])) if cheap else nullcontext():
                    each.append(
                        moge_losses.affine_invariant_local_loss(
                            points[i : i + 1], target[i : i + 1], focal[i : i + 1], scale[i : i + 1], level=level,
                            **settings,
                        )[0].mean()
                    )  # fmt: skip
            values[name] = (torch.stack(each) * share).mean()
    if "normal" in active:
        values["normal"] = moge_losses.normal_loss(points, target)[0].mean()
    if "edge" in active:
        values["edge"] = moge_losses.edge_loss(points, target)[0].mean()
    if "metric_scale" in active and output.get("metric_scale") is not None:
        values["metric_scale"] = (moge_losses.metric_scale_loss(output["metric_scale"], scale)[0] * share).mean()
    return values


def _depth_terms(
    output: dict[str, Tensor], target: Tensor, known: Tensor, active: dict[str, LossConfig]
) -> dict[str, Tensor]:
    """Terms on disparity and depth. Points, known up to a z-shift, are first aligned to the target as in `global`."""
    depth = target[..., 2]
    values: dict[str, Tensor] = {}
    if "ssi" in active or "gradient" in active:
        if "disparity" in output:
            disparity = output["disparity"]
        elif "depth" in output:
            disparity = 1 / output["depth"].clamp_min(1e-6)
        else:
            disparity = 1 / _aligned_depth(output["points"], target, known)
        known = known & (depth > 0)
        wanted = torch.where(known, 1 / torch.where(known, depth, 1.0), torch.nan)
        if "ssi" in active:
            values["ssi"] = scale_shift_invariant_loss(disparity, wanted, known).mean()
        if "gradient" in active:
            values["gradient"] = gradient_matching_loss(disparity, wanted, known).mean()
    if "silog" in active:
        if "depth" not in output:
            raise UserError("losses.silog: this model predicts no metric depth map; use ssi, or global for points.")
        values["silog"] = silog_loss(output["depth"], depth, known).mean()
    return values


def _aligned_depth(points: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """z after the best scale and z-shift to the target, (B,H,W), kept above a thousandth of the target's median."""
    size = (int(DEFAULTS["global"]["align_resolution"]),) * 2
    filled = torch.where(known[..., None], target, 1.0)
    small, small_target, small_known = utils3d.pt.masked_nearest_resize(points, filled, mask=known, size=size)
    weight = small_known.flatten(1) / small_target[..., 2].flatten(1).clamp_min(1e-2)
    scale, shift = align_points_scale_z_shift(small.detach().flatten(1, 2), small_target.flatten(1, 2), weight, 1.0)
    z = scale[:, None, None] * points[..., 2] + shift[:, 2, None, None]
    median = torch.where(known, target[..., 2], torch.nan).flatten(1).nanmedian(1).values.nan_to_num(1.0)
    return torch.maximum(z, 1e-3 * median[:, None, None])
