"""The protocol's choice end to end, its jobs done in this process: what is scored, chosen and seen twice."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from ttt_lib import cli
from ttt_lib.core.config import build_experiment
from ttt_lib.core.errors import RunError
from ttt_lib.evaluation.selection import CONTROLS
from ttt_lib.runs.catalog import experiment_file
from ttt_lib.runs.experiment import open_samples, run_experiment
from ttt_lib.runs.jobs import Outcome
from ttt_lib.runs.protocol import choose_samples, with_controls

SCENES = {"kind": "shifted", "count": 6, "width": 32, "height": 24, "seed": 4}
QUICK = {"model": {"num_tokens": 32}}


def do(jobs, folder):
    """As `run_jobs`, without notebooks."""
    for job in jobs:
        place = folder / job.experiment / job.shard
        parameters = {key: value for key, value in job.parameters.items() if key not in ("profile", "limit")}
        run_experiment(build_experiment(parameters), place, (job.shard_index, job.shard_count), progress=False)
        (place / "manifest.json").write_text(json.dumps({"identity": job.identity}))
    return [Outcome(job.experiment, job.shard, "done") for job in jobs]


def test_the_samples_are_scored_chosen_and_seen_twice(tmp_path):
    overrides = {**QUICK, "data": [SCENES]}
    data = choose_samples(tmp_path, "demo", overrides, 2, "points_scale_invariant/delta1", None, 2, None, do)
    scored = pd.concat(pd.read_csv(path) for path in (tmp_path / "scored").glob("original/*/metrics.csv"))
    scored = scored[
        (scored.prediction == "final") & (scored.metric == "points_scale_invariant") & (scored.score == "delta1")
    ]
    worst = scored.sort_values(["value", "sample"])["sample"].tolist()
    chosen = pd.read_csv(tmp_path / "selection.csv")
    assert chosen.loc[chosen.group == "hard", "sample"].tolist() == worst[:2]
    assert set(chosen.loc[chosen.group == "easy", "sample"]) == set(worst[-2:])
    first, again = open_samples(build_experiment({"name": "row", "data": data}))
    assert set(first.names) == set(chosen["sample"]) and again.names == first.names
    assert (first.name, again.name) == ("shifted", "shifted.again") and [entry["draw"] for entry in data] == [0, 1]


def test_the_command_runs_the_rows_and_the_controls_on_the_chosen_samples(ttt, tmp_path, monkeypatch):
    """Afterwards a plain ablation in the same folder is no study of chosen samples any more."""
    asked = {}

    def run_jobs(jobs, folder, workers, scheduler, cluster_file, threads):
        asked[folder] = jobs
        return do([job for job in jobs if folder.name == "scored"], folder) or [Outcome(jobs[0].experiment, "", "done")]

    monkeypatch.setattr("ttt_lib.runs.jobs.run_jobs", run_jobs)
    monkeypatch.setattr(cli, "summarise", lambda runs, threads: None)
    scenes = "data=[{kind: shifted, count: 4, width: 32, height: 24}]"
    words = ["--experiments", "unfreeze_encoder", "--runs", tmp_path, "--workers", "1", "--no-views", "--set", scenes]
    words = ["ablation", *words, "--set", "model.num_tokens=32", "--limit", "4"]
    done = ttt(*words, "--hardest", "2")
    assert done.returncode == 0 and "hard: 2 samples" in done.stdout
    assert [job.experiment for job in asked[tmp_path]] == ["unfreeze_encoder", *CONTROLS]
    chosen = pd.read_csv(tmp_path / "selection.csv")
    assert {job.samples for job in asked[tmp_path]} == {2 * chosen["sample"].nunique()} == {8}
    assert all(job.parameters["limit"] == 0 for job in asked[tmp_path])
    assert ttt(*words).returncode == 0
    assert [job.samples for job in asked[tmp_path]] == [4] and not (tmp_path / "selection.csv").exists()


def test_a_job_that_failed_is_told_and_nothing_is_chosen(tmp_path):
    failing = lambda jobs, folder: [Outcome(job.experiment, job.shard, "failed", "no disk") for job in jobs]  # noqa: E731
    with pytest.raises(RunError, match="1 of 1 jobs failed .no disk"):
        choose_samples(tmp_path, "demo", {**QUICK, "data": [SCENES]}, 2, "depth_metric/delta1", None, 1, None, failing)
    assert not (tmp_path / "selection.csv").exists()


def test_controls_join_the_rows_once():
    rows = with_controls([experiment_file("tta"), experiment_file("unfreeze_encoder")])
    assert [path.stem for path in rows] == ["tta", "unfreeze_encoder", *(c for c in CONTROLS if c != "tta")]
