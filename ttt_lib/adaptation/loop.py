"""The student's training: passes gathered into optimizer steps. What is learned comes from the supervisions."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Gradients, Pass, Supervision, TrainingLog, accumulate, add_terms, summed
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import NumericalError
from ttt_lib.core.memory import room_for
from ttt_lib.core.schema import OptimizerConfig
from ttt_lib.models.base import GeometryModel

log = logging.getLogger(__name__)


def make_optimizer(parameters: list[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """PyTorch's AdamW or SGD; fused, which is one reading of the weights instead of a dozen, on a CPU where that is right."""
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.name]
    fused = all(parameter.is_cuda or _fuses_on_a_cpu(parameter) for parameter in parameters)
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)


def _fuses_on_a_cpu(parameter: Tensor) -> bool:
    """Not with half precision, of which torch 2.13 moves only the last few numbers by SGD, nor with gaps in memory."""
    exact = parameter.dtype in (torch.float32, torch.float64)
    return exact and torch.empty_like(parameter).stride() == parameter.stride()


def hand_over(gradients: Gradients, leaves: list[Tensor]) -> None:
    """Set `grad` of each leaf, laid out in memory as the leaf is: a fused optimizer on a CPU goes through both in that order
    and looks no further (torch 2.13: other strides give wrong weights without a word)."""
    for leaf, gradient in zip(leaves, gradients):
        if gradient is not None and gradient.stride() != leaf.stride():
            gradient = torch.empty_like(leaf).copy_(gradient)
        leaf.grad = gradient


def first_micro_batch(config: ExperimentConfig) -> int:
    """Views in the network at a time, to begin with; `auto` looks at one pass first."""
    asked, batch_size = config.train.micro_batch, config.train.batch_size
    return batch_size if asked in (None, "auto") else min(asked, batch_size * config.train.accumulation)


def roomy_micro_batch(config: ExperimentConfig, training: TrainingLog, model: GeometryModel) -> int:
    """How many views of a step the free memory of a GPU takes, after one pass, which has shown what a view needs.

    A CPU keeps to one pass at a time: more gained nothing there and took half as much memory again (05_performance).
    """
    train = config.train
    if model.device.type != "cuda" or training.micro_batch < train.batch_size:  # or memory has run out already
        return training.micro_batch
    return max(train.batch_size, min(room_for(model.device, train.batch_size), train.batch_size * train.accumulation))


@contextmanager
def sharpest_point(leaves: list[Tensor], gradients: Gradients, radius: float) -> Iterator[None]:
    """Inside, the weights stand where the loss is worst within `radius`, to first order: theta + radius g / |g|.

    Sharpness-aware minimisation (Foret et al. 2021, equation 2), which SAR uses at test time. Exactly undone after.
    """
    norm = torch.stack([g.square().sum() for g in gradients if g is not None] or [torch.zeros(())]).sum().sqrt()
    own = [leaf.detach().clone() for leaf in leaves]
    try:
        with torch.no_grad():
            for leaf, gradient in zip(leaves, gradients):
                if gradient is not None:
                    leaf.add_(gradient * (radius / norm.clamp_min(1e-12)))
        yield
    finally:
        with torch.no_grad():
            for leaf, value in zip(leaves, own):
                leaf.copy_(value)


