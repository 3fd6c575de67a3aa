"""Adapted weights in a file: for other photographs of the same place."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ttt_lib.core.errors import ModelError, UserError, reason
from ttt_lib.core.files import replacing_file
from ttt_lib.models.base import GeometryModel, weights_checksum

FORMAT = "ttt-depth adapted weights 1"


def save_weights(path: str | Path, model: GeometryModel, weights: dict[str, Tensor]) -> None:
    """Write adapted weights, in one step.

    Args:
        path: the file.
        model: as it was before adaptation; the file says which model it belongs to.
        weights: name -> parameter, `SceneAdaptation.weights`.

    Raises:
        UserError: there are none, or the file cannot be written.
    """
    path = Path(path)
    if not weights:
        raise UserError(f"{path}: nothing was trained, so there are no weights to keep; use an experiment that trains.")
    content = {
        "format": FORMAT, "model": model.name, "checksum": weights_checksum(model),
        "weights": {name: value.detach().cpu().contiguous() for name, value in weights.items()},
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as work:
            torch.save(content, work)
    except OSError as error:
        raise UserError(f"{path}: the weights cannot be written ({reason(error)}).") from error


def use_weights(model: GeometryModel, path: str | Path) -> None:
    """Put adapted weights into the model that they were made from; from here on they are its own.

    Args:
        model: as loaded, with its original weights.
        path: a file of `save_weights`.

    Raises:
        ModelError: no such file, another kind of file, or weights of another model.

    Example:
        >>> from ttt_lib import load_model
        >>> use_weights(load_model("tiny"), "nowhere.pt")
        Traceback (most recent call last):
        ...
        ttt_lib.core.errors.ModelError: nowhere.pt: there is no such file of adapted weights.
    """
    if not os.path.isfile(path):
        raise ModelError(f"{path}: there is no such file of adapted weights.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights, checksum, made_for = (content[key] for key in ("weights", "checksum", "model"))
        if content["format"] != FORMAT or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("another format")
    except Exception as error:  # whatever a damaged or foreign file makes of it
        raise ModelError(
            f"{path}: is no file of adapted weights; `--save-weights` writes one ({reason(error)})."
        ) from error
    if checksum != weights_checksum(model):
        raise ModelError(f"{path}: belongs to another model ({made_for}, or other weights of it).")
    named = dict(model.network.named_parameters())
    if any(name not in named or named[name].shape != value.shape for name, value in weights.items()):
        raise ModelError(f"{path}: its weights do not fit the model {model.name!r}.")
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(value)
