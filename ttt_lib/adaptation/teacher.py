"""Supervision by the model itself: a slow teacher's prediction carried into views, and the views' carried back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ttt_lib.adaptation.batches import MINIMUM_KNOWN_PIXELS, batch_of, join_batches, loss_draws, plain_batch
from ttt_lib.adaptation.ensemble import mean_prediction, predict_member
from ttt_lib.adaptation.gate.signals import disagreement_map
from ttt_lib.adaptation.gradients import forward, loss_of, pass_gradients, view_loss
from ttt_lib.adaptation.losses.terms import active_terms, needs_features
from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Episode, Gradients, Pass, Supervision, summed
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.registry import SUPERVISIONS
from ttt_lib.core.types import Prediction
from ttt_lib.models.base import GeometryModel
from ttt_lib.views.carry import View, carry_back
from ttt_lib.views.draw import view_draws, views_of
from ttt_lib.views.renderer import NovelViewRenderer

VIEWS_TOGETHER = 16  # views that are drawn in the same operations; more would save nothing and take memory


def make_renderer(config: ExperimentConfig, device: torch.device) -> NovelViewRenderer | None:
    """The renderer of novel views, if this experiment draws any."""
    novel = config.views.novel_view
    return NovelViewRenderer(backend=novel.backend, device=device) if novel.probability > 0 else None


def draw_views(
    image: Tensor, target: Prediction, config: ExperimentConfig, draws: torch.Generator | Tensor,
    renderer: NovelViewRenderer | None,
) -> View:  # fmt: skip
    """Views of image (3,H,W) with the target carried into them: of one pass, or as many as there are rows of `view_draws`."""
    if isinstance(draws, torch.Generator):
        draws = view_draws(config.views, config.train.batch_size, draws)
    return views_of(
        image, target.points, target.mask, target.intrinsics, config.views, draws, renderer,
        mirror_keeps_x=config.released.mirror_keeps_x,
    )  # fmt: skip


def pixel_trust(found: list[Prediction], certainty: float) -> Tensor:
    """Weight of each pixel by the spread of several predictions of it: exp(-certainty * spread / median spread), (H,W).

    After the weights by certainty of EATA and ROID, which are a sample's; here the samples are pixels.
    """
    spread = disagreement_map([each.depth for each in found], found[0].mask)
    usable = spread[found[0].mask & torch.isfinite(spread)]
    usual = usable.median() if len(usable) else spread.new_ones(())
    return torch.exp(-certainty * spread / usual.clamp_min(1e-6)).nan_to_num(0.0)


class TeacherOnViews(Supervision):
    """The published method: the student must agree, on views, with what a slow copy of it says of the whole image.

    After every `teacher.refresh_every` steps the teacher moves towards the student and predicts a new target. It draws
    the views for all supervisions. values: its weights.
    """

    draws = True

    def __init__(self, episode: Episode) -> None:
        self.config, self.generator, self.log = episode.config, episode.generator, episode.log
        self.student = episode.student
        self.trust: Tensor | None = None

    def prepare(self, model: GeometryModel, image: Tensor, original: Prediction) -> None:
        """The teacher begins as the student is."""
        self.image, self.values, self.age = image, [value.clone() for value in self.student.values()], 0
        self.renderer = make_renderer(self.config, image.device)
        self.levels = torch.Generator().manual_seed(self.generator.initial_seed())  # so that views stay as they are
        self._predict()

    def _predict(self) -> None:
        """The teacher's target, and how far each pixel of it is trusted."""
        members = self.config.ensemble.members if self.config.ensemble.target else []
        with self.student.weights(self.values):
            others = [predict_member(self.student.model, self.image, member) for member in members]
            found = [self.student.model.predict(self.image), *others]
        self.target = mean_prediction(found[0], found[1:])
        if self.config.teacher.certainty:
            self.trust = pixel_trust(found, self.config.teacher.certainty)

    def draw(self) -> Pass:
        """Views of one pass, and what of them reaches the loss; of several the one with the lowest loss.

        One of which nothing is compared has none, and comes last.
        """
        choices = [self._drawn(1)[0] for _ in range(self.config.teacher.choose_from)]
        if len(choices) == 1:
            return choices[0]
        with self.student.weights():
            losses = [view_loss(self.student.model, each.batch, self.config) for each in choices]
        return min(zip(choices, losses), key=lambda each: (-each[0].batch.compared, each[1]))[0]

    def draw_passes(self, count: int) -> list[Pass]:
        """Together, unless each is chosen from several."""
        return self._drawn(count) if self.config.teacher.choose_from == 1 else super().draw_passes(count)

    def _drawn(self, count: int) -> list[Pass]:
        """Passes. Views of one target are drawn together: on a GPU each operation costs its launch, whatever it works on."""
        views, size = self.config.views, self.config.train.batch_size
        together = 1 if self.trust is not None else max(1, VIEWS_TOGETHER // size)
        draws = [
            (view_draws(views, size, self.generator), loss_draws(self.config, size, self.generator))
            for _ in range(count)
        ]
        passes = []
        for first in range(0, count, together):
            some = draws[first : first + together]
            numbers = torch.cat([of_views for of_views, _ in some])
            view = draw_views(self.image, self._learned(), self.config, numbers, self.renderer)
            self.log.count(view)
            for i, (_, of_loss) in enumerate(some):
                part = view.part(slice(i * size, (i + 1) * size))
                passes.append(Pass(part, batch_of(part, self.config, of_loss)))
        return passes

    def _learned(self) -> Prediction:
        """The present target; where pixels are trusted less, those above a level drawn anew, so that on average a pixel counts by
        its weight."""
        if self.trust is None:
            return self.target
        level = torch.rand((), generator=self.levels).to(self.trust)
        points = torch.where((self.trust >= level)[..., None], self.target.points, torch.nan)
        return replace(self.target, points=points)

    def gradients(self, student: Student, passes: list[Pass]) -> tuple[Gradients, dict[str, Tensor]]:
        """Of the sum of the losses of these passes, which go through the network together where that is exact."""
        batches = join_batches([each.batch for each in passes])
        return summed(student, (pass_gradients(student, batch, self.config, self.log) for batch in batches))

    def after_step(self, student: Student, last: bool) -> None:
        """Move the teacher, and its target unless the training is over."""
        every, decay = self.config.teacher.refresh_every, self.config.teacher.ema_decay
        self.age += 1
        if not every or (self.age < every and not last):
            return
        get_ema_multi_avg_fn(decay)(self.values, student.values(), 0)
        self.age = 0
        if not last:
            self._predict()

    def weights(self, values: list[Tensor]) -> list[Tensor]:
        """The slow ones, with `train.predict_with: teacher`."""
        return self.values if self.config.train.predict_with == "teacher" else values


@SUPERVISIONS.register("teacher")
def teacher(episode: Episode) -> Supervision | None:
    """On wherever a term of the loss has a weight, unless another draws the views."""
    views = bool(active_terms(episode.config.losses)) or episode.config.train.bidirectional > 0
    return TeacherOnViews(episode) if views and episode.drawing is None else None


class Reverse(Supervision):
    """The clean prediction learns from the views' ones, carried back (Robust-Depth's second direction)."""

    joins_passes = False  # each pass looks back from its own views

    def __init__(self, episode: Episode) -> None:
        config = episode.config
        terms = {name: term for name, term in config.losses.items() if not needs_features({name: term})}
        self.config, self.weight = config.model_copy(update={"losses": terms}), config.train.bidirectional
        self.generator = episode.generator
        self.teacher = episode.drawing

    def terms(self, student: Student, passes: list[Pass]) -> dict[str, Tensor]:
        """`reverse`: the losses of the clean prediction against those on the views."""
        image, target, found = self.teacher.image, self.teacher.target, []
        for each in passes:
            with student.weights():
                predicted = student.model.predict(each.view.image, each.view.intrinsics)
            points, seen = carry_back(each.view, predicted.points, target.points, target.intrinsics)
            seen = seen & target.mask  # where there is no surface there is none to learn
            points = torch.where(seen[..., None], points, torch.nan)
            points = points[seen.flatten(1).sum(1) >= MINIMUM_KNOWN_PIXELS]
            if len(points):
                batch = plain_batch(image[None], points, target.intrinsics, self.generator)
                output = forward(student.model, image[None], target.intrinsics[None], self.config)
                found.append(loss_of(output, batch, self.config)[0])
        return {"reverse": torch.stack(found).sum()} if found else {}


@SUPERVISIONS.register("reverse")
def reverse(episode: Episode) -> Supervision | None:
    """On with `train.bidirectional`."""
    return Reverse(episode) if episode.config.train.bidirectional > 0 else None
