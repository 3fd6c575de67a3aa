"""Tables and statistics from result files: the paper's bold cells, hand-worked numbers, and nothing from memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markupsafe import escape
from scipy import stats

from ttt_lib.core.errors import UserError
from ttt_lib.evaluation.paired import bootstrap_interval, paired_gains, paired_summary, summarise
from ttt_lib.evaluation.scores import TABLE1_COLUMNS
from ttt_lib.report import study_figures, tables
from ttt_lib.report.figures import plot_history
from ttt_lib.report.page import write_report
from ttt_lib.runs import results
from ttt_lib.runs.catalog import list_experiments
from ttt_lib.runs.gallery import prediction_file, prediction_name

BASE = np.random.default_rng(0).random((8, 12))


def write_shard(
    folder, experiment, shard=(0, 1), samples=range(5), shift=0.0, columns=TABLE1_COLUMNS, history=True,
    identity=None, finished=1.0,
):  # fmt: skip
    """A finished shard with known numbers: every score of every sample but the first improves by `shift`."""
    place = folder / experiment / f"{shard[0]:03d}-of-{shard[1]:03d}"
    (place / "predictions").mkdir(parents=True)
    rows, times, steps = [], [], []
    for i in list(samples)[shard[0] :: shard[1]]:
        names = {"experiment": experiment, "dataset": "ab"[i % 2], "sample": f"s{i}"}
        for (metric, score), value in zip(TABLE1_COLUMNS, BASE[i]):
            gain = (shift if score == "delta1" else -shift) * (1 if i else -1)
            for prediction, number in (("original", value), ("final", value + gain)):
                if (metric, score) in columns:
                    rows.append({**names, "prediction": prediction, "metric": metric, "score": score, "value": number})
        times.append({**names, "seconds": 1.0 + i, "decision": "adapted"})
        steps += [{**names, "step": k, "passes": 2 * k, "loss": 1 / k} for k in (1, 2)]
        np.savez(
            place / "predictions" / prediction_name(names["dataset"], f"s{i}"), image=np.zeros((6, 8, 3), np.uint8),
            depth_original=np.ones((6, 8), np.float32), depth_final=np.full((6, 8), 2, np.float32),
            depth_truth=np.full((6, 8), 3, np.float32), intrinsics=np.eye(3, dtype=np.float32),
        )  # fmt: skip
    for name, content in (("metrics", rows), ("samples", times), ("history", steps if history else [])):
        if content:  # as run_experiment: a table without rows is not written
            pd.DataFrame(content).to_csv(place / f"{name}.csv", index=False)
    (place / "manifest.json").write_text(json.dumps({"identity": identity or {}, "finished": finished}))
    return place


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    """Three experiments on five samples in two shards, with known numbers."""
    folder = tmp_path_factory.mktemp("runs")
    for experiment, shift in (("original", 0.0), ("control_lr0", 0.0), ("unfreeze_encoder", 0.05)):
        for i in range(2):
            write_shard(folder, experiment, (i, 2), shift=shift)
    return folder


def test_the_published_table_gives_the_papers_bold_cells():
    """Best of each column of the published figures, ties included, worked out by hand."""
    best = tables.best_cells(tables.published_table())
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
    ours = tables.COLUMN_NAMES
    assert set(ours) == set(expected) and not best["seconds"].any() and int(best.to_numpy().sum()) == 16
    text = tables.to_markdown(tables.published_table())
    assert text.count("**") == 2 * 16
    assert "**0.67**" not in text and text.count("**0.70**") == 2 and "**0.49**" in text
    assert r"\textbf{0.48}" in tables.to_latex(tables.published_table())


def test_table_1_is_the_mean_of_the_files(runs_folder):
    runs = results.read_runs(runs_folder)
    assert len(runs.shards) == 6 and len(runs.samples) == 15
    table = tables.table1(runs)
    raw = pd.concat([pd.read_csv(p) for p in runs_folder.glob("*/*/metrics.csv")])
    raw = raw[raw.prediction == "final"]
    for experiment in table.index:
        for metric, score in TABLE1_COLUMNS:
            rows = raw[(raw.experiment == experiment) & (raw.metric == metric) & (raw.score == score)]
            assert table.loc[experiment, f"{metric}_{score}"] == pytest.approx(rows.value.mean())
    assert table.index.tolist() == ["original", "control_lr0", "unfreeze_encoder"] and (table.seconds == 3).all()
    assert tables.control_is_exact(runs) is True


def test_a_control_that_differs_in_the_last_bit_is_noticed(runs_folder):
    runs = results.read_runs(runs_folder)
    row = runs.metrics.index[(runs.metrics.experiment == "control_lr0") & (runs.metrics.prediction == "final")][0]
    runs.metrics.loc[row, "value"] = np.nextafter(runs.metrics.loc[row, "value"], 1)
    assert tables.control_is_exact(runs) is False
    runs.metrics = runs.metrics[runs.metrics.experiment != "control_lr0"]
    assert tables.control_is_exact(runs) is None


def test_gains_and_their_summary(runs_folder):
    runs = results.read_runs(runs_folder)
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
    files = write_report(results.read_runs(runs_folder), tmp_path, bootstrap_samples=50)
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
    view = tables.confound(tables.published_table())
    change = view["unfreeze_encoderSGD_lower_lr - original"]
    assert abs(change["depth_metric_delta1"]) <= 0.011 and abs(change["points_metric_delta1"]) <= 0.011
    assert change["depth_affine_invariant_delta1"] == pytest.approx(0.22)


def test_the_printed_text_decides_what_is_best():
    """Ties and winners by what is printed: 1.115 prints as 1.11, although rounding a frame gives 1.12."""
    table = pd.DataFrame(1.0, index=["a", "b", "c"], columns=[*tables.COLUMN_NAMES, "seconds"])
    table["depth_metric_rel"] = [1.115, 1.11, 1.12]
    table["depth_metric_delta1"] = [1.115, 1.11, np.nan]
    best = tables.best_cells(table)
    assert best["depth_metric_rel"].tolist() == [True, True, False]
    assert best["depth_metric_delta1"].tolist() == [True, True, False]
    for name, line in zip(table.index, tables.to_markdown(table).splitlines()[2:]):
        texts = [cell.strip() for cell in line.split("|")[2:4]]
        assert texts[0] == ("1.12" if name == "c" else "**1.11**") and texts[1] == ("" if name == "c" else "**1.11**")


RELATIVE = [(m, s) for m, s in TABLE1_COLUMNS if "metric" not in m.split("_", 1)[1].split("_")]
PARTIAL = {  # what lies in the folder, and what must be said about it
    "some shards": (
        lambda f: [write_shard(f, "original"), write_shard(f, "control_lr0"), write_shard(f, "tta", (1, 3), shift=0.1)],
        ["tta: 1 of 3 shards", "tta: 2 of 5 samples"],
    ),
    "an experiment without a shard": (
        lambda f: [write_shard(f, "original"), (f / "tta").mkdir(), (f / "failed" / "sgd" / "000-of-001").mkdir(parents=True)],
        ["tta: no finished shard", "sgd: no finished shard; what failed is in", "control_lr0: not run"],
    ),
    "no original": (lambda f: [write_shard(f, "tta", shift=0.1)], ["original: not run"]),
    "only original and control": (lambda f: [write_shard(f, "original"), write_shard(f, "control_lr0")], []),
    "nothing improved": (
        lambda f: [write_shard(f, "original", history=False), write_shard(f, "tta", shift=-0.1, samples=range(1, 5), history=False)],
        ["no experiment trained", "tta: 4 of 5 samples"],
    ),
    "one sample": (lambda f: [write_shard(f, n, samples=[0]) for n in ("original", "tta")], []),
    "other samples": (
        lambda f: [write_shard(f, "original", samples=[0, 1]), write_shard(f, "tta", samples=[2])],
        ["original: 2 of 3", "tta: 1 of 3"],
    ),
    "no metric truth": (
        lambda f: [write_shard(f, n, columns=RELATIVE) for n in ("original", "tta")],
        ["no scores for depth_metric, points_metric"],
    ),
    "no truth": (lambda f: [write_shard(f, n, columns=[]) for n in ("original", "tta")], ["no sample has a truth"]),
    "no sample": (lambda f: [write_shard(f, n, samples=[]) for n in ("original", "tta")], ["no sample has a truth"]),
    "other data": (
        lambda f: [write_shard(f, "original", identity={"data": "1"}), write_shard(f, "tta", identity={"data": "2"})],
        ["tta: ran with other data than original"],
    ),
}  # fmt: skip


def run_notebook(runs, output):
    """The code cells of 03_ablation, in this process."""
    cells = json.loads((Path(__file__).parents[2] / "notebooks" / "03_ablation.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    space = {}
    exec(sources[0], space)
    space |= {"runs_dir": str(runs), "output_dir": str(output), "bootstrap_samples": 20}
    for source in sources[1:]:
        exec(source, space)
    return space


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", PARTIAL)
def test_what_can_be_computed_of_a_partial_run_is_shown_and_the_rest_is_said(case, tmp_path, capsys):
    make, words = PARTIAL[case]
    make(tmp_path / "runs")
    runs = results.read_runs(tmp_path / "runs")
    for line in words:
        assert sum(line in note for note in runs.notes) == 1, (line, runs.notes)
    space = run_notebook(tmp_path / "runs", tmp_path / "out")  # its last cell writes the report
    printed, files = capsys.readouterr().out, space["files"]
    assert all(note in printed for note in runs.notes)
    text = files["html"].read_text(encoding="utf-8")
    assert all(str(escape(note)) in text for note in runs.notes)
    table = pd.read_csv(files["table1"])
    there = {place.parent.name for place in runs.shards}
    in_order = [name for name in list_experiments() if name in there]
    assert table["experiment"].tolist() == ([] if case == "no sample" else in_order)
    assert tables.to_text(tables.table1(runs)) and tables.to_latex(tables.table1(runs))
    final = runs.metrics[(runs.metrics.prediction == "final") & (runs.metrics.score == "delta1")]
    for (experiment, metric), rows in final.groupby(["experiment", "metric"]):
        shown = table.set_index("experiment").loc[experiment, f"{metric}_delta1"]
        assert shown == pytest.approx(rows["value"].mean())


def test_a_report_leaves_no_figure_of_an_earlier_one(runs_folder, tmp_path):
    write_report(results.read_runs(runs_folder), tmp_path / "out", bootstrap_samples=20)
    assert (tmp_path / "out" / "figure4.png").exists()
    write_shard(tmp_path / "runs", "original", history=False)
    files = write_report(results.read_runs(tmp_path / "runs"), tmp_path / "out", bootstrap_samples=20)
    assert "figure4" not in files and not list((tmp_path / "out").glob("*.png"))


def test_a_control_that_has_only_some_shards_is_compared_on_those(tmp_path):
    write_shard(tmp_path, "original", (0, 2))
    write_shard(tmp_path, "original", (1, 2))
    place = write_shard(tmp_path, "control_lr0", (1, 2))
    assert tables.control_is_exact(results.read_runs(tmp_path)) is True
    rows = pd.read_csv(place / "metrics.csv")
    rows.loc[rows.prediction == "final", "value"] += 1e-9
    rows.to_csv(place / "metrics.csv", index=False)
    assert tables.control_is_exact(results.read_runs(tmp_path)) is False


def means(runs):
    return tables.table1(runs).loc["original", "depth_metric_rel"]


def test_shards_of_two_counts_are_never_mixed(tmp_path):
    """Complete wins over incomplete, newer over older; nothing is counted twice, and what is unused is named."""
    for i in range(2):
        write_shard(tmp_path, "original", (i, 2), finished=1.0)
    for i in (0, 2, 3):
        write_shard(tmp_path, "original", (i, 4), finished=9.0)
    runs = results.read_runs(tmp_path)
    assert [p.name for p in runs.shards] == ["000-of-002", "001-of-002"] and len(runs.samples) == 5
    assert means(runs) == pytest.approx(BASE[:5, 0].mean())
    (note,) = [n for n in runs.notes if "not used" in n]
    assert "000-of-004, 002-of-004, 003-of-004" in note and "2 different runs" in note
    write_shard(tmp_path, "original", (1, 4), finished=9.0)
    assert len(results.read_runs(tmp_path).shards) == 4
    for i in range(2):
        (tmp_path / "original" / f"00{i}-of-002" / "manifest.json").unlink()
    assert not [n for n in results.read_runs(tmp_path).notes if "not used" in n]


def test_shards_of_other_settings_are_never_mixed(tmp_path):
    """Two runs with other settings on one folder at a time leave one shard each: one of them is used, and it is said."""
    write_shard(tmp_path, "original", (0, 2), identity={"settings": "new"}, finished=2.0)
    write_shard(tmp_path, "original", (1, 2), identity={"settings": "old"}, finished=1.0)
    runs = results.read_runs(tmp_path)
    assert [p.name for p in runs.shards] == ["000-of-002"] and len(runs.samples) == 3
    assert any("not used: 001-of-002" in n for n in runs.notes) and any("1 of 2 shards" in n for n in runs.notes)


def test_a_score_that_is_there_twice_counts_once(tmp_path):
    write_shard(tmp_path, "original", (0, 2), samples=[0, 1])
    write_shard(tmp_path, "original", (1, 2), samples=[1, 0])
    runs = results.read_runs(tmp_path)
    assert len(runs.samples) == 1 and means(runs) == pytest.approx(BASE[0, 0])


def test_names_of_samples_stay_text(tmp_path):
    for experiment in ("original", "tta"):
        place = write_shard(tmp_path, experiment, samples=[0, 1])
        for name in ("metrics", "samples", "history"):
            rows = pd.read_csv(place / f"{name}.csv")
            rows["sample"] = rows["sample"].map({"s0": "0007", "s1": "NA"})
            rows["dataset"] = "12"
            rows.to_csv(place / f"{name}.csv", index=False)
        (place / "predictions" / prediction_name("12", "0007")).touch()
    runs = results.read_runs(tmp_path)
    assert set(runs.samples["sample"]) == {"0007", "NA"} and len(paired_gains(runs.metrics, "depth_metric", "rel")) == 4
    assert prediction_file([shard for shard in runs.shards if shard.parent.name == "tta"], "12", "0007")


def test_a_damaged_result_file_is_one_sentence(tmp_path):
    place = write_shard(tmp_path, "original")
    (place / "metrics.csv").write_text('a,b\n1,2,3\n"')
    with pytest.raises(UserError, match="metrics.csv: cannot be read"):
        results.read_runs(tmp_path)
    (place / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="no finished run"):
        results.read_runs(tmp_path)


def test_names_in_latex_and_html_are_escaped(tmp_path):
    write_shard(tmp_path / "runs", "a&b<c>_50%")
    runs = results.read_runs(tmp_path / "runs")
    assert r"a\&b<c>\_50\% &" in tables.to_latex(tables.table1(runs))
    text = write_report(runs, tmp_path / "out", bootstrap_samples=20)["html"].read_text(encoding="utf-8")
    assert "a&amp;b&lt;c&gt;_50%" in text and "b<c>" not in text


def test_no_runs_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        results.read_runs(tmp_path)


def test_the_order_of_the_table_is_in_the_experiment_files(tmp_path):
    """`order` of what ran; where a manifest lacks it, of the package's file of that name; the others follow by name."""
    names = list_experiments(more=False)
    assert names[:3] == ["original", "control_lr0", "tta"] and names[-3:] == ["recommended", "scene_corrected", "scene"]
    every = list_experiments()
    assert [name for name in every if name in names] == names  # of all, each has its place by the same key
    scenes = [name for name in every if name.startswith("scene")]
    assert scenes[:4] == ["scene_scale", "scene_affine", "scene_corrected", "scene"]
    for name, order in (("zebra", 5), ("apple", 25), ("tta", None), ("original", None), ("b", None), ("a", None)):
        place = write_shard(tmp_path, name)
        if order is not None:
            settings = {"identity": {}, "finished": 1.0, "settings": {"order": order}}
            (place / "manifest.json").write_text(json.dumps(settings))
    runs = results.read_runs(tmp_path)
    expected = ["zebra", "original", "apple", "tta", "a", "b"]
    assert runs.experiments == expected and tables.table1(runs).index.tolist() == expected
    assert list(runs.metrics.experiment.unique()) == expected
    assert list(paired_gains(runs.metrics, "depth_metric", "rel").experiment.unique()) == expected


