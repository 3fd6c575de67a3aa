"""Models by name: bundled, from a hub, a file, or a registered family."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ttt_lib.core.errors import UserError, reason
from ttt_lib.core.registry import MODELS
from ttt_lib.core.types import Kind
from ttt_lib.models.base import GeometryModel
from ttt_lib.models.moge import HUB_NAMES, TRANSFORMERS_PREFIXES, download_checkpoint, load_network

ASSETS = Path(__file__).parents[1] / "assets"


TINY_TOKENS = 192  # the bundled model was trained at no more, and is far worse at the most of its range


def _choose_device(device: str) -> torch.device:
    """`auto` is CUDA or the CPU: not Apple's MPS, which has no float64."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] == "mps":
        raise UserError(f"model.device: {device!r} has no float64, which corrections and resizing need; use cpu.")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # what cannot be read back, as from `meta`, is no device for results
        return chosen
    except Exception as error:  # a device that PyTorch knows by name only fails in its own way
        raise UserError(f"model.device: {device!r} cannot be used here ({reason(error)}).") from error


def load_model(
    name: str = "tiny",
    device: str = "auto",
    num_tokens: int | None = None,
    autocast: str = "none",
    fov_x: float | None = None,
) -> GeometryModel:
    """Load a geometry model, frozen and in evaluation mode.

    name: `tiny` (bundled, offline); a MoGe hub name (`HUB_NAMES`) or the path of a MoGe checkpoint; the hub name of a
    Depth Anything, ZoeDepth or DPT/MiDaS model (`TRANSFORMERS_PREFIXES`) or its local folder; `FAMILY:REST` for one that
    is registered in `MODELS`. device: `auto`, `cpu`, `cuda`, `cuda:1`. num_tokens: base tokens of a picture (None: `tiny`
    what it was trained at, MoGe the most of its range, transformers models the size that their own rules give).
    autocast: `none`, or `bfloat16` for mixed precision of training passes. fov_x: horizontal field of view in degrees,
    for models that predict no camera (None: 60 is assumed, and said).

    Raises `UserError`, one sentence, for a hub that cannot be reached, an unknown name, a wrong or truncated file.
    """
    if autocast not in ("none", "bfloat16"):
        raise UserError(f"model.autocast: {autocast!r} is not known; use none or bfloat16.")
    target, path = _choose_device(device), Path(os.path.expanduser(name))
    family, added, rest = name.partition(":")
    if added and MODELS.knows(family):
        return MODELS[family](rest, device=target, num_tokens=num_tokens, autocast=autocast, fov_x=fov_x)
    hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~")) and path.suffix not in (".pt", ".pth")
    if name == "tiny":
        path = ASSETS / "tiny.pt"
        if not path.exists():
            raise UserError(f"model 'tiny': {path} is missing; install the package again.")
        num_tokens = num_tokens or TINY_TOKENS
    # `os.path` also answers for names that no file system takes.
    elif os.path.isfile(path / "config.json") or (not os.path.exists(path) and name.startswith(TRANSFORMERS_PREFIXES)):
        from ttt_lib.models.transformers_loading import load_transformers_model

        return load_transformers_model(name, target, num_tokens, autocast, fov_x)
    elif os.path.isdir(path):
        path = path / "model.pt"
        if not path.is_file():
            raise UserError(f"model {name!r}: the folder holds neither config.json (transformers) nor model.pt (MoGe).")
    elif not os.path.isfile(path):
        if not hub_name:
            raise UserError(
                f"model {name!r}: neither 'tiny', nor a file that exists, nor a hub name such as {HUB_NAMES[-1]!r}."
            )
        path = download_checkpoint(name)
    if fov_x is not None:
        raise UserError(f"model {name!r}: it predicts the camera itself; leave the field of view out.")
    network = load_network(path, name).to(target)
    kind: Kind = "metric" if hasattr(network, "scale_head") else "scale_invariant"
    if target.type == "cpu" and name == "tiny":  # a third less time for its convolutions there; ViTs gain nothing
        network = network.to(memory_format=torch.channels_last)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return GeometryModel(network, name, kind, num_tokens, autocast)
