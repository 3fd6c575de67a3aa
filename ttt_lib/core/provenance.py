"""Where a result comes from: hashes, versions, revision, machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

COMPUTING = ("torch", "dlr-moge", "kornia", "numpy", "scipy", "pycolmap", "opencv-python", "pyrender-maintained")
PACKAGES = (*COMPUTING, "papermill", "ttt-depth")  # the former are part of what a result depends on


def fingerprint(content: Any) -> str:
    """Short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Short hash of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def version_of(package: str) -> str | None:
    """The installed version of a distribution, None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Cores that this process may use; of systems that do not say, all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_revision() -> str:
    """Revision of the checkout this package runs from, or `unknown`."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def processor() -> str:
    """What the system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Versions, machine and device for the manifest."""
    import torch

    cuda = torch.cuda.is_available()
    short = cuda and torch.backends.cudnn.allow_tf32 and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
    return {
        "packages": {name: version_of(name) or "absent" for name in PACKAGES},
        "python": platform.python_version(),
        "git_revision": git_revision(),
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "tf32": short,  # convolutions with 10 bits after the point, as torch sets it: training goes elsewhere (gpu_servers.md)
        "cores": cores(),
        "host": socket.gethostname(),
    }