def test_every_mean_says_over_how_many_and_where_rows_differ(tmp_path):
    metric = [pair for pair in TABLE1_COLUMNS if pair[0] == "depth_metric"]
    write_shard(tmp_path, "original", samples=range(5))
    write_shard(tmp_path, "tta", samples=range(3))
    place = write_shard(tmp_path, "unfreeze_encoder", samples=range(5))
    rows = pd.read_csv(place / "metrics.csv")
    lost = (rows.metric == "points_affine_invariant") & (rows["sample"] == "s1") & (rows.prediction == "final")
    rows.loc[lost & (rows.score == "rel"), "value"] = np.nan  # a score that could not be computed
    rows.to_csv(place / "metrics.csv", index=False)
    for experiment in ("original", "tta", "unfreeze_encoder"):  # only s0 and s2 have a metric truth
        path = tmp_path / experiment / "000-of-001" / "metrics.csv"
        rows = pd.read_csv(path)
        rows[~(rows.metric.isin([m for m, _ in metric]) & ~rows["sample"].isin(["s0", "s2"]))].to_csv(path, index=False)
    runs = results.read_runs(tmp_path)
    table = tables.table1(runs)
    assert table["n"].to_dict() == {"original": 5, "unfreeze_encoder": 5, "tta": 3} and table["n"].dtype == int
    assert "points_affine_invariant_rel: means over 4 of 5 samples (unfreeze_encoder)" in runs.notes
    columns = "depth_metric_rel, depth_metric_delta1: means over"
    assert f"{columns} 2 of 5 samples (original, unfreeze_encoder)" in runs.notes
    assert f"{columns} 2 of 3 samples (tta)" in runs.notes
    assert [note for note in runs.notes if note.startswith("tta")] == [
        "tta: 3 of 5 samples; its means are over fewer samples"
    ]
    printed = [line.split() for line in tables.to_text(table).splitlines()]
    assert printed[0][-1] == "n"
    assert {line[0]: line[-1] for line in printed[2:-1]} == {"original": "5", "unfreeze_encoder": "5", "tta": "3"}
    assert tables.to_markdown(table).splitlines()[0].endswith("| n |")
    assert tables.to_markdown(table).splitlines()[2].endswith("| 5 |")
    assert tables.to_latex(table).splitlines()[2].endswith(r"& n \\")
    assert "n |" not in tables.to_markdown(tables.published_table())