class Steps:
    """Optimizer steps over what the supervisions give, which are prepared before the first."""

    def __init__(
        self, student: Student, supervisions: Sequence[Supervision], config: ExperimentConfig,
        generator: torch.Generator, training: TrainingLog,
    ) -> None:  # fmt: skip
        self.student, self.supervisions, self.config = student, supervisions, config
        self.generator, self.training = generator, training
        self.optimizer = make_optimizer(student.leaves, config.train.optimizer)
        self.source = next((each for each in supervisions if each.draws), None)
        training.micro_batch = first_micro_batch(config)

    def _gradients(self, passes: list[Pass]) -> tuple[Gradients, dict[str, Tensor]]:
        """Of the sum of the losses of these passes."""
        return summed(self.student, (each.gradients(self.student, passes) for each in self.supervisions))

    def _passes(self, count: int, factor: float) -> tuple[Gradients, dict[str, Tensor], list]:
        """Draw `count` passes: `factor` times the sum of their gradients, sums of their terms, and the passes drawn."""
        training, train = self.training, self.config.train
        total: Gradients = [None] * len(self.student.leaves)
        sums: dict[str, Tensor] = {}
        drawn, done, together = [], 0, all(each.joins_passes for each in self.supervisions)
        while done < count:
            at_once = max(1, training.micro_batch // train.batch_size) if together else 1
            number = min(at_once, count - done)
            passes = self.source.draw_passes(number) if self.source is not None else [Pass() for _ in range(number)]
            if train.sharpness_radius > 0:
                drawn.append((passes, self.generator.get_state()))
            gradients, terms = self._gradients(passes)
            accumulate(total, gradients, factor)
            if self.source is not None:
                sums["known"] = sums.get("known", 0.0) + sum(each.view.mask.float().mean() for each in passes)
            add_terms(sums, terms)
            if train.micro_batch == "auto" and training.passes_done == 0:
                training.micro_batch = roomy_micro_batch(self.config, training, self.student.model)
            done += len(passes)
            training.passes_done += len(passes)
        return total, sums, drawn

    def _sharpest(self, total: Gradients, drawn: list, factor: float) -> Gradients:
        """The gradient of the same loss (the same passes, patches and rectangles) where it is worst nearby."""
        sharp: Gradients = [None] * len(self.student.leaves)
        with sharpest_point(self.student.leaves, total, self.config.train.sharpness_radius):
            after = self.generator.get_state()
            for passes, state in drawn:
                self.generator.set_state(state)
                accumulate(sharp, self._gradients(passes)[0], factor)
            self.generator.set_state(after)
        return sharp

    def step(self) -> dict[str, float]:
        """One optimizer step; appends to the history and returns its entry. Raises `NumericalError` before a step
        with a loss or gradient that is not finite would spoil the weights."""
        begun, train = time.perf_counter(), self.config.train
        count = min(train.accumulation, train.passes - self.training.passes_done)
        factor = 1 / count if train.accumulation_mode == "mean" else 1.0
        total, sums, drawn = self._passes(count, factor)
        if train.sharpness_radius > 0:
            total = self._sharpest(total, drawn, factor)
        if train.l2_sp > 0:
            accumulate(total, self.student.distance_gradients(train.l2_sp))
        hand_over(total, self.student.leaves)
        entry = self._move(sums, count)
        if train.restore_probability > 0:
            self.student.restore_some(train.restore_probability, self.generator)
        entry["seconds"] = time.perf_counter() - begun
        return entry

    def _move(self, sums: dict[str, Tensor], count: int) -> dict[str, float]:
        """Clip, look, step. All numbers of a step leave the device together: the host waits for it once."""
        trained = [leaf for leaf in self.student.leaves if leaf.grad is not None]
        norm = torch.zeros((), device=self.student.model.device)
        if trained:
            norm = torch.nn.utils.clip_grad_norm_(trained, self.config.train.gradient_clip or float("inf"))
        step = len(self.training.history) + 1
        *terms, norm = torch.stack([value.detach().double().reshape(()) for value in (*sums.values(), norm)]).tolist()
        terms = {key: value / count for key, value in zip(sums, terms)}
        entry = {"step": step, "passes": self.training.passes_done, **terms, "gradient_norm": norm}
        if not np.isfinite([value for value in entry.values()]).all():
            raise NumericalError(f"the loss or its gradient was not finite in step {step}", step=step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.training.history.append(entry)
        return entry


def train_student(
    student: Student, supervisions: Sequence[Supervision], config: ExperimentConfig, generator: torch.Generator,
    training: TrainingLog, progress: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Train the student in place; fills `training`.

    Args:
        student: what is trained, inside the network.
        supervisions: prepared; their terms are summed.
        config: its section `train` says how many passes, which optimizer and which restraint.
        generator: the sample's source of random numbers, which the supervisions draw from too.
        training: the log to fill.
        progress: show a bar.

    Returns:
        The weights to predict with: copies of the student's, as the supervisions would have them.

    Raises:
        NumericalError: before a step that is not finite.
    """
    steps, passes = Steps(student, supervisions, config, generator, training), config.train.passes
    with tqdm(total=passes, desc=config.name, leave=False, disable=not progress, mininterval=1.0) as bar:
        while training.passes_done < passes:
            before = training.passes_done
            entry = steps.step()
            bar.update(training.passes_done - before)
            bar.set_postfix(loss=f"{entry.get('loss', float('nan')):.4f}")
            log.debug("%s: step %d, loss %.5g", config.name, entry["step"], entry.get("loss", float("nan")))
            for supervision in supervisions:
                supervision.after_step(student, training.passes_done >= passes)
    values = [value.clone() for value in student.values()]
    for supervision in supervisions:
        values = supervision.weights(values)
    return values
