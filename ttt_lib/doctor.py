"""`ttt-depth doctor`: what this machine has, and what to do about what it lacks.

`CHECKS` is the list: the checks of the machine are in `machine.py`, those of the package and its surroundings here. One
that raises becomes a finding of its own, so that a broken installation still gives a whole list.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ttt_lib import machine
from ttt_lib.core.errors import UserError, reason
from ttt_lib.core.files import to_json
from ttt_lib.core.provenance import version_of
from ttt_lib.machine import Missing, Problem
from ttt_lib.runs.catalog import experiment_files, notebooks_folder

LEAST_SPACE = 1.0  # GiB; MoGe-2's largest checkpoint alone takes more
REINSTALL = "install the package again in a fresh environment: `pip install .` in its checkout"
ELSEWHERE = "name another folder with --runs or -o, or change to one"
NEEDED = (
    *(f"{name}.ipynb" for name in ("00_base_model", "01_augmentation", "02_adaptation", "03_ablation")),
    *(f"profiles/{name}.yaml" for name in ("demo", "paper")),
    *(f"experiments/{name}.yaml" for name in ("original", "recommended")),
)


@dataclass
class Finding:
    """One line of the list. state: `ok`, `missing` (works without it) or `problem`; essential: nothing works without."""

    name: str
    state: Literal["ok", "missing", "problem"]
    found: str
    advice: str = ""
    essential: bool = False

    @property
    def broken(self) -> bool:
        """A problem without whose solution nothing works."""
        return self.essential and self.state == "problem"

    def __str__(self) -> str:
        """State, name, what is there; on a second line what to do."""
        line = f"{self.state:8} {self.name:14} {self.found}"
        return f"{line}\n{'':8} {'':14} -> {self.advice}" if self.advice else line


class Check(NamedTuple):
    """A row of the table. advice: for whatever the check raises, unless that brings its own."""

    name: str
    essential: bool
    advice: str
    look: Callable[[], str]


def requirements() -> str:
    """The packages that this one requires, against the versions that its metadata asks for."""
    from packaging.requirements import Requirement

    if version_of("ttt-depth") is None:
        raise Missing("ttt-depth itself is not installed")
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
        raise Problem("; ".join(wrong))
    return f"{len(wanted)} packages as required"


def bundled_model() -> str:
    """It is the file that its card describes, loads, and predicts."""
    import torch

    from ttt_lib.models.load import load_model
    from ttt_lib.models.moge import ASSETS

    path, card = ASSETS / "tiny.pt", ASSETS / "tiny.md"
    if not path.is_file():
        raise Problem(f"{path} is missing")
    stated = re.search(r"\b[0-9a-f]{64}\b", card.read_text(encoding="utf-8")) if card.is_file() else None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if stated is not None and stated.group() != digest:
        raise Problem(f"{path} is not the file that its card describes")
    try:
        prediction = load_model("tiny", "cpu", num_tokens=48).predict(torch.rand(3, 48, 64))
    except Exception as error:
        raise Problem(f"cannot be used ({reason(error)})") from error
    if not bool(torch.isfinite(prediction.depth).all()):
        raise Problem("its prediction is not finite")
    return f"loads and predicts, SHA-256 {digest[:12]}"


def gate() -> str:
    """The gate's bundled calibration."""
    from ttt_lib.adaptation.gate.decision import read_calibration

    about = read_calibration().about
    return f"calibrated for {about.get('model')} on {about.get('samples')} samples"


def notebooks() -> str:
    """Notebooks, experiments and profiles: the commands execute them."""
    folder = notebooks_folder()
    if absent := [name for name in NEEDED if not (folder / name).is_file()]:
        raise Problem(f"{folder} lacks {', '.join(absent)}")
    return f"{folder}, {len(experiment_files())} experiments"


def jupyter() -> str:
    """JupyterLab, widgets, and a `python3` kernel that is this interpreter."""
    if absent := [package for package in ("jupyterlab", "ipywidgets", "ipykernel") if version_of(package) is None]:
        raise Problem(f"{', '.join(absent)} not installed", f"`pip install {' '.join(absent)}`")
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    versions = ", ".join(f"{package} {version_of(package)}" for package in ("jupyterlab", "ipywidgets"))
    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel as error:
        raise Problem(f"{versions}; no kernel is called python3") from error
    own = re.fullmatch(r"python(3(\.\d+)?)?", program) is not None  # Jupyter puts its own interpreter in this place
    if not own and os.path.realpath(os.path.dirname(program)) != os.path.realpath(os.path.dirname(sys.executable)):
        raise Problem(f"{versions}; the kernel python3 is another Python, {program}")
    return f"{versions}, kernel python3"


def disk() -> str:
    """The working folder, where results go by default."""
    folder = Path.cwd()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise Problem(f"{folder} cannot be written ({reason(error)})") from error
    free = shutil.disk_usage(folder).free / 2**30
    if free < LEAST_SPACE:
        raise Problem(f"{free:.2f} GiB free in {folder}", f"free some, or {ELSEWHERE}")
    return f"{free:.0f} GiB free in {folder}"


HF = 'for Depth Anything, ZoeDepth and MiDaS: `pip install "transformers>=4.45"`'
KERNEL = f"`{sys.executable} -m ipykernel install --sys-prefix` (ttt-depth itself brings its own kernel)"
CHECKS = (
    Check("Python", True, REINSTALL, machine.python_here),
    Check("requirements", True, REINSTALL, requirements),
    Check("torch", True, REINSTALL, machine.torch_computes),
    Check("GPU", False, REINSTALL, machine.gpus),
    Check("torchvision", False, "nothing needs it: `pip uninstall torchvision`", machine.torchvision),
    Check("MoGe", True, "install it: `pip install dlr-moge==2.0.0`", machine.moge),
    Check("transformers", False, HF, machine.transformers),
    Check("GL", False, machine.WITHOUT_GL, machine.gl),
    Check("hub", False, "use `tiny`, or the path of a `model.pt`", machine.hub),
    Check("bundled model", True, REINSTALL, bundled_model),
    Check("gate", False, f"{REINSTALL}; or set gate.mode=off", gate),
    Check("notebooks", True, REINSTALL, notebooks),
    Check("Jupyter", False, KERNEL, jupyter),
    Check("disk", False, ELSEWHERE, disk),
)


def look(check: Check) -> Finding:
    """Do one check; whatever it raises is a finding."""
    name, essential, advice, found = check
    try:
        return Finding(name, "ok", found(), essential=essential)
    except Problem as error:
        missing = isinstance(error, Missing)
        state = "missing" if missing else "problem"
        return Finding(name, state, str(error), error.advice or advice, essential and not missing)
    except UserError as error:  # of this package: a whole sentence
        return Finding(name, "problem", str(error), advice, essential)
    except Exception as error:  # an import that fails, mostly
        return Finding(name, "problem", f"cannot be used ({type(error).__name__}: {reason(error)})", advice, essential)


def report(as_json: bool) -> bool:
    """Do all checks and print what they find, line by line or as JSON; whether the package can work here."""
    findings = []
    for check in CHECKS:
        findings.append(look(check))
        if not as_json:
            print(findings[-1], flush=True)
    wrong = [finding.name for finding in findings if finding.broken]
    if as_json:
        print(to_json(findings, indent=1))
    elif wrong:
        print(f"ttt-depth cannot work here before this is put right: {', '.join(wrong)}.")
    else:
        print("ttt-depth can work here.")
    return not wrong
