"""A model adapted to several photographs of one scene: predict, correct, train once for all, and let each decide."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ttt_lib.adaptation.adapter import training_possible, working_image
from ttt_lib.adaptation.ensemble import predict_ensemble
from ttt_lib.adaptation.loop import train_student
from ttt_lib.adaptation.losses.presets import resolved, terms_in_words
from ttt_lib.adaptation.photographs.decision import choose
from ttt_lib.adaptation.photographs.evidence import Evidence, at_tracks, corrected, gather, in_scale
from ttt_lib.adaptation.photographs.training import Lesson, PhotographsConfig, PhotographTraining, carried
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Episode, Supervision, TrainingLog, configured
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import ConfigError, NumericalError
from ttt_lib.core.memory import peak_memory_mb, reset_peak_memory
from ttt_lib.core.seeds import sample_generator
from ttt_lib.core.types import Prediction
from ttt_lib.data.photographs.job import UNKNOWN, USUAL_FOCAL
from ttt_lib.data.photographs.scene import Photograph, Scene
from ttt_lib.models.base import GeometryModel, holding, training

log = logging.getLogger(__name__)


@dataclass
class SceneAdaptation:
    """What one scene gave. Predictions of its photographs are made when they are asked for, one photograph at a time.

    scene: in the scale of all results: metres for a metric model, by the median of what it says of all photographs.
    weights: name -> trained parameter; empty where nothing was trained. evidence: of each photograph of the scene.
    log: of the training. failed: why training was given up, in words. seconds: of everything so far.
    """

    model: GeometryModel
    config: ExperimentConfig
    name: str
    scene: Scene
    evidence: list[Evidence] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    log: TrainingLog = field(default_factory=TrainingLog)
    failed: str = ""
    seconds: float = 0.0
    peak_memory_mb: float = 0.0

    @property
    def settings(self) -> PhotographsConfig:
        """The experiment's section `supervision.photographs`."""
        return self.config.supervision.get("photographs") or PhotographsConfig()

    def __repr__(self) -> str:
        return (
            f"SceneAdaptation({self.name}: {len(self.weights)} weights trained in {self.seconds:.1f} s; {self.scene})"
        )

    def results(self) -> Iterator[tuple[Photograph, AdaptResult]]:
        """Every photograph with its result; those that were left out, and all of a refused scene, keep the original."""
        by_name = {each.photograph.name: each for each in self.evidence}
        why = dict(self.scene.left_out)
        for photograph in [*self.scene.photographs, *self.scene.rest]:
            evidence = by_name.get(photograph.name)
            if evidence is not None:
                yield photograph, self.result(evidence)
                continue
            reason = self.scene.refused or f"left out: {why.get(photograph.name, '')}"
            yield photograph, AdaptResult.kept(self.model, photograph.image, reason)

    def result(self, evidence: Evidence) -> AdaptResult:
        """Predict one photograph before and after, correct both, and decide. seconds: its share of the training too."""
        begun, settings = time.perf_counter(), self.settings
        image = evidence.photograph.image.to(self.model.device)
        original = self.model.predict(image)
        generator = sample_generator(self.config.seed, f"{self.name}/{evidence.photograph.name}")
        members = self.config.ensemble.members
        averaged = predict_ensemble(self.model, image, members) if members else original
        candidates = {"corrected": corrected(averaged, evidence, settings.correction, generator)}
        if self.weights:
            named = dict(self.model.network.named_parameters())
            with holding([named[name] for name in self.weights], list(self.weights.values())):
                adapted = predict_ensemble(self.model, image, members)
            candidates["adapted_corrected"] = corrected(adapted, evidence, settings.correction, generator)
        seen = _seen(evidence.photograph, image)
        shown = replace(original, mask=_where(seen, original).mask)  # of the rest nothing is asked
        judged = choose(shown, candidates, evidence, generator)
        if not settings.decide:
            judged = replace(judged, choice=list(candidates)[-1], reason="")
        original = _where(seen, original)
        candidates = {kind: _where(seen, each) for kind, each in candidates.items()}
        final = original if judged.choice == "original" else candidates[judged.choice]
        signals = judged.signals | {"measured": evidence.seen, "tracks": float(len(evidence.used))}
        seconds = self.seconds / len(self.evidence) + time.perf_counter() - begun
        return AdaptResult(
            original, candidates.get("adapted_corrected"), final, judged.choice,
            reason="; ".join(filter(None, [judged.reason, self.failed])), signals=signals, image=image,
            history=self.log.history, passes_done=self.log.passes_done, view_stats=self.log.view_stats,
            micro_batch=self.log.micro_batch, seconds=seconds, peak_memory_mb=self.peak_memory_mb,
            losses=terms_in_words(self.config) if self.log.history else "",
        )  # fmt: skip


def _seen(photograph: Photograph, image: Tensor) -> Tensor | None:
    """Where the photograph, as this image (3,H,W), shows what its camera saw, (H,W); None: everywhere."""
    return None if photograph.seen is None else photograph.seen(tuple(image.shape[1:])).to(image.device)


def _where(seen: Tensor | None, prediction: Prediction) -> Prediction:
    """The prediction, known only there."""
    if seen is None:
        return prediction
    mask = seen if prediction.mask is None else seen & prediction.mask
    maps = {"depth": (prediction.depth, seen), "points": (prediction.points, seen[..., None])}
    unknown = {name: torch.where(where, map_, torch.nan) for name, (map_, where) in maps.items() if map_ is not None}
    return replace(prediction, mask=mask, **unknown)


