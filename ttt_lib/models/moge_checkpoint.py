"""MoGe's checkpoints: from the hub or a file to a network, and one sentence for each mistake."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from moge.model import import_model_class_by_version
from torch import nn
from torch.overrides import TorchFunctionMode

from ttt_lib.core.errors import ModelError, reason
from ttt_lib.models.bounds import BoundsError, check_archive, check_numbers
from ttt_lib.models.hub import fetch

HUB_NAMES = (
    "Ruicheng/moge-vitl",
    "Ruicheng/moge-2-vitl",
    "Ruicheng/moge-2-vitl-normal",
    "Ruicheng/moge-2-vitb-normal",
    "Ruicheng/moge-2-vits-normal",
)
SMALL = 64  # numbers of a configuration up to here are never too large
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


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
    """What a file holds: `model_config` and `model` at least. Raises `ModelError`."""
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


def _network_class(config: dict[str, Any]) -> type[nn.Module]:
    """MoGe-1, MoGe-2 or the small one, as a configuration says."""
    if config.get("architecture") == "tiny":
        from ttt_lib.models.tiny import TinyMoGe

        return TinyMoGe
    return import_model_class_by_version("v2" if "neck" in config else "v1")


def _build(config: dict[str, Any], weights: dict[str, Any]) -> nn.Module:
    """The network of a configuration with the weights of its file. Raises `ValueError` where one does not fit the other."""
    network_class = _network_class(config)
    _check_sizes(config, weights)
    with _WithoutMemory():
        shapes = {key: value.shape for key, value in network_class(**config).state_dict().items()}
    if missing := [key for key in shapes if key not in weights]:
        raise ValueError(f"it lacks {len(missing)} of its weights, first {missing[0]!r}")
    for key, shape in shapes.items():
        if weights[key].shape != shape:
            raise ValueError(f"{key} has the shape {tuple(weights[key].shape)}, not {tuple(shape)}")
    network = network_class(**config)
    network.load_state_dict(weights, strict=False)
    return network


def _check_network(network: nn.Module) -> None:
    """Whether a network can be used as MoGe's are. Raises `ValueError`."""
    if not hasattr(network, "points_head") and not hasattr(network, "head"):
        raise ValueError("it has no points head")
    broken = [key for key, value in network.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"it holds numbers that are not finite, first in {broken[0]!r}")
    tokens = network.num_tokens_range
    pair = isinstance(tokens, list | tuple) and len(tokens) == 2 and all(isinstance(n, int | float) for n in tokens)
    if not pair or not 0 < tokens[0] <= tokens[1] <= 1e5:
        raise ValueError("its `num_tokens_range` is not two numbers of tokens, the lower one first")


def load_network(path: Path, name: str) -> nn.Module:
    """The network of a checkpoint, float32 on the CPU: MoGe-1, MoGe-2 or the small one, as its configuration says.

    `name` is what the user called it. Raises `ModelError` for another kind of file, damaged or incomplete weights.
    """
    checkpoint = _read_checkpoint(path, name)
    config, weights = checkpoint["model_config"], checkpoint["model"]
    try:
        if not isinstance(config, dict) or not isinstance(weights, dict):
            raise ValueError("its `model_config` and `model` are not dictionaries")
        network = _build(config, _plain_names(weights))
        _check_network(network)
    except Exception as error:  # whatever a network's constructor makes of a wrong configuration
        raise ModelError(
            f"model {name!r}: {path} is not a MoGe checkpoint that can be used ({reason(error)})."
        ) from error
    return network
