"""Table 1 and what is beside it, as data frames and as text: Markdown, LaTeX, HTML cells, a terminal.

Everything is computed from the runs; nothing is remembered from elsewhere but the published table, marked as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from ttt_lib.evaluation.scores import SCORES, TABLE1_COLUMNS
from ttt_lib.evaluation.selection import SEEN_AGAIN, beyond_selection, certain_losses, selection_gains, worse_elsewhere
from ttt_lib.runs.results import Runs

PUBLISHED = Path(__file__).parents[1] / "assets" / "published_table1.csv"
PUBLISHED_SOURCE = (
    "Herald of Khmelnytskyi National University, 2025, issue 6 part 2 (MoGe-2 ViT-S, 50 samples, RTX 3080)"
)
LONG = {
    "scale_invariant": "scale-inv.", "affine_invariant": "affine-inv.", "rel": "Rel ↓", "delta1": "δ1 ↑",
    "seconds": "s / image",
}  # fmt: skip
SHORT = {
    "depth": "d", "points": "p", "metric": "met", "scale_invariant": "sc", "affine_invariant": "aff", "delta1": "d1"
}  # fmt: skip
COLUMN_NAMES = [f"{metric}_{score}" for metric, score in TABLE1_COLUMNS]


def published_table() -> pd.DataFrame:
    """The published Table 1, one row an experiment; the last column is seconds an image."""
    return pd.read_csv(PUBLISHED, comment="#").set_index("experiment")


def table1(runs: Runs) -> pd.DataFrame:
    """Means over the samples, in the published columns, seconds an image, and n; NaN where nothing was measured.

    One row an experiment, also for one without any score. n: samples with a score; where a mean is over fewer of them
    than another, `runs.notes` say it.
    """
    final = runs.metrics[runs.metrics.prediction == "final"]
    wide = final.assign(column=final.metric + "_" + final.score).pivot_table(
        index="experiment", columns="column", values="value", aggfunc="mean"
    )
    begun = {*runs.metrics["experiment"], *runs.samples["experiment"]}
    experiments = pd.Index([name for name in runs.experiments if name in begun], name="experiment", dtype=object)
    table = wide.reindex(index=experiments, columns=COLUMN_NAMES).astype(float)
    table.columns.name = None
    table["seconds"] = runs.samples.groupby("experiment")["seconds"].mean().astype(float)
    scored = final.dropna(subset=["value"]).drop_duplicates(["experiment", "dataset", "sample"])
    table["n"] = scored.groupby("experiment").size().reindex(table.index, fill_value=0)
    return table


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text: seconds to three decimals, n to none, scores to two; nothing for NaN."""
    digits = {column: 2 if column in COLUMN_NAMES else {"n": 0}.get(column, 3) for column in table}
    text = {name: ["" if pd.isna(value) else f"{value:.{n}f}" for value in table[name]] for name, n in digits.items()}
    return pd.DataFrame(text, index=table.index, dtype=object)


