"""Bad input, broadly: whatever is wrong with what a user gives ends in one sentence that says what and where."""

# ruff: noqa: E501 (tables of cases)

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moge.utils import io as moge_io
from papermill.parameterize import parameterize_notebook, parameterize_path
from PIL import Image, PngImagePlugin

from ttt_lib.adaptation.gate.decision import read_calibration
from ttt_lib.core.config import build_experiment, load_experiment, load_profile
from ttt_lib.core.errors import UserError
from ttt_lib.core.schema import RESERVED
from ttt_lib.data import moge_layout
from ttt_lib.data.catalog import open_dataset
from ttt_lib.data.images import read_photo
from ttt_lib.data.known_distances import read_references
from ttt_lib.data.samples import write_moge_layout
from ttt_lib.models.load import load_model
from ttt_lib.report import page as report
from ttt_lib.report import photo_files as photos
from ttt_lib.runs import cluster
from ttt_lib.runs import jobs as batch
from ttt_lib.runs import notebook as kernel
from ttt_lib.runs.plan import parse_set
from ttt_lib.runs.results import read_runs

FUZZ = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
few = settings(max_examples=25, **FUZZ)
many = settings(max_examples=200, **FUZZ)


def sentence(error: object, *words: object) -> None:
    """One line, not endless, with these words."""
    text = str(error)
    assert text.isprintable() and 10 < len(text) <= 2000, text
    for word in words:
        assert str(word) in text, text


