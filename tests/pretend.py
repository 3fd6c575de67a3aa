"""A GPU that is none: tensors that say they are on `cuda:0`, computed on the CPU by the very same kernels.

What goes wrong on a first GPU without any arithmetic being wrong shows here: tensors of two devices in one operation, a
CPU's generator for a GPU's numbers, branches on `device.type`, and every place where the host waits for the device. Those
are counted as `torch.cuda.set_sync_debug_mode` counts them. Speed, memory, rounding and streams need the real thing.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
SIZED_BY_DATA = (
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::masked_select",
    "aten::unique_consecutive",
)
MAY_MIX = (
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
    "aten::index_put_",
    "aten::index_put",
    "aten::_index_put_impl_",
)


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU. To autograd it is on `meta`, which needs no driver; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.data.__set__:
                args[0].inner = args[1].inner
                return None
            if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
                index = args[1] if isinstance(args[1], tuple) else (args[1],)
                there = tuple(torch.tensor(part, device=GPU) if isinstance(part, list) else part for part in index)
                return func(args[0], there, *args[2:])
            if func is torch.Tensor.tolist:
                return args[0].cpu().tolist()
            if func is torch.Tensor.new_tensor:
                return torch.tensor(args[1], dtype=args[0].dtype, device=GPU)
            if func is torch.Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendedGpu(TorchDispatchMode):
    """While it is on, what is made on `cuda` is an `OnGpu`. waits: how often the host waited, by operation and line."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_composite(func):  # comes here whole in inference mode
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {}, self.waits)


def _each(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The arguments or results of an operation with every tensor in them changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(_each(part, change) for part in value) if type(value) in (list, tuple) else value


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _line() -> str:
    """The innermost line of the package that is being run."""
    frame = sys._getframe()
    while frame is not None and "/ttt_lib/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/ttt_lib/')[2]}:{frame.f_lineno}" if frame else "elsewhere"


def _waits(name: str, tensors: list[torch.Tensor], kwargs: dict[str, Any], args: Any, to: torch.device | None) -> bool:
    """Whether the host waits for the device here: numbers or sizes come back, or a blocking copy goes either way."""
    here = [isinstance(t, OnGpu) for t in tensors]
    if name in ("aten::_local_scalar_dense", *SIZED_BY_DATA):
        return here[0]
    if name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_") and here[0]:
        indices = [index for index in args[1] if index is not None]
        return any(index.dtype == torch.bool or not isinstance(index, OnGpu) for index in indices)
    if name == "aten::_to_copy":
        return here[0] != (to is not None and to.type == "cuda" or to is None and here[0]) and not kwargs.get(
            "non_blocking"
        )
    if name == "aten::copy_":
        return here[0] != here[1] and not (kwargs.get("non_blocking") or len(args) > 2 and args[2])
    return name == "aten::_linalg_check_errors" and here[0]


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str] | None = None) -> Any:
    """The operation on the CPU; what comes out is on the GPU where it would be. Raises as CUDA does for mixed devices."""
    name, kwargs = func._schema.name, dict(kwargs)
    tensors: list[torch.Tensor] = []
    _each([*args, *kwargs.values()], tensors.append)
    here = any(isinstance(tensor, OnGpu) for tensor in tensors)
    to = kwargs.get("device")
    to = GPU if to is not None and to.type in ("cuda", "meta") else to
    on_gpu = to == GPU if to is not None else here
    if name == "aten::copy_":
        on_gpu = isinstance(args[0], OnGpu)
    if here and name not in MAY_MIX:
        away = [t for t in tensors if not isinstance(t, OnGpu) and (t.ndim or name in ("aten::cat", "aten::stack"))]
        if away:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got one on the CPU too")
    generator = kwargs.get("generator")
    if generator is not None and on_gpu and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' in {name}")
    if waits is not None and tensors and _waits(name, tensors, kwargs, args, to):
        waits[f"{name.removeprefix('aten::')} in {_line()}"] += 1
    if to is not None:
        kwargs["device"] = CPU

    def inside(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.inner if isinstance(tensor, OnGpu) else tensor

    def outside(tensor: torch.Tensor) -> OnGpu:
        return given[id(tensor)] if id(tensor) in given else OnGpu(tensor)

    given = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OnGpu)}
    with torch.inference_mode(False), torch.no_grad():  # else views of usual tensors could not be wrapped
        out = func(*_each(args, inside), **{key: _each(value, inside) for key, value in kwargs.items()})
        return _each(out, outside) if on_gpu else out


def moved(network: torch.nn.Module) -> torch.nn.Module:
    """The network with its parameters and buffers on the pretended GPU, in place."""
    for module in network.modules():
        for key, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[key] = torch.nn.Parameter(value.detach().to(GPU), value.requires_grad)
        for key, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[key] = value.to(GPU)
    return network


@contextmanager
def pretended_gpu(free: int = 2**40, peak: int = 2**20) -> Iterator[PretendedGpu]:
    """A GPU with `free` bytes, of which a pass takes `peak`."""
    said = {
        "_lazy_init": None, "synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 0,
        "max_memory_allocated": peak, "memory_reserved": 0, "mem_get_info": (free, free), "empty_cache": None,
        "get_per_process_memory_fraction": 1.0,
        "get_rng_state": torch.get_rng_state(), "set_rng_state": None,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, value in said.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value, **__: value))
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda")` copies in a way that can be seen
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        yield stack.enter_context(PretendedGpu())
