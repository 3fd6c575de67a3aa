"""The published study's protocol: score a large set, then run every row on the hardest samples, and on as many random and
easy ones, each seen twice, beside controls. What selection alone gives is measured by `evaluation/selection.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import RunError, UserError
from ttt_lib.evaluation.scores import SCORES
from ttt_lib.evaluation.selection import CONTROLS, GROUPS
from ttt_lib.runs.catalog import experiment_file
from ttt_lib.runs.experiment import load_with_profile, open_samples
from ttt_lib.runs.plan import make_jobs
from ttt_lib.runs.results import SELECTION, read_runs

SCORED = "scored"  # folder of the runs that the choice is made by
PER_SHARD = 125  # samples that are scored in one job, unless more shards are asked for
SCENES = 1000  # of `shifted`, where no data is named


def with_controls(files: list[Path]) -> list[Path]:
    """The experiments, and those of the controls that are not among them."""
    there = {file.stem for file in files}
    return files + [experiment_file(name) for name in CONTROLS if name not in there]


def choose_groups(
    scores: pd.DataFrame, metric: str, count: int, below: float | None = None, seed: int = 0
) -> pd.DataFrame:
    """The hardest, as many random, and the easiest samples.

    Args:
        scores: tidy metric rows of one prediction a sample.
        metric: as `points_scale_invariant/delta1`; no error, of which the lowest are easy.
        count: samples of each group. A random one may be hard or easy too: they stand for the whole set.
        below: the hard ones must score lower.
        seed: of the random ones. Nothing depends on the order of `scores`.

    Returns:
        Rows (group, dataset, sample, value), `GROUPS` in order.

    Raises:
        UserError: a metric that was not measured; fewer samples than that needs.

    Example:
        >>> names, values = ["a", "b", "c", "d"], [0.4, 0.1, 0.9, 0.8]
        >>> scores = pd.DataFrame({"dataset": "set", "sample": names, "metric": "depth", "score": "delta1", "value": values})
        >>> choose_groups(scores, "depth/delta1", 1).query("group != 'random'")["sample"].tolist()
        ['b', 'c']
    """
    known = scores["metric"] + "/" + scores["score"]
    if metric not in set(known):
        raise UserError(f"--metric {metric!r}: was not measured; there are {', '.join(sorted(set(known)))}.")
    if not SCORES[metric.partition("/")[2]].higher_is_better:
        raise UserError(f"--metric {metric!r}: is lower for better predictions; choose by a score such as delta1.")
    order = ["value", "dataset", "sample"]
    rows = scores[known == metric].dropna(subset=["value"]).sort_values(order, ignore_index=True)
    if len(rows) < 2 * count:
        said = f"{len(rows)} samples have a score, and as many hard and easy ones are {2 * count}"
        raise UserError(f"--hardest {count}: {said}; name more data or a lower number.")
    hard = rows if below is None else rows[rows["value"] < below]
    if len(hard) < count:
        said = f"{len(hard)} of {len(rows)} samples score lower in {metric}, not {count}"
        raise UserError(f"--below {below}: {said}; raise it, or lower --hardest.")
    parts = hard.head(count), rows.sample(count, random_state=seed), rows.tail(count)
    chosen = pd.concat([part.assign(group=group) for group, part in zip(GROUPS, parts)], ignore_index=True)
    return chosen[["group", "dataset", "sample", "value"]]


def choose_samples(
    runs: Path, profile: str, overrides: dict[str, Any], count: int, metric: str, below: float | None,
    shards: int, limit: int | None, do: Callable[[list, Path], list],
) -> list[dict[str, Any]]:  # fmt: skip
    """Score all samples with `original` (in `runs/scored`, once), choose, and write `runs/selection.csv`.

    do: runs jobs into a folder. Returns `data` for the rows: the chosen samples, and the same seen again.
    Raises `UserError`, and `RunError` for jobs that failed.
    """
    overrides.setdefault("data", [{"kind": "shifted", "count": SCENES}])
    original = experiment_file("original")
    config = load_with_profile(original, profile, overrides)
    total = sum(len(samples) for samples in open_samples(config))
    jobs = make_jobs([original], profile, overrides, max(shards, -(-total // PER_SHARD)), limit, views=False)
    print(f"choosing among {total} samples, which are scored in {runs / SCORED}", flush=True)
    failed = [outcome for outcome in do(jobs, runs / SCORED) if outcome.status == "failed"]
    if failed:
        raise RunError(f"{runs / SCORED}: {len(failed)} of {len(jobs)} jobs failed ({failed[0].reason}); run it again.")
    scored = read_runs(runs / SCORED)
    if not len(scored.metrics):
        raise UserError(f"--hardest {count}: none of the samples could be read and scored.")
    final = scored.metrics[scored.metrics["prediction"] == "final"]
    chosen = choose_groups(final, metric, count, below, seed=config.seed)
    chosen.assign(metric=metric).to_csv(runs / SELECTION, index=False)
    for group, part in chosen.groupby("group", sort=False):
        print(f"{group}: {len(part)} samples, {metric} {part['value'].min():.3f} to {part['value'].max():.3f}")
    return data_of(config, chosen)


def forget_choice(runs: Path) -> None:
    """What is run in this folder now is of no chosen samples, whatever an earlier study there was."""
    with suppress(OSError):  # of a folder that cannot be written, which its jobs say
        (runs / SELECTION).unlink(missing_ok=True)


def data_of(config: ExperimentConfig, chosen: pd.DataFrame) -> list[dict[str, Any]]:
    """The sets of `config` with the chosen samples only, then all of them seen again."""
    found = []
    for entry, samples in zip(config.data, open_samples(config)):
        wanted = set(chosen.loc[chosen["dataset"] == samples.name, "sample"])
        if names := [name for name in samples.names if name in wanted]:
            found.append({"kind": entry.kind, **entry.options(), "names": names, "draw": entry.draw})
    return found + [{**entry, "draw": entry["draw"] + 1} for entry in found]
