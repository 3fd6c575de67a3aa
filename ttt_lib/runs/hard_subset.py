"""The samples on which a model does worst, as a set of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from ttt_lib.core.errors import UserError, reason
from ttt_lib.data import moge_layout
from ttt_lib.data.moge_layout import check_name
from ttt_lib.evaluation.scores import SCORES


def ranked(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Samples by their score, hardest first: tidy metric rows in, rows (dataset, sample, value) out.

    metric as `points_scale_invariant/delta1`; ties by (dataset, sample), so the order is not that of the input.
    Raises `UserError` for a metric that is not there, or that is an error, of which the lowest are easy.
    """
    name, _, score = metric.partition("/")
    rows = scores[(scores["metric"] == name) & (scores["score"] == score)]
    if rows.empty:
        known = sorted({f"{m}/{s}" for m, s in zip(scores["metric"], scores["score"])})
        raise UserError(f"--metric {metric!r}: was not measured; there are {', '.join(known)}.")
    if not SCORES[score].higher_is_better:
        raise UserError(
            f"--metric {metric!r}: is lower for better predictions; choose by a score such as {name}/delta1."
        )
    rows = rows.dropna(subset=["value"]).sort_values(["value", "dataset", "sample"])
    return rows[["dataset", "sample", "value"]].reset_index(drop=True)


def select_hard(scores: pd.DataFrame, metric: str, below: float, count: int) -> pd.DataFrame:
    """At most `count` of the `ranked` samples, the hardest ones, with values under `below`. Raises `UserError`."""
    rows = ranked(scores, metric)
    return rows[rows["value"] < below].head(count)


def _relative(target: Path, start: Path) -> str:
    """The way from one folder to another; the whole path where there is none, as between drives of Windows."""
    try:
        return os.path.relpath(target, start)
    except ValueError:
        return str(target)


def write_subset_index(chosen: pd.DataFrame, folders: dict[str, Path], output: str | Path) -> Path:
    """A set in MoGe's layout that links to the chosen samples: `output/<dataset>/<sample>` and `.index.txt`.

    folders: dataset -> its folder. Links are relative. Raises `UserError` if `output` holds another index already.
    """
    output = Path(output)
    names = [check_name(f"{row.dataset}/{row.sample}", "the hard subset") for row in chosen.itertuples()]
    for row, name in zip(chosen.itertuples(), names):
        link = output / name
        link.parent.mkdir(parents=True, exist_ok=True)
        target = _relative((folders[row.dataset] / row.sample).resolve(), link.parent.resolve())
        if link.is_symlink() and os.readlink(link) == target:
            continue
        if link.exists() or link.is_symlink():
            raise UserError(f"{link}: is there already and is something else; choose another output folder.")
        try:
            link.symlink_to(target, target_is_directory=True)
        except OSError as error:  # Windows makes links for those only who may (its developer mode)
            raise UserError(
                f"{link}: no link can be made there ({reason(error)}); choose another output folder."
            ) from error
    moge_layout.write_index(output, names)
    return output / moge_layout.INDEX
