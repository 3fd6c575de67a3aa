"""Supervision by known distances: a term of the loss at some pixels, and the correction of what is predicted.

A laser, a tape measure or a LiDAR that hits a hundred pixels says what the model cannot know, the scale; the study
names this as the way to make metric predictions improve.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ttt_lib.adaptation.correction import at_references, correct
from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Pass, Supervision
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.types import Prediction
from ttt_lib.data.known_distances import References
from ttt_lib.models.base import GeometryModel

NEAR = 1.3  # times or a part of 3.9: as well as predicted metres are known


def reference_loss(model: GeometryModel, image: Tensor, references: References) -> Tensor:
    """Mean |log d - log d*| of the metric depth at the references, on the clean image (3,H,W). ()."""
    depth = model.metric_depth(model.forward(image[None]), image[None])
    found = at_references(depth, references)[0].clamp_min(1e-6)
    return (found.log() - references.depth.to(found).log()).abs().mean()


def unit_doubt(prediction: Prediction, references: References) -> str:
    """In words, where the distances look as if a file's unit was taken for another; else nothing.

    Only of a prediction in metres, and of a file that does not say its unit: then the two usual ones differ by 3.9.
    """
    if prediction.kind != "metric" or references.unit is None:
        return ""
    found = at_references(prediction.depth[None], references.to(prediction.depth.device))[0]
    ratio = references.depth.to(found) / found
    factor, usual = float(ratio[torch.isfinite(ratio) & (ratio > 0)].nanmedian()), 1000 / 256
    # NaN, which is near to nothing, where no distance lies on a surface.
    if not any(1 / NEAR < factor / mixed < NEAR for mixed in (usual, 1 / usual)):
        return ""
    said = f"known distances are {factor:.3g} times the prediction, as if millimetres and 1/256 m were mixed up"
    return f"{said}: check the unit of their file (--metric-unit)"


class KnownDistances(Supervision):
    """True distances of some pixels of the image.

    Args:
        references: where, and how far.
        config: `losses.metric_reference.weight` is that of the term in training (none: the correction alone).
    """

    name = "known_distances"

    def __init__(self, references: References, config: ExperimentConfig) -> None:
        term = config.losses.get("metric_reference")
        self.references, self.weight = references, term.weight if term is not None else 0.0

    def around(self, model: GeometryModel) -> AbstractContextManager[None]:
        """They are the prompt of a model that takes one."""
        return model.knowing(references=self.references)

    def prepare(self, model: GeometryModel, image: Tensor, original: Prediction) -> None:
        """Bring the distances to the model's device."""
        self.image, self.references = image, self.references.to(model.device)

    def terms(self, student: Student, passes: list[Pass]) -> dict[str, Tensor]:
        """`metric_reference`: mean |log d - log d*|, the same in each of the passes; none where it has no weight."""
        if not self.weight:
            return {}
        return {"metric_reference": reference_loss(student.model, self.image, self.references) * len(passes)}

    def correct(self, prediction: Prediction) -> tuple[Prediction, str]:
        """In metres, by the best correction (`correction.correct`)."""
        with torch.no_grad():
            return correct(prediction, self.references.to(prediction.depth.device))
