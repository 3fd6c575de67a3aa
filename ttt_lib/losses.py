"""What the student minimises: MoGe's own terms, chosen and weighted by configuration, over the whole batch.

Formulas and implementations are those of `moge.train.losses` (MoGe, CVPR 2025; MoGe-2, 2025). The published study
uses the affine-invariant terms: `sum_i 1/z_i * || s p_i + t - q_i ||` with the best scale s and shift t, over the
whole image and over patches of three sizes.
"""

from __future__ import annotations

import torch
from moge.train import losses as moge_losses
from torch import Tensor

from ttt_lib.config import LossConfig
from ttt_lib.errors import UserError

# Of MoGe-1's training configuration; an experiment overrides any of them.
DEFAULTS: dict[str, dict[str, float | int]] = {
    "global": {"align_resolution": 32, "beta": 0.0, "trunc": 1.0},
    "local_4": {"align_resolution": 16, "num_patches": 16, "beta": 0.0, "trunc": 1.0},
    "local_16": {"align_resolution": 8, "num_patches": 256, "beta": 0.0, "trunc": 1.0},
    "local_64": {"align_resolution": 4, "num_patches": 4096, "beta": 0.0, "trunc": 1.0},
}


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


def compute_loss(
    output: dict[str, Tensor],
    target: Tensor,
    negative: Tensor | None,
    intrinsics: Tensor,
    terms: dict[str, LossConfig],
    generator: torch.Generator,
    mask_positive_and_negative: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the terms, averaged over the batch.

    output: the student's `points` (B,H,W,3), up to scale and z-shift, and where the network has them `mask` (B,H,W)
    and `metric_scale` (B,). target: the teacher's points (B,H,W,3) in the views' cameras, NaN where unknown.
    negative: (B,H,W) True where the teacher says there is no surface (sky); neither known nor negative: no mask loss.
    intrinsics (B,3,3) of the views. generator (CPU) seeds the patches of the local terms; the global random state is
    left alone. `mask_positive_and_negative` gives the mask loss one mask for both sides, as the public release does.

    Returns the total (scalar) and each unweighted term (B-averaged, detached). A term of weight 0 is not computed.
    """
    points = output["points"]
    known = torch.isfinite(target).all(-1)
    target = torch.where(known[..., None], target, torch.nan)
    focal = focal_of(intrinsics)
    values: dict[str, Tensor] = {}
    scale: Tensor | None = None
    active = {name: config for name, config in terms.items() if config.weight > 0}

    needs_scale = any(name.startswith("local") or name in ("global", "metric_scale") for name in active)
    if needs_scale:
        settings = parameters("global", terms.get("global", LossConfig()))
        value, _, scale = moge_losses.affine_invariant_global_loss(points, target, **settings)
        if "global" in active:
            values["global"] = value.mean()
    seeds = torch.randint(2**31, (3,), generator=generator).tolist()
    with torch.random.fork_rng(devices=[points.device] if points.device.type == "cuda" else []):
        for level, seed in zip((4, 16, 64), seeds):
            name = f"local_{level}"
            if name in active:
                torch.manual_seed(seed)
                # One view at a time, as in MoGe's own training: the function cannot take several focal lengths.
                each = [
                    moge_losses.affine_invariant_local_loss(
                        points[i : i + 1], target[i : i + 1], focal[i : i + 1], scale[i : i + 1], level=level,
                        **parameters(name, active[name]),
                    )[0].mean()
                    for i in range(len(points))
                ]  # fmt: skip
                values[name] = torch.stack(each).mean()
    if "normal" in active:
        values["normal"] = moge_losses.normal_loss(points, target)[0].mean()
    if "edge" in active:
        values["edge"] = moge_losses.edge_loss(points, target)[0].mean()
    if "mask" in active and output.get("mask") is not None:
        positive = known
        negative = torch.zeros_like(known) if negative is None else negative & ~known
        negative = positive if mask_positive_and_negative else negative
        values["mask"] = moge_losses.mask_l2_loss(output["mask"], positive, negative)[0].mean()
    if "metric_scale" in active and output.get("metric_scale") is not None:
        values["metric_scale"] = moge_losses.metric_scale_loss(output["metric_scale"], scale)[0].mean()

    total = points.sum() * 0.0
    for name, value in values.items():
        total = total + active[name].weight * value
    return total, {name: value.detach() for name, value in values.items()}
