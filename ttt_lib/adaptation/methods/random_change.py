"""A control of training: what a change as large as the trained one gives that nothing was learned in."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_lib.adaptation.supervision import Episode, Supervision
from ttt_lib.core.registry import SUPERVISIONS
from ttt_lib.core.types import Prediction
from ttt_lib.models.base import GeometryModel


class RandomChange(Supervision):
    """Instead of the trained change of the weights a random one, of its norm or of its effect on the prediction."""

    several = True

    def __init__(self, episode: Episode) -> None:
        self.student, self.generator = episode.student, episode.generator
        self.alike = episode.config.train.random_change == "prediction"

    def prepare(self, model: GeometryModel, image: Tensor, original: Prediction) -> None:
        """The effect is that on the image that training works at, of several photographs the last."""
        self.image = image

    def weights(self, values: list[Tensor]) -> list[Tensor]:
        """The original ones, each moved in a random direction as far as it is from its value. Draws are made on the CPU."""
        moved = []
        for start, end in zip(self.student.original, values):
            direction = torch.randn(start.shape, generator=self.generator).to(start)
            factor = (end - start).norm() / direction.norm().clamp_min(1e-12)
            moved.append(start.clone().add_(direction * factor))  # in the layout of `start`, which kernels round by
        return self._equal_effect(values, moved) if self.alike else moved

    def _equal_effect(self, values: list[Tensor], moved: list[Tensor]) -> list[Tensor]:
        """`moved`, so far from the original weights that the prediction changes as much as with `values`, or at the most
        2^14 times as far.

        The distance is doubled until that is so, then halved in between (far off, a network gives hardly any finite depth,
        so the whole range cannot be bisected). The change is the mean |log depth - log original depth| around its median,
        over (H,W).
        """
        original = self._logs(self.student.original)

        def effect(weights: list[Tensor]) -> float:
            change = self._logs(weights) - original
            return float((change - change.nanmedian()).abs().nanmean())

        def at(power: float) -> list[Tensor]:
            return [start.clone().add_(2**power * (end - start)) for start, end in zip(self.student.original, moved)]

        power, wanted = -4.0, effect(values)
        while power < 14 and effect(at(power + 1)) < wanted:
            power += 1
        for step in (0.5, 0.25, 0.125, 0.0625):
            power += step if effect(at(power + step)) < wanted else 0.0
        return at(power)

    def _logs(self, weights: list[Tensor]) -> Tensor:
        """Logarithm of the depth (H,W) that these weights predict, or of the disparity where there is no depth."""
        with self.student.weights(weights):
            found = self.student.model.predict(self.image)
        return (found.disparity if found.depth is None else found.depth).log()


@SUPERVISIONS.register("random_change")
def build(episode: Episode) -> Supervision | None:
    """On with `train.random_change`."""
    return RandomChange(episode) if episode.config.train.random_change else None
