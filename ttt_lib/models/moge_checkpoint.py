"""MoGe's checkpoints: from the hub or a file to a network, and one sentence for each mistake."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ttt_lib.core.errors import ModelError
from ttt_lib.models.bounds import BoundsError, check_archive, check_numbers
from ttt_lib.models.hub import fetch

HUB_NAMES = (
    "Ruicheng/moge-vitl",
    "Ruicheng/moge-2-vitl",
    "Ruicheng/moge-2-vitl-normal",
    "Ruicheng/moge-2-vitb-normal",
    "Ruicheng/moge-2-vits-normal",
)


def refuse_moge_3(name: str) -> None:
    """Raises `ModelError` for the name or path of a MoGe-3, as long as the installed package has no such network."""
    if "moge-3" in name.lower() and importlib.util.find_spec("moge.model.v3") is None:
        raise ModelError(f"model {name!r}: the installed moge has no MoGe-3; use a MoGe-2 such as {HUB_NAMES[-1]!r}.")


def download_checkpoint(name: str) -> Path:
    """The file of MoGe's checkpoint `name` in the hub's cache, downloaded if need be. Raises `ModelError`."""
    page = f"https://huggingface.co/{name}"
    advice = f"download `model.pt` of {page} on a machine with access and pass its path as the model"
    return fetch(name, ("model.pt",), advice) / "model.pt"


def _read_checkpoint(path: Path, name: str) -> dict[str, Any]:
    advice = (
        "a model is the `model.pt` of a MoGe repository, a file written by this package, or the folder of a "
        "transformers model"
    )
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except BoundsError as error:
        raise ModelError(f"model {name!r}: {path} is no checkpoint to be read ({error}).") from error
    except OSError as error:
        raise ModelError(f"model {name!r}: {path} cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # damaged bytes end in nearly any exception inside the unpickler
        raise ModelError(
            f"model {name!r}: {path} is not a readable checkpoint (truncated, or another kind of file); {advice}."
        ) from error
    if not isinstance(checkpoint, dict) or not {"model", "model_config"} <= checkpoint.keys():
        raise ModelError(f"model {name!r}: {path} holds no `model_config` and `model`; {advice}.")
    return checkpoint


SMALL = 64  # numbers of a configuration up to here are never too large
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


class _WithoutMemory(TorchFunctionMode):
    """Inside, new tensors have a shape and no memory. (`torch.device("meta")` goes too far: DINOv2 reads a number.)"""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = {"device": "meta"} if function in FACTORIES else {}
        return function(*args, **{**(kwargs or {}), **more})


def _check_sizes(config: dict[str, Any], weights: dict[str, Any]) -> None:
    """Whether a configuration asks for no more than the file's own tensors show. Raises `ValueError`."""
    tensors = [value for value in weights.values() if isinstance(value, torch.Tensor)]
    if any(value.numel() * value.element_size() > value.untyped_storage().nbytes() for value in tensors):
        raise ValueError("a tensor in it is larger than what is stored of it")
    largest = max([SMALL, *(side for value in tensors for side in value.shape)])
    sizes = {key: value for key, value in config.items() if key not in ("num_tokens_range", "trained_area_range")}
    check_numbers(sizes, largest, max(SMALL, len(tensors)), "its configuration")


def _plain_names(weights: dict[str, Any]) -> dict[str, Any]:
    """Names without what data-parallel training (`module.`) and `torch.compile` (`_orig_mod.`) put before them."""
    plain = {str(key).replace("_orig_mod.", ""): value for key, value in weights.items()}
    while plain and all(key.startswith("module.") for key in plain):
        plain = {key.removeprefix("module."): value for key, value in plain.items()}
    return plain


def load_network(path: Path, name: str) -> nn.Module:
    """The network of a checkpoint, float32 on the CPU: MoGe-1, MoGe-2 or the small one, as its configuration says.

    `name` is what the user called it. Raises `ModelError` for another kind of file, damaged or incomplete weights.
    """
    checkpoint = _read_checkpoint(path, name)
    config, weights = checkpoint["model_config"], checkpoint["model"]
    wrong = f"model {name!r}: {path} is not a MoGe checkpoint"
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise ModelError(f"{wrong}: its `model_config` and `model` are not dictionaries.")
    try:
        if config.get("architecture") == "tiny":
            from ttt_lib.models.tiny import TinyMoGe as Network
        elif "neck" in config:
            from moge.model.v2 import MoGeModel as Network
        else:
            from moge.model.v1 import MoGeModel as Network
        weights = _plain_names(weights)
        _check_sizes(config, weights)
        with _WithoutMemory():
            shapes = {key: value.shape for key, value in Network(**config).state_dict().items()}
        wrong_shapes = [key for key, shape in shapes.items() if key in weights and weights[key].shape != shape]
        if wrong_shapes:
            key = wrong_shapes[0]
            raise ValueError(f"{key} has the shape {tuple(weights[key].shape)}, not {tuple(shapes[key])}")
        if missing := [key for key in shapes if key not in weights]:
            raise ModelError(f"model {name!r}: {path} lacks {len(missing)} of its weights, first {missing[0]!r}.")
        network = Network(**config)
        network.load_state_dict(weights, strict=False)
    except ModelError:
        raise
    except Exception as error:  # whatever a network's constructor makes of a wrong configuration
        # PyTorch's report of wrong shapes says what is wrong from its second line on.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(f"{wrong} ({lines[min(1, len(lines) - 1)].rstrip('.')}).") from error
    if not hasattr(network, "points_head") and not hasattr(network, "head"):
        raise ModelError(f"{wrong} of points: it has no points head.")
    broken = [key for key, value in network.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise ModelError(f"model {name!r}: {path} holds numbers that are not finite, first in {broken[0]!r}.")
    try:
        low, high = map(float, getattr(network, "num_tokens_range", (1, 1)))
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not 0 < low <= high <= 1e5:
        raise ModelError(f"{wrong}: its `num_tokens_range` is not two numbers of tokens, the lower one first.")
    return network
