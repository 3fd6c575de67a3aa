"""Memory of this process and of a CUDA device: what is in use, and the most there was."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import torch

PROCESS = Path("/proc/self")  # Linux; elsewhere nothing is known


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: the GPU's, Python's, or that of PyTorch's CPU allocator."""
    if isinstance(error, RuntimeError):
        return "out of memory" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError)


def _resident_mb(key: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at most; NaN where the system does not say."""
    try:
        lines = (PROCESS / "status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**10
    except (OSError, StopIteration):
        return math.nan


def memory_mb(device: torch.device) -> float:
    """MiB in use now: allocated by PyTorch on a CUDA device, else resident in this process."""
    return torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else _resident_mb("VmRSS")


def peak_memory_mb(device: torch.device) -> float:
    """The most MiB in use since `reset_peak_memory`: allocated by PyTorch on a CUDA device, else resident in all of
    this process (interpreter, libraries and model too). Where the system has no reset: since the process started."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _resident_mb("VmHWM")


def room_for(device: torch.device, done: int) -> int:
    """How many things like the `done` ones before fit into a CUDA device's free memory, with a fifth of it to spare.

    Where this process may have only a part of the device (`torch.cuda.set_per_process_memory_fraction`), what is free of it.

    What one of them needs is taken from the peak since `reset_peak_memory`, so it is rather too much than too little.
    """
    in_use = torch.cuda.memory_allocated(device)
    each = max(torch.cuda.max_memory_allocated(device) - in_use, 1) / done
    (free, total), held = torch.cuda.mem_get_info(device), torch.cuda.memory_reserved(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)  # not in old releases
    return int(0.8 * (min(free, share * total - held) + held - in_use) / each)


def reset_peak_memory(device: torch.device) -> None:
    """`peak_memory_mb` starts again from what is in use now; does nothing where the system cannot do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5", encoding="utf-8")
