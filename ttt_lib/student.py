"""The student's training: passes over views of one image, gathered into optimizer steps, after a slow teacher."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ttt_lib.augment import View, carry_back, cutmix, make_views
from ttt_lib.config import ExperimentConfig, OptimizerConfig
from ttt_lib.ensemble import predict_ensemble
from ttt_lib.geometry import unproject
from ttt_lib.losses import compute_loss
from ttt_lib.models import GeometryModel, Prediction
from ttt_lib.references import References, reference_loss
from ttt_lib.render import NovelViewRenderer
from ttt_lib.restraint import LowRank, distance_gradients, restore_some, sharpest_point

MINIMUM_KNOWN_PIXELS = 64  # a view with fewer says nothing about scale and shift
OUT_OF_MEMORY = (getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError), MemoryError)


class NonFiniteLoss(Exception):
    """The loss or a gradient became NaN or infinite; the sample keeps its original prediction."""


@dataclass
class Training:
    """What the training of one image leaves: a dictionary an optimizer step, passes done, counts of views.

    micro_batch: views that were in the network at a time in the end (lower than asked for when memory ran out).
    """

    history: list[dict[str, float]] = field(default_factory=list)
    passes_done: int = 0
    view_stats: dict[str, int] = field(default_factory=dict)
    micro_batch: int = 0
    stopped: str = ""


class Student:
    """The weights that training moves, inside the network.

    named: the network's parameters that the experiment chose; leaves: what the optimizer moves, these very parameters
    or the factors of their low-rank updates. The network itself always holds valid weights.
    """

    def __init__(self, model: GeometryModel, named: list[tuple[str, torch.nn.Parameter]], lora_rank: int = 0) -> None:
        self.model = model
        self.low_rank = LowRank(named, lora_rank) if lora_rank else None
        if self.low_rank is not None:
            named = [(name, p) for name, p in named if name in self.low_rank.factors]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.original = [p.detach().clone() for p in self.parameters]
        self.leaves: list[Tensor] = self.low_rank.leaves() if self.low_rank else list(self.parameters)

    def values(self) -> list[Tensor]:
        """The present weights of `parameters`, detached."""
        if self.low_rank is None:
            return [p.detach() for p in self.parameters]
        return [value.detach() for value in self.low_rank.merged().values()]

    def put(self, values: list[Tensor]) -> None:
        """Make `values` the present weights (not for low-rank updates, which cannot hold any)."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values):
                parameter.copy_(value)

    @contextmanager
    def weights(self, values: list[Tensor] | None = None) -> Iterator[None]:
        """Inside, the network holds `values` (default: the present ones), without gradients to them; then its own."""
        own = [p.data for p in self.parameters]
        try:
            for parameter, value in zip(self.parameters, self.values() if values is None else values):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(self.parameters, own):
                parameter.data = value

    def attached(self):
        """Inside, a forward pass of the network reaches `leaves` with its gradients."""
        return nullcontext() if self.low_rank is None else self.low_rank.attached(self.model.network)


