"""Gains on samples that were chosen by a score, beside what the choice alone gives.

A sample that is chosen because it scores low owes this in part to chance. Whatever changes its prediction a little, or the
same scene seen again, scores better on average (regression to the mean), and easy samples score worse. So each row is
compared with controls that have learned nothing, on the look that the choice was made on and on a second one
(`data/again.py`). What stays is shown only where it is above every control on both.
"""

from __future__ import annotations

import pandas as pd

from ttt_lib.data.again import AGAIN
from ttt_lib.evaluation.paired import bootstrap_interval
from ttt_lib.evaluation.scores import SCORES

GROUPS = ("hard", "random", "easy")
CONTROLS = ("original", "control_lr0", "control_random_weights", "control_random_prediction", "tta")
ELSEWHERE = ("depth_affine_invariant", "points_affine_invariant")  # whose delta1 a gain must not cost
LOOKS = {"first": "", "again": AGAIN}  # what they put behind the names of the sets
SEEN_AGAIN = "original, seen again"


def is_control(experiment: str) -> bool:
    """Whether it has learned nothing; yours, whose names begin so, count."""
    return experiment in CONTROLS or experiment.startswith("control_")


def selection_gains(
    metrics: pd.DataFrame, chosen: pd.DataFrame, metric: str, score: str, samples: int = 2000,
    controls: tuple[str, ...] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Every row against every control, on both looks at each group of samples.

    Args:
        metrics: tidy rows (experiment, dataset, sample, prediction, metric, score, value) of both looks.
        chosen: rows (group, dataset, sample), as `selection.csv` has them.
        metric, score: of the gain.
        samples: of the bootstrap.
        controls: only these; None: all that there are.

    Returns:
        Rows (group, experiment, look, control) with the count, mean and 95 % interval (`low`, `high`) of the paired gain,
        positive where the row is better. `original, seen again` against `original` is what the choice alone gives.

    Example:
        >>> rows = [
        ...     (experiment, dataset, sample, "final", "depth", "delta1", value)
        ...     for experiment, values in {"original": (0.1, 0.2, 0.4, 0.5), "mine": (0.2, 0.3, 0.5, 0.6)}.items()
        ...     for (dataset, sample), value in zip([("s", "a"), ("s", "b"), ("s.again", "a"), ("s.again", "b")], values)
        ... ]
        >>> columns = ["experiment", "dataset", "sample", "prediction", "metric", "score", "value"]
        >>> chosen = pd.DataFrame({"group": "hard", "dataset": "s", "sample": ["a", "b"]})
        >>> gains = selection_gains(pd.DataFrame(rows, columns=columns), chosen, "depth", "delta1", samples=10)
        >>> gains[["experiment", "look", "mean"]].round(3).to_numpy().tolist()
        [['mine', 'first', 0.1], ['mine', 'again', 0.1], ['original, seen again', 'first', 0.3]]
    """
    rows = metrics[(metrics["metric"] == metric) & (metrics["score"] == score) & (metrics["prediction"] == "final")]
    wide = rows.pivot_table(index=["dataset", "sample"], columns="experiment", values="value", sort=False)
    experiments = [name for name in rows["experiment"].unique() if name in wide]
    found = []
    for group, part in chosen.groupby("group", sort=False):
        looks = {}
        for look, suffix in LOOKS.items():
            keys = pd.MultiIndex.from_arrays([part["dataset"] + suffix, part["sample"]])
            looks[look] = wide.reindex(keys).reset_index(drop=True)
        pairs = [
            (name, look, control, values[control], values[name])
            for look, values in looks.items() for name in experiments for control in experiments
            if (is_control(control) if controls is None else control in controls) and control != name
        ]  # fmt: skip
        if "original" in experiments:
            pairs.append((SEEN_AGAIN, "first", "original", looks["first"]["original"], looks["again"]["original"]))
        for name, look, control, before, after in pairs:
            gain = SCORES[score].gain(before, after).dropna().to_numpy()
            if len(gain):
                about = {"group": group, "experiment": name, "look": look, "control": control}
                low, high = bootstrap_interval(gain, samples)
                found.append({**about, "count": len(gain), "mean": gain.mean(), "low": low, "high": high})
    return pd.DataFrame(found, columns=["group", "experiment", "look", "control", "count", "mean", "low", "high"])


def certain_losses(
    metrics: pd.DataFrame, chosen: pd.DataFrame, samples: int = 2000
) -> dict[str, dict[tuple[str, str], float]]:
    """Rows that lose against `original` in delta1 of each of `ELSEWHERE`: metric -> (group, experiment) -> mean gain.

    Only what is certain counts: an interval below zero on either look, but not on the first one of easy samples, where
    `original` had luck. Of both looks the larger loss.

    Example:
        >>> rows = [
        ...     (experiment, dataset, sample, "final", "depth_affine_invariant", "delta1", value)
        ...     for experiment, values in {"original": (0.8, 0.9), "mine": (0.7, 0.8)}.items()
        ...     for dataset in ("s", "s.again") for sample, value in zip("ab", values)
        ... ]
        >>> columns = ["experiment", "dataset", "sample", "prediction", "metric", "score", "value"]
        >>> chosen = pd.DataFrame({"group": "hard", "dataset": "s", "sample": ["a", "b"]})
        >>> losses = certain_losses(pd.DataFrame(rows, columns=columns), chosen, samples=10)
        >>> worse_elsewhere(losses, "depth_metric", "delta1")
        {('hard', 'mine'): 'depth_affine_invariant/delta1 -0.100'}
    """
    found = {}
    for other in ELSEWHERE:
        gains = selection_gains(metrics, chosen, other, "delta1", samples, controls=("original",))
        lucky = (gains["group"] == "easy") & (gains["look"] == "first") | (gains["experiment"] == SEEN_AGAIN)
        lost = gains[(gains["high"] < 0) & ~lucky]
        found[other] = lost.groupby(["group", "experiment"], sort=False)["mean"].min().to_dict()
    return found


def worse_elsewhere(
    losses: dict[str, dict[tuple[str, str], float]], metric: str, score: str
) -> dict[tuple[str, str], str]:
    """Rows of `certain_losses` in another score than this one: (group, experiment) -> the worst, and how much.

    What is hard in one score stays so when it is seen again; a prediction that is worse in all else may be less wrong
    there.
    """
    found: dict[tuple[str, str], tuple[float, str]] = {}
    for other, lost in losses.items():
        for key, mean in lost.items() if (other, "delta1") != (metric, score) else ():
            found[key] = min(found.get(key, (0.0, "")), (mean, f"{other}/delta1 {mean:+.3f}"))
    return {key: words for key, (_, words) in found.items()}


def beyond_selection(gains: pd.DataFrame) -> pd.DataFrame:
    """One row a group and experiment of `selection_gains`: what was published so far, and what is left of it.

    `first_*`: gain over `original` on the samples as they were chosen, which selection is part of. `over_*` and `again_*`:
    over the control that leaves least of it (`over_control`, `again_control`), on that look and on the second one.
    `gain`: whether the intervals over every control, on both looks, lie above zero. (Easy samples were chosen where
    `original` had luck, so on the first look they must win that back.)
    """

    def columns(prefix: str, row: pd.Series) -> dict[str, float]:
        return {f"{prefix}_{name}": row[name] for name in ("mean", "low", "high")}

    found = []
    for (group, name), rows in gains[gains["experiment"] != "original"].groupby(["group", "experiment"], sort=False):
        record = {"group": group, "experiment": name, "count": rows["count"].max(), "gain": name != SEEN_AGAIN}
        plain = rows[(rows["look"] == "first") & (rows["control"] == "original")]
        record |= columns("first", plain.iloc[0]) if len(plain) else {}
        for prefix, look in [("over", "first"), ("again", "again")] if name != SEEN_AGAIN else []:
            those = rows[rows["look"] == look].dropna(subset=["low"])
            if len(those):
                least = those.loc[those["mean"].idxmin()]
                record |= {**columns(prefix, least), f"{prefix}_control": least["control"]}
            record["gain"] &= bool(len(those)) and bool((those["low"] > 0).all())
        found.append(record)
    names = [f"{prefix}_{name}" for prefix in ("first", "over", "again") for name in ("mean", "low", "high")]
    return pd.DataFrame(found).reindex(
        columns=["group", "experiment", "count", *names, "over_control", "again_control", "gain"]
    )
