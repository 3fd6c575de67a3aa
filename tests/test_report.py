"""Tables and statistics from result files: the paper's bold cells, hand-worked numbers, and nothing from memory."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ttt_lib import report
from ttt_lib.errors import UserError
from ttt_lib.statistics import bootstrap_interval, paired_gains, paired_summary, summarise


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    """Three experiments on five samples in two shards, with known numbers."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    base = {i: rng.random(12) for i in range(5)}
    for experiment, shift in (("original", 0.0), ("control_lr0", 0.0), ("unfreeze_encoder", 0.05)):
        for shard in range(2):
            place = folder / experiment / f"{shard:03d}-of-002"
            (place / "predictions").mkdir(parents=True)
            rows, times, steps = [], [], []
            for i in range(shard, 5, 2):
                identity = {"experiment": experiment, "dataset": "ab"[i % 2], "sample": f"s{i}"}
                for (metric, score), value in zip(report.TABLE1_COLUMNS, base[i]):
                    gain = (shift if score == "delta1" else -shift) * (1 if i else -1)
                    for prediction, number in (("original", value), ("final", value + gain)):
                        rows.append(
                            {**identity, "prediction": prediction, "metric": metric, "score": score, "value": number}
                        )
                times.append({**identity, "seconds": 1.0 + i, "decision": "adapted"})
                steps += [{**identity, "step": k, "passes": 2 * k, "loss": 1 / k} for k in (1, 2)]
                np.savez(
                    place / "predictions" / f"{identity['dataset']}__s{i}.npz", image=np.zeros((6, 8, 3), np.uint8),
                    depth_original=np.ones((6, 8), np.float16), depth_final=np.full((6, 8), 2, np.float16),
                    depth_truth=np.full((6, 8), 3, np.float16), intrinsics=np.eye(3, dtype=np.float32),
                )  # fmt: skip
            pd.DataFrame(rows).to_csv(place / "metrics.csv", index=False)
            pd.DataFrame(times).to_csv(place / "samples.csv", index=False)
            pd.DataFrame(steps).to_csv(place / "history.csv", index=False)
            (place / "manifest.json").write_text(json.dumps({"identity": {}}))
    return folder


def test_the_published_table_gives_the_papers_bold_cells():
    """Best of each column of the published figures, ties included, worked out by hand."""
    best = report.best_cells(report.published_table())
    expected = {
        "depth_metric_rel": ["unfreeze_encoder_lower_lr", "unfreeze_encoder_higher_lr"],
        "depth_metric_delta1": ["unfreeze_encoder"],
        "depth_scale_invariant_rel": ["unfreeze_encoder"],
        "depth_scale_invariant_delta1": ["unfreeze_encoder"],
        "depth_affine_invariant_rel": ["unfreeze_encoder_lower_lr", "unfreeze_encoder_higher_lr"],
        "depth_affine_invariant_delta1": ["unfreeze_encoder_lower_lr", "unfreeze_encoder_higher_lr"],
        "points_metric_rel": ["unfreeze_encoder_lower_lr"],
        "points_metric_delta1": ["unfreeze_encoder"],
        "points_scale_invariant_rel": ["unfreeze_encoder"],
        "points_scale_invariant_delta1": ["unfreeze_encoder"],
        "points_affine_invariant_rel": ["unfreeze_encoder", "unfreeze_encoderSGD"],
        "points_affine_invariant_delta1": ["unfreeze_encoder"],
    }
    assert {column: best.index[best[column]].tolist() for column in expected} == expected
    text = report.to_markdown(report.published_table())
    assert "**0.67**" not in text and text.count("**0.70**") == 2 and "**0.49**" in text
    assert r"\textbf{0.48}" in report.to_latex(report.published_table())


def test_table_1_is_the_mean_of_the_files(runs_folder):
    runs = report.read_runs(runs_folder)
    assert len(runs.shards) == 6 and len(runs.samples) == 15
    table = report.table1(runs)
    raw = pd.concat([pd.read_csv(p) for p in runs_folder.glob("*/*/metrics.csv")])
    raw = raw[raw.prediction == "final"]
    for experiment in table.index:
        for metric, score in report.TABLE1_COLUMNS:
            rows = raw[(raw.experiment == experiment) & (raw.metric == metric) & (raw.score == score)]
            assert table.loc[experiment, f"{metric}_{score}"] == pytest.approx(rows.value.mean())
    assert table.index.tolist() == ["original", "control_lr0", "unfreeze_encoder"] and (table.seconds == 3).all()
    assert report.control_is_exact(runs) is True


