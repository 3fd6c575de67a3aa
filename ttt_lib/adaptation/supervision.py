"""The one way for information to reach the loop: a `Supervision` gives terms of the loss and corrections.

Built in are the teacher on views and the reverse direction (`teacher.py`), and known distances (`known_distances.py`).
Several photographs of a scene are another. The loop knows none of them: it sums what they give.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ttt_lib.adaptation.batches import LossBatch
from ttt_lib.adaptation.student import Student
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.registry import SUPERVISIONS
from ttt_lib.core.types import Prediction
from ttt_lib.models.base import GeometryModel
from ttt_lib.views.carry import View

Gradients = list[Tensor | None]  # of each of `student.leaves`; None: not reached


@dataclass
class TrainingLog:
    """What the training of one image leaves behind.

    history: a dictionary an optimizer step: step, passes, the terms, gradient_norm, known, seconds. passes_done: passes.
    view_stats: counts of views. micro_batch: views in the network at a time, lower than asked for when memory ran out.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    passes_done: int = 0
    view_stats: dict[str, int] = field(default_factory=dict)
    micro_batch: int = 0

    def count(self, view: View) -> None:
        """Add the counts of views that were drawn."""
        for key, value in view.stats.items():
            self.view_stats[key] = self.view_stats.get(key, 0) + value


@dataclass
class Pass:
    """One forward and backward: the views that were drawn for it, and what of them reaches the loss.

    Both are None where no supervision looks at views: then a pass is only counted. number: of which photograph, where there
    are several.
    """

    view: View | None = None
    batch: LossBatch | None = None
    number: int = 0


class Supervision:
    """One source of information about an image. Derive from it and override what applies; the defaults do nothing.

    name: what it is registered as. weight: of its terms in the loss. draws: whether it gives the views that all look at
    (the first that does, does); it has the `generator` that they come from. joins_passes: whether several passes may be
    given at once. several: whether it can take part in training on several photographs; then it is prepared for each, in
    the order of `Pass.number`.

    Example:
        >>> class FarAway(Supervision):
        ...     def terms(self, student, passes):
        ...         depth = student.model.forward(self.image[None])["points"][..., 2]
        ...         return {"far_away": 1 / depth.mean()}
        ...     def prepare(self, model, image, original):
        ...         self.image = image
        >>> FarAway().weight
        1.0
    """

    name = "supervision"
    weight: float = 1.0
    draws: bool = False
    joins_passes: bool = True
    several: bool = False

    def around(self, model: GeometryModel) -> AbstractContextManager[None]:
        """Inside, which is the whole adaptation to an image, the model predicts with what this source knows."""
        return nullcontext()

    def prepare(self, model: GeometryModel, image: Tensor, original: Prediction | None) -> None:
        """Called once an image before training; the network holds the weights that training starts from.

        Args:
            model: the network; its weights may be read, not changed.
            image: (3,H,W) in [0,1], of the size that training works at.
            original: the model's prediction on the full image; of several photographs what each learns, None where that is
                its tracks alone.
        """

    def draw(self) -> Pass:
        """Views of one pass, of a supervision that `draws`."""
        return Pass()

    def draw_passes(self, count: int) -> list[Pass]:
        """As many calls of `draw`, which is all that the loop asks for; who draws them together overrides this as well."""
        return [self.draw() for _ in range(count)]

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """What is drawn inside is drawn again afterwards, of a supervision that `draws`."""
        state = self.generator.get_state()
        yield
        self.generator.set_state(state)

    def terms(self, student: Student, passes: list[Pass]) -> dict[str, Tensor]:
        """Terms of the loss, scalars with gradients to `student.leaves`, summed over the passes.

        Called inside `student.attached()`. Names appear in the history. An empty dictionary trains nothing.
        """
        return {}

    def gradients(self, student: Student, passes: list[Pass]) -> tuple[Gradients, dict[str, Tensor]]:
        """Gradients of `weight` times the sum of the terms, and the terms, detached.

        Override this instead of `terms` where a batch has to go through the network in parts.
        """
        with student.attached():
            terms = self.terms(student, passes)
            if not terms:
                return [None] * len(student.leaves), {}
            found = torch.autograd.grad(self.weight * sum(terms.values()), student.leaves, allow_unused=True)
        return list(found), {name: value.detach() for name, value in terms.items()}

    def after_step(self, student: Student, last: bool) -> None:
        """Called after each optimizer step; `last`: no other follows."""

    def weights(self, values: list[Tensor]) -> list[Tensor]:
        """Weights to predict with instead of these, the student's as the sources before have it (a slow teacher's)."""
        return values

    def correct(self, prediction: Prediction) -> tuple[Prediction, str]:
        """The prediction as this source would have it, and in words what was done (empty: nothing).

        Also asked where nothing was trained, and so without `prepare`.
        """
        return prediction, ""


@dataclass
class Episode:
    """The training of one image, as far as the supervisions of an experiment are built from it.

    generator: the sample's one source of random numbers. supervisions: those that were built before, or given: one that
    draws takes the teacher's place.
    """

    config: ExperimentConfig
    student: Student
    generator: torch.Generator
    log: TrainingLog
    supervisions: list[Supervision] = field(default_factory=list)

    @property
    def drawing(self) -> Supervision | None:
        """The one that gives the views, if there is any yet."""
        return next((each for each in self.supervisions if each.draws), None)


def configured(episode: Episode) -> list[Supervision]:
    """The supervisions that the experiment itself asks for, in the order in which they were registered.

    A registered builder takes the episode and gives a `Supervision`, or None where the experiment has none of it. One that
    is registered with `settings` is asked only where the experiment has its section.
    """
    SUPERVISIONS.load_home()
    for name, build in SUPERVISIONS.items():
        asked = "settings" not in SUPERVISIONS.about[name] or name in episode.config.supervision
        built = build(episode) if asked else None
        if built is not None:
            built.name = name
            episode.supervisions.append(built)
    return episode.supervisions


def summed(
    student: Student, parts: Iterable[tuple[Gradients, dict[str, Tensor]]]
) -> tuple[Gradients, dict[str, Tensor]]:
    """The sums of gradients and of terms."""
    total: Gradients = [None] * len(student.leaves)
    terms: dict[str, Tensor] = {}
    for gradients, values in parts:
        accumulate(total, gradients)
        add_terms(terms, values)
    return total, terms


def accumulate(total: Gradients, gradients: Gradients, factor: float = 1.0) -> None:
    """Add factor * gradients to the total; None, for a tensor that was not reached, adds nothing."""
    reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
    added = [gradients[i] for i in reached]
    if added and factor != 1.0:
        added = torch._foreach_mul(added, factor)  # one operation of a GPU, not one a tensor
    for i, gradient in zip(reached, added):
        total[i] = gradient if total[i] is None else total[i] + gradient


def add_terms(total: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add the values to the total, term by term."""
    for key, value in values.items():
        total[key] = total.get(key, 0.0) + value
