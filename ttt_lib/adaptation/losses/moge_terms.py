"""MoGe's terms: affine-invariant over the image and over patches, normals, edges, mask, metric scale.

Formulas and implementations are those of `moge.train.losses` (MoGe, CVPR 2025; MoGe-2, 2025): `sum_i 1/z_i * || s p_i + t
- q_i ||` with the best scale s and shift t, over the whole image and over patches of three sizes. Defaults are those of
MoGe-1's training configuration; `presets.py` has MoGe-2's.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import utils3d
from moge.train import losses as moge_losses
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.losses.affine import patch_difference, whole_difference
from ttt_lib.adaptation.losses.terms import LossInputs
from ttt_lib.core.registry import LOSSES
from ttt_lib.core.schema import LossConfig, NonNegative, Positive

GRAZING = 88.0  # degrees between a normal and the line of sight


class GlobalSettings(LossConfig):
    """`align_resolution`: side of the grid that the alignment sees; `beta`, `trunc`: of the robust alignment."""

    align_resolution: int = 32
    beta: NonNegative = 0.0
    trunc: Positive = 1.0


def focal_of(intrinsics: Tensor) -> Tensor:
    """Focal length relative to the image's diagonal, (..., 3, 3) -> (...), as MoGe's local loss wants it."""
    return 1 / (1 / intrinsics[..., 0, 0].square() + 1 / intrinsics[..., 1, 1].square()).sqrt()


def _own(settings: LossConfig) -> dict[str, float | int]:
    return settings.model_dump(exclude={"weight"})


def _aligned(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Value of the global term and the scale of its alignment, (B,) each; computed once a batch."""
    if "global" not in inputs.shared:
        points, settings = inputs.output["points"], _own(inputs.settings_of("global"))
        if inputs.cheap:
            value, scale = whole_difference(points, inputs.target, inputs.known, **settings)
        else:
            value, _, scale = moge_losses.affine_invariant_global_loss(points, inputs.target, **settings)
        inputs.shared["global"] = (value, scale)
    return inputs.shared["global"]


@LOSSES.register("global", needs=("points",), reads=(), settings=GlobalSettings)
def global_loss(inputs: LossInputs) -> Tensor:
    """Affine-invariant over the whole image."""
    return _aligned(inputs)[0]


def _local(inputs: LossInputs, level: int, place: int) -> Tensor:
    """Affine-invariant over patches of the image's size divided by `level`; `place`: which of a row's seeds draws them."""
    points, target, settings = inputs.output["points"], inputs.target, _own(inputs.settings)
    focal, scale = focal_of(inputs.intrinsics), _aligned(inputs)[1]
    seeds = [row[place] for row in inputs.seeds]
    if inputs.cheap:
        return patch_difference(points, target, inputs.known, focal, scale, seeds, level, **settings) * inputs.share
    each = []
    with torch.random.fork_rng(devices=[points.device] if points.device.type == "cuda" else []):
        for i, seed in enumerate(seeds):
            torch.manual_seed(seed)
            row = slice(i, i + 1)
            value, _ = moge_losses.affine_invariant_local_loss(
                points[row], target[row], focal[row], scale[row], level=level, **settings
            )
            each.append(value.reshape(()))  # one number where no patch has enough points
    return torch.stack(each) * inputs.share


class Local4(GlobalSettings):
    """`num_patches`: patches of a quarter of the image drawn a picture; `align_resolution`: of each."""

    align_resolution: int = 16
    num_patches: int = 16


class Local16(Local4):
    """Of a sixteenth."""

    align_resolution: int = 8
    num_patches: int = 256


class Local64(Local4):
    """Of a sixty-fourth."""

    align_resolution: int = 4
    num_patches: int = 4096


for _place, (_level, _settings) in enumerate({4: Local4, 16: Local16, 64: Local64}.items()):
    _term = partial(_local, level=_level, place=_place)
    LOSSES.register(f"local_{_level}", needs=("points",), reads=(), settings=_settings)(_term)


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


def _surface_and_sky(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Where the target knows a surface, and where it knows that there is none, (B,H,W) bool each."""
    return inputs.known, inputs.known if inputs.mask_on_both_sides else inputs.negative & ~inputs.known


@LOSSES.register("mask", where=("mask",), reads=("mask",), settings=LossConfig)
def mask_loss(inputs: LossInputs) -> Tensor:
    """Squared error of the predicted mask: surface against sky; nothing where neither is known.

    `mask_on_both_sides` gives it one mask for both, as the public release does.
    """
    return moge_losses.mask_l2_loss(inputs.output["mask"], *_surface_and_sky(inputs))[0]


@LOSSES.register("mask_bce", where=("mask",), reads=("mask",), settings=LossConfig)
def mask_bce_loss(inputs: LossInputs) -> Tensor:
    """Binary cross entropy of the predicted mask, as MoGe-2 trains it; nothing where neither is known."""
    probability, (positive, negative) = inputs.output["mask"], _surface_and_sky(inputs)
    return moge_losses.mask_bce_loss(probability.clamp(0, 1), positive, negative)[0]


@LOSSES.register("normal_map", where=("normal",), reads=("normal",), settings=LossConfig)
def normal_map_loss(inputs: LossInputs) -> Tensor:
    """Squared angle between the normal head's map and the target's normals, MoGe-2's own term for that head.

    The target's normals are those of its points, as `moge.train.dataloader` makes them from depth: none where the surface
    is seen at more than `GRAZING` degrees.
    """
    target = torch.where(inputs.known[..., None], inputs.target, 0.0)
    normals, known = utils3d.pt.point_map_to_normal_map(target, inputs.known)
    cosine = F.cosine_similarity(normals, target, dim=-1).abs()
    known = known & (cosine > math.cos(math.radians(GRAZING)))
    return moge_losses.normal_map_loss(inputs.output["normal"], torch.where(known[..., None], normals, torch.nan))[0]


@LOSSES.register("metric_reference", elsewhere=True, reads=(), settings=LossConfig)
def metric_reference(inputs: LossInputs) -> Tensor:
    """At pixels of known distance, on the clean image: `adaptation/known_distances.py` computes it."""
    raise NotImplementedError("metric_reference is a term of the supervision by known distances")
