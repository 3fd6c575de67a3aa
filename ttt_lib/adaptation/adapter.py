"""One image in, an adapted prediction out, the model as it was before.

A teacher (slow average of the student) predicts a target on the clean image; views of the image carry it; the student
is trained on the views for a few passes (`student.py`); then the adapted network predicts, and the gate decides what
becomes of that. See DESIGN in the README for the method, and `config.py` for the settings.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.ensemble import predict_ensemble
from ttt_lib.adaptation.gate.decision import Calibration, Watcher, best_on_the_line, blend_predictions, read_calibration
from ttt_lib.adaptation.gate.signals import HeldBack, disagreement_map, held_back_views, measure
from ttt_lib.adaptation.gradients import Training
from ttt_lib.adaptation.loop import average_views, train_student
from ttt_lib.adaptation.references import References, correct
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.adaptation.student import Student
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import NumericalError
from ttt_lib.core.memory import peak_memory_mb, reset_peak_memory
from ttt_lib.models.base import GeometryModel, restore, select_parameters, snapshot


def sample_generator(seed: int, name: str) -> torch.Generator:
    """The one source of randomness of a sample: a CPU generator seeded from (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def working_image(image: Tensor, longest_side: int | None) -> Tensor:
    """The image the views are made from: (3,H,W), shrunk (anti-aliased) to at most `longest_side` pixels."""
    height, width = image.shape[-2:]
    if longest_side is None or max(height, width) <= longest_side:
        return image
    factor = longest_side / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)


def adapt(
    model: GeometryModel,
    image: Tensor,
    config: ExperimentConfig,
    name: str = "image",
    progress: bool = False,
    on_step: Callable[[dict[str, float]], None] | None = None,
    references: References | None = None,
    start: list[Tensor] | None = None,
    calibration: Calibration | None = None,
) -> AdaptResult:
    """Adapt `model` to one image by the experiment's method and predict; the model is left exactly as it was.

    image: (3,H,W) float32 in [0,1], any device. name: identifies the sample; with `config.seed` it fixes every random
    draw. on_step: called after each optimizer step with its history entry (what it raises ends the adaptation).
    references: known distances, for the loss `metric_reference` and to correct the final prediction. start: weights to
    begin training from, `weights` of an earlier result with the same parts. calibration: of the gate, for a caller that
    has read it (None: the file of `config.gate.calibration` is read).

    Weights and buffers are bit-identical afterwards, also after an exception or Ctrl-C (which is passed on). A loss
    that is not finite ends this sample with the original prediction, and `reason` says so. Raises `UserError` when
    `config.train.parts` names nothing the model has.
    """
    begun = time.perf_counter()
    reset_peak_memory(model.device)
    image = image.to(model.device)
    references = references.to(model.device) if references is not None else None
    train, members = config.train, config.ensemble.members
    if config.gate.mode != "decide":
        calibration = None
    elif calibration is None:
        calibration = read_calibration(config.gate.calibration)
    original = model.predict(image)
    result = AdaptResult(original=original, adapted=None, final=original, decision="original", image=image)
    generator = sample_generator(config.seed, name)
    if train.method == "tta" and (train.passes or members):
        small = working_image(image, config.views.longest_side)
        result.adapted = predict_ensemble(model, image, members) if members else original
        if train.passes:
            result.adapted = average_views(model, small, result.adapted, config, generator)
        result.final, result.decision, result.passes_done = result.adapted, "averaged", train.passes
    elif train.method == "ttt" and train.passes:
        named = select_parameters(model, train.parts)
        before = snapshot(model, named)
        try:
            _adapt_weights(
                model, image, config, named, name, generator, result, calibration, references, start, progress, on_step
            )
        except (NumericalError, FloatingPointError) as error:
            result.adapted = result.blended = result.weights = None
            result.final, result.decision, result.reason = original, "original", f"original kept: {error}"
        finally:
            restore(model, before)
    if references is not None:
        result.final, said = correct(result.final, references)
        result.add_reason(said)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    result.seconds = time.perf_counter() - begun
    result.peak_memory_mb = peak_memory_mb(model.device)
    return result


def _adapt_weights(
    model: GeometryModel,
    image: Tensor,
    config: ExperimentConfig,
    named: list,
    name: str,
    generator: torch.Generator,
    result: AdaptResult,
    calibration: Calibration | None,
    references: References | None,
    start: list[Tensor] | None,
    progress: bool,
    on_step: Callable[[dict[str, float]], None] | None,
) -> None:
    """Train, predict, pass the gate; fills `result`. The caller puts the weights back."""
    train, gate = config.train, config.gate
    small = working_image(image, config.views.longest_side)
    held, watcher = None, None
    student = Student(model, named, train.lora_rank)
    if gate.mode != "off" or gate.check_every or gate.interpolate:
        # Another seed than the training's: what is measured here was never trained on.
        unseen = sample_generator(config.seed, f"{name}/held back")
        same_size = small.shape == image.shape
        held = held_back_views(model, small, result.original if same_size else model.predict(small), config, unseen)
        watcher = Watcher(student, held, gate) if gate.check_every else None
    if start is not None:
        student.put(start)
    training = Training(history=result.history, view_stats=result.view_stats)
    try:
        teacher = train_student(student, small, config, generator, training, references, progress, on_step, watcher)
    finally:
        result.passes_done, result.micro_batch = training.passes_done, training.micro_batch
    values = teacher if train.predict_with == "teacher" else [value.clone() for value in student.values()]
    result.reason = training.stopped
    if watcher is not None:
        values = watcher.weights
        result.signals["best_step"] = float(watcher.best_step)
        if watcher.best_step == 0:
            result.add_reason("no step beat the original on the held-back views")
    if gate.interpolate and held is not None:
        values, result.signals["interpolation"] = best_on_the_line(student, held, values)
    with student.weights(values):
        result.adapted = predict_ensemble(model, image, config.ensemble.members if config.ensemble.final else [])
    if not torch.isfinite(result.adapted.depth).any():
        raise NumericalError("the adapted prediction has no finite depth")
    result.final, result.decision = result.adapted, "adapted"
    if gate.mode != "off" and held is not None:
        _pass_gate(student, values, held, config, result, calibration, unseen)
        made_for = calibration.about.get("model") if calibration is not None else None
        if made_for not in (None, config.model.name):
            result.add_reason(f"the gate is calibrated for the model {made_for!r}; calibrate it with 04_reliability")
    # What the next image of a sequence starts from: not from weights that were rejected.
    result.weights = None if result.decision == "reject" else values


def _pass_gate(
    student: Student,
    values: list[Tensor],
    held: HeldBack,
    config: ExperimentConfig,
    result: AdaptResult,
    calibration: Calibration | None,
    unseen: torch.Generator,
) -> None:
    """Measure the signals; with `mode: decide` also accept, blend or reject."""
    gate = config.gate
    with student.weights(values):
        adapted = predict_ensemble(student.model, held.image, config.ensemble.members if config.ensemble.final else [])
    signals, experts = measure(student, values, held, adapted, result.history, gate, unseen)
    result.signals |= signals
    spread = disagreement_map(experts, held.original.mask)
    result.blended = blend_predictions(result.original, result.adapted, spread)
    if calibration is None:
        return
    result.signals["estimate"] = calibration.estimate(result.signals)
    result.decision = calibration.decide(result.signals)
    if result.decision == "reject":
        result.final = result.original
    elif result.decision == "blend":
        result.final = result.blended
