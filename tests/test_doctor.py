"""`ttt-depth doctor`: what it finds here, and what it advises when something is taken away or broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from ttt_lib import doctor, machine
from ttt_lib.core.files import to_json
from ttt_lib.doctor import CHECKS, Check, Finding, look
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
    done = ttt("doctor", "--json", cwd=tmp_path)
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert list(found) == [name for name, *_ in CHECKS]
    assert found["torch"]["found"].startswith(torch.__version__) and found["torch"]["essential"]
    assert found["GL"]["state"] in ("ok", "missing")  # drawn by pyrender, or by torch
    assert all(finding["advice"] for finding in found.values() if finding["state"] != "ok")


def test_a_missing_module_is_essential_and_the_list_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = look(check("torch"))
    assert finding.state == "problem" and finding.essential and "pip install ." in finding.advice
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "moge.train.losses", None)
    finding = look(check("MoGe"))
    assert finding.state == "problem" and finding.essential and "dlr-moge" in finding.advice

    def raises() -> str:
        raise OSError("made up")

    monkeypatch.setattr(doctor, "CHECKS", ((Check("first", False, "do", raises), check("Python"))))
    findings = [look(each) for each in doctor.CHECKS]
    assert [f.state for f in findings] == ["problem", "ok"]
    assert "OSError: made up" in findings[0].found and findings[0].advice


def test_exit_code_1_when_something_essential_is_broken(monkeypatch):
    from typer.testing import CliRunner

    from ttt_lib.cli import app

    monkeypatch.setattr(doctor, "CHECKS", (check("torch"), check("disk")))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    monkeypatch.setitem(sys.modules, "torch", None)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "cannot work here before this is put right: torch" in result.stdout
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)[0]["state"] == "problem"


def test_requirements_absent_or_of_another_version(monkeypatch):
    assert look(check("requirements")).state == "ok"
    versions = {"ttt-depth": "0.1.0", "kornia": None, "pandas": "1.0"}
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: versions[name] if name in versions else real(name))
    finding = look(check("requirements"))
    assert finding.state == "problem" and finding.essential
    assert "kornia is not installed" in finding.found and "pandas 1.0 is not >=2.0" in finding.found


# ------------------------------------------------------------------------------------------------ GPU, torchvision


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
    assert (finding.state, finding.essential) == (state, False)
    assert found in finding.found and advice in finding.advice


def test_a_gpu_and_one_that_is_full(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Made Up 9000")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 * 2**30, 8 * 2**30))
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device="cpu": real(*size))
    finding = look(check("GPU"))
    assert finding.state == "ok" and finding.found == "cuda:0 Made Up 9000, 3.0 of 8.0 GiB free"

    def full(index: int) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    finding = look(check("GPU"))
    assert finding.state == "problem" and "out of memory" in finding.found and "nvidia-smi" in finding.advice
    assert "\n" not in finding.found


def test_torchvision_absent_broken_or_there_is_all_right(monkeypatch):
    monkeypatch.setattr(machine, "version_of", lambda name: None)
    assert "nothing needs it" in look(check("torchvision")).found
    monkeypatch.setattr(machine, "version_of", lambda name: "0.1")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    finding = look(check("torchvision"))
    assert finding.state == "ok" and "counts as absent" in finding.found
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    assert look(check("torchvision")).found == "0.1"


def test_a_system_without_cores_to_ask_for_and_apples_gpu(monkeypatch):
    from ttt_lib.core import memory, provenance

    monkeypatch.delattr(provenance.os, "sched_getaffinity")
    monkeypatch.setattr(memory, "PROCESS", Path("/nowhere"))
    assert provenance.cores() >= 1 and memory.peak_memory_mb(torch.device("cpu")) != memory.peak_memory_mb(
        torch.device("cpu")
    )
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    assert "the tests run on Linux" in look(check("Python")).found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    finding = look(check("GPU"))
    assert finding.state == "missing" and "MPS is not used" in finding.found and "float64" in finding.found


@pytest.mark.parametrize(("version", "state"), [(None, "missing"), ("4.20.0", "problem")])
def test_transformers_absent_or_old(monkeypatch, version, state):
    monkeypatch.setattr(machine, "version_of", lambda name: version)
    finding = look(check("transformers"))
    assert (
        finding.state == state
        and "pip install" in finding.advice
        and "transformers>=4.45" in finding.advice
        and not finding.essential
    )


# -------------------------------------------------------------------------------------------------------------- GL


def test_gl_that_crashes_hangs_or_fails_does_not_end_the_doctor(monkeypatch):
    monkeypatch.setattr(machine, "DRAW", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    finding = look(check("GL"))
    assert finding.state == "problem" and not finding.essential
    assert "signal 11" in finding.found and "backend=torch" in finding.advice
    monkeypatch.setattr(machine, "DRAW", "raise RuntimeError('no such display')")
    finding = look(check("GL"))
    assert finding.state == "problem" and "no such display" in finding.found
    monkeypatch.setattr(machine, "DRAW", "import time; time.sleep(60)")
    monkeypatch.setattr(machine, "GL_TIMEOUT", 0.5)
    finding = look(check("GL"))
    assert finding.state == "problem" and "hangs" in finding.advice


def test_a_wrong_picture_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine, "DRAW", """print('FOUND ["pyrender", "pyrender: drawing through egl", false]')""")
    finding = look(check("GL"))
    assert finding.state == "problem" and "wrong" in finding.found and "backend=torch" in finding.advice


@pytest.mark.slow
def test_gl_on_a_platform_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PYOPENGL_PLATFORM", "nonsense")
    finding = look(check("GL"))
    assert finding.state == "missing" and "no GL context could be made" in finding.found
    assert "libegl1" in finding.advice and "torch draws" in finding.advice


# ------------------------------------------------------------------------------------------------------------- hub


def test_the_hub_unreachable_silent_or_there(monkeypatch):
    from huggingface_hub import constants

    from ttt_lib.models import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    assert look(check("hub")).state == "ok"
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    finding = look(check("hub"))
    assert finding.state == "missing" and "does not answer" in finding.found
    assert "model.pt" in finding.advice and "HF_ENDPOINT" in finding.advice
    monkeypatch.setattr(machine, "HUB_PATIENCE", 0.1)
    monkeypatch.setattr(hub, "hub_answers", lambda: bool(machine.threading.Event().wait(30)))
    assert look(check("hub")).state == "missing"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    finding = look(check("hub"))
    assert "switched off" in finding.found and "unset it" in finding.advice


def test_models_in_the_cache_are_named(monkeypatch):
    import huggingface_hub

    repos = [types.SimpleNamespace(repo_id="Ruicheng/moge-2-vits-normal", repo_type="model"),
             types.SimpleNamespace(repo_id="some/data", repo_type="dataset")]  # fmt: skip
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: types.SimpleNamespace(repos=repos))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    finding = look(check("hub"))
    assert "moge-2-vits-normal" in finding.found and "some/data" not in finding.found


# --------------------------------------------------------------------------------------------------- assets, Jupyter


def test_assets_missing_damaged_or_replaced(tmp_path, monkeypatch, untrained_checkpoint):
    assert look(check("bundled model")).state == "ok"
    real = moge.ASSETS
    monkeypatch.setattr(moge, "ASSETS", tmp_path)
    finding = look(check("bundled model"))
    assert finding.state == "problem" and finding.essential and "pip install ." in finding.advice
    (tmp_path / "tiny.pt").write_bytes((real / "tiny.pt").read_bytes()[:1000])
    finding = look(check("bundled model"))
    assert finding.state == "problem" and "cannot be used" in finding.found
    shutil.copy(real / "tiny.md", tmp_path)
    shutil.copy(untrained_checkpoint, tmp_path / "tiny.pt")
    finding = look(check("bundled model"))
    assert finding.state == "problem" and "not the file that its card describes" in finding.found


def test_the_calibration_damaged(tmp_path, monkeypatch):
    from ttt_lib.adaptation.gate import decision as gate

    assert "tiny" in look(check("gate")).found
    (tmp_path / "gate.json").write_text("{}")
    monkeypatch.setattr(gate, "BUNDLED", tmp_path / "gate.json")
    finding = look(check("gate"))
    assert finding.state == "problem" and "gate.mode=off" in finding.advice and not finding.essential


def test_notebooks_missing_or_incomplete(tmp_path, monkeypatch):
    from ttt_lib.runs import catalog as sources

    assert look(check("notebooks")).state == "ok"
    monkeypatch.setattr(sources, "NOTEBOOKS", tmp_path)
    finding = look(check("notebooks"))
    assert finding.state == "problem" and finding.essential and "pip install ." in finding.advice
    (tmp_path / "02_adaptation.ipynb").touch()
    finding = look(check("notebooks"))
    assert "01_augmentation.ipynb" in finding.found and "profiles/demo.yaml" in finding.found


def test_jupyter_without_widgets_or_with_another_kernel(tmp_path, monkeypatch):
    from jupyter_client import kernelspec

    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "ipywidgets" else real(name))
    finding = look(check("Jupyter"))
    assert finding.state == "problem" and finding.advice == "`pip install ipywidgets`"
    monkeypatch.setattr(doctor, "version_of", real)

    def kernel(argv: list[str]) -> Finding:
        spec = types.SimpleNamespace(argv=argv)
        monkeypatch.setattr(kernelspec.KernelSpecManager, "get_kernel_spec", lambda self, name: spec)
        return look(check("Jupyter"))

    assert kernel(["/elsewhere/bin/python", "-m", "ipykernel_launcher"]).state == "problem"
    assert "/elsewhere/bin/python" in kernel(["/elsewhere/bin/python"]).found
    assert kernel([sys.executable, "-m"]).state == "ok" and kernel(["python", "-m"]).state == "ok"

    def none(self: object, name: str) -> None:
        raise kernelspec.NoSuchKernel(name)

    monkeypatch.setattr(kernelspec.KernelSpecManager, "get_kernel_spec", none)
    assert "ipykernel install" in look(check("Jupyter")).advice


def test_a_folder_that_cannot_be_written_and_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert look(check("disk")).state == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**20))
    finding = look(check("disk"))
    assert finding.state == "problem" and "0.00 GiB" in finding.found and "free some" in finding.advice

    def refused(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refused)
    finding = look(check("disk"))
    assert "Permission denied" in finding.found and "--runs" in finding.advice and str(Path.cwd()) in finding.found


def test_findings_as_text_and_json():
    good, bad = Finding("torch", "ok", "2.13"), Finding("MoGe", "problem", "gone", "install it", True)
    assert str(good).split() == ["ok", "torch", "2.13"] and "-> install it" in str(bad)
    assert json.loads(to_json([good, bad]))[1]["advice"] == "install it"
    assert [each.broken for each in (good, bad, Finding("GPU", "problem", ""))] == [False, True, False]
