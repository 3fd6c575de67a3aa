"""Where a test's body runs: on the CPU, on the pretended GPU (`pretend.py`), or on a real one."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from pretend import GPU, moved, pretended_gpu

from ttt_lib.models.base import GeometryModel
from ttt_lib.models.moge import MoGe
from ttt_lib.models.moge_layers import lighten


@dataclass
class Place:
    """`cpu`, `pretended` or `cuda`."""

    name: str

    @property
    def device(self) -> torch.device:
        """Of tensors there."""
        return {"cpu": torch.device("cpu"), "pretended": GPU}.get(self.name, torch.device("cuda:0"))

    def copy_of(self, model: GeometryModel) -> GeometryModel:
        """A MoGe model, there, as `load_model` makes it."""
        network = copy.deepcopy(model.network)
        if self.name != "cpu":
            lighten(network)
        network = moved(network) if self.name == "pretended" else network.to(self.device)
        return MoGe(network, model.name, model.kind, model.num_tokens)

    @contextmanager
    def counting(self) -> Iterator[Callable[[], list[str]]]:
        """Inside, every wait of the host for the device is noted, with the line of the package that waited."""
        if self.name == "pretended":
            with pretended_gpu() as gpu:
                yield lambda: list(gpu.waits.elements())
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield lambda: [
                    f"{w.filename}:{w.lineno}"
                    for w in caught
                    if "synchronizing" in str(w.message) and not w.filename.endswith("torch/cuda/__init__.py")
                ]  # where the mode itself says that it is a prototype
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def held(self) -> int:
        """Bytes of tensors alive; on a GPU PyTorch's own count of its memory."""
        gc.collect()
        if self.name == "cuda":
            return torch.cuda.memory_allocated()
        return sum(each.nbytes for each in gc.get_objects() if issubclass(type(each), torch.Tensor))


@contextmanager
def at(name: str) -> Iterator[Place]:
    """The place of that name, ready; without TF32, which would hide mistakes. Skips where there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: these are the checks of the first GPU")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with pretended_gpu() if name == "pretended" else nullcontext():
            yield Place(name)
    finally:
        torch.backends.cudnn.allow_tf32 = before


REAL = pytest.param("cuda", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize("place", ["cpu", "pretended", REAL], indirect=True)
on_gpus = pytest.mark.parametrize("place", ["pretended", REAL], indirect=True)
