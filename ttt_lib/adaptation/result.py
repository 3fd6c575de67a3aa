"""What adapting to one image gave."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from torch import Tensor

from ttt_lib.core.types import Prediction
from ttt_lib.models.base import GeometryModel

DECISIONS = {
    "original": "the original prediction is used",
    "adapted": "the adapted prediction is used",
    "corrected": "the original prediction, corrected by the tracks of the scene's photographs",
    "adapted_corrected": "the adapted prediction, corrected by the tracks of the scene's photographs",
    "averaged": "the mean over predictions is used, nothing was trained",
    "accept": "the gate accepted the adapted prediction",
    "blend": "the gate mixed both predictions by region",
    "reject": "the gate kept the original prediction",
}


@dataclass
class AdaptResult:
    """What one image gave.

    original: before; adapted: after the last step (None if training failed); final: the one to use; blended: what
    `blend` gives or would give, with a gate. decision: a key of `DECISIONS`; reason: a sentence when the decision is not
    the expected one. history: one dictionary an optimizer step: step, passes, loss, each term, gradient_norm, known
    (share of known target pixels), seconds.
    signals: of the gate. seconds: wall time of everything here; peak_memory_mb: during this adaptation, see
    `memory.peak_memory_mb`. micro_batch: views in the network at a time. weights: of the trained parameters, for the
    next image of a sequence (`train.reset`). image: (3,H,W), what was adapted to. losses: terms and weights of the training.

    Example:
        >>> import torch
        >>> before = Prediction(None, torch.full((48, 64), 2.0), None, None, "metric")
        >>> AdaptResult(before, None, before, "original", seconds=0.25)
        AdaptResult(original: the original prediction is used, 0.2 s, peak memory 0 MiB;
        final: metric, 64 x 48 pixels, depth 2 to 2 m (median 2))
    """

    original: Prediction
    adapted: Prediction | None
    final: Prediction
    decision: str
    reason: str = ""
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    passes_done: int = 0
    view_stats: dict[str, int] = field(default_factory=dict)
    signals: dict[str, float] = field(default_factory=dict)
    micro_batch: int = 0
    blended: Prediction | None = None
    weights: list[Tensor] | None = None
    image: Tensor | None = None
    losses: str = ""

    def facts(self) -> list[str]:
        """Decision, its reason, training and time: a phrase each."""
        facts = [f"{self.decision}: {DECISIONS.get(self.decision, '')}".rstrip(": "), *filter(None, [self.reason])]
        losses = [entry["loss"] for entry in self.history if "loss" in entry]
        if self.passes_done:
            facts.append(f"{self.passes_done} passes")
        if losses:
            facts.append(f"loss {losses[0]:.3g} to {losses[-1]:.3g}")
        measured = math.isfinite(self.peak_memory_mb)  # not on every system
        memory = [f"peak memory {self.peak_memory_mb:.0f} MiB"] if measured else []
        return [*facts, f"{self.seconds:.1f} s", *memory]

    def __repr__(self) -> str:
        return f"AdaptResult({', '.join(self.facts())}; final: {', '.join(self.final.facts())})"

    @classmethod
    def kept(cls, model: GeometryModel, image: Tensor, why: str) -> AdaptResult:
        """The model's own prediction of an image (3,H,W), to which nothing was adapted, and why."""
        begun, image = time.perf_counter(), image.to(model.device)
        original = model.predict(image)
        seconds = time.perf_counter() - begun
        return cls(original, None, original, "original", f"original kept: {why}", seconds=seconds, image=image)

    def add_reason(self, said: str) -> None:
        """Add a sentence to `reason`; an empty one adds nothing."""
        self.reason = "; ".join(filter(None, [self.reason, said]))
