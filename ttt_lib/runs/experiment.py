"""One experiment over a set of samples, written to a folder as it goes: what `02_adaptation.ipynb` calls."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ttt_lib.adaptation.adapter import Adapter
from ttt_lib.adaptation.gate.decision import read_calibration
from ttt_lib.adaptation.known_distances import KnownDistances
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.config import ExperimentConfig, build_experiment, load_experiment, load_profile
from ttt_lib.core.errors import ConfigError, DataError, NumericalError, UserError, reason
from ttt_lib.core.files import absolute, first_repeated, replacing_file
from ttt_lib.core.memory import is_out_of_memory
from ttt_lib.core.seeds import sample_generator
from ttt_lib.core.types import KEYS, Sample
from ttt_lib.data.catalog import open_dataset
from ttt_lib.data.known_distances import sample_references
from ttt_lib.data.samples import SampleSet
from ttt_lib.evaluation.scores import MINIMUM_TRUTH, scores_of_result, tidy_rows
from ttt_lib.models.base import GeometryModel
from ttt_lib.models.load import load_model
from ttt_lib.runs.catalog import resolve_profile
from ttt_lib.runs.gallery import gallery_content, write_gallery_file
from ttt_lib.runs.scene_study import Scenes

log = logging.getLogger(__name__)


@dataclass
class RunSummary:
    """What a run did: tables as in the result files, and where they are."""

    output_dir: Path | None
    metrics: pd.DataFrame
    samples: pd.DataFrame
    history: pd.DataFrame
    left_out: pd.DataFrame
    last: dict[str, Any] = field(default_factory=dict)  # sample and AdaptResult of the last sample, for a picture


def default_profile(model_name: str) -> str | None:
    """What the profile `auto` stands for: `demo` for the bundled model, whose rates and sizes must be small, else none."""
    return "demo" if model_name == "tiny" else None


def load_with_profile(file: Path, profile: str | None, overrides: dict[str, Any] | None) -> ExperimentConfig:
    """An experiment file under a profile (`resolve_profile`), or under the one of its model for `auto`.

    Raises `UserError`.
    """
    if profile == "auto":
        profile = default_profile(load_experiment(file, None, overrides).model.name)
    return load_experiment(file, resolve_profile(profile), overrides)


def experiment_from_parameters(parameters: dict[str, Any], profile: str | None = None) -> ExperimentConfig:
    """The experiment a notebook was given: papermill's parameters, empty ones left to their defaults, profile on top.

    A `data` list in the parameters is explicit, so it wins over the profile's. No `losses` at all, `{}`, is a choice too.
    """
    empty = {key for key, value in parameters.items() if value in ("", {}, []) and key != "losses"}
    content = {key: value for key, value in parameters.items() if key not in empty and value is not None}
    path = resolve_profile(profile)
    overrides = {"data": content["data"]} if "data" in content else None
    return build_experiment(content, load_profile(path) if path else None, overrides, source="parameters")


def use_threads(threads: int | None) -> None:
    """Limit PyTorch to `threads`; None or 0 leaves it as the environment (`OMP_NUM_THREADS`) has set it."""
    if threads:
        torch.set_num_threads(threads)


def open_samples(config: ExperimentConfig, shard: tuple[int, int] = (0, 1)) -> list[SampleSet]:
    """The sets of the experiment, each cut to this shard.

    Raises `ConfigError` if there are none, and `DataError` where two samples have one name, which results go by.
    """
    if not config.data:
        raise ConfigError(f"experiment {config.name}: no data; set `data`, choose a profile, or pass --data.")
    sets = [open_dataset(kind=entry.kind, **entry.options()) for entry in config.data]
    twice = first_repeated((s.name, name) for s in sets for name in s.names)
    if twice is not None:
        raise DataError(f"data: two samples are called {'/'.join(twice)}; give each set a `name` of its own.")
    return [s.shard(*shard) for s in sets]


def open_model(config: ExperimentConfig) -> GeometryModel:
    """The experiment's model, fresh from disk or hub."""
    settings = config.model
    model = load_model(**settings.model_dump(exclude={"checkpointing"}))
    if config.released.published_layers:
        model.as_published()
    if settings.checkpointing:
        model.save_memory()
    return model


