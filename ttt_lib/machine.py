"""What the machine has: interpreter, torch, GPU, model libraries, OpenGL, the hub. `doctor.py` puts the list together.

Each check looks at one thing. What draws through OpenGL runs in another process, because drivers can crash.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Literal

from ttt_lib.core.errors import reason

GL_TIMEOUT = 120.0  # seconds, with the import of torch on a slow disk
HUB_PATIENCE = 15.0  # seconds; name servers may be slower to fail than the hub's own time limit
REINSTALL = "install the package again in a fresh environment: `pip install .` in its checkout"

# What `NovelViewRenderer("auto")` does in a run: make the context, upload a mesh, draw it.
DRAW = """
import json, torch
from ttt_lib.views.renderer import NovelViewRenderer
renderer = NovelViewRenderer("auto")
rows, columns = torch.meshgrid(torch.arange(16) / 16 - 0.47, torch.arange(16) / 16 - 0.47, indexing="ij")
points = torch.stack([columns, rows, torch.ones(16, 16)], -1) * 2
renderer.set_scene(torch.full((3, 16, 16), 0.5), points, torch.ones(16, 16, dtype=torch.bool))
view = renderer.render(torch.eye(4)[None], torch.tensor([[[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]]]), (16, 16))
depth = view.points[0, 8, 8, 2]
print("FOUND " + json.dumps([renderer.backend, renderer.reason, bool(abs(depth - 2) < 0.01)]))
"""


@dataclass
class Finding:
    """One line of the list. state: `ok`, `missing` (works without it) or `problem`; essential: nothing works without."""

    name: str
    state: Literal["ok", "missing", "problem"]
    found: str
    advice: str = ""
    essential: bool = False


def version_of(package: str) -> str | None:
    """The installed version of a distribution, None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Finding:
    """The interpreter; pip has seen to its version."""
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {sys.executable}"
    return Finding("Python", "ok", found, essential=True)


def check_torch() -> Finding:
    """PyTorch imports and computes."""
    try:
        import torch

        if float(torch.ones(8, 8).matmul(torch.ones(8, 8)).sum()) != 512:
            return Finding("torch", "problem", f"{torch.__version__} multiplies matrices wrongly", REINSTALL, True)
        found = f"{torch.__version__}, {torch.get_num_threads()} threads"
    except Exception as error:
        return Finding("torch", "problem", f"cannot be imported ({reason(error)})", REINSTALL, True)
    return Finding("torch", "ok", found, essential=True)


def check_gpu() -> Finding:
    """CUDA devices and their memory, or why torch sees none."""
    import torch

    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            try:
                free, total = (n / 2**30 for n in torch.cuda.mem_get_info(index))
                torch.ones(2, device=f"cuda:{index}").sum().item()
                found.append(f"cuda:{index} {torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GiB free")
            except RuntimeError as error:
                advice = (
                    "free the device (`nvidia-smi` shows who uses it), choose another with CUDA_VISIBLE_DEVICES, or "
                    "install a torch built for it"
                )
                return Finding("GPU", "problem", f"cuda:{index} cannot be used ({reason(error)})", advice)
        return Finding("GPU", "ok", "; ".join(found))
    works = "everything also works on the CPU"
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", "missing", "no NVIDIA driver", f"{works}; for large models use a machine with a GPU")
    if torch.version.cuda is None:
        advice = f"{works}; for the GPU install a torch built for CUDA (environment.yml does)"
        return Finding(
            "GPU", "problem", f"a driver is there, but torch {torch.__version__} is built without CUDA", advice
        )
    found = f"a driver is there, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds no device"
    advice = f"{works}; check that `nvidia-smi` lists a device, that CUDA_VISIBLE_DEVICES is not empty, and that the driver is new enough"
    return Finding("GPU", "problem", found, advice)


