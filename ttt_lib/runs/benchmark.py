"""Time of adaptation: each stage of a step, and how the cost grows. Whole loops side by side are in `loops.py`.

Nothing here is asserted in a test: times belong in `05_performance.ipynb`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ttt_lib.adaptation.adapter import Adapter, working_image
from ttt_lib.adaptation.batches import loss_batch
from ttt_lib.adaptation.gradients import forward, loss_of
from ttt_lib.adaptation.loop import hand_over, make_optimizer
from ttt_lib.adaptation.losses.presets import resolved
from ttt_lib.adaptation.losses.terms import needs_features
from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.teacher import draw_views, make_renderer
from ttt_lib.core.config import ExperimentConfig, build_experiment
from ttt_lib.core.provenance import processor
from ttt_lib.core.seeds import sample_generator
from ttt_lib.geometry.warp import in_front
from ttt_lib.models.base import GeometryModel, training
from ttt_lib.runs.experiment import open_model
from ttt_lib.runs.plan import put

STAGES = ["augment", "render", "forward", "loss", "backward", "optimizer", "teacher", "scene"]


def machine(device: torch.device) -> dict[str, str]:
    """What a table of times must say of where it was made."""
    about = {"torch": torch.__version__, "threads": str(torch.get_num_threads()), "processor": processor()}
    if device.type == "cuda":
        about |= {"device": torch.cuda.get_device_name(device), "driver": str(torch.version.cuda)}
    return about


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
    config = resolved(config, model)
    image = working_image(image.to(model.device), config.views.longest_side)
    clock: dict[str, float] = defaultdict(float)
    rounds = []

    @contextmanager
    def stage(name: str) -> Iterator[None]:  # of what is inside, or of each call of a function that it decorates
        begun = now(model.device)
        yield
        clock[name] += now(model.device) - begun

    with training(model, config.train.parts) as named:
        student = Student(model, named, config.train.lora_rank)
        optimizer = make_optimizer(student.leaves, config.train.optimizer)
        renderer, spare = make_renderer(config, model.device), make_renderer(config, model.device)
        if renderer is not None:
            renderer.render = stage("render")(renderer.render)
        generator = sample_generator(0, "benchmark")
        target = model.predict(image)
        for _ in range(repeats + 1):
            with stage("augment"):
                view = draw_views(image, target, config, generator, renderer)
                batch = loss_batch(view, config, generator)
            with student.attached():
                with stage("forward"):
                    output = forward(model, view.image, view.intrinsics, config)
                with stage("loss"):
                    features = (model.features(view.image),) * 2 if needs_features(config.losses) else None
                    loss, _ = loss_of(output, batch, config, features=features)
                with stage("backward"):
                    gradients = torch.autograd.grad(loss, student.leaves, allow_unused=True)
            with stage("optimizer"):
                hand_over(gradients, student.leaves)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            with stage("teacher"):
                fresh = model.predict(image)
            if spare is not None and clock["render"] > 0:
                with stage("scene"):
                    surface = fresh.mask & in_front(fresh.points)
                    spare.set_scene(image, fresh.points, surface, fresh.intrinsics)
            rounds.append({name: clock[name] for name in STAGES})
            clock.clear()
    steps = 1 / config.train.accumulation  # what a step or a refresh does once, counts for a pass in parts
    refreshes = steps / config.teacher.refresh_every if config.teacher.refresh_every else 0.0
    times = pd.DataFrame(rounds[1:])
    times["augment"] -= times["render"]
    times["render"] += times.pop("scene") * refreshes
    times["optimizer"] *= steps
    times["teacher"] *= refreshes
    table = times.median().rename_axis("stage").reset_index(name="seconds")
    return table.assign(share=table["seconds"] / table["seconds"].sum())


def growth(image: Tensor, config: ExperimentConfig, key: str, values: list[Any]) -> pd.DataFrame:
    """Seconds of adapting to one image as one setting grows: columns key, seconds, images_a_minute.

    key: a dotted setting (`train.passes`), or `images` (how many are adapted one after the other).
    """
    rows = []
    for value in values:
        overrides: dict[str, Any] = {}
        if key != "images":
            put(overrides, key, value)
        changed = build_experiment(config.as_parameters(), overrides=overrides)
        model, count = open_model(changed), value if key == "images" else 1
        begun = now(model.device)
        for i in range(count):
            Adapter(model, changed).adapt(image, str(i))
        seconds = now(model.device) - begun
        rows.append({key: value, "seconds": seconds, "images_a_minute": 60 * count / seconds})
    return pd.DataFrame(rows)
