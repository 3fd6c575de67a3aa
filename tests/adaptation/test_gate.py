"""The gate: signals that no collapse can win, decisions that do what they say, stopping that keeps the best."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import adapt, small_experiment

from ttt_lib.adaptation.gate.decision import Calibration, blend_predictions, read_calibration
from ttt_lib.adaptation.gate.signals import (  # fmt: skip
    consistency,
    disagreement_map,
    edge_agreement,
    ensemble_distances,
    held_back_views,
    log_error,
    original_members,
    vote,
)
from ttt_lib.core.errors import UserError
from ttt_lib.core.seeds import sample_generator
from ttt_lib.models.base import weights_checksum

config = small_experiment(
    train={"passes": 2, "accumulation": 1, "optimizer": {"learning_rate": 1e-4}}, gate={"mode": "measure", "views": 2}
)


@pytest.fixture
def held(tiny, image):
    members = original_members(tiny, image, config().gate)
    return held_back_views(tiny, image, tiny.predict(image), config(), sample_generator(0, "held"), members)


def always(value: float) -> Calibration:
    return Calibration(["votes_gain"], [0.0], [1.0], [0.0], value, accept=0.5, blend=-0.5)


def test_log_error_does_not_see_scale_and_skips_the_unknown():
    depth = torch.rand(2, 8, 8) + 1
    known = torch.ones(2, 8, 8, dtype=torch.bool)
    assert torch.allclose(log_error(3 * depth, depth, known), torch.zeros(2), atol=1e-6)
    spoilt = depth.clone()
    spoilt[0, :4] = torch.nan
    assert torch.allclose(log_error(spoilt, depth, known), torch.zeros(2), atol=1e-6)
    assert log_error(depth, depth, ~known).isnan().all()
    double = depth.clone()
    double[0, 0] *= math.e  # an eighth of the pixels is one logarithm off
    assert float(log_error(double, depth, known)[0]) == pytest.approx(1 / 8, abs=1e-5)


def test_a_collapsed_prediction_does_not_win(held):
    flat = torch.ones_like(held.depth)
    clean = replace(held.original, depth=torch.ones_like(held.original.depth))
    values = consistency(held, flat, held.seen, clean)
    assert values["aa"] < 1e-6 < values["oo"]  # it agrees with itself
    assert values["ao"] > 2 * values["oo"] and values["oa"] > 2 * values["oo"]
    assert values["score"] > values["oo"]
    same = consistency(held, held.depth, held.seen, held.original)
    assert same["aa"] == same["ao"] == same["oa"] == same["oo"] == pytest.approx(same["score"])


def test_votes_find_the_odd_one_out():
    ramp = torch.linspace(1, 5, 48).reshape(1, 48).expand(36, 48)
    mask = torch.ones(36, 48, dtype=torch.bool)
    shares = vote([ramp, 2 * ramp, ramp**2, ramp.flip(-1)], mask, torch.Generator().manual_seed(0))
    assert shares[0] == pytest.approx(1.0, abs=0.02) and shares[1] == pytest.approx(1.0, abs=0.02)
    assert shares[3] < 0.1
    spread = disagreement_map([ramp, 2 * ramp, 3 * ramp], mask)
    assert float(spread.max()) < 1e-5
    assert float(disagreement_map([ramp, ramp.flip(-1)], mask)[:, 0].mean()) == pytest.approx(math.log(5) / 2, rel=0.1)
    assert all(math.isnan(share) for share in vote([ramp, ramp], ~mask, torch.Generator()))


def test_edges_that_coincide_agree_more():
    image = torch.zeros(3, 40, 40)
    image[:, :, 20:] = 1.0
    mask = torch.ones(40, 40, dtype=torch.bool)
    here, there = torch.ones(40, 40), torch.ones(40, 40)
    here[:, 20:], there[20:] = 3.0, 3.0
    assert edge_agreement(here, image, mask) > 0.9 > 0.3 > edge_agreement(there, image, mask)
    assert math.isnan(edge_agreement(torch.ones(40, 40), image, mask))


def test_distances_within_an_ensemble():
    """Planes whose log depth differs by known slopes; the scale of each must not matter."""
    across = torch.linspace(-1, 1, 101)[None].expand(5, 101)
    mask = torch.ones(5, 101, dtype=torch.bool)

    def plane(slope: float, scale: float = 1.0) -> torch.Tensor:
        return scale * (slope * across).exp()

    unit = float(across.abs().mean())  # of |log ratio| for slopes that differ by one
    members = [plane(0.1, 3.0), plane(0.1), plane(0.2, 0.5)]
    found = ensemble_distances(plane(0.5), plane(0.1, 7.0), members, mask)
    first, among = (0.4 + 0.4 + 0.3) / 3 * unit, (0 + 0.1 + 0.1) / 3 * unit
    assert found["spread"] == pytest.approx((first + among) / 2, rel=1e-4)
    assert found["outlying"] == pytest.approx(np.log(first / among), rel=1e-4)
    assert found["gain"] == pytest.approx(np.log(first / (0.1 / 3 * unit)), rel=1e-4)
    swapped = ensemble_distances(plane(0.1), plane(0.5), members, mask)
    assert swapped["outlying"] < found["outlying"] and swapped["gain"] == pytest.approx(-found["gain"], rel=1e-4)


def test_all_signals_are_measured_and_stored(tiny, image):
    before = weights_checksum(tiny)
    result = adapt(tiny, image, config())
    assert weights_checksum(tiny) == before and result.decision == "adapted"
    names = {
        "consistency_self_gain", "consistency_cross_gain", "votes_gain", "reprojection_gain", "edges_gain",
        "drift_weights", "drift_prediction", "drift_features", "loss_drop", "camera_fov_change", "ensemble_spread",
    }  # fmt: skip
    assert names <= result.signals.keys()
    assert all(np.isfinite(result.signals[name]) for name in names)
    assert result.signals["drift_weights"] > 0
    plain = adapt(tiny, image, config(gate={"mode": "off"}))
    assert torch.equal(plain.final.depth, result.final.depth)  # measuring changes nothing
    assert not plain.signals
    few = adapt(tiny, image, config(gate={"signals": ["edges"]}))
    assert {name.split("_")[0] for name in few.signals} == {"edges"}
    still = adapt(tiny, image, config(train={"optimizer": {"learning_rate": 0.0}}))
    for name in ("consistency_self_gain", "votes_gain", "reprojection_gain", "edges_gain", "drift_weights"):
        assert still.signals[name] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("estimate", "decision"), [(1.0, "accept"), (0.0, "blend"), (-1.0, "reject")])
def test_decisions_do_what_they_say(tiny, image, tmp_path, estimate, decision):
    always(estimate).write(tmp_path / "gate.json")
    gate = {"mode": "decide", "calibration": str(tmp_path / "gate.json"), "signals": ["votes"]}
    result = adapt(tiny, image, config(gate=gate))
    assert result.decision == decision
    assert result.signals["estimate"] == pytest.approx(estimate)
    if decision == "accept":
        assert torch.equal(result.final.depth, result.adapted.depth)
    elif decision == "reject":
        assert torch.equal(result.final.depth, result.original.depth)
    else:
        change = (result.final.depth / result.original.depth).log().abs().mean()
        full = log_error(result.adapted.depth[None], result.original.depth[None], result.original.mask[None])
        assert 0 < float(change) <= float(full) + 1e-6
        assert torch.allclose(result.final.points[..., 2], result.final.depth)


def test_the_highest_estimate_counts_on_the_best_of_what_is_not_there():
    calibration = Calibration(["a", "b"], [1.0, 0.0], [2.0, 1.0], [-1.0, 0.5], 0.25, accept=1.0, blend=0.0)
    assert calibration.highest({}) == pytest.approx(0.25 + 3 * 1.0 + 3 * 0.5)
    assert calibration.highest({"a": 5.0}) == pytest.approx(0.25 - 2.0 + 1.5)
    assert calibration.highest({"a": math.nan, "b": 9.0}) == pytest.approx(0.25 + 1.5)  # there, and counts as its mean
    both = {"a": 3.0, "b": -1.0}
    assert calibration.highest(both) == calibration.estimate(both)


def test_what_must_be_rejected_is_not_trained(tiny, image, tmp_path):
    """The original's own predictions lie so far apart that nothing the training does can be accepted."""
    signals, weights = ["ensemble_spread", "votes_gain"], [-1.0, 0.01]
    gate = {"mode": "decide", "calibration": str(tmp_path / "gate.json"), "signals": ["ensemble", "votes"], "views": 1}
    Calibration(signals, [0.0, 0.0], [1e-3, 1.0], weights, 0.0, accept=1.0, blend=0.0).write(tmp_path / "gate.json")
    early = adapt(tiny, image, config(gate=gate), "x")
    assert early.decision == "reject" and early.passes_done == 0 and early.adapted is None
    assert early.final is early.original and early.weights is None
    assert "not trained: the gate rejects" in early.reason
    Calibration(signals, [0.0, 0.0], [1e-3, 1.0], weights, 0.0, accept=-0.5, blend=-9.0).write(tmp_path / "gate.json")
    late = adapt(tiny, image, config(gate=gate), "x")
    assert late.passes_done == 2 and late.decision == "blend"
    for key in ("ensemble_spread", "ensemble_outlying"):  # the very numbers that decide after training
        assert late.signals[key] == early.signals[key]


