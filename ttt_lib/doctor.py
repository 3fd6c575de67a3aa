"""`ttt-depth doctor`: what this machine has, and what to do about what it lacks.

The checks of the machine are in `machine.py`, those of the package and its surroundings here. One that raises becomes a
problem of its own, so that a broken installation still gives a whole list.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ttt_lib.core.errors import UserError, reason
from ttt_lib.core.files import to_json as as_json
from ttt_lib.machine import (
    REINSTALL,
    Finding,
    check_gl,
    check_gpu,
    check_hub,
    check_moge,
    check_python,
    check_torch,
    check_torchvision,
    check_transformers,
    version_of,
)
from ttt_lib.runs.catalog import experiment_files, notebooks_folder

LEAST_SPACE = 1.0  # GiB; MoGe-2's largest checkpoint alone takes more
NOTEBOOK_FILES = tuple(f"{name}.ipynb" for name in ("00_base_model", "01_augmentation", "02_adaptation", "03_ablation"))


def check_requirements() -> Finding:
    """The packages that this one requires, against the versions that its metadata asks for."""
    from packaging.requirements import Requirement

    if version_of("ttt-depth") is None:
        return Finding("requirements", "problem", "ttt-depth itself is not installed", REINSTALL, False)
    wanted = [Requirement(line) for line in importlib.metadata.requires("ttt-depth") or []]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in wanted:
        version = version_of(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Finding("requirements", "problem", "; ".join(wrong), REINSTALL, True)
    return Finding("requirements", "ok", f"{len(wanted)} packages as required", essential=True)


def check_model() -> Finding:
    """The bundled model is the file that its card describes, loads, and predicts."""
    from ttt_lib.models.moge import ASSETS

    path, advice = ASSETS / "tiny.pt", REINSTALL
    if not path.is_file():
        return Finding("bundled model", "problem", f"{path} is missing", advice, True)
    card = ASSETS / "tiny.md"
    stated = re.search(r"\b[0-9a-f]{64}\b", card.read_text(encoding="utf-8")) if card.is_file() else None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if stated is not None and stated.group() != digest:
        return Finding("bundled model", "problem", f"{path} is not the file that its card describes", advice, True)
    try:
        import torch

        from ttt_lib.models.load import load_model

        prediction = load_model("tiny", "cpu", num_tokens=48).predict(torch.rand(3, 48, 64))
        if not bool(torch.isfinite(prediction.depth).all()):
            return Finding("bundled model", "problem", "its prediction is not finite", REINSTALL, True)
    except Exception as error:
        return Finding("bundled model", "problem", f"cannot be used ({reason(error)})", advice, True)
    return Finding("bundled model", "ok", f"loads and predicts, SHA-256 {digest[:12]}", essential=True)


def check_calibration() -> Finding:
    """The gate's bundled calibration."""
    from ttt_lib.adaptation.gate.decision import read_calibration

    try:
        about = read_calibration().about
    except UserError as error:
        return Finding("gate", "problem", str(error), f"{REINSTALL}; or set gate.mode=off")
    return Finding("gate", "ok", f"calibrated for {about.get('model')} on {about.get('samples')} samples")


def check_notebooks() -> Finding:
    """Notebooks, experiments and profiles: the commands execute them."""
    try:
        folder = notebooks_folder()
    except UserError as error:
        return Finding("notebooks", "problem", str(error), REINSTALL, True)
    absent = [name for name in NOTEBOOK_FILES if not (folder / name).is_file()]
    absent += [
        f"profiles/{name}.yaml" for name in ("demo", "paper") if not (folder / "profiles" / f"{name}.yaml").is_file()
    ]
    absent += [f"experiments/{name}.yaml" for name in ("original", "recommended") if name not in experiment_files()]
    if absent:
        return Finding("notebooks", "problem", f"{folder} lacks {', '.join(absent)}", REINSTALL, True)
    return Finding("notebooks", "ok", f"{folder}, {len(experiment_files())} experiments", essential=True)


def check_jupyter() -> Finding:
    """JupyterLab, widgets, and a `python3` kernel that is this interpreter."""
    absent = [package for package in ("jupyterlab", "ipywidgets", "ipykernel") if version_of(package) is None]
    if absent:
        return Finding("Jupyter", "problem", f"{', '.join(absent)} not installed", f"`pip install {' '.join(absent)}`")
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    versions = ", ".join(f"{package} {version_of(package)}" for package in ("jupyterlab", "ipywidgets"))
    advice = f"`{sys.executable} -m ipykernel install --sys-prefix` (ttt-depth itself brings its own kernel)"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return Finding("Jupyter", "problem", f"{versions}; no kernel is called python3", advice)
    program = spec.argv[0]
    own = re.fullmatch(r"python(3(\.\d+)?)?", program) is not None  # Jupyter puts its own interpreter in this place
    if not own and os.path.realpath(os.path.dirname(program)) != os.path.realpath(os.path.dirname(sys.executable)):
        return Finding("Jupyter", "problem", f"{versions}; the kernel python3 is another Python, {program}", advice)
    return Finding("Jupyter", "ok", f"{versions}, kernel python3")


def check_disk() -> Finding:
    """The working folder, where results go by default."""
    folder = Path.cwd()
    elsewhere = "name another folder with --runs or -o, or change to one"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return Finding("disk", "problem", f"{folder} cannot be written ({reason(error)})", elsewhere)
    free = shutil.disk_usage(folder).free / 2**30
    if free < LEAST_SPACE:
        return Finding("disk", "problem", f"{free:.2f} GiB free in {folder}", f"free some, or {elsewhere}")
    return Finding("disk", "ok", f"{free:.0f} GiB free in {folder}")


CHECKS: tuple[tuple[str, Callable[[], Finding]], ...] = (
    ("Python", check_python), ("requirements", check_requirements), ("torch", check_torch), ("GPU", check_gpu),
    ("torchvision", check_torchvision), ("MoGe", check_moge), ("transformers", check_transformers), ("GL", check_gl),
    ("hub", check_hub), ("bundled model", check_model), ("gate", check_calibration), ("notebooks", check_notebooks),
    ("Jupyter", check_jupyter), ("disk", check_disk),
)  # fmt: skip


def diagnose(announce: Callable[[Finding], None] = lambda finding: None) -> list[Finding]:
    """Run all checks in order; announce: called with each finding as it comes. A check that raises is a problem."""
    findings = []
    for name, check in CHECKS:
        try:
            finding = check()
        except Exception as error:
            found = f"could not be looked at ({type(error).__name__}: {reason(error)})"
            finding = Finding(
                name, "problem", found, "put right what is said of torch, MoGe and the requirements first"
            )
        findings.append(finding)
        announce(finding)
    return findings


def to_text(finding: Finding) -> str:
    """State, name, what is there; on a second line what to do."""
    line = f"{finding.state:8} {finding.name:14} {finding.found}"
    return f"{line}\n{'':8} {'':14} -> {finding.advice}" if finding.advice else line


def to_json(findings: list[Finding]) -> str:
    """A list of objects with the fields of `Finding`."""
    return as_json(findings, indent=1)


def broken(findings: list[Finding]) -> list[Finding]:
    """The problems without whose solution nothing works."""
    return [finding for finding in findings if finding.essential and finding.state == "problem"]
