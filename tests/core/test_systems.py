"""What other systems lack is done without: the use of memory in /proc, the affinity of cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ttt_lib.core import memory
from ttt_lib.core.errors import UserError
from ttt_lib.core.provenance import cores, environment
from ttt_lib.models.load import load_model

ELSEWHERE = """
import builtins, json, os, sys
absent = {"resource", "fcntl", "grp", "pwd", "termios"}
held = builtins.__import__
def find(name, *rest, **more):
    caller = (more.get("globals") or (rest[0] if rest else None) or {}).get("__name__", "")
    if name in absent and caller.startswith("ttt_lib"):
        raise ImportError(f"No module named {name!r}")
    return held(name, *rest, **more)
builtins.__import__ = find
for name in ("sched_getaffinity", "sched_setaffinity", "fork", "mkfifo", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
from ttt_lib.cli import main
for line in json.loads(sys.argv[1]):
    sys.argv = ["ttt-depth", *line]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (line, end.code)
"""


def test_the_command_works_without_what_only_linux_has(tmp_path):
    from PIL import Image

    Image.new("RGB", (48, 32), "gray").save(tmp_path / "a.png")
    line = ["adapt", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--set", "model.num_tokens=48",
            "--set", "gate.mode=off", "--set", "train.method=none"]  # fmt: skip
    command = [sys.executable, "-c", ELSEWHERE, json.dumps([line, ["models"]])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "a" / "record.json").is_file()


def test_cores_where_the_system_does_not_say_which(monkeypatch):
    assert cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores() == environment()["cores"] == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


@pytest.mark.parametrize(("cuda", "override", "tf32"), [(False, None, False), (True, None, True), (True, "0", False)])
def test_a_manifest_says_with_which_numbers_a_gpu_computed(monkeypatch, cuda, override, tf32):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    if override:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    assert environment()["tf32"] is tf32


def test_memory_without_proc_is_not_known(monkeypatch):
    monkeypatch.setattr(memory, "PROCESS", Path("/nowhere"))
    cpu = torch.device("cpu")
    memory.reset_peak_memory(cpu)
    assert str(memory.peak_memory_mb(cpu)) == str(memory.memory_mb(cpu)) == "nan"


def test_the_gpu_of_apple_is_not_chosen_and_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert load_model("tiny", "auto", num_tokens=48).device.type == "cpu"
    for device in ("mps", "mps:0"):
        with pytest.raises(UserError, match=f"model.device: '{device}' has no float64.*use cpu"):
            load_model("tiny", device)