def test_figures_say_over_how_many_their_means_are():
    history = pd.DataFrame({"experiment": ["a"] * 3, "dataset": "d", "sample": ["s", "s", "t"], "passes": [1, 2, 1],
                            "loss": [1.0, 0.5, 2.0]})  # fmt: skip
    axis = study_figures.loss_curves(history).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a (n = 1 to 2)"]
    gains = pd.DataFrame({"experiment": ["a", "a", "b"], "gain": [0.1, 0.2, 0.3]})
    samples = pd.DataFrame({"experiment": ["a", "b"], "seconds": [1.0, 2.0]})
    figure, table = study_figures.pareto(gains, samples)
    assert table["n"].to_dict() == {"a": 2, "b": 1}
    assert [text.get_text() for text in figure.axes[0].texts] == ["a (n = 2)", "b (n = 1)"]


def test_samples_without_truth_are_timed_and_not_counted(tmp_path):
    place = write_shard(tmp_path, "original", samples=range(5))
    rows = pd.read_csv(place / "metrics.csv")
    rows[rows["sample"] != "s4"].to_csv(place / "metrics.csv", index=False)
    runs = results.read_runs(tmp_path)
    table = tables.table1(runs)
    assert table.loc["original", "n"] == 4 and table.loc["original", "seconds"] == 3  # of 1, 2, 3, 4 and 5 seconds
    assert any(
        note.endswith("points_affine_invariant_delta1: means over 4 of 5 samples (original)") for note in runs.notes
    )


