"""The functions of a first result, as `ttt_lib` gives them: sources by name, settings by name, scores as a table.

They only choose: samples come from the room `data`, settings from `core.config`, the method is `adaptation.adapter`, and
the scores are those of `evaluation.scores`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from ttt_lib.adaptation.known_camera import adapt_photograph, camera_of
from ttt_lib.adaptation.photographs import scene as scenes
from ttt_lib.adaptation.photographs.scene import SceneAdaptation, guess_focal
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import UserError
from ttt_lib.core.files import first_repeated
from ttt_lib.core.types import Prediction, Sample
from ttt_lib.data.catalog import describe_sources, open_dataset
from ttt_lib.data.images import as_image, read_photo
from ttt_lib.data.known_distances import References
from ttt_lib.data.photographs.load import load_scene
from ttt_lib.data.photographs.scene import Scene
from ttt_lib.data.samples import SampleSet
from ttt_lib.evaluation import scores as metrics
from ttt_lib.evaluation.scores import scores_of_result
from ttt_lib.models.base import GeometryModel
from ttt_lib.runs.catalog import experiment_file
from ttt_lib.runs.experiment import default_profile, load_with_profile

Source = str | Path
Evaluated = Prediction | AdaptResult | GeometryModel


def load_samples(source: Source | Iterable[Source], **options: Any) -> SampleSet:
    """The samples of a source, read when they are asked for.

    Args:
        source: `motorcycle` (two real photographs with metric depth), `synthetic`, `shifted` or `tours` (procedural
            scenes), a folder in MoGe's evaluation layout, a folder of images, one image, a JSON file of sets, or a list
            of these.
        options: of the set, `count=3`, `width=320`, `height=216`, `seed=1`, as the `open_*` functions of the room `data`
            take them.

    Returns:
        A `SampleSet` with `names` and a length; `samples[0]` and a loop over it give `Sample`s, `samples.readable()`
        passes over what cannot be read.

    Raises:
        UserError: for a source that is not there or an option that it does not take.

    Example:
        >>> from ttt_lib import load_samples
        >>> samples = load_samples("motorcycle", width=96, height=64)
        >>> samples.names, tuple(samples[0].image.shape)
        (['motorcycle_left', 'motorcycle_right'], (3, 64, 96))
    """
    entries = [source] if isinstance(source, str | Path) else list(source)
    if not entries:
        raise UserError("load_samples: the list of sources is empty; name at least one, such as 'motorcycle'.")
    sets = [open_dataset(**{**entry, **options}) for entry in describe_sources(entries, "load_samples:")]
    if len(sets) == 1:
        return sets[0]
    names = [s.name for s in sets]
    titles = [s.name if names.count(s.name) == 1 else f"{s.name}_{i}" for i, s in enumerate(sets)]
    labels = [(f"{title}/{name}", partial(s.load, name)) for title, s in zip(titles, sets) for name in s.names]
    if (twice := first_repeated(label for label, _ in labels)) is not None:
        raise UserError(f"load_samples: two samples are called {twice!r}; rename a folder, or use a JSON file of sets.")
    load = dict(labels)
    hashes = "\n".join(s.data_hash() for s in sets)
    return SampleSet("+".join(titles), list(load), lambda label: load[label](), hashes)


def load_experiment(
    experiment: Source, profile: str | None = None, overrides: dict[str, Any] | None = None
) -> ExperimentConfig:
    """The settings of an experiment.

    Args:
        experiment: a name of `list_experiments()`, or a YAML file.
        profile: `demo`, `paper`, `as_released` or a YAML file, laid over it; None for none; `auto` for `demo` where the
            experiment's model is the bundled one.
        overrides: settings, laid over both: `{"train": {"passes": 4}}`.

    Returns:
        An `ExperimentConfig`, validated, which `adapt`, `Adapter` and `run_experiment` take.

    Raises:
        UserError: for a name that is not there, and a setting that is unknown or out of range, by its place.

    Example:
        >>> from ttt_lib import load_experiment
        >>> load_experiment("unfreeze_encoder", overrides={"train": {"passes": 4}}).train.passes
        4
    """
    return load_with_profile(experiment_file(experiment), profile, overrides)


def _settings(
    model: GeometryModel,
    experiment: ExperimentConfig | Source,
    profile: str | None,
    overrides: dict[str, Any] | None,
    where: str,
) -> ExperimentConfig:
    """A complete experiment as it is; one by name or file under its profile, which `auto` chooses for this model."""
    if isinstance(experiment, ExperimentConfig):
        return experiment
    chosen = default_profile(model.name) if profile == "auto" else profile
    return load_with_profile(experiment_file(experiment, f"{where}: experiment"), chosen, overrides)


def adapt(
    model: GeometryModel,
    image: Sample | Tensor | Source,
    experiment: ExperimentConfig | Source = "recommended",
    profile: str | None = "auto",
    overrides: dict[str, Any] | None = None,
    name: str | None = None,
    references: References | None = None,
    progress: bool = True,
    intrinsics: Sequence[float] | Tensor | None = None,
    fov: float | None = None,
    exif: bool = True,
) -> AdaptResult:
    """Adapt the model to one image and predict; the model is left exactly as it was.

    Args:
        model: used as it was loaded; the experiment's section `model` is not.
        image: a `Sample`, a tensor (3,H,W) float in [0,1], or the path of a photograph.
        experiment: a name or file of `notebooks/experiments`, or a complete `ExperimentConfig`, which profile and
            overrides leave alone.
        profile: `demo`, `paper`, `as_released`, a YAML file, None for none; `auto` takes `demo` for the bundled model,
            whose rates must be small, and none for others.
        overrides: settings, `{"train": {"passes": 4}}`.
        name: with the experiment's seed it fixes every random draw (default: that of the sample or file).
        references: known distances (`data.known_distances.read_references`).
        progress: show a bar.
        intrinsics: of the known camera: fx, fy, cx, cy in pixels, or (3,3) normalised. Away from the middle of the
            photograph, its border has no depth (NaN).
        fov: of the known camera, horizontal, in degrees.
        exif: whether the focal length in a photograph's EXIF counts, where neither is given and `model.fov_x` is none.

    Returns:
        An `AdaptResult`: `original`, `adapted` and `final` predictions and the `decision`.

    Raises:
        UserError: for an image that cannot be read and for unknown names or settings.

    Example:
        >>> from ttt_lib import adapt, load_model, load_samples
        >>> model, sample = load_model("tiny", num_tokens=48), load_samples("motorcycle", width=96, height=64)[0]
        >>> quick = {"train": {"passes": 2, "accumulation": 1}}
        >>> result = adapt(model, sample, "unfreeze_encoder", overrides=quick, progress=False)
        >>> result.decision, result.passes_done
        ('adapted', 2)
    """
    file = image if isinstance(image, str | Path) else None
    if isinstance(image, Sample):
        name, image = name or f"{image.dataset}/{image.name}", image.image
    elif file is not None:
        name, image = name or Path(image).name, read_photo(image)
    experiment = _settings(model, experiment, profile, overrides, "adapt")
    # What the gate was calibrated for is compared with the model at hand.
    at_hand = experiment.model.model_copy(update={"name": model.name, "num_tokens": model.num_tokens})
    config = experiment.model_copy(update={"model": at_hand})
    image = as_image(image, "adapt: the image")
    camera = camera_of(model, image, file, exif, intrinsics=intrinsics, fov=fov)
    return adapt_photograph(model, config, image, name or "image", references, camera, progress)


def adapt_scene(
    model: GeometryModel,
    scene: Scene | Source | Iterable[Any],
    experiment: ExperimentConfig | Source = "scene",
    profile: str | None = "auto",
    overrides: dict[str, Any] | None = None,
    name: str = "scene",
    progress: bool = True,
) -> SceneAdaptation:
    """Adapt the model to several photographs of one scene; the model is left exactly as it was.

    Args:
        model: used as it was loaded.
        scene: of `load_scene`; or what that takes (a list of photographs or `Sample`s, a folder, a clip, a COLMAP model):
            then the model's guess of the focal length counts where EXIF says none.
        experiment, profile, overrides: as for `adapt`.
        name: with the experiment's seed it fixes every random draw.
        progress: show a bar while the student trains.

    Returns:
        A `SceneAdaptation`; its `results()` gives each photograph with its `AdaptResult`, all in one scale.

    Raises:
        UserError: for photographs that cannot be read, and for unknown names or settings.

    Example:
        >>> from ttt_lib import adapt_scene, load_model, load_samples
        >>> model, samples = load_model("tiny", num_tokens=48), load_samples("motorcycle", width=192, height=128)
        >>> adapted = adapt_scene(model, [samples[0], samples[0]])
        >>> adapted.scene.refused
        'motorcycle_left_2 is a copy of motorcycle_left, or taken from the same place: take a second photograph a step to the side.'
        >>> [result.decision for _, result in adapted.results()]
        ['original', 'original']
    """
    experiment = _settings(model, experiment, profile, overrides, "adapt_scene")
    if not isinstance(scene, Scene):
        guess = guess_focal(model, experiment.views.longest_side)
        scene = load_scene(scene, prior=guess, seed=experiment.seed)
    return scenes.adapt_scene(model, scene, experiment, name, progress)


def evaluate(what: Evaluated | Iterable[Prediction | AdaptResult], samples: Sample | Iterable[Sample]) -> pd.DataFrame:
    """Scores against the truth of the samples, one row a score (`evaluation.scores.scores_of` says what they are).

    Args:
        what: a prediction or a result of `adapt` for one sample, a list of them in the order of the samples, or a model,
            which predicts each sample.
        samples: one, or several.

    Returns:
        A table with the column `value`; for results `before`, `after`, `better`, which names the better of these two or
        says `same`, and `adapted`, what training gave, where the gate did not take that as it is. Index: metric and
        score, for several samples also dataset and sample; `.reset_index()` makes columns of it.

    Raises:
        UserError: for a sample without enough truth, and for lists of different lengths.

    Example:
        >>> from ttt_lib import evaluate, load_model, load_samples
        >>> sample = load_samples("motorcycle", width=96, height=64)[0]
        >>> scores = evaluate(load_model("tiny"), sample)
        >>> scores.index.names, bool(scores.loc[("points_affine_invariant", "delta1"), "value"] > 0.5)
        (FrozenList(['metric', 'score']), True)
    """
    one = isinstance(samples, Sample)
    samples = [samples] if one else list(samples)
    if isinstance(what, GeometryModel):
        found = (what.predict(sample.image.to(what.device)) for sample in samples)
    else:
        found = [what] if isinstance(what, Prediction | AdaptResult) else list(what)
        if len(found) != len(samples):
            counts = f"{len(found)} predictions for {len(samples)} samples"
            raise UserError(f"evaluate: {counts}; give one of each, in the same order.")
    tables = [_scores(each, sample) for each, sample in zip(found, samples)]
    if not tables:
        raise UserError("evaluate: the list of samples is empty.")
    if one:
        return tables[0]
    return pd.concat(tables, keys=[(sample.dataset, sample.name) for sample in samples], names=["dataset", "sample"])


def _scores(what: Prediction | AdaptResult, sample: Sample) -> pd.DataFrame:
    """The rows of one sample, by metric and score: `value`, or `before`, `after`, `better`, `adapted`."""
    if isinstance(what, Prediction):
        columns = {"value": metrics.scores_of(what, sample)}
    else:
        found = scores_of_result(what, sample)
        columns = {"before": found["original"], "after": found["final"]}
        if "adapted" in found and found["adapted"] is not found["final"]:
            columns["adapted"] = found["adapted"]
    values = [metrics.tidy_rows(scores).set_index(["metric", "score"])["value"] for scores in columns.values()]
    rows = pd.DataFrame(dict(zip(columns, values)), index=values[0].index)
    if rows.empty:
        least = metrics.MINIMUM_TRUTH
        raise UserError(f"evaluate: sample {sample.name!r} has no true depth for at least {least} pixels.")
    if "after" in rows:
        pairs = zip(rows.index.get_level_values("score"), rows["before"], rows["after"])
        gain = [metrics.SCORES[score].gain(before, after) for score, before, after in pairs]
        better = ["after" if g > 0 else "before" if g < 0 else "same" if g == 0 else "" for g in gain]
        rows.insert(2, "better", better)
    return rows