def _scores(experiment: str, sample: Sample, result: AdaptResult) -> pd.DataFrame:
    """A row a score of every prediction that the result holds; none for a sample without truth.

    Raises `DataError` where there is truth, and too little of it for any score.
    """
    if sample.depth is None and sample.points is None:
        return pd.DataFrame()
    found = scores_of_result(result, sample)
    told = [kind for kind in found if kind in ("original", "final") or found[kind] is not found["final"]]
    identity = {"experiment": experiment, "dataset": sample.dataset, "sample": sample.name}
    rows = pd.concat([tidy_rows(found[kind]).assign(**identity, prediction=kind) for kind in told])
    if rows.empty:
        raise DataError(f"its true depth cannot be scored (at least {MINIMUM_TRUTH} pixels must be known).")
    keys, values = KEYS["metrics"]
    return rows[[*keys, *values]].reset_index(drop=True)


def _rows(config: ExperimentConfig, sample: Sample, result: AdaptResult) -> dict[str, pd.DataFrame]:
    """What a sample adds to each table."""
    identity = {"experiment": config.name, "dataset": sample.dataset, "sample": sample.name}
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    about = {
        **identity, "seconds": result.seconds, "peak_memory_mb": result.peak_memory_mb,
        "decision": result.decision, "reason": result.reason, "passes_done": result.passes_done,
        "loss_first": losses[0] if losses else np.nan, "loss_last": losses[-1] if losses else np.nan,
        "micro_batch": result.micro_batch, "losses": result.losses,
        **{f"views_{key}": value for key, value in result.view_stats.items()},
        **{f"signal_{key}": value for key, value in result.signals.items()},
    }  # fmt: skip
    return {
        "metrics": _scores(config.name, sample, result),
        "samples": pd.DataFrame([about]),
        "history": pd.DataFrame([{**identity, **entry} for entry in result.history]),
    }


def _append(rows: pd.DataFrame, path: Path, before: list[pd.DataFrame]) -> None:
    """Add rows to a CSV at once, so that a run that ends early keeps what it has.

    A sample may bring columns that none had before (signals after one that failed): then the file is written again.
    """
    known = list(dict.fromkeys(column for table in before for column in table.columns)) if path.exists() else []
    if not known or set(rows.columns) <= set(known):
        rows.reindex(columns=known or rows.columns).to_csv(path, mode="a", header=not known, index=False)
        return
    with replacing_file(path) as work:
        pd.concat([*before, rows], ignore_index=True).to_csv(work, index=False)


class ResultTables:
    """The tables of `core.types.KEYS`, in memory and, as they grow, as CSV files of a folder (None: no files)."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.parts = folder, {name: [] for name in KEYS}

    def add(self, **tables: pd.DataFrame) -> None:
        """Rows at the end of the tables of these names."""
        for name, rows in tables.items():
            if len(rows) and self.folder is not None:
                _append(rows, self.folder / f"{name}.csv", self.parts[name])
            if len(rows):
                self.parts[name].append(rows)

    def joined(self) -> dict[str, pd.DataFrame]:
        """Whole tables by name, empty ones without columns."""
        return {
            name: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame() for name, parts in self.parts.items()
        }


class Adaptations:
    """An experiment's model, opened, and what it hands from one sample to the next.

    Raises:
        UserError: for a calibration of the gate or a model that cannot be read.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        # Read before the model, which may be a download: a missing one is said now.
        if config.gate.mode == "decide":
            read_calibration(config.gate.calibration)
        self.config, self.model = config, open_model(config)
        self.scenes = Scenes(self.model, config)
        self.weights: list[Tensor] | None = None  # of the last image, where `train.reset` goes on from them
        self.seen = 0

    def adapt(self, samples: SampleSet, sample: Sample) -> tuple[Sample, AdaptResult]:
        """Adapt to one sample, or to its scene; with `config.references` it lacks the pixels that were given away."""
        if "photographs" in self.config.supervision:
            result = self.scenes.adapt(samples, sample)
            if result is not None:
                return sample, result
        config, reset = self.config, self.config.train.reset
        name, supervision = f"{sample.dataset}/{sample.name}", []
        if config.references:
            if not (sample.is_metric and sample.depth is not None):
                raise DataError("has no metric truth, from which references could be sampled.")
            unseen = sample_generator(config.seed, f"{name}/references")
            references, sample = sample_references(sample, config.references, unseen)
            supervision.append(KnownDistances(references, config))
        if config.released.reload_model:
            self.model = open_model(config)
        every = {"per_image": 1, "never": math.inf}.get(reset, reset)
        if self.seen % every == 0:
            self.weights = None
        self.seen += 1
        result = Adapter(self.model, config).adapt(sample.image, name, supervision, start=self.weights)
        self.weights = result.weights if every > 1 else None
        return sample, result


