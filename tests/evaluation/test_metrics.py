"""Scores equal MoGe's own, and the others equal numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from moge.test.metrics import compute_metrics

from ttt_lib.core.types import Prediction, Sample
from ttt_lib.evaluation.scores import (
    SCORES,
    TABLE1_COLUMNS,
    disparity_aligned_metrics,
    scores_of,
    tidy_rows,
    to_moge,
    to_truth,
    zoedepth_metrics,
)


@pytest.fixture(scope="module")
def sample(picture) -> Sample:
    """Every second pixel of the room: the time of MoGe's alignments grows with the square of their number."""
    mask, points = picture.mask[0, ::2, ::2], picture.points[0, ::2, ::2]
    segmentation = torch.zeros(mask.shape, dtype=torch.long)
    segmentation[10:30, 15:45] = 1
    return Sample(
        "room", "made", picture.image[0, :, ::2, ::2], torch.where(mask, points[..., 2], torch.nan), points, mask,
        picture.intrinsics[0], True, True, segmentation, {"thing": 1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def prediction(sample) -> Prediction:
    noise = 1 + 0.2 * torch.randn(sample.mask.shape, generator=torch.Generator().manual_seed(0))
    points = sample.points.nan_to_num(5.0) * noise[..., None] * 1.3
    return Prediction(points, points[..., 2].clone(), sample.mask, sample.intrinsics * 1.05, "metric")


def same(value, score, sample):
    """Equal but for rounding: means of some thousand float32 numbers, summed in an order that depends on threads,
    memory and processor; a share may differ by one pixel that lies on the threshold."""
    pixel = 1.5 / int(sample.mask.sum()) if score.startswith("delta") else 0.0
    return pytest.approx(value, rel=1e-5, abs=max(1e-6, pixel))


@pytest.mark.parametrize("kind", ["metric", "scale_invariant", "affine_invariant"])
def test_equal_to_calling_moge_directly(sample, prediction, kind):
    prediction = Prediction(prediction.points, prediction.depth, prediction.mask, prediction.intrinsics, kind)
    named = {
        f"points_{kind}": prediction.points,
        f"depth_{kind}": prediction.depth,
        "intrinsics": prediction.intrinsics,
    }
    expected, _ = compute_metrics(named, to_truth(sample))
    found = scores_of(prediction, sample)
    for metric, scores in expected.items():
        for score, value in scores.items():
            assert found[metric][score] == same(value, score, sample), (metric, score)
    assert {"local_points", "boundary", "fov_x"} <= found.keys()
    if kind == "metric":
        assert all(score in found[metric] for metric, score in TABLE1_COLUMNS)


def test_disparity_models_are_scored_as_such(sample, prediction):
    disparity = 3 / prediction.depth + 0.1
    model = Prediction(None, None, prediction.mask, None, "disparity", disparity=disparity)
    expected, _ = compute_metrics({"disparity_affine_invariant": disparity}, to_truth(sample))
    found = scores_of(model, sample)["disparity_affine_invariant"]
    for score, value in expected["disparity_affine_invariant"].items():
        assert found[score] == same(value, score, sample), score


def test_the_prediction_is_not_changed(sample, prediction):
    before = [t.clone() for t in (prediction.points, prediction.depth, prediction.intrinsics)]
    scores_of(prediction, sample)
    after = (prediction.points, prediction.depth, prediction.intrinsics)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_scale_and_shift_invariance(sample, prediction):
    base = scores_of(prediction, sample)
    scaled = Prediction(
        prediction.points * 2.5, prediction.depth * 2.5, prediction.mask, prediction.intrinsics, "metric"
    )
    found = scores_of(scaled, sample)
    for metric in ("depth_scale_invariant", "points_scale_invariant", "points_affine_invariant", "zoedepth"):
        for score, value in found[metric].items():
            assert value == pytest.approx(base[metric][score], rel=1e-3, abs=2e-3), metric
    assert found["depth_metric"]["rel"] != pytest.approx(base["depth_metric"]["rel"], rel=0.01)


def test_perfect_is_perfect(sample):
    points = sample.points.nan_to_num(5.0)
    found = scores_of(Prediction(points, points[..., 2], None, sample.intrinsics, "metric"), sample)
    for metric, score in TABLE1_COLUMNS:
        assert found[metric][score] == pytest.approx(1.0 if score == "delta1" else 0.0, abs=1e-4)


def test_zoedepths_columns_by_hand():
    truth, predicted = torch.tensor([1.0, 2.0, 4.0, 10.0]), torch.tensor([1.2, 2.0, 2.0, 16.0])
    found = zoedepth_metrics(predicted, truth)
    assert found["delta1"] == 0.5 and found["delta2"] == 0.5 and found["delta3"] == 0.75
    assert found["abs_rel"] == pytest.approx((0.2 + 0 + 0.5 + 0.6) / 4, rel=1e-6)
    assert found["rmse"] == pytest.approx(math.sqrt((0.04 + 0 + 4 + 36) / 4), rel=1e-6)
    logs = [math.log10(1.2), 0, math.log10(2), math.log10(1.6)]
    assert found["log10"] == pytest.approx(sum(logs) / 4, rel=1e-6)
    natural = [math.log(1.2), 0, -math.log(2), math.log(1.6)]
    mean = sum(natural) / 4
    assert found["rmse_log"] == pytest.approx(math.sqrt(sum(x * x for x in natural) / 4), rel=1e-6)
    assert found["silog"] == pytest.approx(100 * math.sqrt(sum((x - mean) ** 2 for x in natural) / 4), rel=1e-6)


def test_disparity_alignment_undoes_scale_and_shift():
    truth = torch.linspace(1, 20, 50)
    found = disparity_aligned_metrics(5 / truth - 3, truth)
    assert found["abs_rel"] == pytest.approx(0, abs=1e-4) and found["delta1"] == 1


def test_too_little_truth_gives_no_scores(sample, prediction):
    empty = Sample(
        "x", "y", sample.image, sample.depth, sample.points, torch.zeros_like(sample.mask), sample.intrinsics
    )
    assert scores_of(prediction, empty) == {}
    assert tidy_rows({}).columns.tolist() == ["metric", "score", "value"]


def test_predictions_of_another_size_are_fitted(sample, prediction):
    half = Prediction(prediction.points[::2, ::2], prediction.depth[::2, ::2], None, prediction.intrinsics, "metric")
    assert to_moge(half, tuple(sample.mask.shape))["points_metric"].shape == sample.points.shape
    assert len(tidy_rows(scores_of(half, sample))) > 12


def exact(sample) -> Prediction:
    points = sample.points.nan_to_num(5.0)
    return Prediction(points, points[..., 2].clone(), sample.mask, sample.intrinsics, "metric")


def test_depths_that_are_none_are_wrong_and_their_share_is_said(sample):
    """An exact prediction with some pixels at -1: right is the share of the others."""
    truth = exact(sample)
    chosen = sample.mask & (torch.rand(sample.mask.shape, generator=torch.Generator().manual_seed(3)) < 0.31)
    share = float(chosen.sum() / sample.mask.sum())
    for value in (-1.0, 0.0, math.nan, math.inf):
        scores = scores_of(replace(truth, depth=torch.where(chosen, value, truth.depth)), sample)
        assert scores["prediction"] == {"invalid": pytest.approx(share)}
        for metric in (
            "depth_metric",
            "depth_scale_invariant",
            "depth_affine_invariant",
            "zoedepth",
            "zoedepth_metric",
        ):
            assert scores[metric]["delta1"] == pytest.approx(1 - share, abs=1e-6), (value, metric)
        assert scores["depth_metric"]["rel"] == pytest.approx(share, abs=1e-4)
        assert all(math.isfinite(value) for group in scores.values() for value in group.values())


def test_a_prediction_of_the_wrong_sign_or_of_nothing_scores_nothing(sample):
    truth = exact(sample)
    for depth in (-truth.depth, torch.full_like(truth.depth, math.nan), torch.zeros_like(truth.depth)):
        scores = scores_of(replace(truth, depth=depth), sample)
        assert scores["prediction"]["invalid"] == 1.0
        assert all(group["delta1"] == 0.0 for group in scores.values() if "delta1" in group)


def test_one_pixel_that_is_no_number_costs_one_pixel(sample):
    truth = exact(sample)
    depth, points = truth.depth.clone(), truth.points.clone()
    row, column = (int(x[0]) for x in torch.nonzero(sample.mask, as_tuple=True))
    depth[row, column] = math.inf
    points[row, column] = math.nan
    scores = scores_of(replace(truth, depth=depth, points=points), sample)
    assert scores["points_affine_invariant"]["delta1"] == pytest.approx(1 - 1 / int(sample.mask.sum()), abs=1e-6)
    assert "prediction" not in scores_of(truth, sample)


def test_every_score_says_which_way_is_better(sample, prediction):
    for group in scores_of(prediction, sample).values():
        assert group.keys() <= SCORES.keys()
    assert SCORES["delta1"].gain(0.5, 0.7) > 0 > SCORES["rel"].gain(0.1, 0.2)
    before, after = pd.Series([-8.0, 2.0]), pd.Series([3.0, -6.0])  # signed: nearer to zero is better
    assert SCORES["deviation"].gain(before, after).tolist() == [5.0, -4.0]
