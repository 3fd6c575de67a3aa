"""What the machine has: interpreter, torch, GPU, model libraries, OpenGL, the hub. `doctor.py` puts the list together.

A check returns what it found, or raises: `Missing` for what the package works without, anything else for a problem. What
draws through OpenGL runs in another process, because drivers can crash.
"""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import subprocess
import sys
import threading

from ttt_lib.core.errors import reason
from ttt_lib.core.provenance import version_of

GL_TIMEOUT = 120.0  # seconds, with the import of torch on a slow disk
HUB_PATIENCE = 15.0  # seconds; name servers may be slower to fail than the hub's own time limit
TRIED = ("Linux",)  # systems on which the tests run
WITHOUT_GL = "set views.novel_view.backend=torch, or try PYOPENGL_PLATFORM=osmesa with `libosmesa6` installed"

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


class Problem(Exception):
    """What a check found wrong; advice, where the table's is not the right one."""

    def __init__(self, found: str, advice: str = "") -> None:
        super().__init__(found)
        self.advice = advice


class Missing(Problem):
    """What is not there, and the package works without."""


def python_here() -> str:
    """The interpreter, whose version pip has seen to, and the system."""
    system = platform.system()
    tried = "" if system in TRIED else f"; the tests run on {', '.join(TRIED)}, here nothing is promised"
    return f"{platform.python_version()}, {system} {platform.machine()}, {sys.executable}{tried}"


def torch_computes() -> str:
    """PyTorch imports and multiplies."""
    import torch

    if float(torch.ones(8, 8).matmul(torch.ones(8, 8)).sum()) != 512:
        raise Problem(f"{torch.__version__} multiplies matrices wrongly")
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def gpus() -> str:
    """CUDA devices and their memory, or why torch sees none."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            free, total = (n / 2**30 for n in torch.cuda.mem_get_info(index))
            torch.ones(2, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            raise Problem(
                f"cuda:{index} cannot be used ({reason(error)})",
                "free the device (`nvidia-smi` shows who uses it), choose another with CUDA_VISIBLE_DEVICES, or install "
                "a torch built for it",
            ) from error
        found.append(f"cuda:{index} {torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GiB free")
    if found:
        return "; ".join(found)
    works = "everything also works on the CPU"
    if torch.backends.mps.is_available():
        raise Missing("Apple's MPS is not used: it has no float64, which the alignment needs", works)
    if shutil.which("nvidia-smi") is None:
        raise Missing("no NVIDIA driver", f"{works}; for large models use a machine with a GPU")
    there = f"a driver is there, but torch {torch.__version__}"
    if torch.version.cuda is None:
        raise Problem(
            f"{there} is built without CUDA",
            f"{works}; for the GPU install a torch built for CUDA (environment.yml does)",
        )
    raise Problem(
        f"{there} (CUDA {torch.version.cuda}) finds no device",
        f"{works}; check that `nvidia-smi` lists a device, that CUDA_VISIBLE_DEVICES is not empty, and that the driver is"
        " new enough",
    )


def torchvision() -> str:
    """Nothing here needs torchvision; a broken one counts as absent."""
    version = version_of("torchvision")
    if version is None:
        return "absent; nothing needs it"
    from ttt_lib.models.torchvision import hide_broken_torchvision

    hide_broken_torchvision()
    if sys.modules.get("torchvision") is not None:
        return version
    return f"{version} cannot be imported beside this torch; it counts as absent, and nothing needs it"


def moge() -> str:
    """MoGe's network, losses and metrics import."""
    for module in ("moge.model.v2", "moge.train.losses", "moge.test.metrics"):
        importlib.import_module(module)
    return f"dlr-moge {version_of('dlr-moge') or 'of unknown version'}"


def transformers() -> str:
    """For Depth Anything, ZoeDepth and DPT/MiDaS only."""
    from packaging.version import Version

    version = version_of("transformers")
    if version is None:
        raise Missing("not installed")
    if Version(version) < Version("4.45"):
        raise Problem(f"{version} is older than 4.45")
    importlib.import_module("transformers")
    return version


def gl() -> str:
    """What `auto` draws novel views through, found by drawing one in another process."""
    try:
        done = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, timeout=GL_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise Problem(f"no picture after {GL_TIMEOUT:.0f} s", f"the GL driver hangs; {WITHOUT_GL}") from error
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"failed: {last[:200]}"
        raise Problem(f"drawing through GL {ended}")
    backend, why, right = json.loads(line[len("FOUND ") :])
    if not right:
        raise Problem(f"{why}; the picture is wrong")
    if backend != "pyrender":
        from ttt_lib.views.pyrender_backend import INSTALL_GL

        install = INSTALL_GL.split(", or use")[0]
        raise Missing(why, f"torch draws the novel views instead; to have them drawn through GL, {install}")
    return why


def hub() -> str:
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
        raise Missing(f"switched off by HF_HUB_OFFLINE; {held}", f"unset it, or {advice}")
    answers: list[bool] = []
    asked = threading.Thread(target=lambda: answers.append(hub_answers()), daemon=True)
    asked.start()
    asked.join(HUB_PATIENCE)
    if answers != [True]:
        raise Missing(f"{constants.ENDPOINT} does not answer; {held}", f"{advice}; HF_ENDPOINT sets a mirror")
    return f"{constants.ENDPOINT} answers; {held}"