def make_optimizer(parameters: list[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """PyTorch's AdamW or SGD with the configured options; fused on a GPU."""
    fused = {"fused": True} if parameters and parameters[0].is_cuda else {}
    if config.name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
            **fused,
        )  # fmt: skip
    return torch.optim.SGD(
        parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay,
        nesterov=config.nesterov, **fused,
    )  # fmt: skip


def make_renderer(config: ExperimentConfig, device: torch.device) -> NovelViewRenderer | None:
    """The renderer of novel views, if this experiment draws any."""
    novel = config.views.novel_view
    return NovelViewRenderer(backend=novel.backend, device=device) if novel.probability > 0 else None


def draw_views(
    image: Tensor,
    target: Prediction,
    config: ExperimentConfig,
    generator: torch.Generator,
    renderer: NovelViewRenderer | None,
) -> View:
    """One batch of views with the target carried into them."""
    return make_views(
        image,
        target.points,
        target.mask,
        target.intrinsics,
        config.views,
        config.train.batch_size,
        generator,
        renderer,
        mirror_keeps_x=config.released.mirror_keeps_x,
    )


@dataclass
class _Rows:
    """What reaches the loss: row i compares the output of picture `of[i]` with points[i] (NaN: not compared)."""

    images: Tensor
    of: Tensor
    points: Tensor
    intrinsics: Tensor
    negative: Tensor | None


def _rows(view: View, config: ExperimentConfig, generator: torch.Generator) -> _Rows:
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
    kept = kept[of[kept].argsort(stable=True)]  # picture by picture, so that parts draw the whole's random numbers
    kept = kept[:1] if config.released.first_sample_only else kept
    return _Rows(images, of[kept], points[kept], intrinsics[kept], None if negative is None else negative[kept])


def _chunk_gradients(
    student: Student, rows: _Rows, pictures: Tensor, config: ExperimentConfig, generator: torch.Generator, share: float
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Gradients of the loss of some pictures, and its terms, both times their share of the batch."""
    model = student.model
    chosen = torch.isin(rows.of, pictures)
    place = torch.searchsorted(pictures, rows.of[chosen])
    images = rows.images[pictures]
    aligned = config.losses.get("feature")
    aligned = aligned is not None and aligned.weight > 0
    if aligned:
        with torch.no_grad(), student.weights(student.original):
            frozen = model.features(images)[place]
    # The backward pass stays inside: with checkpointing it computes forward passes again.
    with student.attached():
        output = model.forward(images, _cameras(rows, pictures))
        output = {key: value[place] for key, value in output.items() if isinstance(value, Tensor)}
        loss, terms = compute_loss(
            output, rows.points[chosen], None if rows.negative is None else rows.negative[chosen],
            rows.intrinsics[chosen], config.losses, generator, config.released.mask_positive_and_negative,
            (model.features(images)[place], frozen) if aligned else None,
            cheap=not config.released.full_cost_alignment,
        )  # fmt: skip
        gradients = torch.autograd.grad(loss * share, student.leaves, allow_unused=True)
    terms = {"loss": loss.detach(), **terms}
    return list(gradients), {key: value * share for key, value in terms.items()}


def _cameras(rows: _Rows, pictures: Tensor) -> Tensor:
    """Intrinsics of the pictures; one that reaches no loss takes those of the first row."""
    first = [torch.nonzero(rows.of == picture)[:1, 0] for picture in pictures]
    return torch.cat([rows.intrinsics[i] if len(i) else rows.intrinsics[:1] for i in first])


def view_loss(model: GeometryModel, view: View, config: ExperimentConfig, generator: torch.Generator) -> float:
    """Loss of one pass without gradients; takes the same random numbers from `generator` as training on it."""
    rows = _rows(view, config, generator)
    with torch.no_grad():
        output = model.forward(rows.images, view.intrinsics)
        output = {key: value[rows.of] for key, value in output.items() if isinstance(value, Tensor)}
        loss, _ = compute_loss(output, rows.points, rows.negative, rows.intrinsics, config.losses, generator)
    return float(loss)


def _add(total: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for key, value in values.items():
        total[key] = total.get(key, 0.0) + value


def pass_gradients(
    student: Student, view: View, config: ExperimentConfig, generator: torch.Generator, training: Training
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Gradients of the loss of one pass with respect to `student.leaves`, and the terms of the loss (detached).

    The views go through the network in parts of `training.micro_batch`, with the result of the whole: every term is a
    mean over rows. When memory runs out, the part is halved and done again with the same random numbers. Raises the
    error when a single view does not fit.
    """
    rows = _rows(view, config, generator)
    total: list[Tensor | None] = [None] * len(student.leaves)
    terms: dict[str, Tensor] = {}
    pictures = rows.of.unique()
    halves = len(rows.images) if config.views.cutmix > 0 and len(rows.images) > 1 else 0
    done = 0
    while done < len(pictures):
        part = pictures[done : done + training.micro_batch]
        count = int(torch.isin(rows.of, part).sum())
        # MoGe's terms count unknown pixels as zero, so the two regions of a CutMix add up to one picture.
        share = count / (halves if halves else len(rows.of))
        state = generator.get_state()
        try:
            gradients, values = _chunk_gradients(student, rows, part, config, generator, share)
        except OUT_OF_MEMORY:
            if training.micro_batch == 1:
                raise
            training.micro_batch = max(1, min(training.micro_batch, len(part)) // 2)
            generator.set_state(state)
            torch.cuda.empty_cache()
            continue
        done += len(part)
        _accumulate(total, gradients)
        _add(terms, values)
    return total, terms


def _accumulate(total: list[Tensor | None], gradients: list[Tensor | None], factor: float = 1.0) -> None:
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            scaled = gradient if factor == 1.0 else gradient * factor
            total[i] = scaled if total[i] is None else total[i] + scaled


def _reverse_gradients(
    student: Student, view: View, image: Tensor, target: Prediction, config: ExperimentConfig,
    generator: torch.Generator,
) -> tuple[list[Tensor | None], dict[str, Tensor]]:  # fmt: skip
    """The clean prediction learns from the views' ones, carried back (Robust-Depth's second direction)."""
    model = student.model
    with student.weights():
        predicted = model.predict(view.image, view.intrinsics)
    points, seen = carry_back(view, predicted.points, target.points, target.intrinsics)
    points = torch.where(seen[..., None], points, torch.nan)
    points = points[seen.flatten(1).sum(1) >= MINIMUM_KNOWN_PIXELS]
    if not len(points):
        return [None] * len(student.leaves), {}
    camera = target.intrinsics[None]
    terms = {name: term for name, term in config.losses.items() if name not in ("feature", "metric_reference")}
    with student.attached():
        output = model.forward(image[None], camera)
        output = {key: value.expand(len(points), *value.shape[1:]) for key, value in output.items()}
        loss, _ = compute_loss(
            output, points, None, camera.expand(len(points), 3, 3), terms, generator,
            cheap=not config.released.full_cost_alignment,
        )  # fmt: skip
        weighted = config.train.bidirectional * loss
        gradients = torch.autograd.grad(weighted, student.leaves, allow_unused=True)
    return list(gradients), {"reverse": loss.detach()}


def _dump(folder: Path, number: int, view: View, model: GeometryModel) -> None:
    """The debug files that the public release writes in every iteration; only for `released.write_files`."""
    with torch.no_grad():
        output = model.forward(view.image, view.intrinsics)
    for i, image in enumerate(view.image):
        array = (image.permute(1, 2, 0).cpu().numpy() * 255).astype(np.uint8)
        Image.fromarray(array).save(folder / f"{number}_{i}.png")
        np.save(folder / f"{number}_{i}_target.npy", view.points[i].cpu().numpy())
        for name in ("points", "depth", "disparity"):
            if name in output:
                np.save(folder / f"{number}_{i}_{name}.npy", output[name][i].float().cpu().numpy())


def train_student(
    student: Student,
    image: Tensor,
    config: ExperimentConfig,
    generator: torch.Generator,
    training: Training,
    references: References | None = None,
    progress: bool = False,
    on_step: Callable[[dict[str, float]], None] | None = None,
    watch: Callable[[int], bool] | None = None,
) -> list[Tensor]:
    """Train the student in place on views of `image`; fills `training`; returns the teacher's values.

    watch: called with the number of each finished step; True ends the training. Raises `NonFiniteLoss` before a step
    with a loss or gradient that is not finite would spoil the weights.
    """
    model, train, teacher_config = student.model, config.train, config.teacher
    optimizer = make_optimizer(student.leaves, train.optimizer)
    teacher = [value.clone() for value in student.values()]
    renderer = make_renderer(config, image.device)
    dump_folder = tempfile.TemporaryDirectory() if config.released.write_files else None
    members = config.ensemble.members if config.ensemble.target else []

    def predict_target() -> Prediction:
        with student.weights(teacher):
            return predict_ensemble(model, image, members)

    target, target_age = predict_target(), 0
    training.micro_batch = min(train.micro_batch or train.batch_size, train.batch_size)
    bar = tqdm(total=train.passes, desc=config.name, leave=False, disable=not progress, mininterval=1.0)

    def one_pass(view: View) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        gradients, terms = pass_gradients(student, view, config, generator, training)
        if train.bidirectional > 0:
            more, values = _reverse_gradients(student, view, image, target, config, generator)
            _accumulate(gradients, more)
            _add(terms, values)
        weight = config.losses.get("metric_reference")
        if references is not None and weight is not None and weight.weight > 0:
            with student.attached():
                value = reference_loss(model, image, references)
                more = torch.autograd.grad(weight.weight * value, student.leaves, allow_unused=True)
            _accumulate(gradients, list(more))
            _add(terms, {"metric_reference": value.detach()})
        return gradients, terms

    try:
        while training.passes_done < train.passes and not training.stopped:
            begun = time.perf_counter()
            count = min(train.accumulation, train.passes - training.passes_done)
            factor = 1 / count if train.accumulation_mode == "mean" else 1.0
            total: list[Tensor | None] = [None] * len(student.leaves)
            sums: dict[str, Tensor] = {}
            views = []
            for _ in range(count):
                view = draw_views(image, target, config, generator, renderer)
                for key, value in view.stats.items():
                    training.view_stats[key] = training.view_stats.get(key, 0) + value
                if dump_folder is not None:
                    _dump(Path(dump_folder.name), training.passes_done, view, model)
                if train.sharpness_radius > 0:
                    views.append(view)
                gradients, terms = one_pass(view)
                _accumulate(total, gradients, factor)
                _add(sums, {"known": view.mask.float().mean(), **terms})
                training.passes_done += 1
                bar.update()
            if train.sharpness_radius > 0:
                with sharpest_point(student.leaves, total, train.sharpness_radius):
                    total = [None] * len(student.leaves)
                    for view in views:
                        _accumulate(total, one_pass(view)[0], factor)
            if train.l2_sp > 0:
                _accumulate(total, distance_gradients(student, train.l2_sp))
            for leaf, gradient in zip(student.leaves, total):
                leaf.grad = gradient
            entry = _step(student, optimizer, config, training, sums, count)
            if train.restore_probability > 0:
                restore_some(student, train.restore_probability, generator)
            entry["seconds"] = time.perf_counter() - begun
            bar.set_postfix(loss=f"{entry.get('loss', float('nan')):.4f}")
            if on_step is not None:
                on_step(entry)
            if watch is not None and watch(entry["step"]):
                training.stopped = f"stopped after step {entry['step']}: the held-back views no longer improved"

            target_age += 1
            due = teacher_config.refresh_every and target_age == teacher_config.refresh_every
            if due or (teacher_config.refresh_every and training.passes_done >= train.passes):
                with torch.no_grad():
                    for slow, fast in zip(teacher, student.values()):
                        slow.lerp_(fast, 1 - teacher_config.ema_decay)
                target_age = 0
                if training.passes_done < train.passes:
                    target = predict_target()
    finally:
        bar.close()
        if dump_folder is not None:
            dump_folder.cleanup()
    return teacher


def _step(
    student: Student, optimizer: torch.optim.Optimizer, config: ExperimentConfig, training: Training,
    sums: dict[str, Tensor], count: int,
) -> dict[str, float]:  # fmt: skip
    """Clip, look, step; appends the entry of the history and returns it."""
    trained = [leaf for leaf in student.leaves if leaf.grad is not None]
    norm = torch.zeros(())
    if trained:
        norm = torch.nn.utils.clip_grad_norm_(trained, config.train.gradient_clip or float("inf"))
    entry = {key: float(value) / count for key, value in sums.items()}
    entry = {
        "step": len(training.history) + 1,
        "passes": training.passes_done,
        **entry,
        "gradient_norm": float(norm),
    }
    if not np.isfinite(entry.get("loss", 0.0)) or not np.isfinite(entry["gradient_norm"]):
        raise NonFiniteLoss(f"the loss or its gradient was not finite in step {entry['step']}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    training.history.append(entry)
    return entry


def average_views(
    model: GeometryModel, image: Tensor, original: Prediction, config: ExperimentConfig, generator: torch.Generator
) -> Prediction:
    """Test-time augmentation: the mean of the predictions on the views, carried back to the image.

    As many views as training would see. Each view's prediction is scaled to the original by its median ratio, since
    a view's own scale is the least certain part; pixels a view does not show do not count. No weights change.
    """
    target = model.predict(image)
    renderer = make_renderer(config, image.device)
    total = target.points.clone()
    count = torch.ones(image.shape[-2:], device=image.device)
    for _ in range(config.train.passes):
        view = draw_views(image, target, config, generator, renderer)
        predicted = model.predict(view.image, view.intrinsics)
        points, seen = carry_back(view, predicted.points, target.points, target.intrinsics)
        seen = seen & (points[..., 2] > 0) & torch.isfinite(points).all(-1)
        ratio = torch.where(seen, target.points[..., 2] / points[..., 2], torch.nan)
        scale = ratio.flatten(1).nanmedian(dim=1).values.nan_to_num(1.0)
        total += torch.where(seen[..., None], points * scale[:, None, None, None], 0.0).sum(0)
        count += seen.sum(0)
    depth = (total / count[..., None])[..., 2]
    if depth.shape != original.depth.shape:
        ratio = F.interpolate((depth / target.depth)[None, None], original.depth.shape, mode="bilinear")[0, 0]
        depth = original.depth * ratio
    disparity = None if original.disparity is None else 1 / depth.clamp_min(1e-6)
    return replace(original, depth=depth, points=unproject(depth, original.intrinsics), disparity=disparity)
