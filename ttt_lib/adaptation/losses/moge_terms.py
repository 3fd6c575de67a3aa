"""MoGe's terms: affine-invariant over the image and over patches, normals, edges, mask, metric scale.

Formulas and implementations are those of `moge.train.losses` (MoGe, CVPR 2025; MoGe-2, 2025): `sum_i 1/z_i * || s p_i + t
- q_i ||` with the best scale s and shift t, over the whole image and over patches of three sizes. Defaults are those of
MoGe-1's training configuration; `presets.py` has MoGe-2's.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import torch
import utils3d
from moge.train import losses as moge_losses
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.losses.terms import LossInputs
from ttt_lib.core.registry import LOSSES
from ttt_lib.core.schema import LossConfig, NonNegative, Positive
from ttt_lib.geometry.fast_alignment import cheap_alignment

ROWS_AT_ONCE = 8  # of the local terms, on a GPU; patches of a quarter of 640 x 480 then take some 0.7 GB
MULTINOMIAL = 2**24  # choices that `torch.multinomial` can have
GRAZING = 88.0  # degrees between a normal and the line of sight


class GlobalSettings(LossConfig):
    """`align_resolution`: side of the grid that the alignment sees; `beta`, `trunc`: of the robust alignment."""

    align_resolution: int = 32
    beta: NonNegative = 0.0
    trunc: Positive = 1.0


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


class _PerRow:
    """A number for each row of a batch (B,), where MoGe's local loss is written for a batch of one."""

    def __init__(self, values: Tensor) -> None:
        self.values = self.of_patches = values

    def reshape(self, *_: int) -> _PerRow:
        return self

    def __rtruediv__(self, over: float) -> Tensor:
        return over / self.values[:, None, None]  # for maps (B,H,W)

    def __getitem__(self, row: Tensor) -> Tensor:
        self.of_patches = self.values[row]
        return self.of_patches

    def __gt__(self, bound: float) -> Tensor:
        return self.of_patches > bound  # beside a comparison of the patches


def _rows_at_once(points: Tensor) -> int:
    """On a CPU one, with draws of its own. A GPU waits for its many small kernels rather than for their arithmetic."""
    return min(ROWS_AT_ONCE, max(1, MULTINOMIAL // points[0, ..., 0].numel())) if points.device.type == "cuda" else 1


def _local(inputs: LossInputs, level: int, place: int) -> Tensor:
    """Affine-invariant over patches of the image's size divided by `level`; `place`: which of a row's seeds draws them. Rows
    that go together share out their patches at random, each with `num_patches` of them on average."""
    scale, focal, settings = _aligned(inputs)[1], focal_of(inputs.intrinsics), _own(inputs.settings)
    points, each, size = inputs.output["points"], [], _rows_at_once(inputs.output["points"])
    with torch.random.fork_rng(devices=[points.device] if points.device.type == "cuda" else []):
        for first in range(0, len(points), size):
            torch.manual_seed(inputs.seeds[first][place])
            rows = slice(first, first + size)
            with cheap_alignment(int(settings["num_patches"])) if inputs.cheap else nullcontext():
                value, _ = moge_losses.affine_invariant_local_loss(
                    points[rows],
                    inputs.target[rows],
                    _PerRow(focal[rows]),
                    _PerRow(scale[rows]),
                    level=level,
                    **settings,
                )
            each.append(value.expand(len(points[rows])))  # one number where no patch has enough points
    return torch.cat(each) * inputs.share


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
