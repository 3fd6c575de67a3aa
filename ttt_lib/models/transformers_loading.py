"""Models of transformers from the hub or a folder: files, checks, and one sentence for each mistake.

Published names: Depth Anything V1 and V2 (`LiheYoung/depth-anything-*-hf`, `depth-anything/Depth-Anything-V2-*-hf`),
Prompt Depth Anything (`depth-anything/prompt-depth-anything-*-hf`), ZoeDepth (`Intel/zoedepth-*`), DPT/MiDaS
(`Intel/dpt-*`), Depth Pro (`apple/DepthPro-hf`), GLPN (`vinvino02/glpn-*`); `list_models("hf")` has them all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ttt_lib.core.errors import ModelError, reason
from ttt_lib.core.files import read_json
from ttt_lib.core.registry import MODELS
from ttt_lib.models.bounds import build_empty
from ttt_lib.models.hub import NotHeld, fetch
from ttt_lib.models.preprocessing import read_rules
from ttt_lib.models.transformers_models import TransformersModel
from ttt_lib.models.transformers_special import DepthProModel, PromptedModel, ZoeDepthModel

FAMILIES: dict[str, type[TransformersModel]] = {
    "depth_anything": TransformersModel,
    "zoedepth": ZoeDepthModel,
    "dpt": TransformersModel,
    "depth_pro": DepthProModel,
    "prompt_depth_anything": PromptedModel,
    "glpn": TransformersModel,
}
ALWAYS_METRIC = ("zoedepth", "depth_pro", "prompt_depth_anything", "glpn")

# Hub names that start so are loaded through transformers; these are some that are published.
PREFIXES = ("LiheYoung/", "depth-anything/", "Intel/zoedepth", "Intel/dpt", "apple/DepthPro", "vinvino02/glpn")
SIZES = ("Small", "Base", "Large")
PUBLISHED = (
    *(f"LiheYoung/depth-anything-{size.lower()}-hf" for size in SIZES),
    *(f"depth-anything/Depth-Anything-V2-{size}-hf" for size in SIZES),
    *(
        f"depth-anything/Depth-Anything-V2-Metric-{place}-{size}-hf"
        for place in ("Indoor", "Outdoor")
        for size in SIZES
    ),
    *(f"Intel/zoedepth-{data}" for data in ("nyu", "kitti", "nyu-kitti")),
    "Intel/dpt-large",
    "Intel/dpt-hybrid-midas",
    "apple/DepthPro-hf",
    *(f"depth-anything/prompt-depth-anything-{size}-hf" for size in ("vits", "vits-transparent", "vitl")),
    "vinvino02/glpn-nyu",
    "vinvino02/glpn-kitti",
)


def _fetch(name: str) -> Path:
    """The folder, in the hub's cache, with the files of the repository `name`. Raises `ModelError`."""
    advice = f"download the files of https://huggingface.co/{name} on a machine with access and pass their folder"
    described = "config.json", "preprocessor_config.json"
    try:
        return fetch(name, (*described, "model.safetensors"), advice)
    except NotHeld:
        with suppress(NotHeld):  # older repositories
            return fetch(name, (*described, "pytorch_model.bin"), advice)
        raise


def _check_sizes(folder: Path, config: dict[str, Any]) -> None:
    """Whether `config.json` of a folder asks for no more than its tensors show. Raises what damaged files lead to."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForDepthEstimation

    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    shapes: list[tuple[int, ...]] = []
    for path in files:
        if path.suffix == ".bin":
            weights = torch.load(path, map_location="meta", weights_only=True)
            shapes += [tensor.shape for tensor in weights.values()]
            continue
        with safe_open(path, "pt") as stored:
            shapes += [stored.get_slice(key).get_shape() for key in stored.keys()]  # noqa: SIM118  (it is no dictionary)

    def build() -> nn.Module:
        return AutoModelForDepthEstimation.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))

    build_empty(build, config, shapes, sum(path.stat().st_size for path in files), "config.json")


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bar and no report of transformers; what matters in it is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _network(folder: Path, config: dict[str, Any], name: str) -> nn.Module:
    """The network of a folder, float32, with every weight that it uses. Raises `ModelError`."""
    from transformers import AutoModelForDepthEstimation

    family = config["model_type"]
    try:
        _check_sizes(folder, config)
        network, report = AutoModelForDepthEstimation.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # damaged weights and wrong configurations end in nearly any exception
        # PyTorch's advice would run the code in the file.
        why = "its weights are no plain tensors" if "weights_only" in str(error) else reason(error)
        raise ModelError(f"model {name!r}: its files in {folder} cannot be loaded as {family} ({why}).") from error
    # The first fusion layer has nothing to add: its weights are never used, and published files leave them out.
    unused = [key for key in report["missing_keys"] if "fusion_stage.layers.0.residual_layer1." in key]
    missing = sorted(set(report["missing_keys"]) - set(unused))
    if missing:
        raise ModelError(
            f"model {name!r}: the weights in {folder} lack {len(missing)} of those a depth model needs, first {missing[0]!r}."
        )
    for key in unused:  # not left to chance, so that a checksum of the weights is the same each time
        nn.init.zeros_(network.get_parameter(key))
    return network.float()


def _is_transformers(name: str) -> bool:
    """A folder with `config.json`, or a hub name of a family that is known here."""
    path = os.path.expanduser(name)
    return os.path.isfile(os.path.join(path, "config.json")) or (not os.path.exists(path) and name.startswith(PREFIXES))


@MODELS.register("hf", matches=_is_transformers, listed=PUBLISHED)
def load_transformers_model(
    name: str, device: torch.device, num_tokens: int | None, autocast: str, fov_x: float | None
) -> TransformersModel:
    """Load a model of one of the `FAMILIES`, frozen, by hub name or local folder.

    Arguments as `load.load_model`. Raises `ModelError`, one sentence: transformers is missing, the hub cannot be
    reached, the folder holds another kind of model, or damaged or incomplete files.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(f"model {name!r}: transformers is not installed; run `pip install -e '.[hf]'`.") from error
    folder = Path(os.path.expanduser(name))
    if not (folder / "config.json").is_file():
        folder = _fetch(name)
    config = read_json(folder / "config.json")
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise ModelError(
            f"model {name!r}: its config.json says model type {family!r}; known are {', '.join(FAMILIES)}."
        )
    with _quietly():
        network = _network(folder, config, name)
        if num_tokens is not None and (family == "depth_pro" or getattr(network.config, "is_hybrid", False)):
            raise ModelError(f"model {name!r}: {family} takes pictures of one size; leave model.num_tokens out.")
        rules = read_rules(folder, family, network, name)
    backbone = getattr(getattr(network.config, "backbone_config", None), "model_type", None)
    metric = family in ALWAYS_METRIC or getattr(network.config, "depth_estimation_type", "") == "metric"
    metric = metric or (family == "dpt" and backbone == "dinov2")  # facebook/dpt-dinov2-*: depth in metres
    network = network.to(device).requires_grad_(False)
    return FAMILIES[family](network, name, metric, rules, num_tokens, autocast)
