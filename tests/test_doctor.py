"""`ttt-depth doctor`: what it finds here, and what it advises when something is taken away or broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from ttt_lib import doctor
from ttt_lib.doctor import CHECKS, Check, look
from ttt_lib.models import moge


def ttt(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from ttt_lib.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


def check(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)


@pytest.mark.slow
def test_the_command_lists_everything_and_says_that_it_can_work(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = ttt("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, *_ in CHECKS:
        assert name in done.stdout
    assert "Error:" not in done.stdout
    assert "switched off by HF_HUB_OFFLINE" in done.stdout and "ttt-depth can work here" in done.stdout
    shown = {
        line[9:23].strip(): line
        for line in done.stdout.splitlines()
        if line.startswith(("ok ", "missing ", "problem "))
    }
    assert list(shown) == [name for name, *_ in CHECKS] and torch.__version__ in shown["torch"]
    assert not shown["GL"].startswith("problem")  # drawn by pyrender, or by torch
    assert done.stdout.count(" -> ") == sum(not line.startswith("ok ") for line in shown.values())


def test_a_missing_module_is_essential_and_the_list_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = look(check("torch"))
    assert finding.state == "problem" and check("torch").essential and "pip install ." in finding.advice

    def raises() -> str:
        raise OSError("made up")

    monkeypatch.setattr(doctor, "CHECKS", ((Check("first", False, "do", raises), check("Python"))))
    findings = [look(each) for each in doctor.CHECKS]
    assert [f.state for f in findings] == ["problem", "ok"]
    assert "OSError: made up" in findings[0].found and findings[0].advice


def test_exit_code_1_when_something_essential_is_broken(monkeypatch):
    from typer.testing import CliRunner

    from ttt_lib.cli import app

    monkeypatch.setattr(doctor, "CHECKS", (check("torch"), check("Python")))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    monkeypatch.setitem(sys.modules, "torch", None)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "cannot work here before this is put right: torch" in result.stdout


def test_requirements_absent_or_of_another_version(monkeypatch):
    assert look(check("requirements")).state == "ok"
    versions = {"ttt-depth": "0.1.0", "kornia": None, "pandas": "1.0"}
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: versions[name] if name in versions else real(name))
    finding = look(check("requirements"))
    assert finding.state == "problem" and check("requirements").essential
    assert "kornia is not installed" in finding.found and "pandas 1.0 is not >=2.0" in finding.found


# ------------------------------------------------------------------------------------------------ GPU


@pytest.mark.parametrize(
    ("driver", "built", "state", "found", "advice"),
    [
        (None, None, "missing", "no NVIDIA driver", "works on the CPU"),
        ("/usr/bin/nvidia-smi", None, "problem", "built without CUDA", "built for CUDA"),
        ("/usr/bin/nvidia-smi", "12.8", "problem", "finds no device", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, driver, built, state, found, advice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: driver)
    monkeypatch.setattr(torch.version, "cuda", built)
    finding = look(check("GPU"))
    assert (finding.state, check("GPU").essential) == (state, False)
    assert found in finding.found and advice in finding.advice


def test_a_gpu_and_one_that_is_full(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Made Up 9000")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 * 2**30, 8 * 2**30))
    finding = look(check("GPU"))
    assert finding.state == "ok" and finding.found == "cuda:0 Made Up 9000, 3.0 of 8.0 GiB free"

    def full(index: int) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    finding = look(check("GPU"))
    assert finding.state == "problem" and "out of memory" in finding.found and "nvidia-smi" in finding.advice
    assert "\n" not in finding.found


def test_torchvision_absent_broken_or_there_is_all_right(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    finding = look(check("torchvision"))
    assert finding.state == "ok" and "counts as absent" in finding.found and "nothing needs it" in finding.found
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.1")
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    assert look(check("torchvision")).found == "0.1; nothing needs it"


def test_a_system_without_cores_to_ask_for(monkeypatch):
    from ttt_lib.core import memory, provenance

    monkeypatch.delattr(provenance.os, "sched_getaffinity")
    monkeypatch.setattr(memory, "PROCESS", Path("/nowhere"))
    assert "the tests run on Linux" in look(check("Python")).found
    assert provenance.cores() >= 1 and memory.peak_memory_mb(torch.device("cpu")) != memory.peak_memory_mb(
        torch.device("cpu")
    )


# -------------------------------------------------------------------------------------------------------------- GL


def test_gl_that_crashes_hangs_or_fails_does_not_end_the_doctor(monkeypatch):
    monkeypatch.setattr(doctor, "DRAW", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    finding = look(check("GL"))
    assert finding.state == "problem" and not check("GL").essential
    assert "signal 11" in finding.found and "backend=torch" in finding.advice
    monkeypatch.setattr(doctor, "DRAW", "raise RuntimeError('no such display')")
    finding = look(check("GL"))
    assert finding.state == "problem" and "no such display" in finding.found
    monkeypatch.setattr(doctor, "DRAW", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "GL_TIMEOUT", 0.5)
    finding = look(check("GL"))
    assert finding.state == "problem" and "hangs" in finding.found


def test_a_wrong_picture_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "DRAW", doctor.DRAW.replace("- 2)", "- 3)"))
    finding = look(check("GL"))
    assert finding.state == "problem" and "wrong" in finding.found and "backend=torch" in finding.advice


@pytest.mark.slow
def test_gl_on_a_platform_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PYOPENGL_PLATFORM", "nonsense")
    finding = look(check("GL"))
    assert finding.state == "missing" and "no GL context could be made" in finding.found
    assert "libegl1" in finding.advice and "torch draws" in finding.advice


# ------------------------------------------------------------------------------------------------------------- hub


def test_the_hub_unreachable_or_there(monkeypatch):
    from huggingface_hub import constants

    from ttt_lib.models import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    assert look(check("hub")).state == "ok"
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    finding = look(check("hub"))
    assert finding.state == "missing" and "does not answer" in finding.found
    assert "model.pt" in finding.advice and "HF_ENDPOINT" in finding.advice
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    finding = look(check("hub"))
    assert finding.state == "missing" and "switched off" in finding.found


# --------------------------------------------------------------------------------------------------- assets, Jupyter


def test_assets_missing_damaged_or_replaced(tmp_path, monkeypatch, untrained_checkpoint):
    assert look(check("assets")).state == "ok"
    real = moge.ASSETS
    monkeypatch.setattr(moge, "ASSETS", tmp_path)
    finding = look(check("assets"))
    assert finding.state == "problem" and check("assets").essential and "pip install ." in finding.advice
    (tmp_path / "tiny.pt").write_bytes((real / "tiny.pt").read_bytes()[:1000])
    finding = look(check("assets"))
    assert finding.state == "problem" and "cannot be used" in finding.found
    shutil.copy(real / "tiny.md", tmp_path)
    shutil.copy(untrained_checkpoint, tmp_path / "tiny.pt")
    finding = look(check("assets"))
    assert finding.state == "problem" and "not the file that its card describes" in finding.found


def test_the_calibration_damaged(tmp_path, monkeypatch):
    from ttt_lib.adaptation.gate import decision as gate

    assert "calibrated on" in look(check("assets")).found
    (tmp_path / "gate.json").write_text("{}")
    monkeypatch.setattr(gate, "BUNDLED", tmp_path / "gate.json")
    finding = look(check("assets"))
    assert finding.state == "problem" and "gate.json" in finding.found and "pip install ." in finding.advice


def test_notebooks_missing(tmp_path, monkeypatch):
    from ttt_lib.runs import catalog as sources

    assert look(check("notebooks")).state == "ok"
    monkeypatch.setattr(sources, "NOTEBOOKS", tmp_path)
    finding = look(check("notebooks"))
    assert finding.state == "problem" and check("notebooks").essential and "pip install ." in finding.advice
