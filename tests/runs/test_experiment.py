"""One experiment over a set: result files that stay readable, references, sequences."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from ttt_lib.adaptation.adapter import Adapter
from ttt_lib.adaptation.loop import NumericalError
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.config import ExperimentConfig, build_experiment
from ttt_lib.core.errors import DataError
from ttt_lib.core.memory import is_out_of_memory
from ttt_lib.core.types import Sample
from ttt_lib.runs import experiment as experiment_module
from ttt_lib.runs.experiment import _append, experiment_from_parameters, load_with_profile, run_experiment
from ttt_lib.runs.gallery import gallery_content, prediction_name

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


@pytest.mark.parametrize("notebook", ["01_augmentation", "02_adaptation"])
def test_a_notebook_has_the_settings_of_its_job(notebook):
    """Also where a row has no losses at all, which is not the default; unset parameters are the defaults."""
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    defaults: dict = {}
    exec(next(c.source for c in cells if "parameters" in c.metadata.get("tags", [])), {}, defaults)
    unset = {key: defaults[key] for key in defaults.keys() & ExperimentConfig.model_fields.keys()}
    for row in (config(), config().model_copy(update={"losses": {}})):
        assert experiment_from_parameters({**unset, **row.as_parameters()}, None) == row
    assert experiment_from_parameters(unset, None) == build_experiment({"name": unset["name"]})


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
    real = experiment_module.open_dataset

    def second_is_relative(**options):
        found = real(**options)
        load = found.load
        found.load = lambda name: replace(load(name), is_metric=name != found.names[1])
        return found

    monkeypatch.setattr(experiment_module, "open_dataset", second_is_relative)
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


# ------------------------------------------------------------------- every sample in one place, whatever goes wrong


def kept(folder):
    """(dataset, sample) of each table that was written."""
    tables = {path.stem: pd.read_csv(path, dtype=str) for path in folder.glob("*.csv")}
    return {name: set(zip(table["dataset"], table["sample"])) for name, table in tables.items()}


NAMES = {("synthetic", name) for name in ("000", "001", "002")}


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("adapt", ValueError("a picture of no kind"), "ValueError: a picture of no kind"),
        ("adapt", IndexError("index 7 is out of bounds"), "IndexError: index 7 is out of bounds"),
        ("adapt", RuntimeError("out of memory"), "out of memory: lower views.longest_side"),
        ("adapt", RuntimeError("shapes differ"), "RuntimeError: shapes differ"),
        ("scores_of_result", IndexError("no finite pixel"), "IndexError: no finite pixel"),
        ("gallery_content", AttributeError("no depth"), "AttributeError: no depth"),
    ],
)
def test_whatever_one_sample_raises_it_alone_is_left_out(tmp_path, monkeypatch, caplog, where, error, said):
    """Also after its scores: a sample is in the results or left out, never both, never neither."""
    owner = Adapter if where == "adapt" else experiment_module
    real, calls = getattr(owner, where), []

    def fails_first(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(owner, where, fails_first)
    run = run_experiment(config(train={"passes": 0}), tmp_path, progress=False)
    found = kept(tmp_path)
    assert found["left_out"] == {("synthetic", "000")}
    assert found["samples"] == found["metrics"] == NAMES - found["left_out"]
    assert run.left_out.reason.tolist()[0].startswith(said) and len(list((tmp_path / "predictions").iterdir())) == 2
    traced = any(record.exc_info for record in caplog.records if "synthetic/000 is left out" in record.message)
    assert traced == ("memory" not in said)  # the log has where an unexpected one came from


def test_a_device_that_failed_is_an_error_of_the_run(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Adapter, "adapt", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_experiment(config(), None, progress=False)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_limit_reads_no_other_sample(monkeypatch, limit):
    real, read = experiment_module.open_dataset, []

    def watched(**options):
        found = real(**options)
        load = found.load
        found.load = lambda name: read.append(name) or load(name)
        return found

    monkeypatch.setattr(experiment_module, "open_dataset", watched)
    run = run_experiment(config(train={"passes": 0}), None, progress=False, limit=limit)
    assert read == ["000", "001"][:limit] and len(run.samples) == limit


def test_a_sample_with_too_little_truth_for_a_score_is_left_out(tmp_path, monkeypatch):
    real = experiment_module.open_dataset

    def hardly_known(**options):
        found = real(**options)
        load = found.load

        def second(name):
            sample = load(name)
            if name == "001":
                mask = torch.zeros_like(sample.mask)
                mask[0, :15] = True
                sample = replace(sample, mask=mask, depth=torch.where(mask, 1.0, torch.nan))
            return sample

        found.load = second
        return found

    monkeypatch.setattr(experiment_module, "open_dataset", hardly_known)
    run = run_experiment(config(train={"passes": 0}), tmp_path, progress=False)
    assert kept(tmp_path)["samples"] == kept(tmp_path)["metrics"] == NAMES - {("synthetic", "001")}
    assert run.left_out["sample"].tolist() == ["001"] and "at least 16 pixels" in run.left_out.reason[0]


def test_two_samples_of_one_name_are_refused():
    twice = [BASE["data"][0], {**BASE["data"][0], "seed": 1}]
    with pytest.raises(DataError, match="two samples are called synthetic/000; give each set a `name`"):
        run_experiment(config(data=twice), None, progress=False)
    named = [twice[0], {**twice[1], "name": "other"}]
    assert len(run_experiment(config(data=named, train={"passes": 0}), None, progress=False).samples) == 6


def test_names_map_to_files_one_to_one():
    names = [("a", "b/c"), ("a", "b_c"), ("a/b", "c"), ("a_b", "c"), ("a__b", "c"), ("a", "b__c"), ("x" * 200, "y" * 83),
             ("x" * 200, "y" * 84), ("ü", "名"), ("ü", "前"), ("", "a"), ("a", "")]  # fmt: skip
    files = [prediction_name(*name) for name in names]
    assert len(set(files)) == len(names)
    assert all(len(file.encode()) < 150 and "/" not in file and file.isascii() for file in files)


def test_the_gallery_keeps_millimetres(tiny, image):
    """A tower at 2,000 m in millimetres is 2e6, more than half precision holds."""
    prediction = tiny.predict(image)
    far = replace(prediction, depth=prediction.depth * 1e6)
    sample = Sample("s", "d", image, depth=far.depth)
    content = gallery_content(sample, AdaptResult(original=far, adapted=None, final=far, decision="original"))
    for name in ("depth_original", "depth_final", "depth_truth"):
        assert content[name].dtype == np.float32 and np.isfinite(content[name]).all() and content[name].max() > 70_000
