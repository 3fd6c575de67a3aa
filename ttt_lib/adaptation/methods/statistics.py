"""Batch normalisations at test time: their statistics moved towards the image's, and features held to their statistics.

What a batch normalisation keeps of its training is the mean and variance of each channel before it. Both methods need them,
so they are for the bundled model; a ViT has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Episode, Gradients, Pass, Supervision
from ttt_lib.core.errors import ConfigError, NotSupported
from ttt_lib.core.registry import SUPERVISIONS
from ttt_lib.core.schema import Decay, NonNegative, Probability, Section
from ttt_lib.core.types import Prediction
from ttt_lib.models.base import GeometryModel

Norm = nn.modules.batchnorm._BatchNorm
Look = Callable[[Norm, Tensor, Tensor], None]


def batch_norms(model: GeometryModel) -> list[Norm]:
    """Batch normalisations that keep statistics. Raises `NotSupported` where a network has none."""
    norms = [each for each in model.network.modules() if isinstance(each, Norm) and each.running_mean is not None]
    if not norms:
        raise NotSupported(f"{model.name} has no batch normalisation, which norm_statistics and actmad need.")
    return norms


@contextmanager
def watched(norms: list[Norm], look: Look) -> Iterator[None]:
    """Inside, `look(norm, mean, variance)` is called with the statistics (C,) of what each norm is about to see."""

    def before(norm: Norm, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0].float(), [0, *range(2, inputs[0].ndim)])
        look(norm, mean, variance)

    handles = [norm.register_forward_pre_hook(before) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ActmadConfig(Section):
    """`weight`: of the term. In the bundled model it is some hundred times MoGe's global term, hence the default."""

    weight: NonNegative = 0.01


@SUPERVISIONS.register("actmad", settings=ActmadConfig)
class Actmad(Supervision):
    """Features of the image have the means and variances that the norms were trained with (ActMAD, Mirza et al. 2023).

    Mean absolute difference over the channels behind each norm, of means plus of variances; the mean over the norms, where
    the paper has their sum. The references are what the norms know of their training, each channel's; the paper's, of
    every place, need its images.
    """

    several = True

    def __init__(self, episode: Episode) -> None:
        self.weight = episode.config.supervision["actmad"].weight
        self.images: list[Tensor] = []

    def prepare(self, model: GeometryModel, image: Tensor, original: Prediction) -> None:
        """What comes out of a norm in training: its bias as mean, its squared weight as variance."""
        self.images.append(image)
        self.norms = batch_norms(model)
        fields = ("running_mean", "running_var", "weight", "bias")
        self.before = {norm: [getattr(norm, each).detach().clone() for each in fields] for norm in self.norms}

    def terms(self, student: Student, passes: list[Pass]) -> dict[str, Tensor]:
        """`actmad`, of the clean image, the same in each of its passes."""
        off: list[Tensor] = []

        def look(norm: Norm, mean: Tensor, variance: Tensor) -> None:
            usual, usual_variance, weight, bias = self.before[norm]
            spread = usual_variance + norm.eps
            off.append((norm.weight * (mean - usual) * spread.rsqrt() + norm.bias - bias).abs().mean())
            off.append((norm.weight**2 * variance / spread - weight**2 * usual_variance / spread).abs().mean())

        total = 0.0
        for number, count in sorted(Counter(each.number for each in passes).items()):
            off.clear()
            with watched(self.norms, look):
                student.model.forward(self.images[number][None])
            total = total + torch.stack(off).sum() / len(self.norms) * count
        return {"actmad": total}


class NormStatisticsConfig(Section):
    """Statistics of the norms move by `momentum` towards those of what they see.

    `from_views`: with every pass, towards its views, by `momentum` times `decay`^number + `lowest` (DUA, with its values);
    else once before training, towards the image's (alpha-BN: `momentum` is the alpha).
    """

    momentum: Probability = 0.1
    from_views: bool = False
    decay: Decay = 0.94
    lowest: Probability = 0.005


@SUPERVISIONS.register("norm_statistics", settings=NormStatisticsConfig)
class NormStatistics(Supervision):
    """No loss: (1 - m) source + m test statistics (Schneider et al. 2020), or of views one after the other (DUA, Mirza et al.
    2022). They go back with the weights. Alone it needs no training: `train.optimizer.learning_rate: 0`.

    While DUA's own code normalises by the batch that it learns from, here each norm sees what the moved ones before it give.
    """

    joins_passes = False  # one update after the other

    def __init__(self, episode: Episode) -> None:
        self.settings, self.number = episode.config.supervision["norm_statistics"], 0
        if episode.config.gate.mode != "off":
            raise ConfigError(
                "supervision.norm_statistics: the gate would measure the original with them; set gate.mode to off."
            )
        if self.settings.from_views and episode.drawing is None:
            raise ConfigError("supervision.norm_statistics.from_views: no loss draws views; give `losses` one.")

    def prepare(self, model: GeometryModel, image: Tensor, original: Prediction) -> None:
        """The image's own statistics, where these are asked for."""
        self.norms = batch_norms(model)
        if not self.settings.from_views:
            self._move(model, image[None], self.settings.momentum)

    @torch.no_grad()
    def _move(self, model: GeometryModel, images: Tensor, momentum: float) -> None:
        """Move the statistics towards those of images (B,3,H,W), norm by norm."""

        def look(norm: Norm, mean: Tensor, variance: Tensor) -> None:
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance, momentum)

        with watched(self.norms, look):
            model.forward(images)

    def gradients(self, student: Student, passes: list[Pass]) -> tuple[Gradients, dict[str, Tensor]]:
        """None; the views move the statistics."""
        settings = self.settings
        for each in passes if settings.from_views else []:
            self.number += 1
            momentum = min(1.0, settings.momentum * settings.decay**self.number + settings.lowest)
            with student.weights():
                self._move(student.model, each.view.image, momentum)
        return [None] * len(student.leaves), {}
