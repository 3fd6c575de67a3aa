"""What the student minimises: the terms that the configuration chooses and weights, over a batch.

A term is a function from `LossInputs` to one value a row of the batch, (B,), or their mean. All enter `LOSSES` by the same
decorator, the package's own (`moge_terms.py`, `depth_terms.py`) and yours. What a registration says beside the function:

- settings: a subclass of `core.schema.LossConfig`, the term's keys in an experiment; they arrive as `inputs.settings`.
- needs: outputs of the model (`points`, `depth`, `features`) without which the term is a mistake of the experiment.
- where: outputs without which the term is left out (a mask term for a model without a mask).
- elsewhere: the term is computed by a supervision of its own; here are only its settings.
- preset: the name stands for a whole set of terms (`presets.py`); the function takes nothing and gives their settings.
- reads: heads of the network that the term looks at beside points, depth and disparity (`normal`, `mask`); heads that no
  term reads are not computed in training. Unsaid, a term may read all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ttt_lib.core.errors import NotSupported
from ttt_lib.core.registry import LOSSES
from ttt_lib.core.schema import LossConfig

HEADS = ("normal", "mask")  # of MoGe's networks, which training runs only where a term reads them


@dataclass(frozen=True)
class LossInputs:
    """What a term is computed from.

    output: what the student's `forward` gives for each row: `points` (B,H,W,3) up to scale and z-shift, `depth` (B,H,W)
    in metres or `disparity` (B,H,W) up to scale and shift, and where the network has them `mask` (B,H,W), `metric_scale`
    (B,). target (B,H,W,3): the teacher's points in the views' cameras, NaN where unknown; known (B,H,W) bool; negative
    (B,H,W) bool: sky; intrinsics (B,3,3) of the views. settings: the term's own. terms: the settings of all.
    seeds: of `draw_seeds`, (B,3) whole numbers. share (B,): part of its picture that each row is. features: the student's
    and the frozen encoder's, (B,N,C) each, where a term needs them. cheap: by `affine.py`, else MoGe's own functions.
    mask_on_both_sides: as the public release. shared: what one term computes and another uses.
    """

    output: dict[str, Tensor]
    target: Tensor
    known: Tensor
    negative: Tensor
    intrinsics: Tensor
    settings: Any = LossConfig()
    terms: dict[str, LossConfig] = field(default_factory=dict)
    seeds: list[list[int]] = field(default_factory=list)
    share: Tensor | None = None
    features: tuple[Tensor, Tensor] | None = None
    cheap: bool = True
    mask_on_both_sides: bool = False
    shared: dict[str, Any] = field(default_factory=dict)

    def settings_of(self, name: str) -> Any:
        """The settings of another term; its defaults where the experiment does not have it."""
        return self.terms.get(name) or LOSSES.about[name]["settings"]()


def draw_seeds(rows: int, generator: torch.Generator) -> Tensor:
    """The random numbers that the loss of each row takes, (rows, 3): seeds of the patches of the three local terms."""
    return torch.randint(2**31, (rows, 3), generator=generator)


def active_terms(terms: dict[str, LossConfig]) -> list[str]:
    """Names of the terms with a weight, in the order of their registration, which is that of the sum."""
    LOSSES.load_home()
    there = [name for name in LOSSES if name in terms and terms[name].weight > 0]
    return [name for name in there if not {"elsewhere", "preset"} & LOSSES.about[name].keys()]


def unused_outputs(terms: dict[str, LossConfig]) -> tuple[str, ...]:
    """Which of a network's heads no term reads; a term that does not say what it reads may read all of them."""
    about = [LOSSES.about[name] for name in active_terms(terms)]
    if any("reads" not in each for each in about):
        return ()
    return tuple(head for head in HEADS if not any(head in each["reads"] for each in about))


def compute_loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the terms, averaged over the batch.

    A model of disparity has no points to compare: for it the terms that need them are left out, and where no other is
    left, Depth Anything's two take their place, so that every experiment is one for every model.

    Args:
        inputs: `terms` holds names and settings; the settings of each term are put in place here.

    Returns:
        The total, a scalar, and each unweighted term (B-averaged, detached). A term of weight 0 is not computed.

    Raises:
        NotSupported: for a term that needs points, depth or features that the model does not predict.
    """
    inputs = replace(inputs, target=torch.where(inputs.known[..., None], inputs.target, torch.nan))
    there = {*inputs.output, *(["features"] if inputs.features is not None else [])}
    anything = next(inputs.output[name] for name in ("points", "depth", "disparity") if name in inputs.output)
    if not there & {"points", "depth"}:
        inputs = replace(inputs, terms=_of_disparity(inputs.terms))
    total, values = anything.sum() * 0.0, {}
    for name in active_terms(inputs.terms):
        about = LOSSES.about[name]
        for need in about.get("needs", ()):
            if need not in there:
                raise NotSupported(f"losses.{name}: this model predicts no {need}; use {_possible(there)}.")
        if not set(about.get("where", ())) <= there:
            continue
        settings = inputs.terms[name]
        values[name] = LOSSES[name](replace(inputs, settings=settings)).mean()
        total = total + settings.weight * values[name]
    return total, {name: value.detach() for name, value in values.items()}


def _of_disparity(terms: dict[str, LossConfig]) -> dict[str, LossConfig]:
    """The terms without those of points; `ssi` and `gradient`, as in `more/relative_depth`, where these were all."""
    active = {name: "points" in LOSSES.about[name].get("needs", ()) for name in active_terms(terms)}
    kept = {name: term for name, term in terms.items() if not active.get(name)}
    others = [name for name, of_points in active.items() if not of_points and not LOSSES.about[name].get("where")]
    alone = any(active.values()) and not others
    return kept | {"ssi": LossConfig(), "gradient": LossConfig(weight=0.5)} if alone else kept


def _possible(there: set[str]) -> str:
    """Terms that need only what is there, in words."""
    fit = [name for name in LOSSES if set(LOSSES.about[name].get("needs", ())) <= there]
    return ", ".join(name for name in fit if not LOSSES.about[name].get("preset")) or "another model"


def needs_features(terms: dict[str, LossConfig]) -> bool:
    """Whether any active term compares the encoder's features."""
    return any("features" in LOSSES.about[name].get("needs", ()) for name in active_terms(terms))
