"""The samples of an ablation as photographs of scenes; what several photographs are worth, beside what the held-back tracks
said, and controls that must gain nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from ttt_lib.adaptation.photographs.scene import SceneAdaptation, adapt_scene, guess_focal
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.types import Sample
from ttt_lib.data.photographs.job import Picture
from ttt_lib.data.photographs.reconstruct import reconstruct
from ttt_lib.data.photographs.scene import Photograph, Scene
from ttt_lib.data.samples import SampleSet
from ttt_lib.evaluation.scores import scores_of_result
from ttt_lib.models.base import GeometryModel

ALONE = "no other photograph of its scene is in the set"
SCORES = {"depth": "depth_affine_invariant", "points": "points_affine_invariant"}


def reconstruct_samples(
    model: GeometryModel, samples: Iterable[Sample], seed: int = 0, longest_side: int | None = None
) -> Scene:
    """The scene of samples that are photographs of one, with the model's guess of the focal length.

    They know nothing else of the truth. longest_side: pixels of the pictures that the model sees.
    """
    guess = guess_focal(model, longest_side)
    pictures = [Picture(sample.name, sample.image, guess(sample.image)) for sample in samples]
    return reconstruct(pictures, seed, straight=True)


class Scenes:
    """Results of samples by their scenes. The scene that was asked for last is kept, since its samples are neighbours.

    Example:
        >>> from ttt_lib import load_experiment, load_model, load_samples
        >>> config = load_experiment("scene_corrected")
        >>> tours = load_samples("tours", count=1, views=[2], width=64, height=48)
        >>> Scenes(load_model("tiny", num_tokens=48), config).adapt(tours, tours[0]).decision
        'original'
    """

    def __init__(self, model: GeometryModel, config: ExperimentConfig) -> None:
        self.model, self.config = model, config
        self._last: dict[tuple[str, str], SceneAdaptation] = {}

    def adapt(self, samples: SampleSet, sample: Sample) -> AdaptResult | None:
        """The result of one sample; None where the experiment is for a single photograph and the scene says nothing."""
        scene, names = samples.scene_of(sample.name)
        alone = self.config.supervision["photographs"].alone
        why = ALONE
        if len(names) > 1:
            adaptation = self._adapted(samples, scene, names)
            found = next((e for e in adaptation.evidence if e.photograph.name == sample.name), None)
            if found is not None:
                return adaptation.result(found)
            why = adaptation.scene.refused or dict(adaptation.scene.left_out).get(sample.name, "it was left out")
        return None if alone == "single" else AdaptResult.kept(self.model, sample.image, why)

    def _adapted(self, samples: SampleSet, scene: str, names: list[str]) -> SceneAdaptation:
        """The scene of these samples, adapted to unless it is the last one."""
        key = (samples.name, scene)
        if key not in self._last:
            begun = time.perf_counter()
            members = (samples.load(name) for name in names)
            found = reconstruct_samples(self.model, members, self.config.seed, self.config.views.longest_side)
            adaptation = adapt_scene(self.model, found, self.config, "/".join(key))
            adaptation.seconds = time.perf_counter() - begun  # with the reconstruction: each photograph has its share
            self._last = {key: adaptation}
        return self._last[key]


def score_scene(adaptation: SceneAdaptation, samples: Iterable[Sample]) -> pd.DataFrame:
    """A row a photograph: decision, what the held-back tracks said, and delta1 and rel against the truth.

    Columns: photograph, decision, the signals, and `depth_original`, `depth_final`, `rel_original`, `rel_final`,
    `points_original`, `points_final` (affine-invariant), with `_adapted` where something was trained.
    """
    truth = {sample.name: sample for sample in samples}
    rows = []
    for photograph, result in adaptation.results():
        row = {"photograph": photograph.name, "decision": result.decision, **result.signals}
        found = scores_of_result(result, truth[photograph.name])
        for kind in ("original", "adapted", "final"):
            if kind in found:
                row |= {f"{short}_{kind}": found[kind][metric]["delta1"] for short, metric in SCORES.items()}
                row[f"rel_{kind}"] = found[kind]["depth_affine_invariant"]["rel"]
        rows.append(row)
    return pd.DataFrame(rows)


def study(
    model: GeometryModel, config: ExperimentConfig, scenes: dict[str, tuple[Scene, list[Sample]]]
) -> pd.DataFrame:
    """`score_scene` of each scene by name, with `scene`, the number of `photographs` and the `refused` sentence."""
    tables = []
    for name, (scene, samples) in scenes.items():
        adaptation = adapt_scene(model, scene, config, name)
        table = score_scene(adaptation, samples)
        table.insert(0, "scene", name)
        table.insert(1, "photographs", len(samples))
        tables.append(table.assign(refused=scene.refused, seconds=adaptation.seconds))
    return pd.concat(tables, ignore_index=True)


def scene_signals(measured: pd.DataFrame) -> pd.DataFrame:
    """What decides on a photograph of a scene beside what was gained there, as `evaluation.calibration.signal_quality` takes it.

    measured: of `study` with `supervision.photographs.decide: false`, so that every correction was made. Columns:
    `signal_*`, and `gain_adapted`, the gain in delta1 over affine-invariant depth and points.
    `signal_held_back_gain` is log of the original's error at the held-back tracks over the corrected one's.
    """
    names = ["confirmed", "rank", "beyond", "lost_elsewhere_corrected", "measured", "held_back_tracks"]
    told = measured.reindex(columns=measured.columns.union([*names, "held_back_original", "held_back_corrected"]))
    told = told.dropna(subset=["held_back_corrected"])  # of refused scenes nothing was held back
    gains = [told[f"{short}_final"] - told[f"{short}_original"] for short in SCORES]
    table = told[names].add_prefix("signal_")
    errors = told[["held_back_original", "held_back_corrected"]].astype(float)
    table.insert(0, "signal_held_back_gain", np.log(errors.iloc[:, 0] / errors.iloc[:, 1]))
    return table.assign(gain_adapted=sum(gains) / len(gains))


def _with_depth(photograph: Photograph, depth: torch.Tensor) -> Photograph:
    return replace(photograph, tracks=replace(photograph.tracks, depth=depth))


def control_scenes(model: GeometryModel, scene: Scene, other: Scene) -> dict[str, Scene]:
    """Scenes that must change nothing: shuffled depths, the model's own depths, and the points of another scene.

    other: a scene of as many photographs or more.
    """
    generator = torch.Generator().manual_seed(0)
    shuffled, own, foreign = [], [], []
    for photograph, stranger in zip(scene.photographs, other.photographs):
        tracks = photograph.tracks
        order = torch.randperm(len(tracks), generator=generator)
        shuffled.append(_with_depth(photograph, tracks.depth[order]))
        depth = model.predict(photograph.image.to(model.device)).depth.cpu()
        height, width = depth.shape
        column, row = (tracks.uv * torch.tensor([width, height])).long().unbind(-1)
        own.append(_with_depth(photograph, depth[row.clamp(0, height - 1), column.clamp(0, width - 1)]))
        foreign.append(replace(photograph, tracks=stranger.tracks))
    named = {"shuffled depths": shuffled, "the model's own depths": own, "points of another scene": foreign}
    return {name: replace(scene, photographs=photographs) for name, photographs in named.items()}