def check_torchvision() -> Finding:
    """Nothing here needs torchvision; a broken one counts as absent."""
    version = version_of("torchvision")
    if version is None:
        return Finding("torchvision", "ok", "absent; nothing needs it")
    from ttt_lib.models.torchvision import hide_broken_torchvision

    hide_broken_torchvision()
    if sys.modules.get("torchvision") is not None:
        return Finding("torchvision", "ok", version)
    found = f"{version} cannot be imported beside this torch; it counts as absent, and nothing needs it"
    return Finding("torchvision", "ok", found)


def check_moge() -> Finding:
    """MoGe's network, losses and metrics import."""
    try:
        for module in ("moge.model.v2", "moge.train.losses", "moge.test.metrics"):
            importlib.import_module(module)
    except Exception as error:
        found = f"cannot be imported ({reason(error)})"
        return Finding("MoGe", "problem", found, "install it: `pip install dlr-moge==2.0.0`", True)
    return Finding("MoGe", "ok", f"dlr-moge {version_of('dlr-moge') or 'of unknown version'}", essential=True)


def check_transformers() -> Finding:
    """For Depth Anything, ZoeDepth and DPT/MiDaS only."""
    from packaging.version import Version

    version, advice = (
        version_of("transformers"),
        'for Depth Anything, ZoeDepth and MiDaS: `pip install "transformers>=4.45"`',
    )
    if version is None:
        return Finding("transformers", "missing", "not installed", advice)
    if Version(version) < Version("4.45"):
        return Finding("transformers", "problem", f"{version} is older than 4.45", advice)
    try:
        importlib.import_module("transformers")
    except Exception as error:
        return Finding("transformers", "problem", f"{version} cannot be imported ({reason(error)})", advice)
    return Finding("transformers", "ok", version)


def check_gl() -> Finding:
    """What `auto` draws novel views through, found by drawing one in another process."""
    try:
        done = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, timeout=GL_TIMEOUT)
    except subprocess.TimeoutExpired:
        advice = "the GL driver hangs; set views.novel_view.backend=torch, or PYOPENGL_PLATFORM=osmesa"
        return Finding("GL", "problem", f"no picture after {GL_TIMEOUT:.0f} s", advice)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        found = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"failed: {last[:200]}"
        advice = "set views.novel_view.backend=torch, or try PYOPENGL_PLATFORM=osmesa with `libosmesa6` installed"
        return Finding("GL", "problem", f"drawing through GL {found}", advice)
    backend, why, right = json.loads(line[len("FOUND ") :])
    if not right:
        return Finding("GL", "problem", f"{why}; the picture is wrong", "set views.novel_view.backend=torch")
    if backend == "pyrender":
        return Finding("GL", "ok", why)
    from ttt_lib.views.pyrender_backend import INSTALL_GL

    install = INSTALL_GL.split(", or use")[0]
    return Finding(
        "GL", "missing", why, f"torch draws the novel views instead; to have them drawn through GL, {install}"
    )


def check_hub() -> Finding:
    """Whether models can be downloaded, and which are in the cache."""
    from huggingface_hub import constants, scan_cache_dir

    from ttt_lib.models.hub import hub_answers

    try:
        cached = sorted(repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model")
    except Exception:  # no cache yet
        cached = []
    held = f"in the cache: {', '.join(cached) or 'no model'}"
    advice = "use `tiny`, a model of the cache, or the path of a `model.pt` that another machine downloaded"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "missing", f"switched off by HF_HUB_OFFLINE; {held}", f"unset it, or {advice}")
    answers: list[bool] = []
    asked = threading.Thread(target=lambda: answers.append(hub_answers()), daemon=True)
    asked.start()
    asked.join(HUB_PATIENCE)
    if answers == [True]:
        return Finding("hub", "ok", f"{constants.ENDPOINT} answers; {held}")
    return Finding(
        "hub", "missing", f"{constants.ENDPOINT} does not answer; {held}", f"{advice}; HF_ENDPOINT sets a mirror"
    )
