"""What the student learns from several photographs: their corrected predictions, on views, and their tracks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.batches import join_batches, loss_batch
from ttt_lib.adaptation.correction import at_references
from ttt_lib.adaptation.gradients import pass_gradients
from ttt_lib.adaptation.losses.terms import active_terms
from ttt_lib.adaptation.photographs.decision import cell_weights
from ttt_lib.adaptation.photographs.evidence import Evidence
from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Episode, Gradients, Pass, Supervision, TrainingLog, accumulate, add_terms
from ttt_lib.adaptation.teacher import draw_views, make_renderer
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.registry import LOSSES, SUPERVISIONS
from ttt_lib.core.schema import LossConfig, Section
from ttt_lib.core.types import Prediction
from ttt_lib.data.known_distances import References
from ttt_lib.geometry.cameras import unproject
from ttt_lib.views.carry import View, carry_back

SMALLEST = 1e-3  # of the median: what an aligned depth is kept above


class PhotographsConfig(Section):
    """Several photographs of the sample's scene.

    `correction`: what the tracks do to a prediction: one factor, factor and shift, or the best there is.
    `stereo`: whether depth is measured between the photographs, and joins the tracks.
    `target`: what the student learns on views: the corrected prediction, that of the other photographs carried into
    each (`views`), the original, or nothing but what `losses.tracks` says.
    `held_back`: share of the tracks that only decide. `decide`: whether they do; else the last candidate is taken.
    `train`: whether the student learns from them, by the experiment's `train`, `losses` and the other sections of
    `supervision`; else these are for a single photograph only. What they learn stays; the section `teacher` has no part.
    `alone`: what becomes of a sample without other photographs of its scene, or whose scene is refused: `original`, or
    `single`: what the experiment does with one photograph.
    """

    correction: Literal["scale", "affine", "full"] = "full"
    stereo: bool = True
    target: Literal["none", "original", "corrected", "views"] = "corrected"
    held_back: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    decide: bool = True
    train: bool = True
    alone: Literal["original", "single"] = "original"


class TracksConfig(LossConfig):
    """The term `tracks`. `form`: `huber` of log depth, balanced over the picture's cells; `l1` of depth, each track by
    how well it fits (SfM-TTR, 2211.13551). `width`: where Huber's loss becomes linear, in log depth."""

    form: Literal["huber", "l1"] = "huber"
    width: Annotated[float, Field(gt=0.0)] = 0.1


@LOSSES.register("tracks", elsewhere=True, reads=(), settings=TracksConfig)
def tracks(inputs: object) -> Tensor:
    """Depth at the tracks of several photographs; computed by `PhotographTraining` on the whole photograph."""
    raise NotImplementedError("the supervision by photographs computes this term")


@SUPERVISIONS.register("photographs", settings=PhotographsConfig)
def photographs(episode: Episode) -> Supervision | None:
    """None for one image: `scene.adapt_scene` builds it, where a scene is at hand."""
    return None


def depth_at_tracks(output: dict[str, Tensor], evidence: Evidence) -> Tensor:
    """What the student says at the used tracks, (N,), after the fit to them that its kind of output leaves open.

    Points: factor and z-shift; depth: a factor; disparity: factor and shift. The fit is taken as given (no gradient).
    """
    name = next(key for key in ("points", "depth", "disparity") if key in output)
    map_ = output["points"][..., 2] if name == "points" else output[name]
    used = evidence.used
    true, weight = used.depth.to(map_), used.weight.to(map_)
    found = at_references(map_, References(used.uv, used.depth))[0]
    with torch.no_grad():
        wanted = 1 / true if name == "disparity" else true
        shift_free = name != "depth"
        a, b = _fit(found, wanted, weight, shift_free)
    aligned = a * found + b
    aligned = torch.maximum(aligned, SMALLEST * wanted.median())
    return 1 / aligned if name == "disparity" else aligned


def _fit(found: Tensor, wanted: Tensor, weight: Tensor, shift_free: bool) -> tuple[Tensor, Tensor]:
    """(a, b) with a * found + b near wanted (N,), by least squares of relative errors, reweighted to be robust."""
    robust = torch.ones_like(wanted)
    a, b = (wanted / found.clamp_min(1e-6)).median(), torch.zeros_like(wanted[0])
    for _ in range(5):
        w = (weight * robust).clamp_min(1e-8) / wanted.square()
        if shift_free:
            mean, mean_wanted = (w * found).sum() / w.sum(), (w * wanted).sum() / w.sum()
            spread = (w * (found - mean).square()).sum()
            slope = (w * (found - mean) * (wanted - mean_wanted)).sum() / spread.clamp_min(1e-12)
            if bool(slope > 0):
                a, b = slope, mean_wanted - slope * mean
        else:
            a = (w * found * wanted).sum() / (w * found.square()).sum().clamp_min(1e-12)
        error = ((a * found + b) / wanted - 1).abs()
        robust = 1 / error.clamp_min(0.02)  # towards least absolute error
    return a, b


