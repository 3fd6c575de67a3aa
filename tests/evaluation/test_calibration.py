"""Calibration of the gate: on made-up samples whose gains are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ttt_lib.core.errors import UserError
from ttt_lib.evaluation.calibration import (
    area_under_roc,
    calibrate,
    compare_policies,
    decide,
    gain_table,
    is_safe,
    outcome,
    risk_coverage,
    signal_quality,
)


def made_up(count: int = 200, noise: float = 0.002, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    gain = rng.normal(0.0, 0.03, count)
    table = pd.DataFrame({"gain_adapted": gain, "loss_adapted": gain - 0.002})
    table["gain_blended"], table["loss_blended"] = gain / 2 + 0.001, gain / 2 - 0.001
    table["signal_good"] = 5 * gain + rng.normal(0, 5 * noise, count) + 3
    table["signal_noise"] = rng.normal(0, 1, count)
    table["signal_constant"] = 1.0
    table["signal_missing"] = np.nan
    return table


def decided(table, calibration):
    return decide(table, calibration).rename(columns={"gain_final": "gain", "loss_final": "loss"})


def test_a_good_signal_makes_a_safe_gate_that_keeps_the_gain():
    calibration = calibrate(made_up())
    assert "constant" not in calibration.signals and "missing" not in calibration.signals
    fresh = made_up(seed=1)
    found = outcome(decided(fresh, calibration))
    oracle = float(fresh.gain_adapted.clip(lower=0).mean())
    assert found["worse"] <= 0.02 and found["worst"] > -0.03
    assert found["gain"] > 0.8 * oracle
    assert calibration.about["samples"] == 200


def test_without_a_signal_the_gate_does_no_harm():
    table = made_up()[["gain_adapted", "loss_adapted", "gain_blended", "loss_blended", "signal_noise"]]
    table = table.assign(gain_adapted=table.gain_adapted - 0.03, loss_adapted=table.loss_adapted - 0.03)
    table = table.assign(gain_blended=table.gain_adapted, loss_blended=table.loss_adapted)
    found = outcome(decided(table, calibrate(table)))
    assert found["gain"] >= -1e-3 and found["worse"] <= 0.02


def test_one_more_loss_than_was_seen_is_counted():
    assert is_safe({"worse": 0.0, "worst": 0.0}, 49, 0.02) and not is_safe({"worse": 0.0, "worst": 0.0}, 48, 0.02)
    assert is_safe({"worse": 1 / 99, "worst": -0.02}, 99, 0.02) and not is_safe(
        {"worse": 2 / 99, "worst": -0.02}, 99, 0.02
    )
    assert not is_safe({"worse": 1 / 999, "worst": -0.04}, 999, 0.02)
    few = calibrate(made_up(40))  # however good the signal: forty samples cannot show it
    assert (decide(made_up(seed=1), few).decision == "reject").all()


@pytest.mark.parametrize("seed", range(4))
def test_the_promise_holds_on_new_samples(seed):
    """A weak signal: the thresholds keep what they can, and about as many new samples lose as was allowed."""
    calibration = calibrate(made_up(400, noise=0.02, seed=seed))
    found = outcome(decided(made_up(4000, noise=0.02, seed=100 + seed), calibration))
    assert found["worse"] <= 0.03 and found["gain"] > 0.002


def test_the_calmest_first_where_no_signal_tells_the_gain():
    """Changes as large as the spread and of either sign, better on average: only the size of a loss can be told."""

    def scenes(count: int, seed: int) -> pd.DataFrame:
        rng = np.random.default_rng(seed)
        spread = rng.uniform(0.0, 0.1, count)
        gain = 0.1 * spread * rng.normal(0.4, 1.0, count)
        same = {f"{kind}_{action}": gain for kind in ("gain", "loss") for action in ("adapted", "blended")}
        return pd.DataFrame({**same, "signal_ensemble_spread": spread, "signal_noise": rng.normal(0, 1, count)})

    calibration = calibrate(scenes(400, 0))
    assert calibration.about["order"] == "small ensemble_spread"
    assert calibration.estimate({"ensemble_spread": 0.01}) > calibration.estimate({"ensemble_spread": 0.02})
    after = decide(scenes(4000, 1), calibration)
    taken = after.decision != "reject"
    assert 0.5 < taken.mean() < 0.98 and after.signal_ensemble_spread[taken].max() < 0.09
    assert (after.loss_final < -0.01).mean() <= 0.02 < (
        after.loss_adapted < -0.01
    ).mean() and after.gain_final.mean() > 0


def test_a_measured_table_decided_afterwards():
    calibration = calibrate(made_up())
    table = made_up(seed=1).assign(gain_final=9.0, loss_final=9.0, decision="adapted")
    after = decide(table, calibration)
    assert set(after.decision) >= {"accept", "reject"} and set(after.decision) <= {"accept", "blend", "reject"}
    for kind in ("gain", "loss"):
        taken = {"accept": f"{kind}_adapted", "blend": f"{kind}_blended"}
        for decision, part in after.groupby("decision"):
            assert (part[f"{kind}_final"] == (part[taken[decision]] if decision in taken else 0.0)).all()
    implausible = decide(table.assign(signal_camera_implausible=1.0), calibration)
    assert (implausible.decision == "reject").all() and (table.decision == "adapted").all()


def test_policies_and_their_numbers_by_hand():
    table = pd.DataFrame({
        "gain_adapted": [0.1, -0.1], "loss_adapted": [0.05, -0.2], "gain_blended": [0.04, 0.0],
        "loss_blended": [0.02, -0.005], "gain_final": [0.1, 0.0], "loss_final": [0.05, 0.0],
    })  # fmt: skip
    found = compare_policies(table).set_index("policy")
    assert found.gain.to_dict() == pytest.approx(
        {"never": 0.0, "always": 0.0, "blend always": 0.02, "gate": 0.05, "oracle": 0.05}
    )
    assert found.worse.to_dict() == pytest.approx(
        {"never": 0.0, "always": 0.5, "blend always": 0.0, "gate": 0.0, "oracle": 0.0}
    )
    assert found.kept["gate"] == pytest.approx(1.0) and found.worst["always"] == pytest.approx(-0.2)
    assert (found.low <= found.gain).all() and (found.gain <= found.high).all()


def test_area_under_roc_by_hand():
    score = np.array([0.1, 0.4, 0.35, 0.8])
    assert area_under_roc(score, np.array([False, False, True, True])) == pytest.approx(0.75)
    assert area_under_roc(np.ones(4), np.array([False, True, False, True])) == pytest.approx(0.5)
    assert np.isnan(area_under_roc(score, np.ones(4, dtype=bool)))


def test_signal_quality_ranks_and_signs():
    table = made_up()
    table["signal_bad"] = -table.signal_good
    quality = signal_quality(table).set_index("signal")
    assert quality.spearman["good"] > 0.9 and quality.auc["good"] > 0.9
    assert quality.spearman["bad"] == pytest.approx(-quality.spearman["good"])
    assert abs(quality.spearman["noise"]) < 0.3 and "constant" not in quality.index
    curve = risk_coverage(table, "signal_good")
    assert curve.gain.iloc[0] == 0 and curve.gain.iloc[-1] == pytest.approx(table.gain_adapted.mean())
    assert curve.gain.max() > 0.9 * table.gain_adapted.clip(lower=0).mean()


def test_the_table_comes_from_the_results_of_a_run():
    rows = []
    for prediction, depth, points in (("original", 0.8, 0.6), ("final", 0.9, 0.5), ("blended", 0.85, 0.6)):
        rows += [("e", "d", "s", prediction, "depth_affine_invariant", "delta1", depth),
                 ("e", "d", "s", prediction, "points_affine_invariant", "delta1", points),
                 ("e", "d", "s", prediction, "depth_metric", "delta1", 0.0)]  # fmt: skip
    metrics = pd.DataFrame(rows, columns=["experiment", "dataset", "sample", "prediction", "metric", "score", "value"])
    samples = pd.DataFrame([{"experiment": "e", "dataset": "d", "sample": "s", "seconds": 1.0, "decision": "adapted",
                             "signal_votes_gain": 0.3}])  # fmt: skip
    row = gain_table(metrics, samples).iloc[0]
    assert row.gain_adapted == pytest.approx(0.0) and row.loss_adapted == pytest.approx(-0.1)
    assert row.gain_blended == pytest.approx(0.025) and row.loss_blended == pytest.approx(0.0)
    assert row.signal_votes_gain == 0.3
    with pytest.raises(UserError, match="no sample has both"):
        gain_table(metrics, samples.drop(columns="signal_votes_gain"))


def test_each_decision_finds_its_predictions():
    rows, told = [], []
    for sample, decision in (("a", "accept"), ("b", "blend"), ("c", "reject"), ("d", "original")):
        listed = {"original": 0.5, "adapted": 0.7, "blended": 0.6}
        final = {"accept": "adapted", "blend": "blended"}.get(decision, "original")
        scores = {k: v for k, v in listed.items() if k == "original" or k != final} | {"final": listed[final]}
        if decision == "original":
            scores = {"original": 0.5, "final": 0.5}
        rows += [("e", "d", sample, p, "depth_affine_invariant", "delta1", v) for p, v in scores.items()]
        rows += [("e", "d", sample, p, "disparity_affine_invariant", "delta1", 0.1) for p in scores]
        told.append({"experiment": "e", "dataset": "d", "sample": sample, "seconds": 1.0, "decision": decision,
                     "signal_x": np.nan if decision == "original" else 1.0})  # fmt: skip
    metrics = pd.DataFrame(rows, columns=["experiment", "dataset", "sample", "prediction", "metric", "score", "value"])
    table = gain_table(metrics, pd.DataFrame(told)).set_index("sample")
    assert list(table.index) == ["a", "b", "c"]  # the one without signals says nothing
    assert table.gain_adapted.to_dict() == pytest.approx({"a": 0.2, "b": 0.2, "c": 0.2})
    assert table.gain_blended.to_dict() == pytest.approx({"a": 0.1, "b": 0.1, "c": 0.1})
    assert table.gain_final.to_dict() == pytest.approx({"a": 0.2, "b": 0.1, "c": 0.0})