def adapt_scene(
    model: GeometryModel, scene: Scene, config: ExperimentConfig, name: str = "scene", progress: bool = False
) -> SceneAdaptation:
    """Adapt a model to all photographs of a scene at once; the model is as it was afterwards.

    Args:
        model: any; its own weights are where training starts.
        scene: of `data.photographs`; of a refused one the results are the originals.
        config: the experiment. `train` and `losses` are those of a single image; `supervision.photographs` says what of
            the scene is used.
        name: identifies the scene; with `config.seed` it fixes every random draw.
        progress: show a bar.

    Returns:
        The trained weights, and with `results()` the predictions of every photograph.

    Raises:
        UserError: `config.train.parts` names nothing the model has.
    """
    begun = time.perf_counter()
    reset_peak_memory(model.device)
    config = resolved(config, model)
    adaptation = SceneAdaptation(model, config, name, scene)
    if not scene.refused and scene.photographs:
        with training_possible():
            generator = sample_generator(config.seed, name)
            scene = adaptation.scene = in_scale(scene, _metric_factor(model, scene, config))
            settings = adaptation.settings
            adaptation.evidence = gather(scene, settings.held_back, generator, settings.stereo)
            if settings.train and config.train.method == "ttt" and config.train.passes:
                _train(adaptation, generator, progress)
    adaptation.seconds = time.perf_counter() - begun
    adaptation.peak_memory_mb = peak_memory_mb(model.device)
    log.info("%s: %s", name, adaptation)
    return adaptation


def guess_focal(model: GeometryModel, longest_side: int | None = None) -> Callable[[Tensor], float | None]:
    """What a model believes of a picture's camera: a function from an image (3,H,W) to the focal length over the width.

    None where the model has no idea of it (`Prediction.note` says that a field of view was assumed). What a model knows
    poorly (`focal_deviation`) is drawn towards the usual camera, each with the weight that its deviation gives it.
    """

    def guess(image: Tensor) -> float | None:
        prediction = model.predict(working_image(image.to(model.device), longest_side))
        if prediction.intrinsics is None or prediction.note and model.fov_x is None:
            return None
        trust = UNKNOWN**2 / (UNKNOWN**2 + model.focal_deviation**2) if model.fov_x is None else 1.0
        return float(prediction.intrinsics[0, 0]) ** trust * USUAL_FOCAL ** (1 - trust)

    return guess


def _metric_factor(model: GeometryModel, scene: Scene, config: ExperimentConfig) -> float:
    """Metres in a unit of the scene, by the median of what a metric model says of its photographs; 1 for others."""
    if model.kind != "metric":
        return 1.0
    logs = []
    for photograph in scene.photographs:
        image = working_image(photograph.image.to(model.device), config.views.longest_side)
        found = at_tracks(model.predict(image), photograph.tracks).cpu()
        good = torch.isfinite(found) & (found > 0)
        logs.append((found / photograph.tracks.depth)[good].log().median())
    return float(torch.stack(logs).nanmedian().exp())


def _lessons(adaptation: SceneAdaptation, generator: torch.Generator) -> list[Lesson]:
    """Small images with their targets."""
    model, settings, lessons = adaptation.model, adaptation.settings, []
    for evidence in adaptation.evidence:
        image = working_image(evidence.photograph.image.to(model.device), adaptation.config.views.longest_side)
        target = None
        if settings.target != "none":
            target = predict_ensemble(model, image, adaptation.config.ensemble.members)
            how = "scale" if settings.target == "original" else settings.correction
            target = corrected(target, evidence, how, generator)
        if target is not None:  # what is not seen is unknown, and no sky
            target = replace(_where(_seen(evidence.photograph, image), target), mask=target.mask)
        lessons.append(Lesson(image, evidence, target))
    if settings.target == "views":
        for lesson, target in zip(lessons, [carried(lessons, number) for number in range(len(lessons))]):
            lesson.target = target
    return lessons


def _train(adaptation: SceneAdaptation, generator: torch.Generator, progress: bool) -> None:
    """Fill the adaptation's weights and log; a loss that is not finite ends it without weights."""
    model, config = adaptation.model, adaptation.config
    lessons = _lessons(adaptation, generator)
    with training(model, config.train.parts) as named:
        try:
            student = Student(model, named, config.train.lora_rank)
            drawing = PhotographTraining(lessons, config, generator, adaptation.log)
            sources = _sources(Episode(config, student, generator, adaptation.log, [drawing]))
            for source in sources:
                for lesson in lessons:
                    source.prepare(model, lesson.image, lesson.target)
            values = train_student(student, sources, config, generator, adaptation.log, progress)
            adaptation.weights = dict(zip(student.names, values))
        except (NumericalError, FloatingPointError) as error:
            log.info("%s: %s", adaptation.name, error)
            adaptation.failed = f"not trained: {error}"


def _sources(episode: Episode) -> list[Supervision]:
    """The photographs and what else the experiment names; `ConfigError` where that is made for one image alone."""
    sources, settings = configured(episode), {"reverse": "train.bidirectional"}
    alone = [settings.get(each.name, f"supervision.{each.name}") for each in sources if not each.several]
    alone += ["train.prompt_tokens"] if episode.config.train.prompt_tokens else []
    if alone:
        raise ConfigError(
            f"{', '.join(alone)}: made for one image, not for training on several photographs; leave it out, or set"
            " supervision.photographs.train to false."
        )
    return sources
