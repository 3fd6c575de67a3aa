"""Signs, without truth, that an adapted prediction is better than the original: what the gate decides by.

Everything here is computed from the image and the two sets of weights alone. *Held-back* views, drawn from another seed
than the training's, show how well the predictions of either network agree with each other across views; the cross terms
between the networks keep a collapsed (constant) prediction, which agrees with itself perfectly, from winning.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.ensemble import log_difference, predict_member, predict_mirrored, predict_on_views
from ttt_lib.adaptation.gate.reprojection import reprojection_errors
from ttt_lib.adaptation.student import Student
from ttt_lib.core.config import ExperimentConfig, merge
from ttt_lib.core.errors import NotSupported
from ttt_lib.core.schema import GateConfig, ViewConfig
from ttt_lib.core.types import Prediction
from ttt_lib.geometry.cameras import fov_from_intrinsics
from ttt_lib.models.base import GeometryModel
from ttt_lib.views.carry import View
from ttt_lib.views.draw import make_views

PAIRS = 4000  # pixel pairs that are voted on
EQUAL = 0.02  # relative depth within which two pixels count as equally far
FIELDS_OF_VIEW = (15.0, 130.0)  # degrees, horizontal: outside no camera of the data sets lies
ENSEMBLE = ("coarser", "coarser_mirror", "finer", "finer_mirror")  # of the original weights, beside the mirror
LARGEST_ERROR = 1.0  # of log depth; what is farther off counts so much


@dataclass
class HeldBack:
    """Held-back views, and what the original weights say of them: depth carried back (B,H,W) and where it is known.

    members: depth maps (H,W) of the picture itself by `original_members`, where a signal needs them.
    """

    image: Tensor
    view: View
    original: Prediction
    depth: Tensor
    seen: Tensor
    members: list[Tensor]


def held_back_views(
    model: GeometryModel, image: Tensor, original: Prediction, config: ExperimentConfig, generator: torch.Generator,
    members: list[Tensor],
) -> HeldBack:  # fmt: skip
    """Draw the views from `generator` and predict on them with the model's present (original) weights.

    image (3,H,W); original: the prediction on this very image; members: of `original_members`.
    Mirrors, recentred crops and colours of `gate.severity`; cameras stay in place, so that no rendering enters.
    """
    views = ViewConfig(**merge(config.views.model_dump(), {
        "mirror": 0.5, "cutmix": 0.0, "novel_view": {"probability": 0.0}, "shift": {"names": []},
        "crop": {"kind": "recentred", "probability": 1.0, "scale": (0.7, 1.0)},
        "photometric": {"probability": 1.0, "severity": config.gate.severity},
    }))  # fmt: skip
    view = make_views(image, original.points, original.mask, original.intrinsics, views, config.gate.views, generator)
    points, seen = predict_on_views(model, view, original)
    return HeldBack(image, view, original, points[..., 2], seen, members)


def original_members(model: GeometryModel, image: Tensor, config: GateConfig) -> list[Tensor]:
    """The mirrored prediction of the model's present (original) weights, and for the ensemble those of other
    resolutions: depth maps (H,W) of `image`; none where no signal needs them."""
    mirror = ("mirror",) if {"votes", "ensemble"} & set(config.signals) else ()
    others = ENSEMBLE if "ensemble" in config.signals else ()
    return [predict_member(model, image, member).depth for member in mirror + others]


def signals_before(original: Prediction, members: list[Tensor], config: GateConfig) -> dict[str, float]:
    """Those of the signals that say nothing of the adapted prediction, by `original_members`."""
    if "ensemble" not in config.signals:
        return {}
    found = ensemble_distances(original.depth, original.depth, members, original.mask)
    return {f"ensemble_{key}": found[key] for key in ("spread", "outlying")}


def log_error(depth: Tensor, reference: Tensor, known: Tensor) -> Tensor:
    """Mean |log d - log r - median| over the known pixels of each map, (B,H,W) x 3 -> (B,); NaN where none is known."""
    difference, offset = log_difference(depth, reference, known)
    error = (difference - offset[:, None, None]).abs().clamp_max(LARGEST_ERROR)
    return torch.where(known & torch.isfinite(difference), error, torch.nan).flatten(1).nanmean(1)


def consistency(held: HeldBack, depth: Tensor, seen: Tensor, clean: Prediction) -> dict[str, float]:
    """Errors between the predictions on the views and the clean ones, of original (o) and adapted (a) weights.

    depth, seen (B,H,W): the adapted network's on the views, carried back; clean: its prediction on the image.
    `xy` compares x's views with y's clean prediction. `score`: mean of aa, ao and oa.
    """
    known = held.original.mask

    def error(depth: Tensor, seen: Tensor, clean: Prediction) -> float:
        value = log_error(depth, clean.depth.expand_as(depth), seen & known)
        return float(value[~value.isnan()].mean()) if bool((~value.isnan()).any()) else math.nan

    values = {
        "oo": error(held.depth, held.seen, held.original), "aa": error(depth, seen, clean),
        "ao": error(depth, seen, held.original), "oa": error(held.depth, held.seen, clean),
    }  # fmt: skip
    values["score"] = (values["aa"] + values["ao"] + values["oa"]) / 3
    return values


def vote(experts: list[Tensor], mask: Tensor, generator: torch.Generator) -> list[float]:
    """Share of pixel pairs on which each expert agrees with the majority of the others.

    experts: depth maps (H,W) of one picture; mask (H,W): pixels that may be drawn. A pair is ordered nearer, equal
    (within `EQUAL`) or farther; an expert without a majority among the others has no say on that pair. After the
    annotation scheme of Depth Anything V2, where experts vote on relative depth.
    """
    places = torch.nonzero(mask.flatten())[:, 0].cpu()
    if len(places) < 2:
        return [math.nan] * len(experts)
    first, second = places[torch.randint(len(places), (2, PAIRS), generator=generator)]
    logs = torch.stack([e.flatten().cpu().clamp_min(1e-6).log() for e in experts])
    difference = logs[:, first] - logs[:, second]
    order = torch.where(difference.abs() < EQUAL, 0, difference.sign()).long()  # (E, P) of -1, 0, 1
    counts = torch.stack([(order == value).sum(0) for value in (-1, 0, 1)])  # (3, P)
    shares = []
    for own in order:
        others = counts.clone()
        others.scatter_add_(0, (own + 1)[None], torch.full_like(own, -1)[None])
        most, value = others.max(0)
        decided = (others == most).sum(0) == 1
        shares.append(float((value[decided] == own[decided] + 1).float().mean()) if bool(decided.any()) else math.nan)
    return shares


def disagreement_map(experts: list[Tensor], mask: Tensor) -> Tensor:
    """Standard deviation over the experts of log depth, each after its median offset to the first: (H,W)."""
    aligned = [e.clamp_min(1e-6).log() - log_difference(e, experts[0], mask)[1] for e in experts]
    return torch.stack(aligned).std(0, unbiased=False)


def ensemble_distances(original: Tensor, adapted: Tensor, members: list[Tensor], mask: Tensor) -> dict[str, float]:
    """How far predictions of one picture lie apart: mean |log ratio| over the mask, each after its median ratio.

    original, adapted, members: depth maps (H,W). `spread`: mean over all pairs of original and members; `outlying`: log
    of the original's distance from the members over the members' among themselves (it is the odd one out above 0);
    `gain`: log of the original's distance from the members over the adapted one's.
    """
    maps = torch.stack([original, adapted, *members])
    distance = torch.stack([log_error(maps, one.expand_as(maps), mask.expand_as(maps)) for one in maps])
    first, others = distance[0, 2:].mean(), distance[2:, 2:]
    count = len(members)
    among = others.sum() / max(count * (count - 1), 1)
    pairs = (first * count + among * count * (count - 1) / 2) / max(count * (count + 1) / 2, 1)
    return {
        "spread": float(pairs),
        "outlying": _log_ratio(first, among),
        "gain": _log_ratio(first, distance[1, 2:].mean()),
    }


def edge_agreement(depth: Tensor, image: Tensor, mask: Tensor) -> float:
    """Correlation of the magnitudes of the gradients of log depth and of the gray image; depth (H,W), image (3,H,W)."""

    def magnitude(map_: Tensor) -> Tensor:
        across, down = map_[1:, 1:] - map_[1:, :-1], map_[1:, 1:] - map_[:-1, 1:]
        return F.avg_pool2d((across.square() + down.square()).sqrt()[None, None], 5, 1, 2)[0, 0].sqrt()

    both = torch.stack([magnitude(depth.clamp_min(1e-6).log()), magnitude(image.mean(0))])[:, mask[1:, 1:]]
    if both.shape[1] < 2 or float(both.std(1).min()) < 1e-9:
        return math.nan
    return float(torch.corrcoef(both)[0, 1])


def measure(
    student: Student, values: list[Tensor], held: HeldBack, adapted: Prediction, history: list[dict[str, float]],
    config: GateConfig, generator: torch.Generator,
) -> tuple[dict[str, float], list[Tensor]]:  # fmt: skip
    """All chosen signals of one adapted image, and the depth maps (H,W) of the experts.

    values: the adapted weights; adapted: the prediction with them on `held.image`. Names ending in `_gain` are positive
    where the adapted prediction looks better.
    """
    model, original, first = student.model, held.original, student.original
    signals: dict[str, float] = {}
    experts = [original.depth, adapted.depth]
    if "consistency" in config.signals:
        with student.weights(values):
            points, seen = predict_on_views(model, held.view, original)
        found = consistency(held, points[..., 2], seen, adapted)
        signals |= {f"consistency_{key}": value for key, value in found.items()}
        signals["consistency_self_gain"] = _log_ratio(found["oo"], found["aa"])
        signals["consistency_cross_gain"] = _log_ratio(found["oo"], (found["ao"] + found["oa"]) / 2)
    if "votes" in config.signals:
        experts.append(held.members[0])
        with student.weights(values):
            experts.append(predict_mirrored(model, held.image).depth)
        shares = vote(experts, original.mask, generator)
        signals |= {"votes_original": shares[0], "votes_adapted": shares[1], "votes_gain": shares[1] - shares[0]}
        signals["votes_disagreement"] = float(disagreement_map(experts, original.mask)[original.mask].mean())
    if "ensemble" in config.signals:
        found = ensemble_distances(original.depth, adapted.depth, held.members, original.mask)
        signals |= {f"ensemble_{key}": value for key, value in found.items()}
    if "reprojection" in config.signals:
        contexts = [lambda: student.weights(first), lambda: student.weights(values)]
        before, after = reprojection_errors(model, held.image, original, contexts, config.severity, generator)
        signals |= {"reprojection_original": before, "reprojection_adapted": after}
        signals["reprojection_gain"] = _log_ratio(before, after)
    if "edges" in config.signals:
        before, after = (edge_agreement(p.depth, held.image, original.mask) for p in (original, adapted))
        signals |= {"edges_original": before, "edges_adapted": after, "edges_gain": after - before}
    if "drift" in config.signals:
        signals |= _drift(student, values, held, adapted)
    if "loss" in config.signals:
        losses = [entry["loss"] for entry in history if "loss" in entry]
        third = max(1, len(losses) // 3)
        signals["loss_drop"] = _log_ratio(np.mean(losses[:third]), np.mean(losses[-third:])) if losses else math.nan
        signals["loss_rise"] = _log_ratio(losses[-1], min(losses)) if losses else math.nan
    if "camera" in config.signals:
        signals |= _camera(original, adapted)
    return signals, experts


def _drift(student: Student, values: list[Tensor], held: HeldBack, adapted: Prediction) -> dict[str, float]:
    """How far weights, prediction and, where the model gives any, features went."""
    model, original, first = student.model, held.original, student.original
    moved = sum(float((a - b).square().sum()) for a, b in zip(values, first))
    change = log_error(adapted.depth[None], original.depth[None], original.mask[None])
    signals = {
        "drift_weights": math.sqrt(moved / max(sum(float(b.square().sum()) for b in first), 1e-30)),
        "drift_prediction": float(change[0]),
    }
    with torch.no_grad(), suppress(NotSupported):
        with student.weights(first):
            before = model.features(held.image[None])
        with student.weights(values):
            after = model.features(held.image[None])
        signals["drift_features"] = float(1 - F.cosine_similarity(before, after, dim=-1).mean())
    return signals


def _camera(original: Prediction, adapted: Prediction) -> dict[str, float]:
    """How much the predicted camera and the scale changed, and whether the new camera can be one."""
    before, after = (float(fov_from_intrinsics(p.intrinsics.double())[0]) for p in (original, adapted))
    ratio = (adapted.depth / original.depth)[original.mask]
    return {
        "camera_fov_change": abs(after - before),
        "camera_implausible": float(not FIELDS_OF_VIEW[0] < after < FIELDS_OF_VIEW[1]),
        "camera_scale_change": abs(_log_ratio(float(ratio.median()), 1.0)) if len(ratio) else math.nan,
    }


def _log_ratio(a: float | Tensor, b: float | Tensor) -> float:
    a, b = float(a), float(b)  # NumPy would not look at a tensor of a GPU
    return math.log(max(a, 1e-9) / max(b, 1e-9)) if math.isfinite(a) and math.isfinite(b) else math.nan
