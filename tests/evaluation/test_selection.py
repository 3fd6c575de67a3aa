"""What selection alone gives is no gain: pure noise, a real effect, and what lacks a second look."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ttt_lib.core.errors import UserError
from ttt_lib.evaluation.selection import SEEN_AGAIN, beyond_selection, certain_losses, selection_gains, worse_elsewhere
from ttt_lib.runs.protocol import choose_groups

METRIC = {"metric": "depth_metric", "score": "delta1"}


def study(effect: float, count: int = 3000, each: int = 200, experiments=("original", "control_random_weights", "row")):
    """Scores that are a scene's difficulty and noise of every experiment and look; `row` is better by `effect`."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0.5, 0.1, count)
    parts = []
    for experiment in experiments:
        for dataset in ("set", "set.again"):
            value = difficulty + rng.normal(0, 0.1, count) + (effect if experiment == "row" else 0.0)
            names = {"experiment": experiment, "dataset": dataset, "prediction": "final", **METRIC}
            parts.append(pd.DataFrame({**names, "sample": [f"{i:04d}" for i in range(count)], "value": value}))
    metrics = pd.concat(parts, ignore_index=True)
    scored = metrics[(metrics.experiment == "original") & (metrics.dataset == "set")]
    return metrics, choose_groups(scored, "depth_metric/delta1", each)


def test_regression_to_the_mean_is_no_gain():
    """Half of the variance is noise, so the hard samples return half of their way to the mean, with any row."""
    metrics, chosen = study(effect=0.0)
    gains = selection_gains(metrics, chosen, **METRIC, samples=400)
    table = beyond_selection(gains).set_index(["group", "experiment"])
    distance = 0.5 - chosen[chosen.group == "hard"]["value"].mean()
    for experiment in ("row", SEEN_AGAIN):  # what a table of means shows is the choice
        assert table.loc[("hard", experiment), "first_mean"] == pytest.approx(distance / 2, abs=0.03)
        assert table.loc[("easy", experiment), "first_mean"] < -0.05
        assert abs(table.loc[("random", experiment), "first_mean"]) < 0.03
    for group in ("hard", "random", "easy"):
        row = table.loc[(group, "row")]
        assert row["over_low"] < 0 and row["again_low"] < 0 and abs(row["again_mean"]) < 0.03
    assert table.loc[("hard", "row"), "over_control"] == "control_random_weights"  # original is where the choice was
    assert not table["gain"].any()


def test_a_real_gain_is_shown_and_has_its_size():
    """In easy samples too, on the second look; on the first the choice works against any row, so there it is not shown."""
    metrics, chosen = study(effect=0.1)
    table = beyond_selection(selection_gains(metrics, chosen, **METRIC, samples=400)).set_index("experiment")
    row = table.loc["row"].set_index("group")
    assert row["gain"].to_dict() == {"hard": True, "random": True, "easy": False}
    assert (row["again_low"] > 0).all() and np.allclose(row["again_mean"], 0.1, atol=0.035)
    assert not table.loc[SEEN_AGAIN, "gain"].any() and not table.loc["control_random_weights", "gain"].any()


@pytest.mark.parametrize(("cost", "worse"), [(0.0, {}), (0.1, {("hard", "row"), ("random", "row"), ("easy", "row")})])
def test_a_gain_that_costs_another_score_is_named(cost, worse):
    """By chance an interval without a cost lies below zero once in forty; here none does."""
    metrics, chosen = study(effect=0.1)
    other = metrics.assign(metric="depth_affine_invariant")
    other.loc[other["experiment"] == "row", "value"] -= 0.1 + cost
    found = worse_elsewhere(certain_losses(pd.concat([metrics, other]), chosen, samples=400), **METRIC)
    assert set(found) == set(worse) and all("depth_affine_invariant/delta1 -0." in words for words in found.values())
    own = certain_losses(other, chosen, samples=50)
    assert worse_elsewhere(own, metric="depth_affine_invariant", score="delta1") == {}


def test_without_a_second_look_or_a_second_sample_there_is_no_gain():
    metrics, chosen = study(effect=0.1)
    first = metrics[metrics.dataset == "set"]
    table = beyond_selection(selection_gains(first, chosen, **METRIC, samples=50))
    assert not table["gain"].any() and table["again_mean"].isna().all()
    one = chosen.groupby("group").head(1)
    table = beyond_selection(selection_gains(metrics, one, **METRIC, samples=50))
    assert not table["gain"].any() and table["first_low"].isna().all() and (table["count"] == 1).all()
    assert len(beyond_selection(selection_gains(metrics, chosen.head(0), **METRIC))) == 0


def test_the_choice_does_not_depend_on_the_order_and_breaks_ties_by_name():
    values = {"d": 0.2, "b": 0.2, "a": 0.9, "c": 0.2, "e": 0.9, "f": np.nan}
    scores = pd.DataFrame([{"dataset": "s", "sample": k, **METRIC, "value": v} for k, v in values.items()])
    chosen = choose_groups(scores, "depth_metric/delta1", 2, seed=3)
    groups = {group: part["sample"].tolist() for group, part in chosen.groupby("group")}
    assert groups["hard"] == ["b", "c"] and groups["easy"] == ["a", "e"] and len(set(groups["random"])) == 2
    pd.testing.assert_frame_equal(chosen, choose_groups(scores[::-1], "depth_metric/delta1", 2, seed=3))
    others = [
        choose_groups(scores, "depth_metric/delta1", 2, seed=seed).query("group == 'random'") for seed in range(9)
    ]
    assert len({tuple(sorted(other["sample"])) for other in others}) > 2


@pytest.mark.parametrize(
    "metric, count, below, words",
    [
        ("depth_metric/delta1", 3, None, "--hardest 3: 5 samples have a score, .* are 6"),
        ("depth_metric/delta1", 2, 0.15, "--below 0.15: 1 of 5 samples score lower .*, not 2"),
        ("depth_metric/rel", 2, None, "--metric .*there are depth_metric/delta1"),
    ],
)
def test_too_few_samples_are_a_sentence(metric, count, below, words):
    scores = pd.DataFrame([{"dataset": "s", "sample": str(i), **METRIC, "value": i / 10 + 0.1} for i in range(5)])
    with pytest.raises(UserError, match=words):
        choose_groups(scores, metric, count, below)


def test_an_error_is_no_score_to_choose_hard_samples_by():
    scores = pd.DataFrame([{"dataset": "s", "sample": "a", "metric": "depth_metric", "score": "rel", "value": 0.1}])
    with pytest.raises(UserError, match="lower for better predictions"):
        choose_groups(scores, "depth_metric/rel", 1)
