"""A folder of runs read back: what is there, in an order that does not depend on how it was run, and what is missing.

An experiment's shards are used as one set or not at all: results of another shard count or of other settings that lie
in the same folder are named and left alone.
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ttt_lib.core.errors import RunError
from ttt_lib.core.files import absolute
from ttt_lib.core.schema import RESERVED
from ttt_lib.core.types import IDENTITY, KEYS
from ttt_lib.evaluation.scores import TABLE1_COLUMNS
from ttt_lib.runs.catalog import table_places
from ttt_lib.runs.manifest import read_manifest

log = logging.getLogger(__name__)

SELECTION = "selection.csv"  # of a study of hard, random and easy samples: which are which
COMPARABLE = ("data", "limit", "model", "code", "torch")  # parts of an identity that experiments have in common
SHARD = re.compile(r"(\d+)-of-(0*[1-9]\d*)", re.ASCII)
Shards = dict[Path, dict[str, Any]]  # finished ones of an experiment: manifest by folder


@dataclass
class Runs:
    """All results of a runs folder: metrics, samples, history, left_out as tables, and the shards' folders.

    experiments: their names in the order of the table, in which the tables' rows are too. notes: one line for each thing
    that is missing or was not used. selection: of a study of chosen samples (`ttt-depth ablation --hardest`), which are in
    which group; else None.
    """

    folder: Path
    metrics: pd.DataFrame
    samples: pd.DataFrame
    history: pd.DataFrame
    left_out: pd.DataFrame
    shards: list[Path]
    experiments: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    selection: pd.DataFrame | None = None

    def group(self, name: str) -> Runs:
        """The chosen samples of a group alone, as they were seen first; everything where nothing was chosen."""
        if self.selection is None:
            return self
        chosen = self.selection.loc[self.selection["group"] == name, ["dataset", "sample"]].drop_duplicates()
        tables = {key: getattr(self, key).merge(chosen, on=["dataset", "sample"]) for key in KEYS}
        return replace(self, **tables, selection=None)


def read_runs(folder: str | Path) -> Runs:
    """Read every finished shard (those with a manifest); what is missing or not used is in `notes`.

    Args:
        folder: what `ttt-depth ablation --runs` wrote to.

    Returns:
        `Runs`: its tables, in the order of the table of experiments.

    Raises:
        RunError: the folder is missing, holds no finished shard, or a result file cannot be read.

    Example:
        >>> from ttt_lib import read_runs
        >>> runs = read_runs("runs")  # made by `ttt-depth ablation --experiments original`
        >>> runs.experiments, sorted(runs.metrics["prediction"].unique())
        (['original'], ['final', 'original'])
    """
    folder = Path(absolute(folder))
    finished, notes = _finished_shards(folder)
    if not finished:
        raise RunError(f"{folder}: holds no finished run; run `ttt-depth ablation` first or name another folder.")
    chosen: dict[str, Shards] = {}
    for experiment, shards in finished.items():
        log.debug("%s: %d finished shards", experiment, len(shards))
        chosen[experiment], said = _one_set(experiment, shards)
        notes += said
    chosen = dict(sorted(chosen.items(), key=lambda item: (_place_in_table(*item), item[0])))
    places = [place for shards in chosen.values() for place in shards]
    tables = {}
    for name in KEYS:
        tables[name], repeated = _table(name, places, list(chosen))
        if repeated and name == "metrics":
            notes.append(f"{repeated} scores are there twice (two data sets or samples of one name); the first counts")
    runs = Runs(folder, **tables, shards=places, experiments=list(chosen))
    if (folder / SELECTION).is_file():
        selection = _read(folder / SELECTION)
        runs.selection = selection if len(selection) else None
    runs.notes = notes + _incomparable(chosen) + _missing(runs)
    return runs


def _place_in_table(experiment: str, shards: Shards) -> float:
    """`order` of the settings that an experiment ran with; of those without, as older ones are, that of its file."""
    settings = next(iter(shards.values())).get("settings")
    told = settings.get("order") if isinstance(settings, dict) else None
    return float(told) if isinstance(told, int | float) else float(table_places().get(experiment, math.inf))


def _finished_shards(folder: Path) -> tuple[dict[str, Shards], list[str]]:
    """Manifests by experiment and shard folder; a line for each experiment that was begun and has none."""
    finished, notes = {}, []
    begun = {p.parent.name for p in folder.glob("failed/*/*")}
    for place in sorted(p for p in folder.glob("*") if p.is_dir() and p.name not in RESERVED):
        if place.name.startswith("."):  # .work holds unfinished ones
            continue
        shards = {
            p: m for p in sorted(place.iterdir()) if SHARD.fullmatch(p.name) and (m := read_manifest(p)) is not None
        }
        if shards:
            finished[place.name] = shards
        elif not any(place.iterdir()) or any(SHARD.fullmatch(p.name) for p in place.iterdir()):
            begun.add(place.name)
    for name in sorted(begun - set(finished)):
        kept = folder / "failed" / name
        notes.append(f"{name}: no finished shard" + (f"; what failed is in {kept}" if kept.exists() else ""))
    return finished, notes


def _finished(manifest: dict[str, Any]) -> float:
    value = manifest.get("finished")
    return float(value) if isinstance(value, int | float) else 0.0


def _one_set(experiment: str, shards: Shards) -> tuple[Shards, list[str]]:
    """The shards of one run: the newest complete set, or else the fullest one. What it leaves alone is said."""
    sets: dict[tuple[int, str], Shards] = {}
    for place, manifest in shards.items():
        count = int(SHARD.fullmatch(place.name).group(2))
        sets.setdefault((count, json.dumps(manifest.get("identity"), sort_keys=True)), {})[place] = manifest

    def rank(key: tuple[int, str]) -> tuple:
        share = len(sets[key]) / key[0]
        return share >= 1, share, max(_finished(m) for m in sets[key].values()), key

    best = max(sets, key=rank)
    notes = []
    if len(sets) > 1:
        others = ", ".join(place.name for place in shards if place not in sets[best])
        notes.append(f"{experiment}: results of {len(sets)} different runs lie in one folder; not used: {others}")
    if len(sets[best]) < best[0]:
        kept = next(iter(shards)).parent.parent / "failed" / experiment
        failed = f"; what failed is in {kept}" if kept.exists() and any(kept.iterdir()) else ""
        notes.append(f"{experiment}: {len(sets[best])} of {best[0]} shards are finished{failed}")
    return sets[best], notes


def _read(path: Path) -> pd.DataFrame:
    """A result file; names stay text (a sample may be called 0007 or NA), and only numbers can be missing."""
    try:
        columns = pd.read_csv(path, nrows=0).columns
        missing = {column: ["", "nan", "NaN"] for column in columns if column not in IDENTITY}
        names = {column: str for column in columns if column in IDENTITY}
        return pd.read_csv(path, dtype=names, keep_default_na=False, na_values=missing)
    except (ValueError, OSError) as error:
        raise RunError(f"{path}: cannot be read as a table ({' '.join(str(error).split())[:200]}).") from error


def _table(name: str, shards: list[Path], experiments: list[str]) -> tuple[pd.DataFrame, int]:
    """One table of all shards, sorted (experiments as they are given), every row once; how many repeated were dropped."""
    keys, values = KEYS[name]
    parts = [_read(path) for shard in shards if (path := shard / f"{name}.csv").exists() and path.stat().st_size > 1]
    parts = [part for part in parts if len(part)]
    if not parts:
        return pd.DataFrame(columns=[*keys, *values]), 0
    joined = pd.concat(parts, ignore_index=True)
    joined = joined.reindex(columns=[*joined.columns, *(c for c in [*keys, *values] if c not in joined)])
    place = {experiment: i for i, experiment in enumerate(experiments)}
    once = joined.drop_duplicates(keys).sort_values(keys, kind="stable")
    if "experiment" in keys:
        once = once.sort_values("experiment", key=lambda names: names.map(place), kind="stable")
    once = once.reset_index(drop=True)
    return once, len(joined) - len(once)


def _incomparable(chosen: dict[str, Shards]) -> list[str]:
    """A line for each experiment that ran on other data, another model or other code than the reference."""
    identities = {name: next(iter(shards.values())).get("identity") or {} for name, shards in chosen.items()}
    reference = "original" if "original" in identities else next(iter(identities))
    notes = []
    for name, identity in sorted(identities.items()):
        other = [key for key in COMPARABLE if identity.get(key) != identities[reference].get(key)]
        if other:
            notes.append(f"{name}: ran with other {', '.join(other)} than {reference}; compare them with care")
    return notes


def score_counts(runs: Runs) -> pd.DataFrame:
    """Over how many samples each mean of Table 1 is: a row an experiment, a column a score (`metric_score`)."""
    final = runs.metrics[runs.metrics["prediction"] == "final"].dropna(subset=["value"])
    counts = final.groupby(["experiment", final["metric"] + "_" + final["score"]]).size().unstack(fill_value=0)
    columns = [f"{metric}_{score}" for metric, score in TABLE1_COLUMNS]
    return counts.reindex(index=runs.experiments, columns=columns, fill_value=0).astype(int)


def _uneven(runs: Runs, told: list[str]) -> list[str]:
    """A line where means that stand beside each other are over different numbers of samples. told: experiments of which
    it is known that they lack samples as such."""
    counts = score_counts(runs)
    most, notes = counts.max(), []
    for name, row in counts.drop(index=told).iterrows():
        fewer = row[(row < most) & (row > 0)]
        for number, columns in fewer.groupby(fewer):
            others = "/".join(str(n) for n in sorted({most[column] for column in columns.index}))
            notes.append(f"{name}: {', '.join(columns.index)} over {number} samples, elsewhere over {others}")
    done = runs.samples.groupby("experiment").size().reindex(counts.index, fill_value=0)
    if (done > counts.max(axis=1)).any():
        notes.append("seconds are means over all samples, also those without truth, which n does not count")
    partly = most[(most > 0) & (most < most.max())]
    for number, columns in partly.groupby(partly):
        notes.append(
            f"{', '.join(columns.index)}: means over {number} of {most.max()} samples, which alone have such truth"
        )
    return notes


def _missing(runs: Runs) -> list[str]:
    """One line for each thing that the tables lack."""
    notes = []
    done = runs.samples.groupby("experiment").size()
    everything = len(runs.samples.drop_duplicates(["dataset", "sample"]))
    told = [name for name in runs.experiments if done.get(name, 0) < everything]
    for name in told:
        notes.append(f"{name}: {done.get(name, 0)} of {everything} samples; its means are over fewer samples")
    if "original" not in runs.experiments:
        notes.append("original: not run, so there are no paired differences")
    if "control_lr0" not in runs.experiments:
        notes.append("control_lr0: not run, so the evaluation is not checked")
    if not len(runs.metrics):
        notes.append("no sample has a truth, so there are no scores")
    else:
        known = set(runs.metrics.dropna(subset=["value"])["metric"])
        absent = [m for m in dict.fromkeys(metric for metric, _ in TABLE1_COLUMNS) if m not in known]
        if absent:
            notes.append(f"no scores for {', '.join(absent)}: the samples' truth does not allow them")
        notes += _uneven(runs, told)
    if not len(runs.history):
        notes.append("no experiment trained, so there are no loss curves")
    return notes
