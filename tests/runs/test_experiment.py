"""One experiment over a set: result files that stay readable, references, sequences."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from ttt_lib.adaptation.adapter import Adapter
from ttt_lib.adaptation.loop import NumericalError
from ttt_lib.core.config import build_experiment
from ttt_lib.core.memory import is_out_of_memory
from ttt_lib.runs import experiment as experiment_module
from ttt_lib.runs.experiment import _append, load_with_profile, run_experiment

BASE = {
    "name": "test",
    "model": {"name": "tiny", "num_tokens": 48, "device": "cpu"},
    "train": {"passes": 1, "batch_size": 2, "accumulation": 1, "optimizer": {"learning_rate": 1e-3}},
    "views": {"longest_side": 80},
    "losses": {"global": {"align_resolution": 6}, "mask": {"weight": 0.1}},
    "data": [{"kind": "synthetic", "count": 3, "width": 80, "height": 60}],
}


def config(**overrides):
    return build_experiment(BASE, overrides=overrides)


def test_new_columns_do_not_shift_old_rows(tmp_path):
    path, tables = tmp_path / "t.csv", []
    for rows in (
        pd.DataFrame([{"a": 1, "b": 2}]),
        pd.DataFrame([{"c": 3.5, "a": 4}]),
        pd.DataFrame([{"b": 5, "a": 6}]),
    ):
        _append(rows, path, tables)
        tables.append(rows)
    found = pd.read_csv(path)
    assert list(found.columns) == ["a", "b", "c"]
    assert found.a.tolist() == [1, 4, 6]
    assert np.array_equal(found.b, [2, np.nan, 5], equal_nan=True)
    assert np.array_equal(found.c, [np.nan, 3.5, np.nan], equal_nan=True)


def test_a_first_sample_that_fails_leaves_readable_files(tmp_path, monkeypatch):
    adapt_module = import_module("ttt_lib.adaptation.adapter")  # as an attribute of the package this is the function
    real, calls = adapt_module.train_student, []

    def fails_once(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise NumericalError("made up")
        return real(*arguments, **options)

    monkeypatch.setattr(adapt_module, "train_student", fails_once)
    run = run_experiment(config(gate={"mode": "measure", "views": 1, "signals": ["edges"]}), tmp_path, progress=False)
    samples = pd.read_csv(tmp_path / "samples.csv")
    assert samples.decision.tolist() == ["original", "adapted", "adapted"]
    assert "made up" in samples.reason[0]
    assert samples.signal_edges_gain.isna().tolist() == [True, False, False]
    metrics = pd.read_csv(tmp_path / "metrics.csv")
    assert set(metrics.prediction) == {"original", "final", "blended"}
    assert len(metrics) == len(run.metrics)


def test_references_come_from_the_truth_and_leave_the_scores(tmp_path):
    run = run_experiment(config(references=50, train={"passes": 0}), None, progress=False)
    rel = run.metrics[(run.metrics.metric == "depth_metric") & (run.metrics.score == "rel")]
    means = rel.groupby("prediction").value.mean()
    assert means["final"] < means["original"]
    assert run.samples.reason.str.contains("50 references").all()


def test_samples_without_metric_truth_are_left_out_of_references(monkeypatch):
    from dataclasses import replace

    real = experiment_module.iterate

    def second_is_relative(sets):
        for i, sample in enumerate(real(sets)):
            yield replace(sample, is_metric=i != 1)

    monkeypatch.setattr(experiment_module, "iterate", second_is_relative)
    run = run_experiment(config(references=5, train={"passes": 0}), None, progress=False)
    assert len(run.samples) == 2 and len(run.left_out) == 1
    assert "metric truth" in run.left_out.reason.iloc[0]


@pytest.mark.parametrize(("reset", "begins"), [("per_image", [0, 0, 0]), ("never", [0, 1, 1]), (2, [0, 1, 0])])
def test_sequences_begin_where_they_should(monkeypatch, reset, begins):
    seen = []
    real = Adapter.adapt

    def spy(*arguments, start=None, **options):
        seen.append(int(start is not None))
        return real(*arguments, start=start, **options)

    monkeypatch.setattr(Adapter, "adapt", spy)
    run_experiment(config(train={"reset": reset}), None, progress=False)
    assert seen == begins


def test_the_profile_follows_the_model_unless_it_is_named():
    file = ROOT / "notebooks" / "experiments" / "unfreeze_encoder.yaml"
    assert load_with_profile(file, "auto", None) == load_with_profile(file, "demo", None)
    large = {"model": {"name": "Ruicheng/moge-2-vits-normal"}}
    assert load_with_profile(file, "auto", large) == load_with_profile(file, None, large)
    assert load_with_profile(file, "auto", large).train.passes == 512
    assert load_with_profile(file, "demo", large).train.passes < 512


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, told):
    assert is_out_of_memory(error) is told
