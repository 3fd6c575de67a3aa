"""MoGe's checkpoints: from the hub or a file to a network, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ttt_lib.core.errors import UserError
from ttt_lib.models.hub import NotInRepository, download, hub_answers

HUB_NAMES = (
    "Ruicheng/moge-vitl",
    "Ruicheng/moge-2-vitl",
    "Ruicheng/moge-2-vitl-normal",
    "Ruicheng/moge-2-vitb-normal",
    "Ruicheng/moge-2-vits-normal",
)
# Hub names that start so are loaded through transformers, every other one through moge.
TRANSFORMERS_PREFIXES = ("LiheYoung/", "depth-anything/", "Intel/zoedepth", "Intel/dpt")


def download_checkpoint(name: str) -> Path:
    """The file of MoGe's checkpoint `name` in the hub's cache, downloaded if need be. Raises `UserError`."""
    page = f"https://huggingface.co/{name}"
    advice = f"download `model.pt` of {page} on a machine with access and pass its path as the model"
    try:
        return download(name, "model.pt", hub_answers(), advice)
    except NotInRepository as error:
        raise UserError(
            f"model {name!r}: the repository holds no `model.pt`, so it is no MoGe model; known are {', '.join(HUB_NAMES)}"
            f" and names that begin with {', '.join(TRANSFORMERS_PREFIXES)}."
        ) from error


def _read_checkpoint(path: Path, name: str) -> dict[str, Any]:
    advice = (
        "a model is the `model.pt` of a MoGe repository, a file written by this package, or the folder of a "
        "transformers model"
    )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"model {name!r}: {path} cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # damaged bytes end in nearly any exception inside the unpickler
        raise UserError(
            f"model {name!r}: {path} is not a readable checkpoint (truncated, or another kind of file); {advice}."
        ) from error
    if not isinstance(checkpoint, dict) or not {"model", "model_config"} <= checkpoint.keys():
        raise UserError(f"model {name!r}: {path} holds no `model_config` and `model`; {advice}.")
    return checkpoint


def load_network(path: Path, name: str) -> nn.Module:
    """The network of a checkpoint, float32 on the CPU: MoGe-1, MoGe-2 or the small one, as its configuration says.

    `name` is what the user called it. Raises `UserError` for another kind of file, damaged or incomplete weights.
    """
    checkpoint = _read_checkpoint(path, name)
    config, weights = checkpoint["model_config"], checkpoint["model"]
    wrong = f"model {name!r}: {path} is not a MoGe checkpoint"
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise UserError(f"{wrong}: its `model_config` and `model` are not dictionaries.")
    try:
        if config.get("architecture") == "tiny":
            from ttt_lib.models.tiny import TinyMoGe as Network
        elif "neck" in config:
            from moge.model.v2 import MoGeModel as Network
        else:
            from moge.model.v1 import MoGeModel as Network
        network = Network(**config)
        missing = network.load_state_dict(weights, strict=False).missing_keys
    except Exception as error:  # whatever a network's constructor makes of a wrong configuration
        # PyTorch's report of wrong shapes says what is wrong from its second line on.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"{wrong} ({lines[min(1, len(lines) - 1)].rstrip('.')}).") from error
    if missing:
        raise UserError(f"model {name!r}: {path} lacks {len(missing)} of its weights, first {missing[0]!r}.")
    if not hasattr(network, "points_head") and not hasattr(network, "head"):
        raise UserError(f"{wrong} of points: it has no points head.")
    broken = [key for key, value in network.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(f"model {name!r}: {path} holds numbers that are not finite, first in {broken[0]!r}.")
    try:
        low, high = map(float, getattr(network, "num_tokens_range", (1, 1)))
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not 0 < low <= high <= 1e5:
        raise UserError(f"{wrong}: its `num_tokens_range` is not two numbers of tokens, the lower one first.")
    return network
