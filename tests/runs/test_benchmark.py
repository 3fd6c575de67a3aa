"""The benchmark measures what it says it does; times themselves are not tested."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import time
from concurrent.futures import Future
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import adapt

from ttt_lib.adaptation.adapter import Adapter
from ttt_lib.adaptation.losses.presets import resolved
from ttt_lib.core.config import build_experiment
from ttt_lib.core.memory import memory_mb, peak_memory_mb, reset_peak_memory
from ttt_lib.models.base import weights_checksum
from ttt_lib.models.load import load_model
from ttt_lib.runs import benchmark, loops
from ttt_lib.runs.benchmark import growth, machine, stage_times
from ttt_lib.runs.loops import compare_loops, loops_to_compare
from ttt_lib.views import renderer

BASE = {
    "name": "test",
    "model": {"name": "tiny", "num_tokens": 48, "device": "cpu"},
    "train": {"passes": 2, "batch_size": 2, "accumulation": 1, "optimizer": {"learning_rate": 1e-3}},
    "teacher": {"refresh_every": 1},
    "views": {"longest_side": 64, "novel_view": {"probability": 1.0, "backend": "torch"}},
    "losses": {"global": {"align_resolution": 6}},
}


def test_every_stage_has_its_share_and_the_weights_stay(tiny, picture):
    before = weights_checksum(tiny)
    table = stage_times(tiny, picture.image[0], build_experiment(BASE), repeats=1)
    assert table.stage.tolist() == ["augment", "render", "forward", "loss", "backward", "optimizer", "teacher"]
    assert table.share.sum() == pytest.approx(1.0)
    assert (table.seconds > 0).all()
    assert weights_checksum(tiny) == before
    still = build_experiment(
        BASE, overrides={"views": {"novel_view": {"probability": 0.0}}, "teacher": {"refresh_every": 0}}
    )
    rest = stage_times(tiny, picture.image[0], still, repeats=1).set_index("stage").seconds
    assert rest["render"] == 0.0 and rest["teacher"] == 0.0
    assert machine(torch.device("cpu"))["torch"] == torch.__version__


def test_the_scene_is_made_once_a_target_and_is_not_a_part_of_the_views(tiny, picture, monkeypatch):
    targets, own = [], benchmark.draw_views
    monkeypatch.setattr(benchmark, "draw_views", lambda *given: targets.append(given[1]) or own(*given))
    make = renderer.build_mesh
    monkeypatch.setattr(renderer, "build_mesh", lambda *given: time.sleep(1.0) or make(*given))
    config = build_experiment(BASE, overrides={"teacher": {"refresh_every": 2}})
    seconds = stage_times(tiny, picture.image[0], config, repeats=2).set_index("stage").seconds
    assert len(targets) == 3 and all(target is targets[0] for target in targets)
    assert seconds["augment"] < 1.0 and seconds["teacher"] < 1.0
    assert seconds["render"] >= 0.5  # half a scene a pass: a new target every second step


def hold_and_let_go(megabytes: int) -> float:
    """Fill so much memory, return what was in use then, and give it back (an allocator might keep it)."""
    with mmap.mmap(-1, megabytes * 2**20) as held:
        held.write(b"x" * len(held))
        return memory_mb(torch.device("cpu"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_memory_is_of_this_process_and_its_peak_can_be_forgotten():
    cpu = torch.device("cpu")
    with_it = hold_and_let_go(64)
    # The system counts the pages of a thread in batches.
    assert peak_memory_mb(cpu) + 5 > with_it > memory_mb(cpu) + 50
    reset_peak_memory(cpu)
    assert peak_memory_mb(cpu) < with_it - 50


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_an_adaptation_tells_its_own_peak(tiny, picture):
    adapt(tiny, picture.image[0], build_experiment(BASE))  # so that the second one needs no more pages
    with_it = hold_and_let_go(256)
    assert adapt(tiny, picture.image[0], build_experiment(BASE)).peak_memory_mb < with_it


def test_growth_passes_the_setting_on(picture, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Adapter, "adapt", lambda self, image, name: seen.append((self.config.train.passes, self.model.num_tokens))
    )
    config = build_experiment(BASE)
    table = growth(picture.image[0], config, "train.passes", [2, 5])
    assert seen == [(2, 48), (5, 48)] and list(table["train.passes"]) == [2, 5]
    seen.clear()
    growth(picture.image[0], config, "model.num_tokens", [60])
    assert seen == [(2, 60)]
    seen.clear()
    assert (growth(picture.image[0], config, "images", [3]).images_a_minute > 0).all()
    assert len(seen) == 3


@pytest.mark.slow
def test_loops_are_compared_in_their_own_processes(picture):
    config = build_experiment(BASE)
    longer = build_experiment(BASE, overrides={"train": {"passes": 4}, "released": {"reload_model": True}})
    table = compare_loops({"longer": longer, "plain": config}, picture.image[0], repeats=1).set_index("loop")
    assert table.passes.to_dict() == {"longer": 4, "plain": 2}
    assert table.faster["longer"] == 1.0 and table.memory["longer"] == 1.0
    assert (table.peak_mb > 50).all() and (table.seconds > 0).all()
    assert (table.added_mb > 0).all() and (table.added_mb < table.peak_mb).all()
    assert table.memory["plain"] == pytest.approx(table.added_mb["plain"] / table.added_mb["longer"])


def test_a_loops_process_takes_the_present_environment(picture, monkeypatch):
    """That of a server which processes are forked from is of when it began."""
    monkeypatch.setenv("TTT_PRESENT", "before")
    settings = build_experiment(BASE).as_parameters()
    assert loops._adapt_once(settings, picture.image[0], 1, 1, {"TTT_PRESENT": "now"})["passes"] == 2
    assert os.environ["TTT_PRESENT"] == "now"


def test_the_loops_take_the_same_steps_and_views():
    loops = loops_to_compare({"name": "tiny", "num_tokens": 48, "device": "cpu"}, 64, 8)
    equal = {(c.train.passes, c.train.batch_size, c.train.accumulation, c.views.longest_side) for c in loops.values()}
    assert equal - {(8, 2, 2, 64)} == {(4, 2, 1, 64)}  # `recommended` is shorter
    assert {c.model.num_tokens for c in loops.values()} == {48}
    assert {tuple(c.train.parts) for name, c in loops.items() if "recommended" not in name} == {
        ("encoder", "neck", "heads")
    }
    released, ours = loops["as released"], loops["all terms"]
    assert (
        released.released.full_cost_alignment and released.released.reload_model and released.released.published_layers
    )
    assert not any(ours.released.model_dump().values())
    patches = {
        name: resolved(config, load_model("tiny")).losses["local_64"].weight
        for name, config in loops.items() if name in ("as released", "all terms", "without patches")
    }  # fmt: skip
    assert patches == {"as released": 1.0, "all terms": 1.0, "without patches": 0.0}


def test_rounds_end_with_the_time_and_what_fails_is_a_row(picture, monkeypatch, tmp_path):
    clock, ran = iter(range(0, 10_000, 60)), []

    class Pool:
        """Runs nothing; a minute passes whenever somebody looks at the clock."""

        def __init__(self, *_, **__): ...

        __enter__, __exit__ = lambda self: self, lambda *_: None

        def submit(self, function, settings, *_):
            ran.append(settings["name"])
            name, future = settings["name"], Future()
            if name == "big":
                future.set_exception(RuntimeError("CUDA out of memory"))
            else:
                future.set_result(dict.fromkeys(("seconds", "passes", "peak_mb", "added_mb", "memory"), 2.0))
            return future

    monkeypatch.setattr(loops, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(loops.time, "monotonic", lambda: next(clock))
    configs = {name: build_experiment(BASE, overrides={"name": name}) for name in ("plain", "big")}
    kept = []
    table = compare_loops(configs, picture.image[0], rounds=9, seconds=150, keep=lambda t: kept.append(list(t.loop)))
    assert kept == [["plain"], ["plain", "big"], ["plain", "big"]]  # nothing measured waits for the end
    table = table.set_index("loop")
    assert ran == ["plain", "big", "plain"] and list(table.rounds) == [2, 0]
    assert table.failed["big"] == "RuntimeError: CUDA out of memory" and math.isnan(table.seconds["big"])
    assert table.faster["plain"] == 1.0 and not table.failed["plain"]


@pytest.mark.slow
def test_the_command_writes_its_table(tmp_path, monkeypatch):
    own = loops.loops_to_compare
    small = lambda model, side, passes: {  # noqa: E731
        name: config
        for name, config in own({**model, "num_tokens": 48, "device": "cpu"}, 64, passes).items()
        if name in ("as released", "all terms, together, bfloat16", "recommended")
    }
    monkeypatch.setattr(loops, "loops_to_compare", small)
    said = loops.benchmark(tmp_path, quick=True, passes=1, rounds=1)
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["loop"] for row in found["loops"]] == ["as released", "all terms, together, bfloat16", "recommended"]
    assert all(row["seconds"] > 0 and row["rounds"] == 1 and not row["failed"] for row in found["loops"])
    assert found["torch"] == torch.__version__ and "as released, 512 passes" in said
    assert said in (tmp_path / "benchmark.md").read_text()


@pytest.mark.slow
def test_the_memory_of_the_parent_is_not_the_loops(picture):
    hold_and_let_go(1200)
    table = compare_loops({"plain": build_experiment(BASE)}, picture.image[0], repeats=1)
    assert table.peak_mb[0] < 1200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "parameters"),
    [
        ("05_performance", {
            "model": {"name": "tiny", "num_tokens": 48}, "longest_side": 64, "passes": 1, "repeats": 1, "tokens": [48],
            "sides": [64], "steps": [1], "images": [1], "batch_sizes": [1],
        }),
        ("04_reliability", {
            "calibration_data": [{"kind": "shifted", "count": 4, "seed": 11, "width": 64, "height": 48}],
            "test_data": [{"kind": "shifted", "count": 3, "width": 64, "height": 48}],
            "tour_data": [{"kind": "tours", "count": 1, "views": [2], "width": 64, "height": 48}],  # refused
            "overrides": {"model": {"num_tokens": 48}, "train": {"passes": 1}, "gate": {"views": 1}},
        }),
    ],
)  # fmt: skip
def test_the_notebook_runs_headless(kernel, tmp_path, notebook, parameters):
    from ttt_lib.runs.catalog import NOTEBOOKS

    parameters = {**parameters, "threads": 1}
    if notebook == "04_reliability":
        parameters["output_dir"] = str(tmp_path / "out")
    kernel.execute(NOTEBOOKS / f"{notebook}.ipynb", tmp_path / "out.ipynb", parameters)
    if notebook == "04_reliability":
        from ttt_lib.adaptation.gate.decision import read_calibration

        assert read_calibration(tmp_path / "out" / "gate.json").about["samples"] == 4
        return
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    shown = "\n".join(o.get("text") or o["data"].get("text/plain", "") for c in cells for o in c.get("outputs", []))
    for table, rows in {
        "ms a pass": ["augment", "render", "forward", "loss", "backward", "optimizer", "teacher"],
        "loop  passes": ["as released", "all terms", "all terms, together", "demo"],
    }.items():
        assert table in shown
        for row in rows:
            assert re.search(rf"^\d* *{row} +\d", shown, re.M), row
    for key in ("train.passes", "model.num_tokens", "views.longest_side", "train.batch_size", "images"):
        assert re.search(rf"{re.escape(key)}  seconds  images_a_minute\n0 ", shown), key
