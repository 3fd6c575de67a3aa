"""The command: mistakes are one line and exit code 2, photographs become files, an ablation runs end to end."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import typer
from moge.utils import io as moge_io
from PIL import Image

from ttt_lib import doctor
from ttt_lib.cli import app
from ttt_lib.core.errors import UserError
from ttt_lib.data.catalog import describe_sources, open_dataset
from ttt_lib.data.samples import write_moge_layout
from ttt_lib.runs.plan import choose_experiments, parse_set

QUICK = ["--set", "model.num_tokens=48", "--set", "train.passes=2", "--set", "train.accumulation=1",
         "--set", "losses.global.align_resolution=6", "--set", "views.longest_side=96"]  # fmt: skip


TTT = [sys.executable, "-c", "from ttt_lib.cli import main; main()"]


def of_its_own(*words) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    return subprocess.run([*TTT, *words], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ablation", "--experiments", "nonsense"], "nonsense"),
        (["ablation", "--data", "/nowhere"], "/nowhere"),
        (["ablation", "--profile", "fast"], "fast"),
        (["ablation", "--set", "train.steps=3"], "train.steps"),
        (["ablation", "--below", "0.5"], "--hardest"),
        (["adapt", "x.png", "--model", "/nowhere.pt"], "/nowhere.pt"),
        (["adapt", "x.png", "-o", f"{__file__}/out"], "cannot be written"),  # before the model and the photograph are
        (["scene", "x.png", "-o", f"{__file__}/out", "--model", "/nowhere.pt"], "cannot be written"),  # looked for
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(ttt, arguments, words):
    done = (of_its_own if "adapt" in arguments else ttt)(
        *arguments
    )  # where all there is is loaded, nothing else is said
    assert done.returncode == 2 and words in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


COMMANDS = ["ablation", "adapt", "scene", "benchmark", "models", "doctor"]


def test_every_help_answers_with_an_example_and_without_torch():
    loaded = "import sys; sys.argv[0] = 'ttt-depth'\nfrom ttt_lib.cli import main\ntry: main()\n"
    loaded += "finally: print('LOADED', sorted({'torch', 'numpy', 'pandas', 'moge'} & set(sys.modules)))"
    for arguments in ([], *([command] for command in COMMANDS)):
        command = [sys.executable, "-c", loaded, *arguments, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "Example: ttt-depth" in done.stdout, arguments
        assert "LOADED []" in done.stdout, done.stdout


def test_every_command_is_looked_at_and_its_example_is_one_it_takes():
    group = typer.main.get_command(app)
    assert list(group.commands) == COMMANDS
    for command in [group, *group.commands.values()]:
        program, name, *arguments = shlex.split(command.epilog.removeprefix("Example: "))
        assert program == "ttt-depth" and (command is group or name == command.name)
        group.commands[name].make_context(name, arguments)  # raises for an option or a value it does not know
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{command.name}: {parameter.name} has no help"


@pytest.mark.parametrize(
    ("words", "completion"),
    [
        ("ttt-depth ad", ["adapt"]),
        ("ttt-depth benchmark --ou", ["--output"]),
        ("ttt-depth adapt --experiment recom", ["recommended"]),
        ("ttt-depth ablation --experiments original,unfreeze_encoder_sh", ["original,unfreeze_encoder_shorter"]),
        ("ttt-depth ablation --profile as", ["as_released"]),
    ],
)
def test_the_shell_completes(words, completion):
    environment = {**os.environ, "_TTT_DEPTH_COMPLETE": "complete_bash", "COMP_WORDS": words,
                   "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
    done = subprocess.run(TTT, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.split() == completion, done.stderr


def test_completion_can_be_shown_and_installed(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run([*TTT, "--show-completion", "bash"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "_TTT_DEPTH_COMPLETE=complete_bash" in done.stdout, done.stderr
    done = subprocess.run([*TTT, "--install-completion", "bash"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert any("complete_bash" in p.read_text() for p in tmp_path.rglob("*") if p.is_file())


def test_parsing(tmp_path):
    found = parse_set(["train.passes=4", "train.parts=[neck, heads]"])
    assert found == {"train": {"passes": 4, "parts": ["neck", "heads"]}}
    with pytest.raises(UserError, match="--set train"):
        parse_set(["train"])
    assert describe_sources(["motorcycle"]) == [{"kind": "motorcycle"}]
    assert choose_experiments(None)[0].stem == "original" and len(choose_experiments("tta,original")) == 2
    (tmp_path / "frame").mkdir()
    (tmp_path / "frame" / "depth.png").touch()
    with pytest.raises(UserError, match="index.txt is missing"):
        describe_sources([str(tmp_path)])
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.jpg")
    assert describe_sources([str(tmp_path / "photo.jpg")]) == [{"kind": "images", "path": str(tmp_path / "photo.jpg")}]


def test_adapt_writes_what_it_promises_and_goes_on_after_a_bad_file(ttt, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 120), dtype=np.uint8)).save(tmp_path / "gray.png")
    (tmp_path / "broken.jpg").write_text("no image")
    done = ttt("adapt", tmp_path / "broken.jpg", tmp_path / "gray.png", "-o", tmp_path / "out", *QUICK)
    assert done.returncode == 1 and "broken.jpg" in done.stderr and "Traceback" not in done.stderr
    folder = tmp_path / "out" / "gray"
    depth = np.load(folder / "depth.npy")
    read = moge_io.read_depth(folder / "depth.png")
    finite = np.isfinite(depth)
    assert depth.shape == (90, 120) and np.allclose(read[finite], depth[finite], rtol=1e-3)
    record = json.loads((folder / "record.json").read_text())
    assert record["decision"] in ("accept", "blend", "reject") and record["signals"]  # `recommended` has a gate
    assert record["settings"]["train"]["passes"] == 2 and record["seconds"] > 0
    assert (folder / "cloud.ply").read_bytes()[:3] == b"ply" and (folder / "before_after.png").stat().st_size > 1000
    assert not list((tmp_path / "out").glob(".*"))


def test_adapt_takes_known_distances(ttt, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 120), dtype=np.uint8)).save(tmp_path / "gray.png")
    (tmp_path / "points.csv").write_text("u,v,metres\n10.5,20.5,3.0\n")
    arguments = ["adapt", tmp_path / "gray.png", "-o", tmp_path / "out", *QUICK, "--set", "gate.mode=off"]
    done = ttt(*arguments, "--metric-points", tmp_path / "points.csv")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "gray"
    assert np.load(folder / "depth.npy")[20, 10] == pytest.approx(3.0, rel=0.05)
    record = json.loads((folder / "record.json").read_text())
    assert record["unit"] == "metre" and "1 references" in record["reason"] and record["decision"] == "adapted"
    wrong = ttt(*arguments, "--metric-points", tmp_path / "none.csv")
    assert wrong.returncode == 1 and "no such file" in wrong.stderr and "Traceback" not in wrong.stderr


ENDLESS = """
import signal
import time
from ttt_lib import cli
from ttt_lib.report import photo_files
def adapt_photograph(*_):
    print("ready", flush=True)
    time.sleep(200)
