"""MoGe's terms: affine-invariant over the image and over patches, normals, edges, mask, metric scale.

Formulas and implementations are those of `moge.train.losses` (MoGe, CVPR 2025; MoGe-2, 2025): `sum_i 1/z_i * || s p_i + t
- q_i ||` with the best scale s and shift t, over the whole image and over patches of three sizes. Defaults are those of
MoGe-1's training configuration.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from moge.train import losses as moge_losses
from torch import Tensor

from ttt_lib.adaptation.losses.terms import LossInputs
from ttt_lib.core.registry import LOSSES
from ttt_lib.core.schema import LossConfig, NonNegative, Positive
from ttt_lib.geometry.fast_alignment import cheap_alignment


class GlobalSettings(LossConfig):
    """`align_resolution`: side of the grid that the alignment sees; `beta`, `trunc`: of the robust alignment."""

    align_resolution: int = 32
    beta: NonNegative = 0.0
    trunc: Positive = 1.0


class LocalSettings(GlobalSettings):
    """`num_patches`: patches drawn a picture."""

    num_patches: int = 16


class Local4(LocalSettings):
    """Patches of a quarter of the image."""

    align_resolution: int = 16


class Local16(LocalSettings):
    """Patches of a sixteenth."""

    align_resolution: int = 8
    num_patches: int = 256


class Local64(LocalSettings):
    """Patches of a sixty-fourth."""

    align_resolution: int = 4
    num_patches: int = 4096


def focal_of(intrinsics: Tensor) -> Tensor:
    """Focal length relative to half the image diagonal, (..., 3, 3) -> (...), as MoGe's local loss wants it."""
    return 1 / (1 / intrinsics[..., 0, 0].square() + 1 / intrinsics[..., 1, 1].square()).sqrt()


def _own(settings: LossConfig) -> dict[str, float | int]:
    return settings.model_dump(exclude={"weight"})


def _aligned(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Value of the global term and the scale of its alignment, (B,) each; computed once a batch."""
    if "global" not in inputs.shared:
        settings = _own(inputs.settings_of("global"))
        with cheap_alignment() if inputs.cheap else nullcontext():
            value, _, scale = moge_losses.affine_invariant_global_loss(
                inputs.output["points"], inputs.target, **settings
            )
        inputs.shared["global"] = (value, scale)
    return inputs.shared["global"]


@LOSSES.register("global", needs=("points",), reads=(), settings=GlobalSettings)
def global_loss(inputs: LossInputs) -> Tensor:
    """Affine-invariant over the whole image."""
    return _aligned(inputs)[0]


def _local(inputs: LossInputs, level: int, place: int) -> Tensor:
    """Over patches of the image's size divided by `level`; `place`: which of a row's seeds draws them."""
    scale, focal, settings = _aligned(inputs)[1], focal_of(inputs.intrinsics), _own(inputs.settings)
    points, each = inputs.output["points"], []
    with torch.random.fork_rng(devices=[points.device] if points.device.type == "cuda" else []):
        # One view at a time, as in MoGe's own training: the function cannot take several focal lengths.
        for i in range(len(points)):
            torch.manual_seed(inputs.seeds[i][place])
            row = slice(i, i + 1)
            with cheap_alignment(int(settings["num_patches"])) if inputs.cheap else nullcontext():
                each.append(moge_losses.affine_invariant_local_loss(
                    points[row], inputs.target[row], focal[row], scale[row], level=level, **settings
                )[0].mean())  # fmt: skip
    return torch.stack(each) * inputs.share


@LOSSES.register("local_4", needs=("points",), reads=(), settings=Local4)
def local_4(inputs: LossInputs) -> Tensor:
    """Affine-invariant over patches of a quarter."""
    return _local(inputs, 4, 0)


@LOSSES.register("local_16", needs=("points",), reads=(), settings=Local16)
def local_16(inputs: LossInputs) -> Tensor:
    """Affine-invariant over patches of a sixteenth."""
    return _local(inputs, 16, 1)


@LOSSES.register("local_64", needs=("points",), reads=(), settings=Local64)
def local_64(inputs: LossInputs) -> Tensor:
    """Affine-invariant over patches of a sixty-fourth."""
    return _local(inputs, 64, 2)


@LOSSES.register("normal", needs=("points",), reads=(), settings=LossConfig)
def normal_loss(inputs: LossInputs) -> Tensor:
    """Angles between the normals of both point maps (not those of the network's normal head)."""
    return moge_losses.normal_loss(inputs.output["points"], inputs.target)[0]


@LOSSES.register("edge", needs=("points",), reads=(), settings=LossConfig)
def edge_loss(inputs: LossInputs) -> Tensor:
    """Directions between neighbouring points."""
    return moge_losses.edge_loss(inputs.output["points"], inputs.target)[0]


@LOSSES.register("metric_scale", needs=("points",), where=("metric_scale",), reads=(), settings=LossConfig)
def metric_scale_loss(inputs: LossInputs) -> Tensor:
    """Logarithm of the predicted metric scale against the scale of the alignment."""
    return moge_losses.metric_scale_loss(inputs.output["metric_scale"], _aligned(inputs)[1])[0] * inputs.share


@LOSSES.register("mask", where=("mask",), reads=("mask",), settings=LossConfig)
def mask_loss(inputs: LossInputs) -> Tensor:
    """Squared error of the predicted mask: surface against sky; nothing where neither is known.

    `mask_on_both_sides` gives it one mask for both, as the public release does.
    """
    nothing = torch.zeros_like(inputs.known) if inputs.negative is None else inputs.negative & ~inputs.known
    nothing = inputs.known if inputs.mask_on_both_sides else nothing
    return moge_losses.mask_l2_loss(inputs.output["mask"], inputs.known, nothing)[0]


@LOSSES.register("metric_reference", elsewhere=True, reads=(), settings=LossConfig)
def metric_reference(inputs: LossInputs) -> Tensor:
    """At pixels of known distance, on the clean image: `adaptation/known_distances.py` computes it."""
    raise NotImplementedError("metric_reference is a term of the supervision by known distances")