def track_loss(output: dict[str, Tensor], evidence: Evidence, settings: TracksConfig) -> Tensor:
    """The term `tracks` of one photograph, a scalar."""
    found, true = depth_at_tracks(output, evidence), evidence.used.depth.to(next(iter(output.values())))
    if settings.form == "l1":
        weight = evidence.used.weight.to(true)
        return (weight * (found - true).abs()).sum() / (weight.sum().clamp_min(1e-6) * true.median())
    weight = cell_weights(evidence.used).to(true)
    return (weight * F.huber_loss(found.log(), true.log(), reduction="none", delta=settings.width)).sum()


@dataclass
class Lesson:
    """One photograph as training sees it: image (3,h,w), evidence, and the target of its size (None: tracks only)."""

    image: Tensor
    evidence: Evidence
    target: Prediction | None


class PhotographTraining(Supervision):
    """Photographs take turns: each pass draws views of one, with its target carried into them.

    The order is shuffled anew in every round, so that any number of photographs costs the same memory.
    """

    name = "photographs"
    draws = True
    several = True

    def __init__(
        self, lessons: Sequence[Lesson], config: ExperimentConfig, generator: torch.Generator, log: TrainingLog
    ) -> None:
        self.lessons, self.config, self.generator, self.log = lessons, config, generator, log
        self.queue: list[int] = []
        term = config.losses.get("tracks")
        self.tracks = term if term is not None and term.weight > 0 else None
        self.dense = bool(active_terms(config.losses)) and all(lesson.target is not None for lesson in lessons)
        self.renderer = make_renderer(config, lessons[0].image.device)

    def draw(self) -> Pass:
        """Views of the photograph whose turn it is."""
        if not self.queue:
            self.queue = torch.randperm(len(self.lessons), generator=self.generator).tolist()
        number = self.queue.pop()
        lesson = self.lessons[number]
        target = lesson.target or _nothing(lesson)
        view = draw_views(lesson.image, target, self.config, self.generator, self.renderer)
        self.log.count(view)
        return Pass(view, loss_batch(view, self.config, self.generator), number)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Also the photographs' turns."""
        queue = list(self.queue)
        with super().rehearsal():
            yield
        self.queue = queue

    def gradients(self, student: Student, passes: list[Pass]) -> tuple[Gradients, dict[str, Tensor]]:
        """Of the losses on views, and of the term `tracks`, summed over the passes."""
        gradients: Gradients = [None] * len(student.leaves)
        terms: dict[str, Tensor] = {}
        if self.dense:
            for batch in join_batches([each.batch for each in passes]):
                more, values = pass_gradients(student, batch, self.config, self.log)
                accumulate(gradients, more)
                add_terms(terms, values)
        if self.tracks is not None:
            for each in passes:
                more, values = self._track_gradients(student, self.lessons[each.number])
                accumulate(gradients, more)
                add_terms(terms, values)
        return gradients, terms

    def _track_gradients(self, student: Student, lesson: Lesson) -> tuple[Gradients, dict[str, Tensor]]:
        """Of the term `tracks` on a whole photograph."""
        weight, intrinsics = self.tracks.weight, lesson.evidence.photograph.intrinsics.to(lesson.image)
        with student.attached():
            output = student.model.forward(lesson.image[None], intrinsics[None])
            loss = track_loss(output, lesson.evidence, self.tracks)
            gradients = torch.autograd.grad(weight * loss, student.leaves, allow_unused=True)
        return list(gradients), {"tracks": loss.detach(), "loss": weight * loss.detach()}


def _nothing(lesson: Lesson) -> Prediction:
    """A target that knows no pixel."""
    height, width = lesson.image.shape[-2:]
    points = torch.full((height, width, 3), torch.nan, device=lesson.image.device)
    mask = torch.ones(height, width, dtype=torch.bool, device=lesson.image.device)
    intrinsics = lesson.evidence.photograph.intrinsics.to(lesson.image)
    return Prediction(points=points, depth=points[..., 2], mask=mask, intrinsics=intrinsics, kind="scale_invariant")


def carried(lessons: list[Lesson], number: int) -> Prediction:
    """The target of one photograph as the targets of the others show it: real views, with occlusion.

    Of each pixel the median over the photographs that see it (`views.carry_back`: not hidden there, no depth edge, inside
    the picture); unknown where none does.
    """
    own = lessons[number]
    pose, found = own.evidence.photograph.pose, []
    for other in lessons[:number] + lessons[number + 1 :]:
        shown = other.target
        view = View(
            image=other.image[None], points=shown.points[None], mask=shown.mask[None], negative=None,
            intrinsics=shown.intrinsics[None], kind=["photograph"],
            transform=(other.evidence.photograph.pose @ torch.linalg.inv(pose))[None].to(other.image),
        )  # fmt: skip
        points, seen = carry_back(view, shown.points[None], own.target.points, own.target.intrinsics)
        found.append(torch.where(seen[0], points[0, ..., 2], torch.nan))
    depth = torch.stack(found).nanmedian(0).values
    return replace(own.target, depth=depth, points=unproject(depth, own.target.intrinsics))
