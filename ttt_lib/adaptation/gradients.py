"""The student's weights, and the gradients of a pass, or of several at once, over its views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from ttt_lib.adaptation.losses.terms import compute_loss, draw_seeds, unused_outputs
from ttt_lib.adaptation.student import Student
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.memory import OUT_OF_MEMORY
from ttt_lib.core.types import Prediction
from ttt_lib.models.base import GeometryModel
from ttt_lib.views.carry import View, carry_back, cutmix

MINIMUM_KNOWN_PIXELS = 64  # a view with fewer says nothing about scale and shift


@dataclass
class Training:
    """What the training of one image leaves: a dictionary an optimizer step, passes done, counts of views.

    micro_batch: views in the network at a time, at the end (lower than asked for when memory ran out).
    """

    history: list[dict[str, float]] = field(default_factory=list)
    passes_done: int = 0
    view_stats: dict[str, int] = field(default_factory=dict)
    micro_batch: int = 0
    stopped: str = ""


@dataclass
class Rows:
    """What reaches the loss: row i compares the output of picture `of[i]` with points[i] (NaN: not compared).

    share: of the picture's compared pixels that are this row's; 1 where a picture is one row. seeds (rows, 3): of
    `draw_seeds`. compared: pictures of a pass that reach the loss, which is their mean.
    """

    images: Tensor
    of: Tensor
    points: Tensor
    intrinsics: Tensor
    negative: Tensor | None
    share: Tensor
    seeds: Tensor
    compared: int


def rows_of(view: View, config: ExperimentConfig, generator: torch.Generator) -> Rows:
    """One row a view, or with CutMix one row a region; rows with hardly any known pixel are left out.

    Takes every random number that the loss of this pass needs, so the loss may be computed at any later time.
    """
    images, points, negative = view.image, view.points, view.negative
    of = torch.arange(len(images), device=images.device)
    intrinsics = view.intrinsics
    if config.views.cutmix > 0 and len(images) > 1:
        # The other view of a row is the next one. Each region is a row of its own, so that it is aligned alone.
        other = View(*(x.roll(-1, 0) if isinstance(x, Tensor) else x for x in vars(view).values()))
        images, region = cutmix(view, other, generator, config.views.cutmix)
        own = torch.where(region[..., None], torch.nan, points)
        points = torch.cat([own, torch.where(region[..., None], other.points, torch.nan)])
        if negative is not None:
            negative = torch.cat([negative & ~region, other.negative & region])
        of, intrinsics = of.repeat(2), torch.cat([intrinsics, other.intrinsics])
    known = torch.isfinite(points).all(-1).flatten(1).sum(1)
    kept = torch.nonzero(known >= MINIMUM_KNOWN_PIXELS)[:, 0]
    kept = kept[of[kept].argsort(stable=True)]  # picture by picture
    kept = kept[:1] if config.released.first_sample_only else kept
    of, known = of[kept], known[kept].float()
    share = known / torch.zeros(len(images), device=known.device).scatter_add_(0, of, known)[of]
    negative = None if negative is None else negative[kept]
    seeds, compared = draw_seeds(len(of), generator), len(of.unique())
    return Rows(images, of, points[kept], intrinsics[kept], negative, share, seeds, compared)


def join_passes(passes: list[Rows]) -> list[Rows]:
    """Neighbouring passes as one, where their pictures count the same: with as many of them compared in each.

    The sum of the losses stays what it was; `compared` is still that of one pass.
    """
    joined = []
    for compared, found in groupby(passes, key=lambda rows: rows.compared):
        group = list(found)
        if len(group) == 1:
            joined += group
            continue
        first = [0, *torch.tensor([len(rows.images) for rows in group]).cumsum(0).tolist()]
        joined.append(Rows(
            images=torch.cat([rows.images for rows in group]),
            of=torch.cat([rows.of + start for rows, start in zip(group, first)]),
            points=torch.cat([rows.points for rows in group]),
            intrinsics=torch.cat([rows.intrinsics for rows in group]),
            negative=None if group[0].negative is None else torch.cat([rows.negative for rows in group]),
            share=torch.cat([rows.share for rows in group]),
            seeds=torch.cat([rows.seeds for rows in group]),
            compared=compared,
        ))  # fmt: skip
    return joined


def left_out(config: ExperimentConfig) -> tuple[str, ...]:
    """Outputs of the network that training does not compute: those that no term of the loss reads."""
    return () if config.released.all_heads else unused_outputs(config.losses)


def _chunk_gradients(
    student: Student, rows: Rows, pictures: Tensor, config: ExperimentConfig, share: float,
    dump: Callable[[dict[str, Tensor]], None] | None,
) -> tuple[list[Tensor | None], dict[str, Tensor]]:  # fmt: skip
    """Gradients of the loss of some pictures, and its terms, both times their share of the batch."""
    model = student.model
    chosen = torch.isin(rows.of, pictures)
    place = torch.searchsorted(pictures, rows.of[chosen])  # `pictures` is sorted
    images = rows.images[pictures]
    aligned = config.losses.get("feature")
    aligned = aligned is not None and aligned.weight > 0
    if aligned:
        with torch.no_grad(), student.weights(student.original):
            frozen = model.features(images)[place]
    # The backward pass stays inside: with checkpointing it computes forward passes again.
    with student.attached():
        with model.without(left_out(config)):
            output = model.forward(images, _cameras(rows, pictures))
        if dump is not None:
            dump(output)
        output = {key: value[place] for key, value in output.items() if isinstance(value, Tensor)}
        loss, terms = compute_loss(
            output, rows.points[chosen], None if rows.negative is None else rows.negative[chosen],
            rows.intrinsics[chosen], config.losses, rows.seeds[chosen.cpu()], config.released.mask_positive_and_negative,
            (model.features(images)[place], frozen) if aligned else None,
            cheap=not config.released.full_cost_alignment, row_share=rows.share[chosen],
        )  # fmt: skip
        gradients = torch.autograd.grad(loss * share, student.leaves, allow_unused=True)
    terms = {"loss": loss.detach(), **terms}
    return list(gradients), {key: value * share for key, value in terms.items()}


def _cameras(rows: Rows, pictures: Tensor) -> Tensor:
    """Intrinsics of the pictures; one that reaches no loss takes those of the first row."""
    first = [torch.nonzero(rows.of == picture)[:1, 0] for picture in pictures]
    return torch.cat([rows.intrinsics[i] if len(i) else rows.intrinsics[:1] for i in first])


def view_loss(model: GeometryModel, view: View, config: ExperimentConfig, generator: torch.Generator) -> float:
    """Loss of one pass without gradients; takes the same random numbers from `generator` as training on it."""
    rows = rows_of(view, config, generator)
    with torch.no_grad():
        output = model.forward(rows.images, view.intrinsics)
        output = {key: value[rows.of] for key, value in output.items() if isinstance(value, Tensor)}
        loss, _ = compute_loss(
            output, rows.points, rows.negative, rows.intrinsics, config.losses, rows.seeds, row_share=rows.share
        )
    return float(loss * len(rows.of) / max(rows.compared, 1))


def add_terms(total: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add the values to the total, term by term."""
    for key, value in values.items():
        total[key] = total.get(key, 0.0) + value


