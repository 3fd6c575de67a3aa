"""Whole sets of terms under one name, which an experiment's `losses` may hold beside terms of its own.

`own` is the set that the model was trained with, as far as its family says (`GeometryModel.losses`), and what an experiment
without `losses` has. The others are fixed: `moge1`, `moge2`, and `study`. Terms beside a set are laid over it key by key; of
several sets the last counts, so an override can choose another one; a set's weight multiplies those of its terms.
"""

from __future__ import annotations

from typing import Any

from ttt_lib.adaptation.losses.terms import active_terms
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.registry import LOSSES
from ttt_lib.core.schema import LossConfig
from ttt_lib.models.base import GeometryModel

Terms = dict[str, dict[str, Any]]


@LOSSES.register("own", preset=True, settings=LossConfig)
def own() -> Terms:
    """The model's own; `resolved` puts it in place."""
    return {}


@LOSSES.register("study", preset=True, settings=LossConfig)
def study() -> Terms:
    """The study's, on MoGe-2: MoGe-1's terms without normals (`configs/train/ablation_unfreeze_encoder.json` of its release)."""
    return {name: {} for name in ("global", "local_4", "local_16", "local_64", "mask")}


@LOSSES.register("moge1", preset=True, settings=LossConfig)
def moge1() -> Terms:
    """MoGe-1's for complete labels (`docs/train.md` of microsoft/MoGe, `synthetic`)."""
    return {**study(), "normal": {}}


@LOSSES.register("moge2", preset=True, settings=LossConfig)
def moge2() -> Terms:
    """MoGe-2's for complete labels (`configs/train/v2.json` of microsoft/MoGe, `A`), which a teacher's targets are."""
    sides = {"global": 48, "local_4": 24, "local_16": 12, "local_64": 6}
    weights = {"edge": 1.0, "normal_map": 0.1, "metric_scale": 0.1, "mask_bce": 0.1}
    return {name: {"align_resolution": side} for name, side in sides.items()} | {
        name: {"weight": weight} for name, weight in weights.items()
    }


def resolved(config: ExperimentConfig, model: GeometryModel) -> ExperimentConfig:
    """The experiment with single terms only: its set, that of `model` for `own`, with the other terms laid over it.

    Example:
        >>> from ttt_lib import load_experiment, load_model
        >>> config = load_experiment("unfreeze_encoder", overrides={"losses": {"moge2": {}, "edge": {"weight": 0}}})
        >>> terms_in_words(resolved(config, load_model("tiny")))
        'global 1, local_4 1, local_16 1, local_64 1, metric_scale 0.1, mask_bce 0.1, normal_map 0.1'
    """
    sets = [name for name in config.losses if LOSSES.about[name].get("preset")]
    if not sets:
        return config
    chosen, factor = sets[-1], config.losses[sets[-1]].weight
    terms = LOSSES[model.losses if chosen == "own" else chosen]()
    terms = {name: {**term, "weight": factor * term.get("weight", 1.0)} for name, term in terms.items()}
    for name, term in config.losses.items():
        if name not in sets:
            terms[name] = terms.get(name, {}) | term.model_dump(exclude_unset=True)
    losses = {name: LOSSES.about[name].get("settings", LossConfig)(**term) for name, term in terms.items()}
    return config.model_copy(update={"losses": losses})


def terms_in_words(config: ExperimentConfig) -> str:
    """The active terms and their weights, for the record of a result; one whose output a model lacks is left out of the sum."""
    return ", ".join(f"{name} {config.losses[name].weight:g}" for name in active_terms(config.losses))
