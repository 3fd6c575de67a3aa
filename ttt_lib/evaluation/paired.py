"""Paired statistics of per-sample differences: what a table of means cannot say."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from ttt_lib.evaluation.scores import SCORES

LEVEL = 0.95  # of every interval


def bootstrap_interval(
    values: np.ndarray, samples: int = 2000, seed: int | np.random.Generator = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values` (N,); NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (samples, len(values)))].mean(1)
    return tuple(float(v) for v in np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))


def paired_summary(gain: np.ndarray, tolerance: float = 1e-3, samples: int = 2000) -> dict[str, float]:
    """Summary of per-sample gains (N,), positive where the sample improved.

    count, mean with its bootstrap interval, improved / unchanged / worse at `tolerance`, best gain and worst loss,
    p-values of the two-sided sign test (zeros dropped) and Wilcoxon signed-rank test; NaN where a test has no data.
    """
    gain = np.asarray(gain, dtype=float)
    low, high = bootstrap_interval(gain, samples)
    up, down = int((gain > 0).sum()), int((gain < 0).sum())
    return {
        "count": len(gain),
        "mean": float(gain.mean()) if len(gain) else float("nan"),
        "low": low,
        "high": high,
        "improved": int((gain > tolerance).sum()),
        "unchanged": int((np.abs(gain) <= tolerance).sum()),
        "worse": int((gain < -tolerance).sum()),
        "best_gain": float(gain.max()) if len(gain) else float("nan"),
        "worst_loss": float(gain.min()) if len(gain) else float("nan"),
        "sign_p": float(stats.binomtest(up, up + down).pvalue) if up + down else float("nan"),
        "wilcoxon_p": float(stats.wilcoxon(gain).pvalue) if up + down else float("nan"),
    }


def in_order(table: pd.DataFrame, keys: list[str], experiments: Iterable[str]) -> pd.DataFrame:
    """The rows sorted by these columns, experiments as they are given."""
    place = {name: i for i, name in enumerate(experiments)}
    return table.sort_values(
        keys, key=lambda column: column.map(place) if column.name == "experiment" else column, ignore_index=True
    )


def paired_gains(metrics: pd.DataFrame, metric: str, score: str) -> pd.DataFrame:
    """Per-sample gain of every experiment over `original`, both by their final predictions.

    metrics: tidy rows (experiment, dataset, sample, prediction, metric, score, value). Returns experiment, dataset,
    sample, before, after, gain (positive is better), experiments in the order in which `metrics` has them. Samples that
    one of the two lacks are left out.
    """
    rows = metrics[(metrics.metric == metric) & (metrics.score == score) & (metrics.prediction == "final")]
    before = rows.loc[rows.experiment == "original", ["dataset", "sample", "value"]].rename(columns={"value": "before"})
    joined = rows.rename(columns={"value": "after"}).merge(before, on=["dataset", "sample"])
    joined["gain"] = SCORES[score].gain(joined["before"], joined["after"])
    columns = ["experiment", "dataset", "sample", "before", "after", "gain"]
    return in_order(joined[columns].dropna(subset=["gain"]), columns[:3], metrics["experiment"].unique())


def summarise(
    gains: pd.DataFrame, tolerance: float = 1e-3, samples: int = 2000, by: tuple[str, ...] = ("experiment",)
) -> pd.DataFrame:
    """`paired_summary` for each group of `paired_gains` rows, one row a group; no rows, but all columns, for none."""
    rows = []
    for key, group in gains.groupby(list(by), sort=False):
        rows.append({**dict(zip(by, key)), **paired_summary(group["gain"].to_numpy(), tolerance, samples)})
    return pd.DataFrame(rows, columns=[*by, *paired_summary(np.zeros(0), samples=1)])
