"""What is written is JSON as the standard has it, and whole or not at all."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ttt_lib.core import files
from ttt_lib.core.errors import UserError
from ttt_lib.core.files import absolute, check_writable, first_repeated, read_json, replacing, to_json, write_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def strict(text: str):
    """As a parser of another language reads it: the names NaN and Infinity are errors."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def without_infinities(value):
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(VALUES)
def test_anything_is_json_and_only_what_is_not_finite_is_lost(value):
    assert strict(to_json(value)) == without_infinities(value)


@dataclass
class Record:
    loss: float
    place: Path


def test_what_this_package_keeps_is_written_as_plain_values():
    value = {
        "numpy": np.float32("nan"), "array": np.array([1.5, np.inf]), "torch": torch.tensor([[1, 2]]),
        "record": Record(-math.inf, Path("a/b")), "tuple": (1, {2: math.nan}),
    }  # fmt: skip
    assert strict(to_json(value)) == {
        "numpy": None, "array": [1.5, None], "torch": [[1, 2]], "record": {"loss": None, "place": "a/b"},
        "tuple": [1, {"2": None}],
    }  # fmt: skip


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_first_that_is_there_twice():
    assert first_repeated([3, 1, 2, 1, 3]) == 1 and first_repeated([]) is None


def test_a_path_means_the_same_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of/somebody")
    assert absolute("a/../b.pt") == absolute(Path("b.pt")) == str(tmp_path / "b.pt")
    assert absolute("~/b.pt") == "/home/of/somebody/b.pt" and absolute("tcp://host/x") == "tcp://host/x"
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "b.pt").touch()
    assert absolute("~/b.pt") == str(tmp_path / "~" / "b.pt")


def test_a_text_without_end_is_not_read(tmp_path):
    with open(tmp_path / "long.json", "wb") as file:
        file.truncate((1 << 28) + 1)  # takes no room on the disk
    with pytest.raises(UserError, match="has more than 256 MiB"):
        read_json(tmp_path / "long.json")


def test_whether_a_folder_can_be_made_is_asked_without_leaving_a_trace(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "and" / "newer")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(UserError, match="disk is mounted"):
        check_writable(tmp_path)


def test_what_a_killed_process_left_is_cleared_and_what_others_make_is_not(tmp_path):
    """Of a process that is gone, beside one that lives, one of another machine, and a folder of another name."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    out = tmp_path / "out"
    left = [files._unfinished(tmp_path / name, gone.pid) for name in ("out", "other")]
    elsewhere = left[0].with_name(left[0].name.replace(f"-{gone.pid}", f"x-{gone.pid}"))
    kept = [files._unfinished(out, os.getppid()), elsewhere, left[1]]
    for folder in (left[0], *kept):
        folder.mkdir()
        (folder / "depth.npy").touch()
    with replacing(out) as work:
        assert work not in (left[0], *kept)
        (work / "record.json").touch()
    assert set(tmp_path.iterdir()) == {out, *kept} and (out / "record.json").is_file()
