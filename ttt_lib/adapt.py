"""The test-time-training loop: one image in, an adapted prediction out, the model as it was before.

A teacher (slow average of the student) predicts a target on the clean image; views of the image carry it; the student
is trained on the views for a few passes; then the adapted network predicts. See DESIGN in the README for the method,
and `config.TrainConfig` for the settings.
"""

from __future__ import annotations

import hashlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ttt_lib.augment import View, carry_back, make_views
from ttt_lib.config import ExperimentConfig, OptimizerConfig
from ttt_lib.geometry import unproject
from ttt_lib.losses import compute_loss
from ttt_lib.models import GeometryModel, Prediction, restore, select_parameters, snapshot
from ttt_lib.render import NovelViewRenderer

MINIMUM_KNOWN_PIXELS = 64  # a view with fewer says nothing about scale and shift


@dataclass
class AdaptResult:
    """What one image gave.

    original: before; adapted: after the last step (None if training stopped); final: the one to use. decision:
    `original`, `adapted` or `averaged`; reason: a sentence when the decision is not the expected one. history: one
    dictionary an optimizer step: step, passes, loss, each term, gradient_norm, known (share of known target pixels),
    seconds. seconds: wall time of everything here; peak_memory_mb: of the device (CUDA) or of the process (CPU).
    """

    original: Prediction
    adapted: Prediction | None
    final: Prediction
    decision: str
    reason: str = ""
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    passes_done: int = 0
    view_stats: dict[str, int] = field(default_factory=dict)


class NonFiniteLoss(Exception):
    """The loss or a gradient became NaN or infinite; the sample keeps its original prediction."""


def sample_generator(seed: int, name: str) -> torch.Generator:
    """The one source of randomness of a sample: a CPU generator seeded from (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """PyTorch's AdamW or SGD with the configured options."""
    if config.name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
    return torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


