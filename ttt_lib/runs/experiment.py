"""One experiment over a set of samples, written to a folder as it goes: what `02_adaptation.ipynb` calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ttt_lib.adaptation.adapter import Adapter
from ttt_lib.adaptation.gate.decision import read_calibration
from ttt_lib.adaptation.known_distances import KnownDistances
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.config import ExperimentConfig, build_experiment, load_experiment, load_profile
from ttt_lib.core.errors import UserError
from ttt_lib.core.memory import is_out_of_memory
from ttt_lib.core.seeds import sample_generator
from ttt_lib.core.types import Prediction, Sample
from ttt_lib.data.catalog import open_dataset
from ttt_lib.data.known_distances import sample_references
from ttt_lib.data.samples import SampleSet
from ttt_lib.evaluation.scores import evaluate, tidy_rows
from ttt_lib.models.base import GeometryModel
from ttt_lib.models.load import load_model
from ttt_lib.runs.catalog import NOTEBOOKS
from ttt_lib.runs.results import prediction_name

GALLERY_SIDE = 256  # pixels of the longer side of what is kept for figures


@dataclass
class RunSummary:
    """What a run did: tables as in the result files, and where they are."""

    output_dir: Path | None
    metrics: pd.DataFrame
    samples: pd.DataFrame
    history: pd.DataFrame
    left_out: pd.DataFrame
    last: dict[str, Any] = field(default_factory=dict)  # sample and AdaptResult of the last sample, for a picture


def resolve_profile(profile: str | None) -> Path | None:
    """Path of a profile given by name (a file of `notebooks/profiles`) or by path; None for an empty one."""
    if not profile:
        return None
    path = Path(profile)
    if path.suffix in (".yaml", ".yml"):
        return path
    path = NOTEBOOKS / "profiles" / f"{profile}.yaml"
    if not os.path.isfile(path):  # also answers for names that no file system takes
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError(
            f"profile {profile!r}: there is no such profile; there are {known}, or give the path of a file."
        )
    return path


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

    A `data` list in the parameters is explicit, so it wins over the profile's.
    """
    content = {key: value for key, value in parameters.items() if value not in (None, "", {}, [])}
    path = resolve_profile(profile)
    overrides = {"data": content["data"]} if "data" in content else None
    return build_experiment(content, load_profile(path) if path else None, overrides, source="parameters")


def use_threads(threads: int | None) -> None:
    """Limit PyTorch to `threads`; None or 0 leaves it as the environment (`OMP_NUM_THREADS`) has set it."""
    if threads:
        torch.set_num_threads(threads)


def open_samples(config: ExperimentConfig, shard: tuple[int, int] = (0, 1)) -> list[SampleSet]:
    """The sets of the experiment, each cut to this shard. Raises `UserError` if there are none."""
    if not config.data:
        raise UserError(f"experiment {config.name}: no data; set `data`, choose a profile, or pass --data.")
    return [open_dataset(kind=entry.kind, **entry.options()).shard(*shard) for entry in config.data]


def iterate(sets: list[SampleSet]) -> Iterator[Sample]:
    """All readable samples of all sets, in order."""
    for sample_set in sets:
        yield from sample_set.readable()


def open_model(config: ExperimentConfig) -> GeometryModel:
    """The experiment's model, fresh from disk or hub."""
    settings = config.model
    model = load_model(settings.name, settings.device, settings.num_tokens, settings.autocast, settings.fov_x)
    if settings.checkpointing:
        model.save_memory()
    return model


def _small(map_: torch.Tensor | None) -> np.ndarray | None:
    if map_ is None:
        return None
    height, width = map_.shape[-2:]
    factor = min(1.0, GALLERY_SIDE / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(map_[None, None].float().cpu(), size, mode="nearest")[0, 0].numpy()


def write_gallery_file(path: Path, sample: Sample, result: AdaptResult) -> None:
    """Small copies of what figures need: image, depths (float16) and intrinsics, as a compressed npz."""
    depth = _small(result.original.depth)
    image = F.interpolate(sample.image[None], depth.shape, mode="area")[0]
    content = {
        "image": (image.permute(1, 2, 0).cpu().numpy() * 255).astype(np.uint8),
        "depth_original": depth.astype(np.float16),
        "depth_final": _small(result.final.depth).astype(np.float16),
        "mask": _small(result.final.mask.float()) > 0.5,
        "intrinsics": result.final.intrinsics.cpu().numpy(),
    }
    if sample.depth is not None:
        content["depth_truth"] = _small(sample.depth).astype(np.float16)
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **content)
    os.replace(temporary, path)


def _rows(experiment: str, sample: Sample, prediction: str, values: Prediction) -> pd.DataFrame:
    rows = tidy_rows(evaluate(values, sample))
    for place, (key, value) in enumerate(
        {"experiment": experiment, "dataset": sample.dataset, "sample": sample.name, "prediction": prediction}.items()
    ):
        rows.insert(place, key, value)
    return rows