def test_of_chosen_samples_nothing_shows_a_gain_that_is_the_choice(tmp_path, capsys):
    """Each row's second look is a data set of its own; what follows in the notebook is of the random samples alone."""
    for experiment, shift in (("original", 0.0), ("control_lr0", 0.0), ("unfreeze_encoder", 0.2)):
        place = write_shard(tmp_path / "runs", experiment, samples=range(8), shift=shift)
        for name in ("metrics", "samples", "history"):
            rows = pd.read_csv(place / f"{name}.csv")
            pd.concat([rows, rows.assign(dataset=rows["dataset"] + ".again")]).to_csv(
                place / f"{name}.csv", index=False
            )
    names = {"hard": [1, 2, 3], "random": [2, 5, 6], "easy": [0, 4, 7]}
    keys = [(group, "ab"[i % 2], f"s{i}") for group, numbers in names.items() for i in numbers]
    chosen = pd.DataFrame(keys, columns=["group", "dataset", "sample"]).assign(value=0.0, metric="depth_metric/delta1")
    chosen.to_csv(tmp_path / "runs" / "selection.csv", index=False)
    runs = results.read_runs(tmp_path / "runs")
    hard, random = runs.group("hard"), runs.group("random")
    assert sorted(hard.samples["sample"].unique()) == ["s1", "s2", "s3"] and len(hard.samples) == 9
    table = tables.selection_table(runs, 50).set_index(["group", "experiment"])
    assert table.loc[("hard", "unfreeze_encoder"), "again_mean"] == pytest.approx(0.2)
    assert table["gain"][table["gain"]].index.tolist() == [(group, "unfreeze_encoder") for group in ("hard", "random")]
    assert table.loc[("hard", "original, seen again"), "first_mean"] == 0
    text = tables.selection_cells(tables.selection_table(runs, 50))
    assert text.loc[("hard", "unfreeze_encoder"), "second look, over controls"] == (
        "+0.2000 (+0.2000, +0.2000) over original"
    )
    space = run_notebook(tmp_path / "runs", tmp_path / "out")
    assert "all below is of the random samples" in capsys.readouterr().out and "beyond_selection" in space["files"]
    pd.testing.assert_frame_equal(space["table"], tables.table1(random))
    written = pd.read_csv(space["files"]["beyond_selection"])
    assert len(written) == 12 * 3 * 3 and set(written["metric"] + "_" + written["score"]) == set(tables.COLUMN_NAMES)
    page = space["files"]["html"].read_text(encoding="utf-8")
    assert "beyond selection" in page and (tmp_path / "out" / "chosen_samples.png").exists()
    assert pd.read_csv(space["files"]["table1_hard"])["n"].tolist() == [3, 3, 3]


def test_loss_curves_of_samples_that_had_no_loss():
    """A row without losses has steps and no loss; beside it others have one."""
    without = pd.DataFrame([{"dataset": "d", "sample": "a", "step": step, "passes": step} for step in (1, 2)])
    assert not plot_history(without).axes[0].lines
    both = pd.concat([without, without.assign(sample="b", loss=0.5)])
    (line,) = plot_history(both).axes[0].lines
    assert line.get_label() == "b" and line.get_ydata().tolist() == [0.5, 0.5]