def refused(function, *arguments, words=(), **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    sentence(caught.value, *words)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ configurations

BOMB = "\n".join(["a: &a [x, x]", *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi"))])
TEXTS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "latin": b"name: \xe9\xff",
    "utf16": "name: x".encode("utf-16"),
    "tag": b"name: tag\ndescription: !!python/object/apply:os.system ['touch SENTINEL']",
    "bomb": f"name: *i\n{BOMB}".encode().replace(b"name: *i\n", b"") + b"\nname: *i",
    "deep": b"name: " + b"[" * 3000,
    "deep_map": b"name: " + b"{a: " * 3000 + b"1" + b"}" * 3000,
    "date": b"name: date\ndescription: 2001-99-99",
    "tagged_int": b"name: tagged_int\nseed: !!int abc",
    "digits": b"name: digits\nseed: " + b"9" * 5000,
    "hex": b"name: hex\nseed: 0x" + b"f" * 5000,
    "nan": b"name: nan\ntrain: {optimizer: {learning_rate: .nan}}",
    "inf": b"name: inf\nlosses: {global: {weight: .inf}}",
    "negative": b"name: negative\ntrain: {batch_size: -99999999999999999999}",
    "huge": b"name: huge\ntrain: {batch_size: 99999999999999999999}",
    "twice": b"name: twice\ntrain: {passes: 1, passes: 2}",
    "recursive": b"name: recursive\ntrain: &a\n  optimizer: *a",
    "recursive_list": b"name: recursive_list\ndata: &a [*a]",
    "keys": b"name: keys\ntrain: {3: 4, null: 5}\n[1, 2]: 3",
    "long": b"name: long\nseed: '" + b"x" * 100000 + b"'",
    "surrogate": b'name: surrogate\ndescription: "\\ud800"',
    "documents": b"name: documents\n---\nname: other",
    "null": b"name: null\ntrain:\n",
    "nesterov": b"name: nesterov\ntrain: {optimizer: {name: sgd, nesterov: true}}",
    "one_pixel": b"name: one_pixel\nviews: {longest_side: 1}",
    "summary": b"name: summary",
    "...": b"name: '..'",
    ".work": b"name: .work",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_configuration(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"{name}.yaml"
    path.write_bytes(TEXTS[name])
    refused(load_experiment, path, words=[path])
    if name not in ("surrogate", "summary"):  # of which a profile may hold anything
        refused(load_experiment, path, ROOT / "notebooks" / "profiles" / "demo.yaml", words=[path])
    assert os.listdir(tmp_path) == [path.name]


def test_names_of_files_that_no_file_system_takes(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("x" * 300 + ".yaml", "a\0b.yaml", "folder.yaml", "pipe.yaml", "line\nbreak.yaml", "\udcff.yaml"):
        for read in (load_experiment, load_profile, read_calibration, read_photo, cluster.read_yaml):
            refused(read, tmp_path / name)
        for kind in ("moge", "images"):
            if not name.endswith("r.yaml"):
                refused(open_dataset, kind, path=str(tmp_path / name))
        refused(load_model, str(tmp_path / name), "cpu")
    refused(load_model, "~nobody-of-this-name/x.pt", "cpu", words=["nobody-of-this-name"])


@pytest.mark.parametrize(
    "text", ["set: [1]", "set: {train: 3}", "scale: {passes: .inf}", "scale: {passes: 1.0e+308}", "set: &a {a: *a}",
             "set: {name: '../x'}", "set: {3: 4}", "scale:", "set: {views: {crop: {scale: 7}}}", "set: {seed: 1, seed: 2}"]
)  # fmt: skip
def test_a_profile(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    refused(
        load_experiment, ROOT / "notebooks/experiments/unfreeze_encoder.yaml", tmp_path / "mine.yaml", words=["mine"]
    )


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("x" * 300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=8,
)
WHOLE = build_experiment({"name": "whole", "data": [{"kind": "synthetic"}]}).as_parameters()
PLACES = [(key,) for key in WHOLE] + [(k, sub) for k, v in WHOLE.items() if isinstance(v, dict) for sub in v]


def check_a_value_of_any_kind(place: tuple, junk: object) -> None:
    content = json.loads(json.dumps(WHOLE))
    target = content[place[0]] if len(place) > 1 else content
    target[place[-1]] = junk
    try:
        config = build_experiment(content, source="mine.yaml")
    except UserError as error:
        sentence(error, "mine.yaml")
    else:
        assert build_experiment(config.as_parameters()) == config


def check_any_bytes(folder: Path, content: bytes) -> None:
    """What needs a beginning of its own takes no bytes at all; of the two that may take some, what they took is right."""
    for suffix, read in (
        ("yaml", load_experiment), ("json", moge_layout.read_eval_config), ("json", read_calibration),
        ("csv", lambda path: read_references(path, (9, 9))), ("png", lambda path: read_references(path, (9, 9))),
        ("jpg", read_photo), ("pt", lambda path: load_model(str(path), "cpu")),
    ):  # fmt: skip
        path = folder / f"any.{suffix}"
        path.write_bytes(content)
        refused(read, path, words=[path])
    for suffix, read, right in (
        ("yaml", load_profile, lambda found: found.name == "any" and isinstance(yaml.safe_load(content), dict)),
        ("txt", lambda path: moge_layout.read_index(path.parent, path.name), lambda names: names and all(
            name.isprintable() and not name.startswith("/") and ".." not in name.split("/") for name in names)),
    ):  # fmt: skip
        path = folder / f"any.{suffix}"
        path.write_bytes(content)
        try:
            found = read(path)
        except UserError as error:
            sentence(error, path)
        else:
            assert right(found), (content, found)


@few
@given(st.sampled_from(PLACES), JUNK)
def test_a_value_of_any_kind(place, junk):
    check_a_value_of_any_kind(place, junk)


@few
@given(content=st.binary(max_size=200) | JUNK.map(lambda junk: repr(junk).encode("utf-8", "replace")))
def test_any_bytes_as_any_file(tmp_path_factory, content):
    check_any_bytes(tmp_path_factory.getbasetemp(), content)


@pytest.mark.slow
@many
@given(st.sampled_from(PLACES), JUNK)
def test_many_values_of_any_kind(place, junk):
    check_a_value_of_any_kind(place, junk)


@pytest.mark.slow
@many
@given(content=st.binary(max_size=2000) | JUNK.map(lambda junk: repr(junk).encode("utf-8", "replace")))
def test_many_bytes_as_any_file(tmp_path_factory, content):
    check_any_bytes(tmp_path_factory.getbasetemp(), content)


# -------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(ttt, monkeypatch, tmp_path):
    """Run the command in `tmp_path`, where p.png is a photograph; gives exit code and stderr, and no job may begin."""

    def no_jobs(*_, **__):
        raise AssertionError("a job would have been run")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch, "run_jobs", no_jobs)
    picture(tmp_path / "p.png")

    def run(*words: object) -> tuple[int, str]:
        done = ttt(*words)
        return done.returncode, done.stderr

    return run


def picture(path: Path, size=(40, 32)) -> Path:
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


PLAIN = ["--set", "train.method=none", "--set", "model.num_tokens=48", "--set", "gate.mode=off"]
SETTINGS = [
    "train", "=3", "a..b=3", "train=3", "train.passes=[", "train.passes=a: b: c", "train.passes=*x", "train.passes=2001-99-99",
    "train.passes=!!python/object/apply:os.system ['touch SENTINEL']", "train.passes=" + "9" * 5000, "seed=1e400",
    "seed=" + "[" * 2000, "name=../x", "name=..", "model.device=meta", "model.device=hpu", "model.device=xla", "model.device=",
    "model.name=" + "x" * 300, "model.name=~nobody/x", "model.name=\"a\\0b\"", "model.name=.", "data=3", "losses.globl={}", "x" * 5000 + "=3",
    "train.optimizer={lr: 3}",
]  # fmt: skip
LINES = {
    **{f"set {text[:30]}": ["adapt", "p.png", "--set", text] for text in SETTINGS},
    "set twice": ["adapt", "p.png", "--set", "train=3", "--set", "train.passes=3"],
    "set and option": ["adapt", "p.png", "--set", "model=3", "--model", "tiny"],
    "no image": ["adapt", "none.png", *PLAIN],
    "folder without images": ["adapt", "empty", *PLAIN],
    "image of a name no system takes": ["adapt", "y" * 283 + ".png", *PLAIN],
    "unit is none": ["adapt", "p.png", "--metric-points", "x.png", "--metric-unit", "inch"],
    "unit of nothing": ["adapt", "p.png", "--metric-unit", "mm"],
    "image is a device": ["adapt", "/dev/zero", *PLAIN],
    "empty name": ["adapt", "", *PLAIN],
    "one result for two": ["adapt", "p.png", "other/p.png", *PLAIN],
    "experiment empty": ["adapt", "p.png", "--experiment", ""],
    "experiment long": ["adapt", "p.png", "--experiment", "x" * 300],
    "experiment is an image": ["adapt", "p.png", "--experiment", "p.png"],
    "profile long": ["adapt", "p.png", "--profile", "x" * 300],
    "profile is a folder": ["adapt", "p.png", "--profile", "."],
    "output is a file": ["adapt", "p.png", *PLAIN, "-o", "p.png"],
    "output is long": ["adapt", "p.png", *PLAIN, "-o", "y" * 300],
    "points for two": ["adapt", "p.png", "q.png", "--metric-points", "x.csv"],
    "experiments empty": ["ablation", "--experiments", ","],
    "data long": ["ablation", "--data", "x" * 300],
    "data is no set": ["ablation", "--data", "/dev/null"],
    "data without end": ["ablation", "--set", "data=[{kind: synthetic, count: 100000000000}]"],
    "sides without end": ["ablation", "--set", "data=[{kind: synthetic, width: 1000000000}]"],
    "shards without end": ["ablation", "--experiments", "original", "--shards", "1000000000", "--set", "data=[{kind: synthetic, count: 2}]"],
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_command_line(command, tmp_path, name):
    (tmp_path / "empty").mkdir()
    code, said = command(*LINES[name])
    assert code in (1, 2) and said.startswith("ttt-depth: ") and said.count("\n") == 1, said
    sentence(said.strip())
    assert not (tmp_path / "SENTINEL").exists()


@pytest.mark.parametrize(
    "line", [["adapt"], ["adapt", "--nothing"], ["nothing"], ["models", "x"], ["ablation", "--workers", "-1"],
             ["ablation", "--threads", "10000000"], ["ablation", "--limit", "many"]]
)  # fmt: skip
def test_a_command_that_does_not_exist(command, line):
    code, said = command(*line)
    assert code == 2 and "Usage: ttt-depth" in said and "Traceback" not in said


SETS = {
    "empty": "", "list": "[]", "none": "{}", "deep": "[" * 100000, "number": '{"a": 3}', "path": '{"a": {"path": 3}}',
    "no_path": '{"a": {}}', "unknown": '{"a": {"path": ".", "foo": 3}}', "kind": '{"a": {"path": ".", "kind": "images"}}',
    "twice": '{"a": {"path": "."}, "a": {"path": "."}}', "nan": '{"a": {"path": ".", "depth_unit": NaN}}', "name": '{"../x": {"path": "."}}',
    "split": '{"a": {"path": ".", "split": "../../x"}}', "digits": '{"a": {"path": ".", "width": 1' + "0" * 5000 + "}}",
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_file_of_sets(command, tmp_path, name):
    (tmp_path / "sets.json").write_text(SETS[name])
    code, said = command("ablation", "--experiments", "original", "--data", "sets.json")
    assert code == 2 and said.startswith("ttt-depth: ") and said.count("\n") == 1, said
    assert any(word in said for word in ("sets.json", "data.0", "split", "`a`"))


def test_photographs_named_to_escape_and_results_that_are_none(command, tmp_path):
    work = tmp_path / "work"
    (work / "out" / "p").mkdir(parents=True)
    for place in (work, work / "out", work / "out" / "p"):
        (place / "thesis.txt").write_text("years of work")
    for name in ("..png", "...png"):
        shutil.copy(tmp_path / "p.png", tmp_path / name)
        code, said = command("adapt", name, *PLAIN, "-o", work / "out")
        assert code == (0 if Path(name).stem.strip(".") else 1), said
    code, said = command("adapt", "p.png", *PLAIN, "-o", work / "out")
    assert code == 1 and "no earlier result" in said
    assert len(list(work.rglob("thesis.txt"))) == 3


@pytest.mark.parametrize("name", ["a{b}\n<c>'\".png", os.fsdecode(b"\xff\xfe.png"), "名.png", "-x.png"])
def test_photographs_of_any_name(command, tmp_path, name):
    picture(tmp_path / "p.png").rename(tmp_path / name)
    code, said = command("adapt", "-o", tmp_path / "out", *PLAIN, "--", name)
    assert code == 0, said
    (record,) = (tmp_path / "out").rglob("record.json")
    assert json.loads(record.read_text())["image"] == name
    samples = open_dataset("images", path=str(tmp_path))
    assert len(list(samples.readable())) == 1 and samples.data_hash()


@pytest.mark.parametrize("what", [(np, "save"), (os, "rename"), (photos.moge_io, "save_ply")])
def test_a_full_disk_leaves_nothing_behind(command, tmp_path, monkeypatch, what):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*what, full)
        code, said = command("adapt", "p.png", *PLAIN, "-o", "out")
    assert code == 1 and "No space left" in said and "out/p" in said and said.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


JOBS = ["ablation", "--experiments", "original", "--set", "data=[{kind: synthetic, count: 1}]", "--runs=here"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EACCES, "Permission denied", "/somewhere"), "/somewhere: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.ENOTDIR, "Not a directory", "here"), "here: Not a directory"),  # named on the command line
        (OSError(errno.EISDIR, "Is a directory", Path("here")), "here: Is a directory"),
    ],
)
def test_a_disk_or_a_file_that_the_user_can_put_right_is_one_line(command, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(batch, "run_jobs", fail)
    assert command(*JOBS) == (2, f"ttt-depth: {said}.\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBADF, "Bad file descriptor"),
        FileNotFoundError(errno.ENOENT, "No such file", "/of/the/program"),
        ConnectionResetError("by somebody"),
    ],
)
def test_a_mistake_of_the_program_keeps_its_trace(command, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(batch, "run_jobs", fail)
    with pytest.raises(type(error)) as caught:
        command(*JOBS)
    assert caught.value is error


# ------------------------------------------------------------------------------------------------ images, frames


def chunked(path: Path, width: int, height: int) -> Path:
    """A PNG that says it is so large."""
    picture(path)
    data = bytearray(path.read_bytes())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    return path


def test_images_that_are_none(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "program.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n"
    )
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(tmp_path / "nan.tif")
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    chunked(tmp_path / "bomb.png", 60000, 60000)
    chunked(tmp_path / "nothing.png", 0, 0)
    for path in sorted(tmp_path.iterdir()):
        refused(read_photo, path, words=[path])
    assert "not an image" in refused(read_photo, tmp_path / "program.jpg")  # never handed to Ghostscript
    samples = open_dataset("images", path=str(tmp_path))
    assert not list(samples.readable()) and len(samples.left_out) == len(samples)


def damaged(path: Path, count: int) -> None:
    """Files cut and changed at random are pictures all the same, or refused in one sentence."""
    rng = np.random.default_rng(1)
    whole = Image.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "HEIF", "JPEG2000", "ICO", "QOI", "TGA", "DDS"):
        try:
            whole.save(path, format=kind)
        except (KeyError, OSError):  # a Pillow without this codec
            continue
        data = path.read_bytes()
        for i in range(count):
            changed = bytearray(data[: int(rng.integers(0, len(data)))] if i % 3 == 0 else data)
            for place in rng.integers(0, max(1, min(len(changed), 300 if i % 3 == 1 else 10**6)), 8 if changed else 0):
                changed[place] = int(rng.integers(0, 256))
            path.write_bytes(changed)
            try:
                image = read_photo(path)
                assert torch.isfinite(image).all() and image.min() >= 0 and image.max() <= 1
            except UserError as error:
                sentence(error, path)


def test_damaged_images(tmp_path):
    damaged(tmp_path / "photo.jpg", 15)


@pytest.mark.slow
def test_many_damaged_images(tmp_path):
    damaged(tmp_path / "photo.jpg", 200)


def frame(folder: Path) -> Path:
    """A set of one good frame `s`."""
    rng = np.random.default_rng(0)
    depth = (2 + rng.random((32, 40))).astype(np.float32)
    image = rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)
    moge_layout.write_frame(folder / "s", image, depth, [[1.1, 0, 0.5], [0, 1.3, 0.5], [0, 0, 1]])
    moge_io.write_segmentation(folder / "s" / "segmentation.png", np.ones((32, 40), np.uint8), {"a": 1})
    moge_layout.write_index(folder, ["s"])
    return folder


def png(path: Path, values: np.ndarray, **texts: str) -> None:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.fromarray(values).save(path, pnginfo=info)


def camera(*rows: str) -> str:
    return f'{{"intrinsics": [{", ".join(f"[{row}]" for row in rows)}]}}'


KNOWN = np.full((32, 40), 30000, np.uint16)
COLOURS = np.zeros((32, 40, 3), np.uint8)
METAS = [
    "", "[]", "3", "null", "{", "[" * 100000, '{"intrinsics": null}', '{"intrinsics": {}}', '{"intrinsics": "abc"}',
    camera("1, 0, 0.5", "0, 1, 0.5"), camera("1, 0, 0.5", "0, 1, 0.5", "0, 0, 0"), camera("1, 0, 0.5", "0, 1, 0.5", "0, 0, -1"),
    camera("NaN, 0, 0.5", "0, 1, 0.5", "0, 0, 1"), camera("Infinity, 0, 0.5", "0, 1, 0.5", "0, 0, 1"), camera("-1, 0, 0.5", "0, 1, 0.5", "0, 0, 1"),
    camera("1" + "0" * 400 + ", 0, 0.5", "0, 1, 0.5", "0, 0, 1"), camera("1e300, 0, 0.5", "0, 1, 0.5", "0, 0, 1"),
    camera("1e-6, 0, 0.5", "0, 1, 0.5", "0, 0, 1"), camera("1e30, 0, 0.5", "0, 1, 0.5", "0, 0, 1"),
    camera("500, 0, 20", "0, 500, 16", "0, 0, 1"), camera("1, 0, 1e10", "0, 1, 0.5", "0, 0, 1"),
]  # fmt: skip
FRAMES = {
    **{f"meta {text[:50]}": lambda s, text=text: (s / "meta.json").write_text(text) for text in METAS},
    **{
        f"near {near} far {far}": lambda s, near=near, far=far: png(s / "depth.png", KNOWN, near=near, far=far)
        for near, far in [("x", "y"), ("", ""), ("nan", "2"), ("1", "inf"), ("-1", "2"), ("0", "2"), ("5", "1"), ("1e38", "1e39"), ("1e-40", "1e-30")]
    },
    "unit": lambda s: png(s / "depth.png", KNOWN, near="1", far="2", unit="-1"),
    "no near": lambda s: png(s / "depth.png", KNOWN),
    "all unknown": lambda s: png(s / "depth.png", KNOWN * 0, near="1", far="2"),
    "all sky": lambda s: png(s / "depth.png", KNOWN * 0 + 65535, near="1", far="2"),
    "8 bits": lambda s: png(s / "depth.png", KNOWN.astype(np.uint8), near="1", far="2"),
    "colours": lambda s: png(s / "depth.png", COLOURS, near="1", far="2"),
    "another size": lambda s: png(s / "depth.png", KNOWN[:5, :5].copy(), near="1", far="2"),
    "depth is a photograph": lambda s: shutil.copy(s / "image.jpg", s / "depth.png"),
    "image is a bomb": lambda s: chunked(s / "i.png", 60000, 60000).rename(s / "image.jpg"),
    "image is empty": lambda s: (s / "image.jpg").write_bytes(b""),
    "image is cut": lambda s: (s / "image.jpg").write_bytes((s / "image.jpg").read_bytes()[:-400]),
    "labels a list": lambda s: png(s / "segmentation.png", KNOWN.astype(np.uint8), labels="[1]"),
    "labels of text": lambda s: png(s / "segmentation.png", KNOWN.astype(np.uint8), labels='{"a": "x"}'),
    "labels deep": lambda s: png(s / "segmentation.png", KNOWN.astype(np.uint8), labels="[" * 100000),
    "segmentation of colours": lambda s: png(s / "segmentation.png", COLOURS),
    "segmentation of another shape": lambda s: png(s / "segmentation.png", KNOWN[:3, :30].astype(np.uint8)),
    **{f"{file} a folder": lambda s, file=file: ((s / file).unlink(), (s / file).mkdir())
       for file in ("image.jpg", "depth.png", "meta.json", "segmentation.png")},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FRAMES)
def test_a_frame(tmp_path, name):
    folder = frame(tmp_path)
    FRAMES[name](folder / "s")
    samples = open_dataset("moge", path=str(folder), include_segmentation=True)
    assert not list(samples.readable())
    ((left, why),) = samples.left_out
    assert left == "s"
    sentence(why, folder / "s")
    assert "Error" not in why and "['" not in why  # a sentence, not a dump


def test_sizes_without_end(tmp_path):
    for width, height in ((10**5, 10**5), (10**9, 10**9)):
        refused(open_dataset("moge", path=str(frame(tmp_path)), width=width, height=height).load, "s", words=["pixels"])


INDICES = {
    "../outside": False, "s/../../outside": False, "s/../s": False, "..": False, ".": False, "/etc": False, "..\\outside": False,
    "s\x1b[31m": False, "s\0": False, "s\ns": False, "./s\ns/": False, "": False, "\n\n": False,
    "s": True, "./s//": True, "s\r\n": True, "\ufeffs\n": True, "\n\n  s  \n": True,
}  # fmt: skip


@pytest.mark.parametrize("text", INDICES)
def test_an_index(tmp_path, text):
    shutil.copytree(frame(tmp_path / "set") / "s", tmp_path / "outside")
    index = tmp_path / "set" / ".index.txt"
    index.write_bytes(text.encode())
    if INDICES[text]:
        assert open_dataset("moge", path=str(tmp_path / "set"))[0].name == "s"
    else:
        refused(open_dataset, "moge", path=str(tmp_path / "set"), words=[index])
    for bad in (bytes(range(256)), text.encode("utf-16")):
        index.write_bytes(bad)
        refused(open_dataset, "moge", path=str(tmp_path / "set"), words=[index])


def test_names_do_not_leave_the_folder_that_is_written(tmp_path):
    sample = open_dataset("moge", path=str(frame(tmp_path / "set")))[0]
    sample.depth[:] = 2.0
    for name in ("../x", "/x", ".."):
        sample.name = name
        refused(write_moge_layout, [sample], tmp_path / "written")
    assert sorted(os.listdir(tmp_path)) == ["set", "written"] and not list((tmp_path / "written").iterdir())
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(tmp_path / "set")
    (tmp_path / "links" / ".index.txt").write_text("a/s")
    assert open_dataset("moge", path=str(tmp_path / "links"))[0].name == "a/s"  # links are followed


POINTS = {
    "empty": b"", "binary": bytes(range(256)), "no head": b"1,2,3", "words": b"u,v,metres\na,b,c", "nan": b"u,v,metres\nnan,1,1",
    "inf": b"u,v,metres\n1,1,inf", "negative": b"u,v,metres\n1,1,-1", "outside": b"u,v,metres\n100,1,1", "utf16": "u,v,metres\n1,1,1".encode("utf-16"),
    "quote": b'u,v,metres\n"1,1,1', "none": b"u,v,metres\n", "few": b"u,v,metres\n1,1", "semicolons": b"u;v;metres\n1;1;1", "blank": b"\n\n\n",
    "columns": b"," * 500, "huge": b"u,v,metres\n1,1,1e300", "tiny": b"u,v,metres\n1,1,1e-300", "twice": b"u,v,metres,metres \n1,1,1,2",
}  # fmt: skip


@pytest.mark.parametrize("name", POINTS)
def test_known_distances(tmp_path, name):
    path = tmp_path / "points.csv"
    path.write_bytes(POINTS[name])
    refused(read_references, path, (32, 40), words=[path])


def test_known_distances_of_a_png(tmp_path):
    path = tmp_path / "d.png"
    for values, texts in [
        (COLOURS, {}),
        (KNOWN * 0, {}),
        (KNOWN, {"near": "x", "far": "y"}),
        (KNOWN, {"near": "1", "far": "1e39"}),
    ]:
        png(path, values, **texts)
        refused(read_references, path, (32, 40), words=[path])


# --------------------------------------------------------------------------------------------------- checkpoints


class Evil:
    """Unpickling this writes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch '{self.sentinel}'",)


def test_checkpoints_do_not_run_what_is_in_them(tmp_path):
    path, evil = tmp_path / "m.pt", Evil(tmp_path / "SENTINEL")
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "depth_anything", "auto_map": {"AutoConfig": "evil.Config"}}')
    (folder / "evil.py").write_text(f"open({str(evil.sentinel)!r}, 'w')")
    for content in (evil, {"model_config": evil, "model": {}}, {"model_config": {}, "model": {"w": evil}}):
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            refused(load_model, str(path), "cpu", words=[path])
            shutil.copy(path, folder / "pytorch_model.bin")
            assert "weights_only" not in refused(load_model, str(folder), "cpu", words=[folder])
        path.write_bytes(pickle.dumps(content))
        refused(load_model, str(path), "cpu", words=[path])
        assert not evil.sentinel.exists()
    pickle.loads(path.read_bytes())  # it would have
    assert evil.sentinel.exists()


def test_checkpoints_of_other_things(tmp_path, untrained_checkpoint):
    path, good = tmp_path / "m.pt", torch.load(untrained_checkpoint, weights_only=True)
    weights, config = good["model"], good["model_config"]
    some = next(iter(weights))
    for content in (
        None, [1], torch.ones(3), weights, {"model": weights}, {"model_config": None, "model": None}, {"model_config": [1], "model": weights},
        {**good, "model": {}}, {**good, "model": {1: torch.ones(1)}}, {**good, "model": {key: 3 for key in weights}},
        {**good, "model": {key: torch.ones(1) for key in weights}}, {**good, "model": {key: value for key, value in weights.items() if key != some}},
        {**good, "model": {**weights, some: torch.full_like(weights[some], torch.nan)}},
        {**good, "model_config": {**config, "x": 3}}, {**good, "model_config": {"encoder": "os.system"}}, {**good, "model_config": {"neck": 3}},
        *({**good, "model_config": {**config, "num_tokens_range": tokens}} for tokens in ([3], ["a", "b"], [0, 0], [-5, 10**12], 3)),
    ):  # fmt: skip
        torch.save(content, path)
        refused(load_model, str(path), "cpu", words=[path])
    whole = untrained_checkpoint.read_bytes()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:cut])
        refused(load_model, str(path), "cpu", words=[path])
    for content in (
        b"{",
        b"[]",
        b"[" * 100_000,
        bytes(range(256)),
        b'{"model_type": "x"}',
        b'{"model_type": "depth_anything"}',
    ):
        (tmp_path / "config.json").write_bytes(content)
        refused(load_model, str(tmp_path), "cpu", words=[tmp_path])


# ---------------------------------------------------------------------------------------- jobs, clusters, results


def test_a_description_of_a_cluster(tmp_path, monkeypatch):
    class SLURMCluster:
        def __init__(self, cores: int) -> None:
            raise RuntimeError("no such queue\nat all")

    monkeypatch.setitem(
        sys.modules, "dask_jobqueue", types.SimpleNamespace(SLURMCluster=SLURMCluster, system=os.system)
    )
    path = tmp_path / "cluster.yaml"
    for text in ("", "- 1", "3", "a: [", "class: system\noptions: {command: x}", "class: [1]", "options: 3", "options: {foo: 1}",
                 "options: {cores: 1}", "class: SLURMCluster", "[" * 5000, "!!python/object:os.system {}"):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError) as caught, cluster.open_client(1, None, str(path), print):
            pass
        sentence(caught.value, path)


@pytest.mark.parametrize(
    "address",
    [
        "junk",
        pytest.param("tcp://127.0.0.1:1", marks=pytest.mark.slow),
        "foo://x:y",
        "tcp://",
        "tcp://[::",
        "inproc://9/9/9",
    ],
)
def test_an_address_without_a_scheduler(address, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_WITHIN", 3)
    with pytest.raises(UserError) as caught, cluster.open_client(1, address, None, print):
        pass
    sentence(caught.value, f"--scheduler {address}")


def test_wrong_addresses_one_after_another():
    """dask closes a client that failed when it is collected; within the start of the next, that never ended."""
    script = """
import gc
from ttt_lib.runs import cluster
from ttt_lib.core.errors import UserError
gc.set_threshold(1)
for attempt in range(3):
    try:
        with cluster.open_client(1, "foo://x:y", None, print):
            pass
    except UserError as error:
        print(error)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert answer.stdout.count("--scheduler foo://x:y: no scheduler answers there") == 3, answer.stderr


def test_a_scheduler_whose_workers_mix_jobs():
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as there:
        address = there.scheduler_address
        with pytest.raises(UserError) as caught, cluster.open_client(1, address, None, print):
            pass
    sentence(caught.value, f"--scheduler {address}", "--nthreads 1")


def job(name: str = "a") -> batch.Job:
    return batch.Job(name, 0, 1, {}, {"settings": "x"}, ("n.ipynb",))


def test_jobs_stay_in_the_folder_of_runs(tmp_path):
    for name in ("..", ".", "", "../x", "/x", ".work", *RESERVED):  # jobs have the names of experiments
        refused(build_experiment, {"name": name}, words=["name"])
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for runs in ("file", "file/runs", "loop/runs", "x" * 300):
        refused(batch.run_jobs, [job()], tmp_path / runs, announce=print, words=["--runs"])


@pytest.mark.parametrize(
    ("text", "finished"),
    [("", False), ("[]", False), ("3", False), ("{", False), ("{}", True), ('{"identity": 3}', False),
     ('{"identity": {}, "finished": "x"}', True), ("[" * 100000, False)],
)  # fmt: skip
def test_a_manifest(tmp_path, monkeypatch, text, finished):
    monkeypatch.setattr(batch, "_fill", lambda job, work, kernel: work.mkdir(parents=True))
    place = tmp_path / "a" / "000-of-001"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(text)
    (tmp_path / "a" / "000-of-000").mkdir()
    (tmp_path / "a" / "000-of-000" / "manifest.json").write_text("{}")
    if finished:
        assert read_runs(tmp_path).shards == [place]
    else:
        refused(read_runs, tmp_path, words=[tmp_path, "holds no finished run"])
    (outcome,) = batch.run_jobs([job()], tmp_path, announce=lambda line: None)
    assert outcome.status == "done" and (tmp_path / "superseded").exists()  # it counts as another run's


def test_a_calibration(tmp_path):
    path = tmp_path / "c.json"
    for text in ("", "[]", "3", "{}", '{"weights": 3}', "[" * 100000, "null"):
        path.write_text(text)
        refused(read_calibration, path, words=[path])


# ------------------------------------------------------------------------------------ notebooks and the report

STRINGS = [
    "__import__('os').system('touch SENTINEL')", "\"; __import__('os').system('touch SENTINEL'); \"", "'''\nimport os\nos.system('touch SENTINEL')\n'''",
    '"""\n__import__("os").system("touch SENTINEL")\n"""', "\\", '\\"', "\\\\'\"", "{seed}", "{0.__class__}", "%run x", "!touch SENTINEL", "\n!touch SENTINEL\n",
    "\\N{BULLET}", "\r\n\t\0\x1b", "\u2028\u2029", "名", "$HOME `touch SENTINEL`", "# type: x",
]  # fmt: skip


def injected(parameters: dict) -> dict:
    """What the parameters are after papermill has put them into notebook 02 and its cell has been executed."""
    notebook = nbformat.read(ROOT / "notebooks" / "02_adaptation.ipynb", as_version=4)
    made = parameterize_notebook(
        papermill.iorw.load_notebook_node(str(ROOT / "notebooks" / "02_adaptation.ipynb")), parameters
    )
    before = [cell.source for cell in notebook.cells]
    (cell,) = (cell for cell in made.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert [c.source for c in made.cells if c is not cell] == before  # nothing else has changed
    found: dict = {}
    exec(compile(cell.source, "cell", "exec"), found)
    return {key: found[key] for key in parameters}


@pytest.mark.parametrize("text", STRINGS)
def test_a_notebook_executes_nothing_that_a_string_says(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    content = {"name": "x", "description": text, "model": {"name": text}, "gate": {"calibration": text},
               "data": [{"kind": "moge", "path": text, "name": text, "shifts": [text]}]}  # fmt: skip
    parameters = build_experiment(content).as_parameters()
    assert injected(parameters) == parameters
    overrides = parse_set([f"description={yaml.safe_dump(text)}"])
    assert injected(build_experiment({"name": "x"}, None, overrides).as_parameters())["description"] == text
    refused(build_experiment, {"name": text}, words=["name"])
    refused(build_experiment, {"name": "x", text: 1})
    assert not list(tmp_path.iterdir())


def test_places_with_braces_are_places(tmp_path, monkeypatch):
    """Papermill formats the paths that it is given with the parameters."""
    seen = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda *places, parameters, **_: seen.extend(
        parameterize_path(place, parameters) for place in places))  # fmt: skip
    folder = tmp_path / "{output_dir}{seed.__class__}{}"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "02_adaptation.ipynb", folder / "n.ipynb")
    kernel.execute(folder / "n.ipynb", folder / "out.ipynb", {"seed": 3}, None)
    assert seen == [str(folder / "n.ipynb"), str(folder / "out.ipynb")]


def test_the_report_shows_names_and_runs_none(tmp_path):
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    rows = []
    for experiment, value in (("original", 0.5), ("mine", 0.6)):
        place = tmp_path / "runs" / experiment / "000-of-001"
        place.mkdir(parents=True)
        (place / "manifest.json").write_text('{"identity": {}, "finished": 1.0}')
        names = {"experiment": experiment, "dataset": bad, "sample": bad}
        rows = [
            {**names, "prediction": "final", "metric": "points_affine_invariant", "score": "delta1", "value": value}
        ]
        pd.DataFrame(rows).to_csv(place / "metrics.csv", index=False)
        pd.DataFrame([{**names, "seconds": 1.0}]).to_csv(place / "samples.csv", index=False)
        left = {"dataset": bad, "sample": bad, "reason": bad}
        pd.DataFrame([left]).to_csv(place / "left_out.csv", index=False)
    page = report.write_report(read_runs(tmp_path / "runs"), tmp_path / "out")["html"].read_text()
    assert "alert(1)" in page and "<script>alert" not in page and "<img src=x" not in page