def _append(rows: pd.DataFrame, path: Path | None, before: list[pd.DataFrame]) -> None:
    """Add rows to a CSV at once, so that a run that ends early keeps what it has.

    A sample may bring columns that none had before (signals after one that failed): then the file is written again.
    """
    if path is None or not len(rows):
        return
    known = list(dict.fromkeys(column for table in before for column in table.columns)) if path.exists() else []
    if not known or set(rows.columns) <= set(known):
        rows.reindex(columns=known or rows.columns).to_csv(path, mode="a", header=not known, index=False)
        return
    temporary = path.with_suffix(".tmp")
    pd.concat([*before, rows], ignore_index=True).to_csv(temporary, index=False)
    os.replace(temporary, path)


def run_experiment(
    config: ExperimentConfig,
    output_dir: str | Path | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
    limit: int | None = None,
) -> RunSummary:
    """Adapt to every sample of the experiment (of this shard) and evaluate original and final predictions.

    Writes `metrics.csv`, `samples.csv`, `history.csv`, `left_out.csv` and `predictions/*.npz` to `output_dir` (None:
    nothing is written). A sample that cannot be read, has no usable truth or does not fit in memory is left out with
    its reason and the others go on. The same numbers come out whatever the shard count and the order.
    """
    folder = Path(output_dir) if output_dir else None
    if folder is not None:
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
    paths = {key: folder / f"{key}.csv" if folder else None for key in ("metrics", "samples", "history", "left_out")}
    sets = open_samples(config, shard)
    model = open_model(config)
    tables: dict[str, list[pd.DataFrame]] = {key: [] for key in paths}
    last: dict[str, Any] = {}
    # Read once, and before any work: a missing one is said now.
    calibration = read_calibration(config.gate.calibration) if config.gate.mode == "decide" else None

    def add(table: str, rows: pd.DataFrame) -> None:
        _append(rows, paths[table], tables[table])
        tables[table].append(rows)

    left_out: list[tuple[str, str, str]] = []
    weights = None  # of the last image, where `train.reset` goes on from them
    total = sum(len(s) for s in sets)
    bar = tqdm(total=min(total, limit or total), desc=config.name, disable=not progress, mininterval=2.0)
    for done, sample in enumerate(iterate(sets)):
        if limit is not None and done >= limit:
            break
        identity = {"experiment": config.name, "dataset": sample.dataset, "sample": sample.name}
        if config.references and not (sample.is_metric and sample.depth is not None):
            left_out.append(
                (sample.dataset, sample.name, "has no metric truth, from which references could be sampled")
            )
            bar.update()
            continue
        try:
            if config.released.reload_model:
                model = open_model(config)
            name = f"{sample.dataset}/{sample.name}"
            supervision = []
            if config.references:
                unseen = sample_generator(config.seed, f"{name}/references")
                references, sample = sample_references(sample, config.references, unseen)
                supervision.append(KnownDistances(references, config))
            if config.train.reset == "per_image" or (config.train.reset != "never" and done % config.train.reset == 0):
                weights = None
            result = Adapter(model, config, calibration).adapt(sample.image, name, supervision, start=weights)
            weights = result.weights if config.train.reset != "per_image" else None
            if sample.depth is not None or sample.points is not None:
                add("metrics", _rows(config.name, sample, "original", result.original))
                add("metrics", _rows(config.name, sample, "final", result.final))
                for kind, prediction in (("adapted", result.adapted), ("blended", result.blended)):
                    if prediction is not None and prediction is not result.final:
                        add("metrics", _rows(config.name, sample, kind, prediction))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            left_out.append(
                (sample.dataset, sample.name, "out of memory: lower views.longest_side, or set model.checkpointing")
            )
            continue
        except FloatingPointError as error:
            left_out.append((sample.dataset, sample.name, str(error)))
            continue
        finally:
            bar.update()
        losses = [entry["loss"] for entry in result.history if "loss" in entry]
        add("samples", pd.DataFrame([{
            **identity, "seconds": result.seconds, "peak_memory_mb": result.peak_memory_mb,
            "decision": result.decision, "reason": result.reason, "passes_done": result.passes_done,
            "loss_first": losses[0] if losses else np.nan, "loss_last": losses[-1] if losses else np.nan,
            "micro_batch": result.micro_batch,
            **{f"views_{key}": value for key, value in result.view_stats.items()},
            **{f"signal_{key}": value for key, value in result.signals.items()},
        }]))  # fmt: skip
        if result.history:
            add("history", pd.DataFrame([{**identity, **entry} for entry in result.history]))
        if folder is not None:
            write_gallery_file(folder / "predictions" / prediction_name(sample.dataset, sample.name), sample, result)
        last = {"sample": sample, "result": result}
    bar.close()
    left_out += [(s.name, name, reason) for s in sets for name, reason in s.left_out]
    add("left_out", pd.DataFrame(left_out, columns=["dataset", "sample", "reason"]))

    def joined(key: str) -> pd.DataFrame:
        parts = [t for t in tables[key] if len(t)]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    return RunSummary(folder, *(joined(key) for key in ("metrics", "samples", "history", "left_out")), last=last)
