"""One image in, an adapted prediction out, the model as it was before.

A teacher (slow average of the student) predicts a target on the clean image; views of the image carry it; the student
is trained on the views for a few passes (`loop.py`); then the adapted network predicts, and the gate decides what becomes of
that. Other sources of information join as `supervision.Supervision`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.ensemble import predict_adapted, predict_ensemble, predict_on_views, with_depth
from ttt_lib.adaptation.gate.gate import Gate
from ttt_lib.adaptation.loop import train_student
from ttt_lib.adaptation.losses.presets import resolved, terms_in_words
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Episode, Supervision, TrainingLog, configured
from ttt_lib.adaptation.teacher import draw_views, make_renderer
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import DataError, NumericalError
from ttt_lib.core.memory import peak_memory_mb, reset_peak_memory
from ttt_lib.core.seeds import sample_generator
from ttt_lib.core.types import Prediction
from ttt_lib.data.images import SMALLEST, as_image
from ttt_lib.models.base import GeometryModel, training
from ttt_lib.models.prompts import prompt_tokens

log = logging.getLogger(__name__)


def working_image(image: Tensor, longest_side: int | None) -> Tensor:
    """The image the views are made from: (3,H,W), shrunk (anti-aliased) to at most `longest_side` pixels.

    The shorter side keeps `SMALLEST` of them, because a view is a part of it: crops of a single row teach nothing.
    """
    if longest_side is None:
        return image
    height, width = image.shape[-2:]
    factor = max(longest_side / max(height, width), SMALLEST / min(height, width))
    if factor >= 1:
        return image
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)


def _require_shape(model: GeometryModel, image: Tensor) -> None:
    """The shorter side of an image (3,H,W) gets a row of tokens at least, also of a quarter fewer (`ensemble`)."""
    height, width = image.shape[-2:]
    elongation, tokens = max(height, width) / min(height, width), model.num_tokens
    if tokens is not None and elongation > 3 * tokens:
        raise DataError(
            f"adapt: an image of {width} x {height} pixels is too long for {tokens} tokens; cut it, or raise model.num_tokens."
        )


def average_views(
    model: GeometryModel, image: Tensor, original: Prediction, config: ExperimentConfig, generator: torch.Generator
) -> Prediction:
    """Test-time augmentation: the mean of the predictions on the views, carried back to the image. No weights change.

    As many views as training would see. Each view's prediction is scaled to the original by its median ratio, since
    a view's own scale is the least certain part; pixels a view does not show do not count.
    """
    target, renderer = model.predict(image), make_renderer(config, image.device)
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
    # Where there is no surface there is no mean of it either.
    ratio = torch.where(target.depth > 0, depth / target.depth, 1.0)
    if ratio.shape != original.depth.shape:
        ratio = F.interpolate(ratio[None, None], original.depth.shape, mode="bilinear")[0, 0]
    depth = original.depth * ratio
    return with_depth(original, depth, None if original.disparity is None else 1 / depth.clamp_min(1e-6))


@contextmanager
def training_possible() -> Iterator[None]:
    """Inside, gradients are on and new tensors are float32, whatever the caller has set."""
    kind = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(kind)


class Adapter:
    """A model and a method: adapts to one image after the other, each from the original weights.

    Args:
        model: used as it is loaded; its weights and buffers are bit-identical after each image, also after an
            exception or Ctrl-C (which is passed on), and so is which of them require gradients.
        config: the experiment. Its section `model` is not used, except to compare it with what the gate is made for.

    Raises:
        ConfigError: for a calibration that cannot be read.

    Example:
        >>> from ttt_lib import load_model, load_samples
        >>> from ttt_lib.core.config import build_experiment
        >>> model, sample = load_model("tiny", num_tokens=48), load_samples("motorcycle", width=96, height=64)[0]
        >>> config = build_experiment({"name": "quick", "train": {"passes": 1, "accumulation": 1}})
        >>> result = Adapter(model, config).adapt(sample.image, sample.name)
        >>> result.decision, tuple(result.final.depth.shape)
        ('adapted', (64, 96))
    """

    def __init__(self, model: GeometryModel, config: ExperimentConfig) -> None:
        self.model, self.config = model, resolved(config, model)
        self.gate = Gate(config) if config.gate.mode != "off" else None

    def adapt(
        self, image: Tensor, name: str = "image", supervision: Sequence[Supervision] = (),
        start: list[Tensor] | None = None, progress: bool = False,
    ) -> AdaptResult:  # fmt: skip
        """Adapt to one image and predict.

        Args:
            image: (3,H,W) float in [0,1], any device.
            name: identifies the sample; with `config.seed` it fixes every random draw.
            supervision: further sources of information beside those that the experiment asks for.
            start: weights to begin training from, `weights` of an earlier result with the same parts.
            progress: show a bar.

        Returns:
            Predictions before and after, the decision, the history. A loss that is not finite ends this sample with
            the original prediction, and `reason` says so.

        Raises:
            UserError: when `config.train.parts` names nothing the model has, or the image is none.
        """
        begun, model, train = time.perf_counter(), self.model, self.config.train
        reset_peak_memory(model.device)
        image = as_image(image, "adapt: the image").to(model.device)
        _require_shape(model, image)
        with training_possible(), ExitStack() as known:
            for source in supervision:
                known.enter_context(source.around(model))
            original = model.predict(image)
            result = AdaptResult(original=original, adapted=None, final=original, decision="original", image=image)
            generator = sample_generator(self.config.seed, name)
            if train.method == "tta":
                self._average(result, generator)
            elif train.method == "ttt" and train.passes:
                try:
                    self._train(result, name, generator, supervision, start, progress)
                except (NumericalError, FloatingPointError) as error:
                    log.info("%s: %s", name, error)
                    result.adapted = result.blended = result.weights = None
                    result.final, result.decision, result.reason = original, "original", f"original kept: {error}"
            for source in supervision:
                result.final, words = source.correct(result.final)
                result.add_reason(words)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        result.seconds = time.perf_counter() - begun
        result.peak_memory_mb = peak_memory_mb(model.device)
        log.info("%s: %s in %.1f s %s", name, result.decision, result.seconds, result.reason)
        return result

    def _average(self, result: AdaptResult, generator: torch.Generator) -> None:
        """The mean over predictions and views."""
        config, members = self.config, self.config.ensemble.members
        result.adapted = predict_ensemble(self.model, result.image, members) if members else result.original
        if config.train.passes:
            small = working_image(result.image, config.views.longest_side)
            result.adapted = average_views(self.model, small, result.adapted, config, generator)
        result.final, result.decision, result.passes_done = result.adapted, "averaged", config.train.passes

    def _train(
        self, result: AdaptResult, name: str, generator: torch.Generator, supervision: Sequence[Supervision],
        start: list[Tensor] | None, progress: bool,
    ) -> None:  # fmt: skip
        """Train, predict and decide: fills `result`. The weights are put back whatever happens."""
        config, model = self.config, self.model
        small = working_image(result.image, config.views.longest_side)
        with prompt_tokens(model, config.train.prompt_tokens), training(model, config.train.parts) as named:
            student = Student(model, named, config.train.lora_rank)
            episode = Episode(config, student, generator, TrainingLog(result.history, 0, result.view_stats))
            sources, held = [*configured(episode), *supervision], None
            if self.gate is not None:
                held = self.gate.hold_back(model, small, name, result)
                if held is None:
                    return
            if start is not None:
                student.put(start)
            for source in sources:
                source.prepare(model, small, result.original)
            try:
                values = train_student(student, sources, config, episode.generator, episode.log, progress)
            finally:
                result.losses = terms_in_words(config)
                result.passes_done, result.micro_batch = episode.log.passes_done, episode.log.micro_batch
            with student.weights(values):
                result.adapted = predict_adapted(model, result.image, config)
            if not torch.isfinite(result.adapted.depth).any():
                raise NumericalError("the adapted prediction has no finite depth")
            result.final, result.decision = result.adapted, "adapted"
            if self.gate is not None:
                self.gate.decide(student, values, held, result)
            # What the next image of a sequence starts from: not from weights that were rejected.
            goes_on = config.train.reset != "per_image" and result.decision != "reject"
            result.weights = values if goes_on else None
