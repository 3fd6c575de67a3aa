"""MoGe's checkpoints: from the hub or a file to a network, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from moge.model import import_model_class_by_version
from torch import nn

from ttt_lib.core.errors import ModelError, reason
from ttt_lib.models.bounds import build_empty
from ttt_lib.models.hub import fetch
from ttt_lib.models.tiny import TinyMoGe

HUB_NAMES = (
    "Ruicheng/moge-vitl",
    "Ruicheng/moge-2-vitl",
    "Ruicheng/moge-2-vitl-normal",
    "Ruicheng/moge-2-vitb-normal",
    "Ruicheng/moge-2-vits-normal",
)


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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"model {name!r}: {path} cannot be read ({reason(error)}).") from error
    except Exception as error:  # damaged bytes end in nearly any exception inside the unpickler
        raise ModelError(
            f"model {name!r}: {path} is not a readable checkpoint (truncated, or another kind of file); {advice}."
        ) from error
    if not isinstance(checkpoint, dict) or not {"model", "model_config"} <= checkpoint.keys():
        raise ModelError(f"model {name!r}: {path} holds no `model_config` and `model`; {advice}.")
    return checkpoint


def _build(config: dict[str, Any], weights: dict[str, Any], size: int) -> nn.Module:
    """MoGe-1, MoGe-2 or the small one with the weights of its file of so many bytes. Raises what a wrong configuration
    leads to."""
    version = "v2" if "neck" in config else "v1"
    kind = TinyMoGe if config.get("architecture") == "tiny" else import_model_class_by_version(version)
    shapes = [value.shape for value in weights.values() if isinstance(value, torch.Tensor)]
    sizes = {key: value for key, value in config.items() if key not in ("num_tokens_range", "trained_area_range")}
    network = build_empty(lambda: kind(**config), sizes, shapes, size, "its configuration")
    # Without what data-parallel training (`module.`) and `torch.compile` (`_orig_mod.`) put before a name.
    plain = {str(key).replace("_orig_mod.", "").removeprefix("module."): value for key, value in weights.items()}
    if missing := network.load_state_dict(plain, strict=False, assign=True).missing_keys:
        raise ValueError(f"it lacks {len(missing)} of its weights, first {missing[0]!r}")
    if not hasattr(network, "points_head") and not hasattr(network, "head"):
        raise ValueError("it has no points head")
    for key, value in network.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(f"it holds numbers that are not finite, first in {key!r}")
    low, high = network.num_tokens_range
    if not 0 < low <= high <= 1e5:
        raise ValueError("its `num_tokens_range` is not two numbers of tokens, the lower one first")
    return network.float()


def load_network(path: Path, name: str) -> nn.Module:
    """The network of a checkpoint, float32 on the CPU: MoGe-1, MoGe-2 or the small one, as its configuration says.

    `name` is what the user called it. Raises `ModelError` for another kind of file, damaged or incomplete weights.
    """
    checkpoint = _read_checkpoint(path, name)
    try:
        return _build(checkpoint["model_config"], checkpoint["model"], path.stat().st_size)
    except Exception as error:  # whatever a network's constructor makes of a wrong configuration
        raise ModelError(
            f"model {name!r}: {path} is not a MoGe checkpoint that can be used ({reason(error)})."
        ) from error