photo_files.adapt_photograph = adapt_photograph
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
cli.main()
"""


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a process is ended without being asked")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_end_leaves_nothing_half_done(tmp_path, number):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    words = ["adapt", str(tmp_path / "a.png"), "-o", str(tmp_path / "out")]
    with subprocess.Popen([sys.executable, "-c", ENDLESS, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n" and list((tmp_path / "out").glob(".a.*.partial"))
        process.send_signal(number)
        assert process.wait(timeout=60) == (143 if number == signal.SIGTERM else 130)
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Two real frames and a broken one in the MoGe layout."""
    folder = tmp_path_factory.mktemp("frames")
    names = write_moge_layout(open_dataset(kind="motorcycle", width=128, height=88).readable(), folder)
    (folder / "broken").mkdir()
    (folder / ".index.txt").write_text("\n".join([names[0], "broken", names[1]]))
    return folder


@pytest.mark.slow
def test_an_ablation_on_real_frames_end_to_end(ttt, frames, tmp_path):
    arguments = ["ablation", "--data", frames, "--runs", tmp_path / "runs", "--workers", "1", "--no-views",
                 "--experiments", "original,control_lr0,unfreeze_encoder", *QUICK]  # fmt: skip
    done = ttt(*arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "unfreeze_encoder" in done.stdout and "broken" in done.stdout and "\x1b" not in done.stdout
    metrics = pd.read_csv(tmp_path / "runs" / "summary" / "metrics.csv")
    assert set(metrics["sample"]) == {"motorcycle_left", "motorcycle_right"}
    keys = ["dataset", "sample", "prediction", "metric", "score"]
    rows = {name: g.sort_values(keys)["value"].to_numpy() for name, g in metrics.groupby("experiment")}
    assert np.array_equal(rows["original"], rows["control_lr0"], equal_nan=True)
    assert not np.array_equal(rows["original"], rows["unfreeze_encoder"], equal_nan=True)
    assert {"depth_metric", "points_metric"} <= set(metrics.metric)  # the layout says that it is metric
    for name in ("table1.csv", "table1.tex", "table1.md", "figure4.png", "report.html", "03_ablation.ipynb"):
        assert (tmp_path / "runs" / "summary" / name).exists()
    again = ttt(*arguments)
    assert again.returncode == 0 and "3 of 3 jobs were done before" in again.stdout
    # The same numbers from two shards.
    done = ttt(*arguments[:4], tmp_path / "sharded", *arguments[5:], "--shards", "2")
    assert done.returncode == 0, done.stderr
    other = pd.read_csv(tmp_path / "sharded" / "summary" / "metrics.csv")
    pd.testing.assert_frame_equal(metrics, other)


def test_verbose_says_what_is_done_and_debug_shows_the_cause(ttt, tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text("name: [")
    log = logging.getLogger("ttt_lib")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", logging.NOTSET)
    command = ["adapt", "x.jpg", "--experiment", str(tmp_path / "bad.yaml"), "-o", str(tmp_path)]
    said = {}
    for option in ("", "--verbose", "--debug"):
        done = ttt(*filter(None, [option]), *command)
        assert done.returncode == 2
        said[option] = done.stderr
    assert said[""].count("\n") == 1 and "Traceback" not in said["--verbose"]
    assert "Traceback" in said["--debug"] and "yaml" in said["--debug"] and "direct cause" in said["--debug"]
    assert all(text.splitlines()[-1].startswith("ttt-depth: ") for text in said.values())
    monkeypatch.setattr(doctor, "CHECKS", [check for check in doctor.CHECKS if check.name == "assets"])
    done = ttt("-v", "doctor")
    assert done.returncode == 0 and "ttt_lib.models.load: model tiny: family tiny on cpu" in done.stderr
