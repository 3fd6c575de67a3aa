"""Time of adaptation: each stage of a step, and how the cost grows. Whole loops side by side are in `loops.py`.

Nothing here is asserted in a test: times belong in `05_performance.ipynb`.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ttt_lib.adaptation.adapter import Adapter, working_image
from ttt_lib.adaptation.batches import loss_batch
from ttt_lib.adaptation.gradients import forward, loss_of
from ttt_lib.adaptation.loop import make_optimizer
from ttt_lib.adaptation.losses.presets import resolved
from ttt_lib.adaptation.losses.terms import needs_features
from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.teacher import draw_views, make_renderer
from ttt_lib.core.config import ExperimentConfig, build_experiment
from ttt_lib.core.seeds import sample_generator
from ttt_lib.models.base import GeometryModel, training
from ttt_lib.runs.plan import put

STAGES = ("augment", "render", "forward", "loss", "backward", "optimizer", "teacher")


def machine(device: torch.device) -> dict[str, str]:
    """What a table of times must say of where it was made."""
    about = {"torch": torch.__version__, "threads": str(torch.get_num_threads()), "processor": _processor()}
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
        about["driver"] = str(torch.version.cuda)
    return about


def _processor() -> str:
    try:
        lines = open("/proc/cpuinfo", encoding="utf-8").read().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def stage_times(model: GeometryModel, image: Tensor, config: ExperimentConfig, repeats: int = 5) -> pd.DataFrame:
    """Median seconds of each stage of one pass on `image` (3,H,W), and its share: columns stage, seconds, share.

    All views are of one target, as between two refreshes of the teacher. The teacher, the optimizer and, within
    `render`, making the scene of a new target count as often as the configuration runs them. The first repeat warms up
    and does not count. The weights are as before afterwards.
    """
    device, config = model.device, resolved(config, model)
    image = working_image(image.to(device), config.views.longest_side)
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with training(model, config.train.parts) as named:
        student = Student(model, named, config.train.lora_rank)
        optimizer = make_optimizer(student.leaves, config.train.optimizer)
        renderer, spare = make_renderer(config, device), make_renderer(config, device)
        drawing = [0.0]
        if renderer is not None:
            renderer.render = _timed(renderer.render, drawing, device)
        generator = sample_generator(0, "benchmark")
        target = model.predict(image)
        for _ in range(repeats + 1):
            drawing[0] = 0.0
            marks = [now(device)]
            view = draw_views(image, target, config, generator, renderer)
            batch = loss_batch(view, config, generator)
            marks.append(now(device))
            with student.attached():
                output = forward(model, view.image, view.intrinsics, config)
                marks.append(now(device))
                features = (model.features(view.image),) * 2 if needs_features(config.losses) else None
                loss, _ = loss_of(output, batch, config, features=features)
                marks.append(now(device))
                gradients = torch.autograd.grad(loss, student.leaves, allow_unused=True)
            marks.append(now(device))
            for leaf, gradient in zip(student.leaves, gradients):
                leaf.grad = gradient
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            marks.append(now(device))
            fresh = model.predict(image)
            marks.append(now(device))
            if spare is not None and drawing[0] > 0:
                surface = fresh.mask & torch.isfinite(fresh.points).all(-1) & (fresh.points[..., 2] > 0)
                spare.set_scene(image, fresh.points, surface, fresh.intrinsics)
            marks.append(now(device))
            for stage, seconds in _shares([b - a for a, b in zip(marks, marks[1:])], drawing[0], config).items():
                times[stage].append(seconds)
    medians = {stage: statistics.median(values[1:]) for stage, values in times.items()}
    total = sum(medians.values())
    rows = [{"stage": stage, "seconds": seconds, "share": seconds / total} for stage, seconds in medians.items()]
    return pd.DataFrame(rows)


def _shares(spent: list[float], drawing: float, config: ExperimentConfig) -> dict[str, float]:
    """Seconds of each stage for one pass, from those between the marks; what a step or a refresh does once, in parts."""
    steps = 1 / config.train.accumulation
    refreshes = steps / config.teacher.refresh_every if config.teacher.refresh_every else 0.0
    scene = spent[6] if drawing > 0 else 0.0
    return {
        "augment": spent[0] - drawing, "render": drawing + scene * refreshes, "forward": spent[1], "loss": spent[2],
        "backward": spent[3], "optimizer": spent[4] * steps, "teacher": spent[5] * refreshes,
    }  # fmt: skip


def _timed(function: Callable, total: list[float], device: torch.device) -> Callable:
    def wrapped(*arguments: Any) -> Any:
        begun = now(device)
        result = function(*arguments)
        total[0] += now(device) - begun
        return result

    return wrapped


def growth(model: GeometryModel, image: Tensor, config: ExperimentConfig, key: str, values: list[Any]) -> pd.DataFrame:
    """Seconds of adapting to one image as one setting grows: columns key, seconds, images_a_minute.

    key: a dotted setting (`train.passes`), or `model.num_tokens` or `images` (how many are adapted one after the other).
    """
    rows = []
    own = model.num_tokens
    for value in values:
        changed, count = config, 1
        if key == "images":
            count = int(value)
        elif key == "model.num_tokens":
            model.num_tokens = int(value)
        else:
            overrides: dict[str, Any] = {}
            put(overrides, key, value)
            changed = build_experiment(config.as_parameters(), overrides=overrides)
        begun = now(model.device)
        for i in range(count):
            Adapter(model, changed).adapt(image, str(i))
        seconds = now(model.device) - begun
        rows.append({key: value, "seconds": seconds, "images_a_minute": 60 * count / seconds})
        model.num_tokens = own
    return pd.DataFrame(rows)
