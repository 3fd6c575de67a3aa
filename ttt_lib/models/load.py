"""Models by name. Each family registers a loader and says which names are its own; here nothing is known of any."""

from __future__ import annotations

import logging
import math

import torch

from ttt_lib.core.errors import ModelError, UserError, reason
from ttt_lib.core.registry import MODELS
from ttt_lib.models import moge, transformers_loading  # noqa: F401  (they register their families)
from ttt_lib.models.base import GeometryModel

log = logging.getLogger(__name__)


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
    canonical_focal: float | None = None,
) -> GeometryModel:
    """Load a geometry model, frozen and in evaluation mode.

    Args:
        name: `tiny` (bundled, offline); a MoGe hub name or the path of a MoGe checkpoint; the hub name of a Depth
            Anything, Prompt Depth Anything, ZoeDepth, DPT/MiDaS, Depth Pro or GLPN model or its local folder
            (`list_models` knows the published names); `FAMILY:REST` for a family that is registered in `MODELS`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        num_tokens: base tokens of a picture (None: `tiny` what it was trained at, MoGe the most of its range,
            transformers models the size that their own rules give).
        autocast: `none`, or `bfloat16` for mixed precision of training passes.
        fov_x: horizontal field of view in degrees, where it is known (None: as the model predicts it; 60 is assumed,
            and said, for models that do not).
        canonical_focal: focal length, in pixels of the picture as the network gets it, of the camera that a metric
            model was trained for: its depth is rescaled by the ratio of the focal lengths (None: it is not).

    Returns:
        A `GeometryModel`: `predict` for a prediction, `forward` for outputs with gradients.

    Raises:
        UserError: one sentence, for a hub that cannot be reached, an unknown name, a wrong or truncated file.

    Example:
        >>> from ttt_lib import load_model
        >>> model = load_model("tiny", device="cpu")
        >>> model.kind, model.num_tokens
        ('metric', 192)
    """
    if autocast not in ("none", "bfloat16"):
        raise UserError(f"model.autocast: {autocast!r} is not known; use none or bfloat16.")
    if num_tokens is not None and num_tokens < 1:
        raise ModelError(f"model.num_tokens: {num_tokens} is less than one token.")
    if fov_x is not None and not 0 < fov_x < 180:
        raise ModelError(f"model.fov_x: {fov_x:g} is not a field of view in degrees; it lies between 0 and 180.")
    if canonical_focal is not None and not 0 < canonical_focal < math.inf:
        raise ModelError(f"model.canonical_focal: {canonical_focal:g} is no focal length in pixels; it is above 0.")
    target = _choose_device(device)
    family, rest = _family(name)
    log.info("model %s: family %s on %s", name, family, target)
    model = MODELS[family](rest, device=target, num_tokens=num_tokens, autocast=autocast, fov_x=fov_x)
    if fov_x is not None:
        model.fov_x = fov_x
    if canonical_focal is not None:
        if model.output != "depth" or not model.of_one_camera:
            raise ModelError(
                f"model.canonical_focal: {name} has no metric depth that belongs to one camera; leave it out."
            )
        model.canonical_focal = canonical_focal
    return model


def _family(name: str) -> tuple[str, str]:
    """The family of a name, and what its loader is called with: for `FAMILY:REST` the rest, otherwise the name.

    Families with `matches` are asked, the newest first: MoGe, whose `matches` takes every file, is the oldest.
    """
    prefix, colon, rest = name.partition(":")
    if colon and MODELS.knows(prefix) and "matches" not in MODELS.about[prefix]:
        return prefix, rest
    for family in reversed(MODELS.all_names()):
        if (matches := MODELS.about[family].get("matches")) and matches(name):
            return family, name
    raise ModelError(
        f"model {name!r}: neither 'tiny', nor a file that exists, nor a hub name such as {moge.HUB_NAMES[-1]!r}."
    )


def list_models(family: str | None = None) -> list[str]:
    """Published names that `load_model` takes, beside files and folders.

    Args:
        family: only of this one, such as `moge`, `tiny`, `hf` or one of yours (None: of all).

    Returns:
        What each family says is `listed`; a family that is reached as `FAMILY:REST` and lists nothing is named so.

    Raises:
        UserError: there is no such family.

    Example:
        >>> from ttt_lib import list_models
        >>> list_models("tiny")
        ['tiny']
    """
    families = MODELS.all_names()
    if family is not None and family not in families:
        raise ModelError(f"list_models: no family is called {family!r}; there are {', '.join(families)}.")
    chosen = [family] if family is not None else families
    return [name for each in chosen for name in MODELS.about[each].get("listed", (f"{each}:...",))]
