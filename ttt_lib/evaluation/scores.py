"""Scores of a prediction against a sample's truth: MoGe's evaluation, ZoeDepth's set, Depth Anything's alignment.

The twelve columns of the published Table 1 and what else `moge.test.metrics.compute_metrics` gives come from that very
function, with its two slow alignments replaced by ones that find the same optimum (`geometry/exact_alignment.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import utils3d
from moge.test.metrics import compute_metrics
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.types import Prediction, Sample
from ttt_lib.geometry.exact_alignment import align_affine_lstsq, fast_alignment

# (metric, score) of the published table's columns, in its order.
TABLE1_COLUMNS = [
    (f"{quantity}_{alignment}", score)
    for quantity in ("depth", "points")
    for alignment in ("metric", "scale_invariant", "affine_invariant")
    for score in ("rel", "delta1")
]
MINIMUM_TRUTH = 16  # known pixels; fewer cannot determine the alignments

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Score:
    """What a score means. unit: empty for shares and ratios. signed: zero is best, and either side is worse."""

    higher_is_better: bool
    unit: str = ""
    signed: bool = False

    def gain(self, before: Any, after: Any) -> Any:
        """By how much `after` is better, of numbers or columns of them; negative where it is worse.

        Example:
            >>> round(SCORES["rel"].gain(0.3, 0.1), 3), SCORES["deviation"].gain(-5.0, 2.0)
            (0.2, 3.0)
        """
        if self.signed:
            return abs(before) - abs(after)
        return after - before if self.higher_is_better else before - after


# Every score of `scores_of`, whatever its metric.
SHARES = ("delta1", "delta2", "delta3", "radius1_f1", "radius2_f1", "radius3_f1")
ERRORS = ("rel", "abs_rel", "log10", "rmse_log", "silog", "invalid")
SCORES = {
    **dict.fromkeys(SHARES, Score(True)),
    **dict.fromkeys(ERRORS, Score(False)),
    "rmse": Score(False, "m, or the truth's unit"),
    "mae": Score(False, "degrees"),
    "deviation": Score(False, "degrees", signed=True),
}


# MoGe's boundary score calls it by the name that it had before utils3d was packaged.
utils3d.pt.sliding_window_2d = utils3d.pt.sliding_window


def to_moge(prediction: Prediction, size: tuple[int, int]) -> dict[str, Tensor]:
    """The prediction under the names that MoGe's evaluation expects for its kind, on the CPU, at `size` (H, W).

    As MoGe's own baselines: a metric model's outputs are `points_metric` and `depth_metric`, from which the function
    derives the other alignments; a scale-invariant one's are `*_scale_invariant`; and so on.
    """

    def fit(map_: Tensor, channels_last: bool) -> Tensor:
        """A map (H,W) or (H,W,3) at `size`, on the CPU."""
        map_ = map_.detach().float().cpu()
        if map_.shape[:2] == size:
            return map_.clone()
        maps = map_.permute(2, 0, 1) if channels_last else map_[None]
        maps = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
        return maps.permute(1, 2, 0) if channels_last else maps[0]

    named = {}
    if prediction.kind == "disparity":
        named["disparity_affine_invariant"] = fit(prediction.disparity, False)
    else:
        if prediction.points is not None:
            named[f"points_{prediction.kind}"] = fit(prediction.points, True)
        named[f"depth_{prediction.kind}"] = fit(prediction.depth, False)
    if prediction.intrinsics is not None:
        named["intrinsics"] = prediction.intrinsics.detach().float().cpu()
    return named


def to_truth(sample: Sample) -> dict:
    """The sample's truth as MoGe's evaluation expects it; unknown pixels hold 1 and are masked."""
    mask = sample.mask.cpu()
    truth = {
        "depth": torch.where(mask, sample.depth.cpu(), 1.0),
        "points": torch.where(mask[..., None], sample.points.cpu(), 1.0),
        "depth_mask": mask,
        "is_metric": sample.is_metric,
        "has_sharp_boundary": sample.has_sharp_boundary,
    }
    if sample.intrinsics is not None:
        truth["intrinsics"] = sample.intrinsics.cpu()
    if sample.segmentation is not None and sample.segmentation_labels:
        truth["segmentation_mask"] = sample.segmentation.cpu()
        truth["segmentation_labels"] = sample.segmentation_labels
    return truth


def scores_of(prediction: Prediction, sample: Sample) -> Scores:
    """All scores of one prediction: {"depth_metric": {"rel": ..., "delta1": ...}, ...}.

    `moge.test.metrics.compute_metrics` on the same tensors, plus `zoedepth` (after one scale by the median) and, for
    metric predictions of metric truth, `zoedepth_metric` (as predicted), and `disparity_aligned` (scale and shift fitted
    in disparity, as Depth Anything reports). Where the truth has fewer than `MINIMUM_TRUTH` known pixels, the result is
    empty. The prediction is not modified.

    Where truth is known and the prediction is not finite, or a depth that should be above zero is not, the pixel is
    wrong: in no delta, and with a relative error of 1 (MoGe's own delta counts depths below zero as right). Their share
    is then there as `prediction/invalid`; the alignments see the other pixels.
    """
    if sample.mask is None or int(sample.mask.sum()) < MINIMUM_TRUTH:
        return {}
    named, truth = to_moge(prediction, tuple(sample.mask.shape)), to_truth(sample)
    whole, valid = truth["depth_mask"], _valid(named)
    zoedepth = _zoedepth_scores(named, truth["depth"], whole, valid, sample.is_metric)
    wrong = whole & ~valid
    if not bool(wrong.any()):
        return {**_aligned_scores(named, truth), **zoedepth}
    enough = int((whole & valid).sum()) >= MINIMUM_TRUTH
    share = float(wrong.sum() / whole.sum()) if enough else 1.0
    # The truth stands in, so that the alignments have numbers.
    stand_ins = {"points": truth["points"], "depth": truth["depth"], "disparity": 1 / truth["depth"]}
    for key in named.keys() - {"intrinsics"}:
        quantity = key.partition("_")[0]
        there = valid[..., None] if quantity == "points" else valid
        named[key] = torch.where(there, named[key], stand_ins[quantity])
    truth["depth_mask"] = whole & valid if enough else whole
    aligned = _aligned_scores(named, truth)
    scores = {metric: _with_wrong(group, share) for metric, group in aligned.items()}
    return {**scores, **zoedepth, "prediction": {"invalid": float(wrong.sum() / whole.sum())}}


def _valid(named: dict[str, Tensor]) -> Tensor:
    """Pixels (H,W) where every map that was predicted holds numbers, and depths above zero where they have no shift."""
    maps = [map_ for key, map_ in named.items() if key != "intrinsics"]
    finite = [torch.isfinite(map_) if map_.ndim == 2 else torch.isfinite(map_).all(-1) for map_ in maps]
    above_zero = [named[key] > 0 for key in ("depth_metric", "depth_scale_invariant") if key in named]
    return torch.stack(finite + above_zero).all(0)


def _with_wrong(group: dict[str, float], share: float) -> dict[str, float]:
    """Scores of a metric when `share` of the pixels is wrong beside those it was computed on."""

    def of_all(score: str, value: float) -> float:
        if SCORES[score].higher_is_better:
            return value * (1 - share)
        return value * (1 - share) + share if score in ("rel", "abs_rel") else value

    return {score: of_all(score, value) for score, value in group.items()}


def _depth(named: dict[str, Tensor]) -> Tensor | None:
    """The predicted depth, whatever its kind; None of a disparity."""
    return next((map_ for key, map_ in named.items() if key.startswith("depth_")), None)


def _aligned_scores(named: dict[str, Tensor], truth: dict) -> Scores:
    """MoGe's scores, and those in disparity, over the pixels of the truth's mask."""
    with torch.no_grad(), fast_alignment():
        scores, _ = compute_metrics(named, truth)
    mask, depth = truth["depth_mask"], _depth(named)
    disparity = named["disparity_affine_invariant"] if depth is None else 1 / depth.clamp_min(1e-6)
    return {**scores, "disparity_aligned": disparity_aligned_metrics(disparity[mask], truth["depth"][mask])}


def _zoedepth_scores(
    named: dict[str, Tensor], truth: Tensor, mask: Tensor, valid: Tensor, metric_truth: bool
) -> Scores:
    """ZoeDepth's columns over all known pixels; one without a valid depth counts as its smallest."""
    depth = _depth(named)
    if depth is None:
        return {}
    known, there = truth[mask], valid[mask]
    predicted = torch.where(there, depth[mask], 0.0)
    middle = predicted[there].median() if bool(there.any()) else known.median()
    scores = {"zoedepth": zoedepth_metrics(predicted * (known.median() / middle), known)}
    if "depth_metric" in named and metric_truth:
        scores["zoedepth_metric"] = zoedepth_metrics(predicted, known)
    return scores


def zoedepth_metrics(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """ZoeDepth's table columns (Bhat et al. 2023) for known pixels (N,), in the same units, no alignment here.

    delta1-3: share with max(p/t, t/p) < 1.25^k; abs_rel: mean |p - t| / t; rmse: root of the mean square; log10: mean
    |log10 p - log10 t|; rmse_log and silog as in Eigen et al. 2014. Predictions at or below zero count as 1e-3.
    """
    predicted, truth = predicted.double().clamp_min(1e-3), truth.double()
    ratio = torch.maximum(predicted / truth, truth / predicted)
    logs = predicted.log() - truth.log()
    return {
        **{f"delta{k}": float((ratio < 1.25**k).double().mean()) for k in (1, 2, 3)},
        "abs_rel": float(((predicted - truth).abs() / truth).mean()),
        "rmse": float((predicted - truth).square().mean().sqrt()),
        "log10": float(logs.abs().mean() / math.log(10)),
        "rmse_log": float(logs.square().mean().sqrt()),
        "silog": float(100 * (logs.square().mean() - logs.mean().square()).clamp_min(0).sqrt()),
    }


def disparity_aligned_metrics(disparity: Tensor, truth: Tensor) -> dict[str, float]:
    """AbsRel and delta1 as Depth Anything reports them: scale and shift fitted in disparity by least squares.

    disparity (N,) predicted, truth (N,) depth of the same known pixels. Fitted disparities below that of the farthest
    truth are raised to it, as MoGe's evaluation does too.
    """
    scale, shift = align_affine_lstsq(disparity, 1 / truth)
    depth = 1 / (disparity * scale + shift).clamp_min(float(1 / truth.max()))
    scores = zoedepth_metrics(depth, truth)
    return {"abs_rel": scores["abs_rel"], "delta1": scores["delta1"]}


def scores_of_result(result: AdaptResult, sample: Sample) -> dict[str, Scores]:
    """Scores of what a result holds of `original`, `final`, `adapted` and `blended`; of the same prediction the same object."""
    held = {kind: getattr(result, kind) for kind in ("original", "final", "adapted", "blended")}
    different = {id(each): each for each in held.values() if each is not None}
    scores = {key: scores_of(each, sample) for key, each in different.items()}
    return {kind: scores[id(each)] for kind, each in held.items() if each is not None}


def tidy_rows(scores: Scores) -> pd.DataFrame:
    """One row a score: columns metric, score, value."""
    rows = [(metric, score, value) for metric, group in scores.items() for score, value in group.items()]
    return pd.DataFrame(rows, columns=["metric", "score", "value"])
