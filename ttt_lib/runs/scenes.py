"""The samples of an ablation as photographs of scenes: each scene is reconstructed and adapted to once."""

from __future__ import annotations

import time

from ttt_lib.adaptation.photographs.scene import SceneAdaptation, adapt_scene
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.types import Sample
from ttt_lib.data.samples import SampleSet
from ttt_lib.models.base import GeometryModel
from ttt_lib.runs.scene_study import reconstruct_samples

ALONE = "no other photograph of its scene is in the set"


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