def test_a_control_that_differs_in_the_last_bit_is_noticed(runs_folder):
    runs = report.read_runs(runs_folder)
    row = runs.metrics.index[(runs.metrics.experiment == "control_lr0") & (runs.metrics.prediction == "final")][0]
    runs.metrics.loc[row, "value"] = np.nextafter(runs.metrics.loc[row, "value"], 1)
    assert report.control_is_exact(runs) is False
    runs.metrics = runs.metrics[runs.metrics.experiment != "control_lr0"]
    assert report.control_is_exact(runs) is None


def test_gains_and_their_summary(runs_folder):
    runs = report.read_runs(runs_folder)
    for metric, score in (("depth_metric", "rel"), ("points_metric", "delta1")):
        gains = paired_gains(runs.metrics, metric, score)
        group = gains[gains.experiment == "unfreeze_encoder"]
        assert group.gain.tolist() == pytest.approx([-0.05 if s == "s0" else 0.05 for s in group["sample"]])
        summary = summarise(gains).set_index("experiment").loc["unfreeze_encoder"]
        assert (summary["improved"], summary["worse"], summary["unchanged"]) == (4, 1, 0)
        assert summary["mean"] == pytest.approx(0.03) and summary["worst_loss"] == pytest.approx(-0.05)
        assert summary["low"] <= 0.03 <= summary["high"]
    by_set = summarise(gains, by=("experiment", "dataset"))
    assert len(by_set) == 6 and by_set["count"].sum() == 15


def test_statistics_against_scipy_and_by_hand():
    gain = np.array([0.1, 0.2, -0.05, 0.0, 0.3, 0.0004])
    summary = paired_summary(gain, tolerance=1e-3)
    assert (summary["improved"], summary["unchanged"], summary["worse"]) == (3, 2, 1)
    assert summary["sign_p"] == pytest.approx(2 * (1 + 5) / 32)  # 4 up, 1 down: P(X <= 1) + P(X >= 4)
    assert summary["wilcoxon_p"] == pytest.approx(stats.wilcoxon(gain).pvalue)
    assert summary["best_gain"] == 0.3 and summary["worst_loss"] == -0.05
    low, high = bootstrap_interval(np.random.default_rng(0).normal(1, 0.5, 400))
    assert low < 1.05 and high > 0.95 and 0.07 < high - low < 0.13  # 2 * 1.96 * 0.5 / 20
    assert bootstrap_interval(gain, seed=1) == bootstrap_interval(gain, seed=1)
    assert np.isnan(paired_summary(np.zeros(3))["sign_p"])


def test_the_report_is_computed_from_the_files_beside_it(runs_folder, tmp_path):
    files = report.write_report(report.read_runs(runs_folder), tmp_path, bootstrap_samples=50)
    metrics, table = pd.read_csv(files["metrics"]), pd.read_csv(files["table1"]).set_index("experiment")
    again = metrics[metrics.prediction == "final"].groupby(["experiment", "metric", "score"]).value.mean()
    text = files["html"].read_text(encoding="utf-8")
    for (experiment, metric, score), value in again.items():
        assert table.loc[experiment, f"{metric}_{score}"] == pytest.approx(value)
        assert f"{value:.2f}" in text and f"{value:.2f}" in files["markdown"].read_text(encoding="utf-8")
    paired = pd.read_csv(files["paired"])
    row = paired[
        (paired.experiment == "unfreeze_encoder") & (paired.metric == "depth_metric") & (paired.score == "rel")
    ]
    assert row["mean"].item() == pytest.approx(0.03)
    for name in ("figure4", "loss_curves", "pareto", "gallery", "latex"):
        assert files[name].stat().st_size > 100
    assert 'src="http' not in text and "cdn.plot.ly" not in text.split("<script")[0]
    assert text.count("data:image/png;base64") >= 4 and "Plotly.newPlot" in text


def test_the_published_confound_shows():
    view = report.confound(report.published_table())
    change = view["unfreeze_encoderSGD_lower_lr - original"]
    assert abs(change["depth_metric_delta1"]) <= 0.011 and abs(change["points_metric_delta1"]) <= 0.011
    assert change["depth_affine_invariant_delta1"] == pytest.approx(0.22)


def test_no_runs_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        report.read_runs(tmp_path)