def pass_gradients(
    student: Student, rows: Rows, config: ExperimentConfig, training: Training,
    dump: Callable[[dict[str, Tensor]], None] | None = None,
) -> tuple[list[Tensor | None], dict[str, Tensor]]:  # fmt: skip
    """Gradients of the loss of a pass with respect to `student.leaves`, and the terms of the loss (detached).

    For several passes that were joined: of the sum of their losses. The views go through the network in parts of
    `training.micro_batch`, with the result of the whole: every term is a mean over rows. When memory runs out, the part
    is halved and done again. Raises the error when a single view does not fit. dump: called with each part's output.
    """
    total: list[Tensor | None] = [None] * len(student.leaves)
    terms: dict[str, Tensor] = {}
    pictures = rows.of.unique()
    if config.released.first_sample_only and rows.compared:  # the release runs the whole batch, and uses one of it
        pictures = torch.arange(len(rows.images), device=rows.of.device)
    done = 0
    while done < len(pictures):
        part = pictures[done : done + training.micro_batch]
        count = int(torch.isin(rows.of, part).sum())
        # A mean over pictures: the regions of a CutMix, each weighted by its area, add up to one.
        share = count / rows.compared
        try:
            gradients, values = [None] * len(student.leaves), {}
            if count:
                gradients, values = _chunk_gradients(student, rows, part, config, share, dump)
        except OUT_OF_MEMORY:
            if training.micro_batch == 1:
                raise
            training.micro_batch = max(1, min(training.micro_batch, len(part)) // 2)
            torch.cuda.empty_cache()
            continue
        done += len(part)
        accumulate(total, gradients)
        add_terms(terms, values)
    return total, terms


def accumulate(total: list[Tensor | None], gradients: list[Tensor | None], factor: float = 1.0) -> None:
    """Add factor * gradients to the total; None, for a tensor that was not reached, adds nothing."""
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            scaled = gradient if factor == 1.0 else gradient * factor
            total[i] = scaled if total[i] is None else total[i] + scaled


def reverse_gradients(
    student: Student, view: View, image: Tensor, target: Prediction, config: ExperimentConfig,
    generator: torch.Generator,
) -> tuple[list[Tensor | None], dict[str, Tensor]]:  # fmt: skip
    """The clean prediction learns from the views' ones, carried back (Robust-Depth's second direction)."""
    model = student.model
    with student.weights():
        predicted = model.predict(view.image, view.intrinsics)
    points, seen = carry_back(view, predicted.points, target.points, target.intrinsics)
    seen = seen & target.mask  # where there is no surface there is none to learn
    points = torch.where(seen[..., None], points, torch.nan)
    points = points[seen.flatten(1).sum(1) >= MINIMUM_KNOWN_PIXELS]
    if not len(points):
        return [None] * len(student.leaves), {}
    camera = target.intrinsics[None]
    terms = {name: term for name, term in config.losses.items() if name not in ("feature", "metric_reference")}
    with student.attached():
        with model.without(left_out(config)):
            output = model.forward(image[None], camera)
        output = {key: value.expand(len(points), *value.shape[1:]) for key, value in output.items()}
        loss, _ = compute_loss(
            output, points, None, camera.expand(len(points), 3, 3), terms, draw_seeds(len(points), generator),
            cheap=not config.released.full_cost_alignment,
        )  # fmt: skip
        weighted = config.train.bidirectional * loss
        gradients = torch.autograd.grad(weighted, student.leaves, allow_unused=True)
    return list(gradients), {"reverse": loss.detach()}