@contextmanager
def weights_of(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Inside, `parameters` hold `values` (no copies are made); afterwards their own again."""
    own = [p.data for p in parameters]
    try:
        for parameter, value in zip(parameters, values):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own):
            parameter.data = value


def working_image(image: Tensor, longest_side: int | None) -> Tensor:
    """The image the views are made from: (3,H,W), shrunk (anti-aliased) to at most `longest_side` pixels."""
    height, width = image.shape[-2:]
    if longest_side is None or max(height, width) <= longest_side:
        return image
    factor = longest_side / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)


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


def make_renderer(config: ExperimentConfig, device: torch.device) -> NovelViewRenderer | None:
    """The renderer of novel views, if this experiment draws any."""
    novel = config.views.novel_view
    return NovelViewRenderer(backend=novel.backend, device=device) if novel.probability > 0 else None


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
        predicted = model.predict(view.image)
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
    return replace(original, depth=depth, points=unproject(depth, original.intrinsics))


def _dump(folder: Path, step: int, view: View, output: dict[str, Tensor]) -> None:
    """The debug files that the public release writes in every iteration; only for `released.write_files`."""
    for i, image in enumerate(view.image):
        array = (image.permute(1, 2, 0).cpu().numpy() * 255).astype(np.uint8)
        Image.fromarray(array).save(folder / f"{step}_{i}.png")
        np.save(folder / f"{step}_{i}_target.npy", view.points[i].cpu().numpy())
        np.save(folder / f"{step}_{i}_points.npy", output["points"][i].detach().float().cpu().numpy())


def _select(
    output: dict[str, Any], view: View, rows: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None]:
    """The rows of the batch that reach the loss: outputs, targets, intrinsics, negatives."""
    chosen = {key: value[rows] for key, value in output.items() if value is not None}
    negative = view.negative[rows] if view.negative is not None else None
    return chosen, view.points[rows], view.intrinsics[rows], negative


def train_student(
    model: GeometryModel,
    image: Tensor,
    config: ExperimentConfig,
    parameters: list[nn.Parameter],
    generator: torch.Generator,
    result: AdaptResult,
    progress: bool = False,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> list[Tensor]:
    """Train `parameters` in place on views of `image`; fills `result.history`; returns the teacher's values of them.

    Raises `NonFiniteLoss` before a step with a loss or gradient that is not finite would spoil the weights.
    """
    train, teacher_config = config.train, config.teacher
    optimizer = make_optimizer(parameters, train.optimizer)
    teacher = [p.detach().clone() for p in parameters]
    renderer = make_renderer(config, image.device)
    dump_folder = tempfile.TemporaryDirectory() if config.released.write_files else None
    target = model.predict(image)
    target_age = 0
    sums: dict[str, Tensor] = {}
    in_step, begun = 0, time.perf_counter()
    bar = tqdm(total=train.passes, desc=config.name, leave=False, disable=not progress, mininterval=1.0)
    try:
        for i in range(train.passes):
            view = draw_views(image, target, config, generator, renderer)
            for key, value in view.stats.items():
                result.view_stats[key] = result.view_stats.get(key, 0) + value
            rows = torch.nonzero(view.mask.flatten(1).sum(1) >= MINIMUM_KNOWN_PIXELS)[:, 0]
            rows = rows[:1] if config.released.first_sample_only else rows
            output = model.forward(view.image)
            if dump_folder is not None:
                _dump(Path(dump_folder.name), i, view, output)
            if rows.numel():
                chosen, points, intrinsics, negative = _select(output, view, rows)
                loss, terms = compute_loss(
                    chosen, points, negative, intrinsics, config.losses, generator,
                    config.released.mask_positive_and_negative,
                )  # fmt: skip
                accumulated = min(train.accumulation, train.passes - (i - in_step))
                (loss / accumulated if train.accumulation_mode == "mean" else loss).backward()
                known = view.mask.float().mean()
                for key, value in {"loss": loss.detach(), "known": known, **terms}.items():
                    sums[key] = sums.get(key, 0.0) + value
            in_step += 1
            result.passes_done = i + 1
            bar.update()
            if in_step < train.accumulation and i + 1 < train.passes:
                continue

            trained = [p for p in parameters if p.grad is not None]
            norm = (
                nn.utils.clip_grad_norm_(trained, train.gradient_clip or float("inf")) if trained else torch.zeros(())
            )
            entry = {key: float(value) / in_step for key, value in sums.items()}
            entry = {"step": len(result.history) + 1, "passes": i + 1, **entry, "gradient_norm": float(norm)}
            if not np.isfinite(entry.get("loss", 0.0)) or not np.isfinite(entry["gradient_norm"]):
                raise NonFiniteLoss(f"the loss or its gradient was not finite in step {entry['step']}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            entry["seconds"] = time.perf_counter() - begun
            result.history.append(entry)
            bar.set_postfix(loss=f"{entry.get('loss', float('nan')):.4f}")
            if on_step is not None:
                on_step(entry)
            sums, in_step, begun = {}, 0, time.perf_counter()

            target_age += 1
            if teacher_config.refresh_every and target_age == teacher_config.refresh_every and i + 1 < train.passes:
                target_age = 0
                with torch.no_grad():
                    for slow, fast in zip(teacher, parameters):
                        slow.lerp_(fast, 1 - teacher_config.ema_decay)
                with weights_of(parameters, teacher):
                    target = model.predict(image)
    finally:
        bar.close()
        if dump_folder is not None:
            dump_folder.cleanup()
    if target_age and teacher_config.refresh_every:
        with torch.no_grad():
            for slow, fast in zip(teacher, parameters):
                slow.lerp_(fast, 1 - teacher_config.ema_decay)
    return teacher


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory: allocated on a CUDA device since the last reset, else resident in this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def adapt(
    model: GeometryModel,
    image: Tensor,
    config: ExperimentConfig,
    name: str = "image",
    progress: bool = False,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> AdaptResult:
    """Adapt `model` to one image by the experiment's method and predict; the model is left exactly as it was.

    image: (3,H,W) float32 in [0,1], any device. name: identifies the sample; with `config.seed` it fixes every random
    draw. on_step: called after each optimizer step with its history entry (what it raises ends the adaptation).

    Weights and buffers are bit-identical afterwards, also after an exception or Ctrl-C (which is passed on). A loss
    that is not finite ends this sample with the original prediction, and `reason` says so. Raises `UserError` when
    `config.train.parts` names nothing the model has.
    """
    begun = time.perf_counter()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    image = image.to(model.device)
    train = config.train
    original = model.predict(image)
    result = AdaptResult(original=original, adapted=None, final=original, decision="original")
    generator = sample_generator(config.seed, name)
    if train.method == "tta" and train.passes:
        image = working_image(image, config.views.longest_side)
        result.adapted = result.final = average_views(model, image, original, config, generator)
        result.decision, result.passes_done = "averaged", train.passes
    elif train.method == "ttt" and train.passes:
        named = select_parameters(model, train.parts)
        parameters = [parameter for _, parameter in named]
        before = snapshot(model, named)
        try:
            teacher = train_student(
                model, working_image(image, config.views.longest_side), config, parameters, generator, result,
                progress, on_step,
            )  # fmt: skip
            values = teacher if train.predict_with == "teacher" else [p.data for p in parameters]
            with weights_of(parameters, values):
                result.adapted = model.predict(image)
            if not torch.isfinite(result.adapted.depth).any():
                raise NonFiniteLoss("the adapted prediction has no finite depth")
            result.final, result.decision = result.adapted, "adapted"
        except NonFiniteLoss as error:
            result.adapted, result.reason = None, f"original kept: {error}"
        finally:
            restore(model, before)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    result.seconds = time.perf_counter() - begun
    result.peak_memory_mb = peak_memory_mb(model.device)
    return result
