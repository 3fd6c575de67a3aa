"""The gate of one image: views held back before training, signals after it, and what becomes of the prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_lib.adaptation.ensemble import predict_adapted
from ttt_lib.adaptation.gate.decision import Calibration, blend_predictions, read_calibration
from ttt_lib.adaptation.gate.signals import (
    HeldBack,
    disagreement_map,
    held_back_views,
    measure,
    original_members,
    signals_before,
)
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.adaptation.student import Student
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.seeds import sample_generator
from ttt_lib.models.base import GeometryModel


class Gate:
    """Measures the signals of each image; with `gate.mode: decide` also accepts, blends or rejects.

    Args:
        config: the experiment.
        calibration: what to decide by (None: the file that `config.gate.calibration` names, or the bundled one).

    Raises:
        ConfigError: for a calibration that cannot be read.
    """

    def __init__(self, config: ExperimentConfig, calibration: Calibration | None = None) -> None:
        self.config = config
        self.calibration = None
        if config.gate.mode == "decide":
            self.calibration = calibration or read_calibration(config.gate.calibration)

    def hold_back(
        self, model: GeometryModel, image: Tensor, name: str, result: AdaptResult, decides: bool = True
    ) -> HeldBack | None:
        """Views that are never trained on, of another seed than the training's, with the original weights' word.

        None where the original weights alone say already that the gate rejects whatever training gives: then `result`
        says so. image (3,H,W): that training works at; decides: whether the gate's word is the last.
        """
        self.unseen: torch.Generator = sample_generator(self.config.seed, f"{name}/held back")
        original, gate = result.original, self.config.gate
        small = original if image.shape[-2:] == original.depth.shape else model.predict(image)
        members = original_members(model, image, gate)
        if decides and self.calibration is not None:
            signals = signals_before(small, members, gate)
            highest = self.calibration.highest(signals)
            if highest < min(self.calibration.accept, self.calibration.blend):
                result.signals |= {**signals, "estimate": highest}
                result.decision = "reject"
                result.add_reason("not trained: the gate rejects by the original predictions alone")
                self._doubt(result)
                return None
        return held_back_views(model, image, small, self.config, self.unseen, members)

    def _doubt(self, result: AdaptResult) -> None:
        made_for = self.calibration.about.get("model")
        if made_for not in (None, self.config.model.name):
            result.add_reason(f"the gate is calibrated for the model {made_for!r}; calibrate it with 04_reliability")

    def decide(self, student: Student, values: list[Tensor], held: HeldBack, result: AdaptResult) -> None:
        """Signals, blend and decision of the adapted weights `values`; fills `result`."""
        with student.weights(values):
            adapted = predict_adapted(student.model, held.image, self.config)
        signals, experts = measure(student, values, held, adapted, result.history, self.config.gate, self.unseen)
        result.signals |= signals
        spread = disagreement_map(experts, held.original.mask)
        result.blended = blend_predictions(result.original, result.adapted, spread)
        if self.calibration is None:
            return
        result.signals["estimate"] = self.calibration.estimate(result.signals)
        result.decision = self.calibration.decide(result.signals)
        result.final = {"reject": result.original, "blend": result.blended}.get(result.decision, result.adapted)
        self._doubt(result)
