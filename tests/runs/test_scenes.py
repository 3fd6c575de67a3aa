"""Samples as photographs of scenes: once a scene, the same whatever the shard, and what stands alone."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from conftest import small_experiment
from true_scene import true_scene

from ttt_lib.data.samples import SampleSet
from ttt_lib.evaluation.calibration import signal_quality
from ttt_lib.runs import scene_study
from ttt_lib.runs.experiment import Adaptations, run_experiment
from ttt_lib.runs.scene_study import ALONE, Scenes, control_scenes, scene_signals, study

experiment = small_experiment(supervision={"photographs": {}}, train={"method": "none", "passes": 0})


@pytest.fixture
def grouped(monkeypatch):
    """Three samples, two of them a scene, whose reconstruction is the truth."""
    scene, samples = true_scene(views=3, scale=0.2)
    by_name = {sample.name: sample for sample in samples}
    asked = []

    def reconstruct(pictures, seed=0, straight=False):
        assert straight  # samples have the truth of pinhole cameras
        asked.append([picture.name for picture in pictures])
        assert all(0.3 < picture.focal < 3 for picture in pictures)  # the model's guess
        return scene

    monkeypatch.setattr(scene_study, "reconstruct", reconstruct)
    names = [sample.name for sample in samples]
    return SampleSet("set", names, by_name.__getitem__, scenes={"s": names}), asked


def test_a_scene_is_reconstructed_once_and_gives_the_same_in_any_shard(tiny, grouped):
    samples, asked = grouped
    scenes = Scenes(tiny, experiment())
    results = {name: scenes.adapt(samples, samples.load(name)) for name in samples.names}
    assert asked == [samples.names]
    shard = samples.shard(2, 3)
    alone = Scenes(tiny, experiment()).adapt(shard, shard[0])
    assert torch.equal(alone.final.depth, results[shard.names[0]].final.depth)
    assert asked == [samples.names] * 2


def test_what_stands_alone_is_left_as_it_is_or_adapted_alone(tiny, grouped):
    samples, asked = grouped
    single = SampleSet("set", samples.names, samples.load)
    result = Scenes(tiny, experiment()).adapt(single, single[0])
    assert result.final is result.original and result.reason == f"original kept: {ALONE}" and not asked
    by_itself = experiment(supervision={"photographs": {"alone": "single"}})
    assert Scenes(tiny, by_itself).adapt(single, single[0]) is None
    _, result = Adaptations(by_itself).adapt(single, single[0])
    assert result.decision == "original" and result.reason == ""  # train.method none


def test_an_experiment_with_photographs_runs_over_a_set(tmp_path):
    """Real reconstruction: two views of a tour that is too small for it, so the sentence is in the table."""
    config = experiment(
        data=[{"kind": "tours", "count": 1, "views": [2], "baselines": [0.1], "width": 64, "height": 48}]
    )
    run = run_experiment(config, tmp_path, progress=False)
    assert run.samples["decision"].tolist() == ["original", "original"] and not len(run.left_out)
    assert run.samples["reason"].str.startswith("original kept: ").all()


def test_a_study_says_what_was_gained_and_the_controls_gain_nothing(tiny):
    scene, samples = true_scene(views=3, scale=0.2)
    other = true_scene(seed=11, kind="room", views=3, scale=0.2)[0]
    table = study(tiny, experiment(), {"one": (scene, samples)})
    assert table["photograph"].tolist() == [sample.name for sample in samples]
    # measured by perfect cameras: most of the picture is right to a quarter
    assert (table["depth_final"] >= table["depth_original"]).all() and table["depth_final"].mean() > 0.9
    assert table["rel_final"].mean() < 0.5 * table["rel_original"].mean()
    controls = control_scenes(tiny, scene, other)
    found = study(tiny, experiment(), {name: (changed, samples) for name, changed in controls.items()})
    assert len(controls) == 3 and (found["decision"] == "original").all()


def test_what_decides_stands_beside_what_was_gained():
    """Three photographs of a scene and one of a refused one; the more the held-back tracks say, the more was gained."""
    rows = [
        {"held_back_original": 0.2, "held_back_corrected": 0.2 / ratio, "rank": 0.5, "confirmed": 0.9, "beyond": 0.0,
         "measured": 0.5, "held_back_tracks": 50, "depth_original": 0.6, "depth_final": 0.6 + gain, "points_original": 0.5,
         "points_final": 0.5 + 3 * gain}
        for ratio, gain in ((1, 0.0), (2, 0.05), (4, 0.1))
    ]  # fmt: skip
    table = scene_signals(pd.DataFrame([*rows, {"depth_original": 0.6, "depth_final": 0.6}]))
    assert table["gain_adapted"].tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert table["signal_held_back_gain"].tolist() == pytest.approx([0.0, math.log(2), math.log(4)])
    assert signal_quality(table).set_index("signal")["spearman"]["held_back_gain"] == pytest.approx(1.0)
    nothing = dict.fromkeys(["depth_original", "depth_final", "points_original", "points_final"], 0.5)
    assert scene_signals(pd.DataFrame([nothing, nothing])).empty  # all refused