def why_left_out(place: str, error: Exception) -> str:
    """Why the sample or photograph `place` is left out; the log says so too, with the trace of what nobody expected.

    Raises `error` again if it is the whole run's: a device that has failed.
    """
    expected = True
    if is_out_of_memory(error):
        why = "out of memory: lower views.longest_side, set model.checkpointing, or shrink the picture"
    elif isinstance(error, UserError | NumericalError | FloatingPointError):
        why = str(error)
    elif isinstance(error, RuntimeError) and "CUDA error" in str(error):  # nothing can be computed there any more
        raise error
    else:
        why, expected = f"{type(error).__name__}: {reason(error)}", False
    log.warning("%s is left out: %s", place, why, exc_info=None if expected else error)
    return why


def run_experiment(
    config: ExperimentConfig,
    output_dir: str | Path | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
    limit: int | None = None,
) -> RunSummary:
    """Adapt to every sample of the experiment (of this shard) and evaluate original and final predictions.

    Every sample is either in `samples` or, whatever went wrong with it, in `left_out` with its reason; the others go on.
    The same numbers come out whatever the shard count and the order.

    Args:
        config: its `data` says which samples, its `model` which model.
        output_dir: gets `metrics.csv`, `samples.csv`, `history.csv`, `left_out.csv`, `predictions/*.npz`; None: nothing.
        shard: which part of the samples, (index, count).
        progress: show a bar.
        limit: only the first samples, and no other is read.

    Returns:
        A `RunSummary` with these tables.

    Raises:
        UserError: for data, a model or a calibration that is not there; not for what goes wrong with one sample.

    Example:
        >>> from ttt_lib import load_experiment, run_experiment
        >>> quick = {"data": [{"kind": "motorcycle", "width": 96, "height": 64}], "model": {"num_tokens": 48}}
        >>> config = load_experiment("original", profile="demo", overrides=quick)
        >>> run_experiment(config, progress=False).samples["sample"].tolist()
        ['motorcycle_left', 'motorcycle_right']
    """
    folder = Path(absolute(output_dir)) if output_dir else None
    if folder is not None:
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
    places = [(s, name) for s in open_samples(config, shard) for name in s.names][:limit]
    adaptations, tables = Adaptations(config), ResultTables(folder)
    last: dict[str, Any] = {}
    for sample_set, name in tqdm(places, desc=config.name, disable=not progress, mininterval=2.0):
        try:
            sample, result = adaptations.adapt(sample_set, sample_set.load(name))
            rows = _rows(config, sample, result)
            kept = gallery_content(sample, result) if folder is not None else {}
        except Exception as error:
            why = why_left_out(f"{sample_set.name}/{name}", error)
            tables.add(left_out=pd.DataFrame([{"dataset": sample_set.name, "sample": name, "reason": why}]))
            continue
        log.info("%s/%s: %s in %.1f s", sample_set.name, name, result.decision, result.seconds)
        if kept:
            write_gallery_file(folder, sample, kept)
        tables.add(**rows)
        last = {"sample": sample, "result": result}
    return RunSummary(folder, **tables.joined(), last=last)
