"""Training that stays near the original, as supervisions: Fisher-weighted distance, a pull after each step, a mean at the end.

Training sees the same views with them as without, so that a row and its control differ by the method alone.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Episode, Gradients, Pass, Supervision, accumulate
from ttt_lib.core.errors import ConfigError
from ttt_lib.core.registry import SUPERVISIONS
from ttt_lib.core.schema import Count, NonNegative, Probability, Section


class FisherConfig(Section):
    """L2-SP by importance: `weight` times sum F (theta - theta_0)^2, F over `passes` passes, scaled to a mean of one.

    So `weight` has the size of `train.l2_sp`'s; EATA's own weight, 2000, is of an F that is not scaled.
    """

    weight: NonNegative = 0.1
    passes: Count = 8


@SUPERVISIONS.register("fisher", settings=FisherConfig)
class Fisher(Supervision):
    """Weights that the loss depends on stay (EATA, Niu et al. 2022, equations 8 and 9).

    F is the mean squared gradient of the experiment's own loss over passes at the original weights, before the first step.
    """

    several = True

    def __init__(self, episode: Episode) -> None:
        self.settings, self.drawing, self.importance = episode.config.supervision["fisher"], episode.drawing, None
        if self.drawing is None:
            raise ConfigError(
                "supervision.fisher: there is no loss on views whose gradients it could take; give `losses` one."
            )

    def _measure(self, student: Student) -> Gradients:
        """F of each leaf, None where the loss does not reach. The passes are those that training draws next, and again."""
        squares: Gradients = [None] * len(student.leaves)
        with self.drawing.rehearsal():
            for _ in range(self.settings.passes):
                found, _ = self.drawing.gradients(student, [self.drawing.draw()])
                accumulate(squares, [None if each is None else each.square() for each in found])
        reached = [each for each in squares if each is not None]
        mean = sum(float(each.sum()) for each in reached) / max(1, sum(each.numel() for each in reached))
        return [None if each is None else each / max(mean, 1e-30) for each in squares]

    def gradients(self, student: Student, passes: list[Pass]) -> tuple[Gradients, dict[str, Tensor]]:
        """Of the distance, once a pass; what it is of is the loss on views, so nothing is added to the terms."""
        if self.importance is None:  # here and not in `prepare`: now it is known how many views fit the memory
            self.importance = self._measure(student)
        pull = student.distance_gradients(self.settings.weight * len(passes))
        return [None if by is None else each * by for each, by in zip(pull, self.importance)], {}


class SourceConfig(Section):
    """`keep`: share of the trained weights after each step; the rest is the original's. The default is ROID's `MOMENTUM_SRC`."""

    keep: Probability = 0.99


@SUPERVISIONS.register("source", settings=SourceConfig)
class Source(Supervision):
    """After each step theta <- keep theta + (1 - keep) theta_0 (weight ensembling, ROID, Marsden et al. 2024)."""

    several = True

    def __init__(self, episode: Episode) -> None:
        self.keep = episode.config.supervision["source"].keep

    def after_step(self, student: Student, last: bool) -> None:
        """Go a part of the way back."""
        student.shrink_change(self.keep)


class LastConfig(Section):
    """`steps`: weights of how many of the last steps are averaged."""

    steps: Count = 4


@SUPERVISIONS.register("last", settings=LastConfig)
class Last(Supervision):
    """Predict with the mean of the weights after the last steps (Izmailov et al. 2018; of one run, as uniform soups are)."""

    several = True

    def __init__(self, episode: Episode) -> None:
        self.kept: deque[list[Tensor]] = deque(maxlen=episode.config.supervision["last"].steps)

    def after_step(self, student: Student, last: bool) -> None:
        """Keep a copy."""
        self.kept.append([value.clone() for value in student.values()])

    def weights(self, values: list[Tensor]) -> list[Tensor]:
        """Their mean, as the last plus the mean difference to it: exactly the weights where none has moved.

        In place, because new tensors could get another memory format, and with it a network's last bits change.
        """
        if not self.kept:
            return values
        return [each[-1].clone().add_(sum(one - each[-1] for one in each) / len(each)) for each in zip(*self.kept)]