def best_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Which cells are the best of their column as printed (ties count), seconds excepted: a frame of booleans.

    The printed text decides, because rounding a frame can differ from it (1.115 prints as 1.11 and rounds to 1.12).
    """
    best = pd.DataFrame(False, index=table.index, columns=table.columns)
    text = printed(table)
    for column in COLUMN_NAMES:
        values = pd.to_numeric(text[column], errors="coerce")
        target = values.max() if SCORES[column.rsplit("_", 1)[-1]].higher_is_better else values.min()
        best[column] = values == target
    return best


def _headers(table: pd.DataFrame, words: dict[str, str], between: str) -> list[str]:
    """Names of the columns, of these words."""
    scores = [[*metric.split("_", 1), score] for metric, score in TABLE1_COLUMNS]
    others = [[column] for column in table.columns[len(scores) :]]
    return [between.join(words.get(part, part) for part in parts) for parts in scores + others]


def styled(table: pd.DataFrame, bold: str, escape: str) -> Styler:
    """The table for pandas to write as `html` or `latex`, the best cells in `bold`, whatever that is there."""
    shown = printed(table).set_axis(_headers(table, LONG, " "), axis=1).rename_axis(None)
    best = best_cells(table).to_numpy()
    return shown.style.format_index(escape=escape).apply(lambda _: np.where(best, bold, ""), axis=None)


def to_markdown(table: pd.DataFrame) -> str:
    """The table with the best cells in bold."""
    text = printed(table)
    text = text.mask(best_cells(table), "**" + text + "**")
    lines = [f"| experiment | {' | '.join(_headers(table, LONG, ' '))} |", "|---" * (len(text.columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in zip(text.index, text.to_numpy())]
    return "\n".join(lines) + "\n"


def to_latex(table: pd.DataFrame) -> str:
    """A `tabular` with the best cells in bold; needs booktabs."""
    arrows = {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "δ1": r"$\delta_1$"}
    columns = "l" + "r" * table.shape[1]
    code = styled(table, "textbf:--rwrap;", "latex").to_latex(hrules=True, column_format=columns)
    for symbol, command in arrows.items():
        code = code.replace(symbol, command)
    return code


def to_text(table: pd.DataFrame) -> str:
    """The table for a terminal: short column names, one row an experiment."""
    short = table.set_axis(_headers(table, SHORT, "."), axis=1)
    legend = (
        "d: depth, p: points; met: metric, sc: scale-invariant, aff: affine-invariant; rel: lower, d1: higher is better; "
        "n: samples with a score"
    )
    return f"{short.round(3).to_string(na_rep='-')}\n({legend})"


def confound(table: pd.DataFrame) -> pd.DataFrame:
    """The part of a gain that is not training, on the published numbers or ours.

    `unfreeze_encoderSGD_lower_lr` hardly changes the model: its metric columns equal `original`'s. Where its aligned
    columns differ from `original`'s all the same, so does the evaluation. Returns original, the near-zero row, their
    difference, and the best row's difference, one row a column; what the table lacks is left out.
    """
    rows = [name for name in ("original", "unfreeze_encoderSGD_lower_lr", "control_lr0") if name in table.index]
    view = table.loc[rows, COLUMN_NAMES].T
    if "original" not in rows:
        return view
    for name in rows[1:]:
        view[f"{name} - original"] = view[name] - view["original"]
    if "unfreeze_encoder" in table.index:
        view["unfreeze_encoder - original"] = table.loc["unfreeze_encoder", COLUMN_NAMES] - view["original"]
    return view


def control_is_exact(runs: Runs) -> bool | None:
    """Whether `control_lr0` gives exactly the numbers of `original` on the samples that both have; None if no such."""
    final = runs.metrics[runs.metrics.prediction == "final"]
    keys = ["dataset", "sample", "metric", "score"]
    wide = final.pivot(index=keys, columns="experiment", values="value").reindex(columns=["original", "control_lr0"])
    seen = wide.notna().groupby(["dataset", "sample"]).transform("any")
    wide = wide[seen.all(axis=1)]
    return wide["original"].equals(wide["control_lr0"]) if len(wide) else None


SELECTION_LEGEND = (
    "As chosen: gain over original on the very samples and pictures that original's score chose, which the choice is part "
    f"of; the row '{SEEN_AGAIN}' is what the choice alone gives. Over controls: over the one that leaves least of it. Second "
    "look: the same on the same scenes seen again, which nothing was chosen by. A gain is what lies above every control on "
    "both looks, and costs nothing certain in affine-invariant delta1 (95 % intervals, paired bootstrap over the samples)."
)


def chosen_by(runs: Runs) -> tuple[str, str]:
    """Metric and score that chose the samples."""
    metric, _, score = runs.selection["metric"].iloc[0].partition("/")
    return metric, score


def selection_table(
    runs: Runs, bootstrap_samples: int = 2000, of: Sequence[tuple[str, str]] | None = None
) -> pd.DataFrame | None:
    """`beyond_selection` of the runs; None where no score chose the samples.

    of: pairs of metric and score, one table below the other; None: those that chose the samples. `worse_in`: the other
    score that a row loses in (`worse_elsewhere`), which is then no gain.
    """
    if runs.selection is None:
        return None
    losses = certain_losses(runs.metrics, runs.selection, bootstrap_samples)
    every = []
    for metric, score in of or [chosen_by(runs)]:
        gains = selection_gains(runs.metrics, runs.selection, metric, score, bootstrap_samples)
        table = beyond_selection(gains).assign(metric=metric, score=score)
        worse = worse_elsewhere(losses, metric, score)
        table["worse_in"] = [worse.get(key, "") for key in zip(table["group"], table["experiment"])]
        table["gain"] &= table["worse_in"] == ""
        every.append(table)
    return pd.concat(every)


def selection_cells(table: pd.DataFrame) -> pd.DataFrame:
    """`selection_table` as text: mean (interval), and which control it is over."""

    def cell(row: pd.Series, prefix: str) -> str:
        mean, low, high = (row[f"{prefix}_{name}"] for name in ("mean", "low", "high"))
        if pd.isna(mean):
            return ""
        control = row.get(f"{prefix}_control")
        over = f" over {control}" if isinstance(control, str) else ""
        return f"{mean:+.4f} ({low:+.4f}, {high:+.4f}){over}"

    shown = table[["group", "experiment"]].assign(n=table["count"])
    titles = {"first": "as chosen", "over": "over controls", "again": "second look, over controls"}
    for prefix, title in titles.items():
        shown[title] = [cell(row, prefix) for _, row in table.iterrows()]
    verdict = np.where(table["worse_in"] != "", "not shown; " + table["worse_in"], "not shown")
    return shown.assign(gain=np.where(table["gain"], "yes", verdict)).set_index(["group", "experiment"])


def summary_text(runs: Runs) -> str:
    """For a terminal: Table 1, or of chosen samples what is left beyond selection; then notes and what was left out."""
    selected = selection_table(runs)
    if selected is None:
        lines = [to_text(table1(runs))]
    else:
        lines = [selection_cells(selected).to_string(), f"({SELECTION_LEGEND})"]
    lines += runs.notes
    if len(runs.left_out):
        lines += ["left out:", runs.left_out.to_string(index=False)]
    return "\n".join(lines)