def test_blend_takes_the_adapted_where_experts_agree(tiny, image):
    original = tiny.predict(image)
    pattern = torch.ones_like(original.depth)
    pattern[: len(pattern) // 4] = 1.2
    adapted = replace(original, depth=2 * original.depth * pattern)
    spread = torch.zeros_like(original.depth)
    agreed = blend_predictions(original, adapted, spread)
    assert torch.allclose(agreed.depth, original.depth * pattern, rtol=1e-4)  # scale stays the original's
    argued = blend_predictions(original, adapted, spread + 100.0)
    assert torch.allclose(argued.depth, original.depth, rtol=1e-4)


def test_an_implausible_camera_is_rejected():
    assert always(1.0).decide({"camera_implausible": 0.0}) == "accept"
    assert always(1.0).decide({"camera_implausible": 1.0}) == "reject"


def test_missing_signals_count_as_their_mean_and_wild_ones_are_clipped():
    calibration = Calibration(["a", "b"], [1.0, 2.0], [1.0, 2.0], [0.1, 0.2], 0.5, 1.0, 0.0)
    assert calibration.estimate({}) == pytest.approx(0.5)
    assert calibration.estimate({"a": 2.0, "b": math.nan}) == pytest.approx(0.6)
    assert calibration.estimate({"a": 1e9, "b": 2.0}) == pytest.approx(0.5 + 0.3)


def test_a_gate_that_sees_nothing_rejects():
    calibration = Calibration(["a", "b", "c"], [0.0] * 3, [1.0] * 3, [0.1, 0.2, 0.0], 0.5, 0.4, 0.0)
    assert calibration.decide({"a": 0.0}) == calibration.decide({"b": 0.0, "a": math.nan}) == "accept"
    for signals in ({}, {"a": math.nan, "b": math.inf}, {"c": 1.0, "other": 1.0}):
        assert calibration.decide(signals) == "reject"


def test_a_wrong_calibration_file_is_one_sentence(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for name in ("x.json", "none.json"):
        with pytest.raises(UserError, match=r"gate\.calibration"):
            read_calibration(tmp_path / name)


def test_the_gate_fails_closed(tiny, image, monkeypatch):
    from ttt_lib.adaptation.gate import signals

    real, calls = signals.predict_on_views, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise FloatingPointError("not finite")
        return real(*arguments)

    monkeypatch.setattr(signals, "predict_on_views", broken)
    result = adapt(tiny, image, config())
    assert len(calls) == 2 and result.decision == "original" and "not finite" in result.reason
    assert torch.equal(result.final.depth, result.original.depth)
    assert result.adapted is None and result.weights is None and result.blended is None


def test_rejected_weights_start_nothing(tiny, image, tmp_path):
    always(-1.0).write(tmp_path / "gate.json")
    gate = {"mode": "decide", "calibration": str(tmp_path / "gate.json"), "signals": ["votes"]}
    assert adapt(tiny, image, config(gate=gate, train={"reset": "never"})).weights is None
    assert adapt(tiny, image, config(train={"reset": "never"})).weights is not None


def test_a_missing_calibration_is_said_before_training(tiny, image):
    gate = {"mode": "decide", "calibration": "/nowhere.json"}
    with pytest.raises(UserError, match="nowhere"):
        adapt(tiny, image, config(gate=gate), on_step=lambda entry: pytest.fail("trained first"))


def test_blended_disparities_are_aligned_first(tiny, image):
    original = replace(tiny.predict(image), kind="disparity")
    original = replace(original, disparity=1 / original.depth)
    adapted = replace(original, disparity=7 * original.disparity + 3)
    spread = torch.zeros_like(original.depth)
    spread[:, : spread.shape[1] // 2] = 0.2
    blended = blend_predictions(original, adapted, spread)
    assert torch.allclose(blended.disparity, original.disparity, rtol=1e-3, atol=1e-5)


def test_a_calibration_of_another_model_is_said(tiny, image, tmp_path):
    other = always(1.0)
    other.about["model"] = "Ruicheng/moge-2-vits-normal"
    other.write(tmp_path / "gate.json")
    gate = {"mode": "decide", "calibration": str(tmp_path / "gate.json"), "signals": ["votes"]}
    assert "calibrated for the model 'Ruicheng" in adapt(tiny, image, config(gate=gate)).reason
