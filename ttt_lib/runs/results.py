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

import pandas as pd

from ttt_lib.core.errors import RunError
from ttt_lib.core.files import absolute
from ttt_lib.core.schema import RESERVED
from ttt_lib.core.types import IDENTITY, KEYS
from ttt_lib.evaluation.paired import in_order
from ttt_lib.evaluation.scores import TABLE1_COLUMNS
from ttt_lib.runs.catalog import table_places
from ttt_lib.runs.jobs import read_manifest

log = logging.getLogger(__name__)

SELECTION = "selection.csv"  # of a study of hard, random and easy samples: which are which
COMPARABLE = ("data", "limit", "model", "code", "torch")  # parts of an identity that experiments have in common
SHARD = re.compile(r"(\d+)-of-(0*[1-9]\d*)", re.ASCII)


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
    if finished.empty:
        raise RunError(f"{folder}: holds no finished run; run `ttt-depth ablation` first or name another folder.")
    chosen = []
    for experiment, shards in finished.groupby("experiment", sort=False):
        log.debug("%s: %d finished shards", experiment, len(shards))
        used, said = _one_set(experiment, shards, folder)
        chosen.append(used)
        notes += said
    used = pd.concat(chosen)
    experiments, places = list(used["experiment"].unique()), list(used["place"])
    tables = {name: _table(name, places, experiments) for name in KEYS}
    runs = Runs(folder, **tables, shards=places, experiments=experiments)
    if (folder / SELECTION).is_file():
        runs.selection = _read(folder / SELECTION)
    runs.notes = notes + _incomparable(used) + _missing(runs)
    return runs


