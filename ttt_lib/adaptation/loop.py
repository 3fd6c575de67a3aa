"""The student's training: passes over views of one image, gathered into optimizer steps, after a slow teacher."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ttt_lib.adaptation.ensemble import predict_ensemble, predict_on_views
from ttt_lib.adaptation.gradients import (
    Rows,
    Training,
    accumulate,
    add_terms,
    join_passes,
    pass_gradients,
    reverse_gradients,
    rows_of,
)
from ttt_lib.adaptation.references import References, reference_loss
from ttt_lib.adaptation.regularizers import distance_gradients, restore_some, sharpest_point
from ttt_lib.adaptation.student import Student
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import NumericalError
from ttt_lib.core.memory import room_for
from ttt_lib.core.schema import OptimizerConfig
from ttt_lib.core.types import Prediction
from ttt_lib.geometry.cameras import unproject
from ttt_lib.models.base import GeometryModel
from ttt_lib.views.carry import View
from ttt_lib.views.draw import make_views
from ttt_lib.views.renderer import NovelViewRenderer


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


def _dump(folder: Path, number: int, view: View, output: dict[str, Tensor]) -> None:
    """The debug files that the public release writes in every iteration; only for `released.write_files`."""
    for i, image in enumerate(view.image):
        array = (image.permute(1, 2, 0).cpu().numpy() * 255).astype(np.uint8)
        Image.fromarray(array).save(folder / f"{number}_{i}.png")
        np.save(folder / f"{number}_{i}_target.npy", view.points[i].cpu().numpy())
        for name in ("points", "depth", "disparity"):
            if name in output:
                np.save(folder / f"{number}_{i}_{name}.npy", output[name][i].detach().float().cpu().numpy())


def _first_micro_batch(config: ExperimentConfig) -> int:
    """Views in the network at a time, to begin with; `auto` looks at one pass first."""
    asked, batch_size = config.train.micro_batch, config.train.batch_size
    return batch_size if asked in (None, "auto") else min(asked, batch_size * config.train.accumulation)


def _roomy_micro_batch(config: ExperimentConfig, training: Training, model: GeometryModel) -> int:
    """How many views of a step the free memory of a GPU takes, after one pass, which has shown what a view needs.

    A CPU keeps to one pass at a time: more gained nothing there and took half as much memory again (05_performance).
    """
    train = config.train
    if model.device.type != "cuda" or training.micro_batch < train.batch_size:  # or memory has run out already
        return training.micro_batch
    return max(train.batch_size, min(room_for(model.device, train.batch_size), train.batch_size * train.accumulation))


def _passes_at_once(config: ExperimentConfig, training: Training) -> int:
    """Passes whose views go through the network together."""
    if config.train.bidirectional > 0 or config.released.write_files:  # these look at each pass by itself
        return 1
    return max(1, training.micro_batch // config.train.batch_size)


def train_student(
    student: Student,
    image: Tensor,
    config: ExperimentConfig,
    generator: torch.Generator,
    training: Training,
    references: References | None = None,
    progress: bool = False,
    on_step: Callable[[dict[str, float]], None] | None = None,
    watch: Callable[[int, bool], bool] | None = None,
) -> list[Tensor]:
    """Train the student in place on views of `image`; fills `training`; returns the teacher's values.

    watch: called with the number of each finished step and whether it is the last; True ends the training. Raises
    `NumericalError` before a step with a loss or gradient that is not finite would spoil the weights.
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
    training.micro_batch = _first_micro_batch(config)
    bar = tqdm(total=train.passes, desc=config.name, leave=False, disable=not progress, mininterval=1.0)

    def draw_pass() -> tuple[View, Rows]:
        view = draw_views(image, target, config, generator, renderer)
        for key, value in view.stats.items():
            training.view_stats[key] = training.view_stats.get(key, 0) + value
        return view, rows_of(view, config, generator)

    def gradients_of(passes: list[tuple[View, Rows]]) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Of the sum of the losses of these passes."""
        gradients: list[Tensor | None] = [None] * len(student.leaves)
        terms: dict[str, Tensor] = {}
        dump = None
        if dump_folder is not None:
            dump = partial(_dump, Path(dump_folder.name), training.passes_done, passes[0][0])
        for rows in join_passes([rows for _, rows in passes]):
            more, values = pass_gradients(student, rows, config, training, dump)
            accumulate(gradients, more)
            add_terms(terms, values)
        if train.bidirectional > 0:
            more, values = reverse_gradients(student, passes[0][0], image, target, config, generator)
            accumulate(gradients, more)
            add_terms(terms, values)
        weight = config.losses.get("metric_reference")
        if references is not None and weight is not None and weight.weight > 0:
            with student.attached():
                value = reference_loss(model, image, references) * len(passes)  # the same in each of them
                more = torch.autograd.grad(weight.weight * value, student.leaves, allow_unused=True)
            accumulate(gradients, list(more))
            add_terms(terms, {"metric_reference": value.detach()})
        return gradients, terms

    try:
        while training.passes_done < train.passes and not training.stopped:
            begun = time.perf_counter()
            count = min(train.accumulation, train.passes - training.passes_done)
            factor = 1 / count if train.accumulation_mode == "mean" else 1.0
            total: list[Tensor | None] = [None] * len(student.leaves)
            sums: dict[str, Tensor] = {}
            groups, done = [], 0
            while done < count:
                passes = [draw_pass() for _ in range(min(_passes_at_once(config, training), count - done))]
                if train.sharpness_radius > 0:
                    groups.append((passes, generator.get_state()))
                gradients, terms = gradients_of(passes)
                accumulate(total, gradients, factor)
                known = torch.stack([view.mask.float().mean() for view, _ in passes]).sum()
                add_terms(sums, {"known": known, **terms})
                if train.micro_batch == "auto" and training.passes_done == 0:
                    training.micro_batch = _roomy_micro_batch(config, training, model)
                done += len(passes)
                training.passes_done += len(passes)
                bar.update(len(passes))
            if train.sharpness_radius > 0:
                with sharpest_point(student.leaves, total, train.sharpness_radius):
                    total, after = [None] * len(student.leaves), generator.get_state()
                    for passes, state in groups:  # the same patches and rectangles: the gradient of the same loss
                        generator.set_state(state)
                        accumulate(total, gradients_of(passes)[0], factor)
                    generator.set_state(after)
            if train.l2_sp > 0:
                accumulate(total, distance_gradients(student, train.l2_sp))
            for leaf, gradient in zip(student.leaves, total):
                leaf.grad = gradient
            entry = _step(student, optimizer, config, training, sums, count)
            if train.restore_probability > 0:
                restore_some(student, train.restore_probability, generator)
            entry["seconds"] = time.perf_counter() - begun
            bar.set_postfix(loss=f"{entry.get('loss', float('nan')):.4f}")
            if on_step is not None:
                on_step(entry)
            if (
                watch is not None
                and watch(entry["step"], training.passes_done >= train.passes)
                and training.passes_done < train.passes
            ):
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
        raise NumericalError(f"the loss or its gradient was not finite in step {entry['step']}")
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
        points, seen = predict_on_views(model, view, target)
        ratio = torch.where(seen, target.points[..., 2] / points[..., 2], torch.nan)
        scale = ratio.flatten(1).nanmedian(dim=1).values.nan_to_num(1.0)
        total += torch.where(seen[..., None], points * scale[:, None, None, None], 0.0).sum(0)
        count += seen.sum(0)
    depth = (total / count[..., None])[..., 2]
    ratio = depth / target.depth
    if ratio.shape != original.depth.shape:
        ratio = F.interpolate(ratio[None, None], original.depth.shape, mode="bilinear")[0, 0]
    depth = original.depth * ratio
    disparity = None if original.disparity is None else 1 / depth.clamp_min(1e-6)
    return replace(original, depth=depth, points=unproject(depth, original.intrinsics), disparity=disparity)
