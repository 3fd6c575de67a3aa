"""`ttt-depth doctor`: what this machine has, and what to do about what it lacks.

`CHECKS` is the list. A check returns what it found, or raises: `Missing` for what the package works without, anything
else for a problem, so that a broken installation still gives a whole list.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from ttt_lib.core.errors import reason
from ttt_lib.core.provenance import version_of
from ttt_lib.runs.catalog import experiment_files, notebooks_folder

GL_TIMEOUT = 120.0  # seconds, with the import of torch on a slow disk
# What `NovelViewRenderer("auto")` does in a run: make the context, upload a mesh, draw it.
DRAW = """
import torch
from ttt_lib.views.renderer import NovelViewRenderer
renderer = NovelViewRenderer("auto")
rows, columns = torch.meshgrid(torch.arange(16) / 16 - 0.47, torch.arange(16) / 16 - 0.47, indexing="ij")
points = torch.stack([columns, rows, torch.ones(16, 16)], -1) * 2
renderer.set_scene(torch.full((3, 16, 16), 0.5), points, torch.ones(16, 16, dtype=torch.bool))
view = renderer.render(torch.eye(4)[None], torch.tensor([[[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]]]), (16, 16))
if abs(view.points[0, 8, 8, 2] - 2) > 0.01:
    raise RuntimeError(renderer.reason + "; the picture is wrong")
print("FOUND", renderer.backend, renderer.reason)
"""


class Problem(Exception):
    """What a check found wrong."""


class Missing(Problem):
    """What is not there, and the package works without."""


class Finding(NamedTuple):
    """What a check found. state: `ok`, `missing` (works without it) or `problem`."""

    state: str
    found: str
    advice: str = ""


class Check(NamedTuple):
    """A row of the table. advice: for whatever the check raises."""

    name: str
    essential: bool
    advice: str
    look: Callable[[], str]


def python_here() -> str:
    """The interpreter, whose version pip has seen to, and the system."""
    here = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {sys.executable}"
    return f"{here}; the tests run on Linux"


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


def torch_here() -> str:
    """PyTorch imports."""
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def gpus() -> str:
    """CUDA devices and their memory, or why torch sees none."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            free, total = (n / 2**30 for n in torch.cuda.mem_get_info(index))
        except RuntimeError as error:
            raise Problem(f"cuda:{index} cannot be used ({reason(error)})") from error
        found.append(f"cuda:{index} {torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GiB free")
    if found:
        return "; ".join(found)
    if shutil.which("nvidia-smi") is None:
        raise Missing("no NVIDIA driver")
    lacks = "is built without CUDA" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) finds no device"
    raise Problem(f"a driver is there, but torch {torch.__version__} {lacks}")


def torchvision() -> str:
    """Nothing needs it; one that cannot be imported beside this torch counts as absent."""
    from ttt_lib.models.torchvision import hide_broken_torchvision

    hide_broken_torchvision()
    found = version_of("torchvision") if sys.modules.get("torchvision") else "counts as absent"
    return f"{found}; nothing needs it"


def gl() -> str:
    """What `auto` draws novel views through, found by drawing one in another process, because drivers can crash."""
    try:
        done = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, timeout=GL_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise Problem(f"no picture after {GL_TIMEOUT:.0f} s: the GL driver hangs") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"failed: {last[:200]}"
        raise Problem(f"drawing through GL {ended}")
    backend, why = done.stdout.partition("FOUND ")[2].strip().split(" ", 1)
    if backend != "pyrender":
        raise Missing(why)
    return why


def hub() -> str:
    """Whether models can be downloaded."""
    from huggingface_hub import constants

    from ttt_lib.models.hub import hub_answers

    if constants.HF_HUB_OFFLINE:
        raise Missing("switched off by HF_HUB_OFFLINE")
    if not hub_answers():
        raise Missing(f"{constants.ENDPOINT} does not answer")
    return f"{constants.ENDPOINT} answers"


def assets() -> str:
    """It is the file that its card describes, loads, and predicts; the gate was calibrated for it."""
    import torch

    from ttt_lib.adaptation.gate.decision import read_calibration
    from ttt_lib.models.load import load_model
    from ttt_lib.models.moge import ASSETS

    prediction = load_model("tiny", "cpu", num_tokens=48).predict(torch.rand(3, 48, 64))
    if not bool(torch.isfinite(prediction.depth).all()):
        raise Problem("its prediction is not finite")
    digest = hashlib.sha256((ASSETS / "tiny.pt").read_bytes()).hexdigest()
    if digest not in (ASSETS / "tiny.md").read_text(encoding="utf-8"):
        raise Problem(f"{ASSETS / 'tiny.pt'} is not the file that its card describes")
    count = read_calibration().about["samples"]
    return f"the model predicts, SHA-256 {digest[:12]}; the gate was calibrated on {count} samples"


def notebooks() -> str:
    """Notebooks, experiments and profiles: the commands execute them."""
    return f"{notebooks_folder()}, {len(experiment_files())} experiments"


REINSTALL = "install the package again in a fresh environment: `pip install .` in its checkout"
GPU = (
    "everything also works on the CPU; for the GPU install a torch built for CUDA (environment.yml does), and see that "
    "`nvidia-smi` lists a device that is free and CUDA_VISIBLE_DEVICES names it"
)
GL = (
    "torch draws the novel views without it (or set views.novel_view.backend=torch); for GL install a library (Debian: "
    "`apt-get install libegl1 libgl1-mesa-dri`, or `libosmesa6` with PYOPENGL_PLATFORM=osmesa)"
)
HUB = "use `tiny`, or the path of a `model.pt` that another machine downloaded; HF_ENDPOINT sets a mirror"
CHECKS = (
    Check("Python", True, REINSTALL, python_here),
    Check("requirements", True, REINSTALL, requirements),
    Check("torch", True, REINSTALL, torch_here),
    Check("GPU", False, GPU, gpus),
    Check("torchvision", False, "nothing needs it: `pip uninstall torchvision`", torchvision),
    Check("GL", False, GL, gl),
    Check("hub", False, HUB, hub),
    Check("assets", True, REINSTALL, assets),
    Check("notebooks", True, REINSTALL, notebooks),
)


def look(check: Check) -> Finding:
    """Do one check; whatever it raises is a finding."""
    try:
        return Finding("ok", check.look())
    except Problem as error:
        state = "missing" if isinstance(error, Missing) else "problem"
        return Finding(state, str(error), check.advice)
    except Exception as error:  # an import that fails, mostly
        return Finding("problem", f"cannot be used ({type(error).__name__}: {reason(error)})", check.advice)


def report() -> bool:
    """Do all checks and print what they find, and below it what to do; whether the package can work here."""
    wrong = []
    for check in CHECKS:
        state, found, advice = look(check)
        print(f"{state:8} {check.name:14} {found}" + (f"\n{'':23} -> {advice}" if advice else ""), flush=True)
        if check.essential and state == "problem":
            wrong.append(check.name)
    if wrong:
        print(f"ttt-depth cannot work here before this is put right: {', '.join(wrong)}.")
    else:
        print("ttt-depth can work here.")
    return not wrong