def _finished_shards(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """A row a finished shard (experiment, place, count of shards, identity, seconds when it ended), experiments in the
    order of the table, which is `order` of the settings that ran; and a line for each experiment that has none."""
    rows, begun = [], {place.parent.name for place in folder.glob("failed/*/*")}
    for experiment in folder.glob("[!.]*/"):  # .work holds unfinished ones
        if experiment.name in RESERVED or not experiment.is_dir():
            continue
        shards = [place for place in experiment.iterdir() if SHARD.fullmatch(place.name)]
        if len(shards) == len(list(experiment.iterdir())):
            begun.add(experiment.name)
        default = table_places().get(experiment.name, math.inf)
        for place in shards:
            if (manifest := read_manifest(place)) is not None:
                settings, count = manifest.get("settings"), int(place.name.partition("-of-")[2])
                told = settings.get("order") if isinstance(settings, dict) else None
                order = float(told) if isinstance(told, int | float) else default
                identity, ended = manifest.get("identity", {}), manifest.get("finished")
                rows.append((order, experiment.name, place, count, identity, ended))
    table = pd.DataFrame(rows, columns=["order", "experiment", "place", "count", "identity", "ended"])
    table["ended"] = pd.to_numeric(table["ended"], errors="coerce").fillna(0.0)
    without = sorted(begun - set(table["experiment"]))
    notes = [f"{name}: no finished shard{_what_failed(folder, name)}" for name in without]
    return table.sort_values(["order", "experiment", "place"]), notes


def _what_failed(folder: Path, experiment: str) -> str:
    kept = folder / "failed" / experiment
    return f"; what failed is in {kept}" if kept.exists() and any(kept.iterdir()) else ""


def _one_set(experiment: str, shards: pd.DataFrame, folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The shards of one run: the newest complete set, or else the fullest one. What it leaves alone is said."""
    told = shards["identity"].map(lambda identity: json.dumps(identity, sort_keys=True))
    sets = [part for _, part in shards.groupby(["count", told])]
    best = max(sets, key=lambda part: (len(part) / part["count"].iloc[0], part["ended"].max()))
    count, notes = best["count"].iloc[0], []
    if len(sets) > 1:
        others = ", ".join(place.name for place in shards["place"].drop(best.index))
        notes.append(f"{experiment}: results of {len(sets)} different runs lie in one folder; not used: {others}")
    if len(best) < count:
        failed = _what_failed(folder, experiment)
        notes.append(f"{experiment}: {len(best)} of {count} shards are finished{failed}")
    return best, notes


def _read(path: Path) -> pd.DataFrame:
    """A result file; names stay text (a sample may be called 0007 or NA), and only numbers can be missing."""
    try:
        columns = pd.read_csv(path, nrows=0).columns
        missing = {column: ["", "nan", "NaN"] for column in columns if column not in IDENTITY}
        names = {column: str for column in columns if column in IDENTITY}
        return pd.read_csv(path, dtype=names, keep_default_na=False, na_values=missing)
    except (ValueError, OSError) as error:
        raise RunError(f"{path}: cannot be read as a table ({' '.join(str(error).split())[:200]}).") from error


def _table(name: str, shards: list[Path], experiments: list[str]) -> pd.DataFrame:
    """One table of all shards, sorted (experiments as they are given), every row once."""
    keys, values = KEYS[name]
    parts = [_read(path) for shard in shards if (path := shard / f"{name}.csv").exists() and path.stat().st_size > 1]
    if not parts:
        return pd.DataFrame(columns=[*keys, *values])
    joined = pd.concat(parts, ignore_index=True)
    joined = joined.reindex(columns=[*joined.columns, *(c for c in [*keys, *values] if c not in joined)])
    return in_order(joined.drop_duplicates(keys), keys, experiments)


def _incomparable(used: pd.DataFrame) -> list[str]:
    """A line for each experiment that ran on other data, another model or other code than the reference."""
    identities = used.groupby("experiment")["identity"].first().to_dict()
    reference = "original" if "original" in identities else used["experiment"].iloc[0]
    notes = []
    for name, identity in identities.items():
        other = [key for key in COMPARABLE if identity.get(key) != identities[reference].get(key)]
        if other:
            notes.append(f"{name}: ran with other {', '.join(other)} than {reference}; compare them with care")
    return notes


def _fewer(runs: Runs) -> list[str]:
    """A line for each number of samples that a mean of Table 1 is over, where it is not that of all the row's samples."""
    final = runs.metrics[runs.metrics["prediction"] == "final"].dropna(subset=["value"])
    counts = final.groupby(["experiment", final["metric"] + "_" + final["score"]]).size().unstack(fill_value=0)
    found: dict[tuple, list[str]] = {}
    scores = [f"{metric}_{score}" for metric, score in TABLE1_COLUMNS if f"{metric}_{score}" in counts]
    for experiment, row in counts[scores].iterrows():
        done = int((runs.samples["experiment"] == experiment).sum())
        for number, columns in row[(row > 0) & (row < done)].groupby(row):
            found.setdefault((", ".join(columns.index), number, done), []).append(experiment)
    return [
        f"{columns}: means over {number} of {done} samples ({', '.join(experiments)})"
        for (columns, number, done), experiments in found.items()
    ]


def _missing(runs: Runs) -> list[str]:
    """One line for each thing that the tables lack."""
    notes = []
    done = runs.samples.groupby("experiment").size()
    everything = len(runs.samples.drop_duplicates(["dataset", "sample"]))
    for name in runs.experiments:
        if done.get(name, 0) < everything:
            notes.append(f"{name}: {done.get(name, 0)} of {everything} samples; its means are over fewer samples")
    known = set(runs.metrics.dropna(subset=["value"])["metric"])
    absent = [m for m in dict.fromkeys(metric for metric, _ in TABLE1_COLUMNS) if m not in known]
    there = bool(len(runs.metrics))
    lacking = {
        "original: not run, so there are no paired differences": "original" not in runs.experiments,
        "control_lr0: not run, so the evaluation is not checked": "control_lr0" not in runs.experiments,
        "no sample has a truth, so there are no scores": not there,
        f"no scores for {', '.join(absent)}: the samples' truth does not allow them": there and absent,
        "no experiment trained, so there are no loss curves": not len(runs.history),
    }
    return notes + [said for said, lacks in lacking.items() if lacks] + _fewer(runs)
