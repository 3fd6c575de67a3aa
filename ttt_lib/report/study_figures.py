"""Figures of studies: Figure 4, loss curves, gains against what they cost or were expected to be, and single samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttt_lib.evaluation.paired import summarise
from ttt_lib.geometry.cameras import unproject
from ttt_lib.report.figures import depth_panel, error_panel, finished, panels, point_cloud
from ttt_lib.runs.gallery import prediction_file
from ttt_lib.runs.results import Runs

COLOURS = {"accept": "tab:green", "blend": "tab:orange", "reject": "tab:red"}


def figure4(gains: pd.DataFrame, tolerance: float = 1e-3, title: str = "") -> Figure:
    """Per-sample before and after of every experiment, and how many improved and got worse."""
    experiments = [name for name in gains["experiment"].unique() if name != "original"]
    columns = min(5, max(len(experiments), 1))
    rows = -(-len(experiments) // columns)
    figure = plt.figure(figsize=(2.4 * columns, 2.4 * rows + 3))
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1] * rows + [1.2], hspace=0.6, wspace=0.35)
    for i, name in enumerate(experiments):
        axis = figure.add_subplot(grid[i // columns, i % columns])
        group = gains[gains.experiment == name]
        axis.scatter(group["before"], group["after"], s=8, c=np.where(group["gain"] >= 0, "tab:green", "tab:red"))
        values = group[["before", "after"]].to_numpy(float)
        low, high = values.min(), values.max()
        axis.plot([low, high], [low, high], "k--", linewidth=0.6)
        axis.set_title(name.replace("unfreeze_encoder", "unfreeze"), fontsize=7)
        axis.tick_params(labelsize=6)
    axis = figure.add_subplot(grid[rows, :])
    table = summarise(gains[gains.experiment != "original"], tolerance, samples=2).set_index("experiment")
    bars = table.reindex(experiments)[["improved", "worse"]] * [1, -1]
    bars.plot.bar(ax=axis, stacked=True, color=["tab:green", "tab:red"], rot=40, fontsize=7, xlabel="")
    figure.suptitle(title, fontsize=9)
    plt.close(figure)
    return figure


def selection_figure(table: pd.DataFrame) -> Figure:
    """`selection_table`: gains as chosen (gray) and what is left over controls on the second look, a panel a group."""
    groups = table["group"].unique()
    figure, axes = plt.subplots(1, max(len(groups), 1), figsize=(11, 1.4 + 0.3 * table["experiment"].nunique()),
                                sharex=True, sharey=True, squeeze=False, layout="constrained")  # fmt: skip
    looks = (("first", -0.15, "tab:gray", "as chosen"), ("again", 0.15, "tab:blue", "second look, over controls"))
    for axis, group in zip(axes[0], groups):
        rows = table[table["group"] == group].set_index("experiment")
        for prefix, beside, color, label in looks:
            mean, low, high = (rows[f"{prefix}_{name}"].to_numpy(float) for name in ("mean", "low", "high"))
            bars = np.maximum(np.stack([mean - low, high - mean]), 0)  # of one sample the interval is unknown
            style = {"fmt": "o", "color": color, "markersize": 4, "linewidth": 1, "label": label}
            axis.errorbar(mean, np.arange(len(rows)) + beside, xerr=bars, **style)
        axis.axvline(0, color="k", linewidth=0.6)
        axis.set_title(f"{group}, {over(rows['count'])}", fontsize=8)
        axis.set_yticks(range(len(rows)), rows.index, fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=2, fontsize=7)
    figure.suptitle("gain in " + ", ".join(sorted(set(table["metric"] + " " + table["score"]))), fontsize=9)
    plt.close(figure)
    return figure


def over(counts: pd.Series) -> str:
    """Over how many samples means are: `n = 5`, or `n = 3 to 5`.

    Example:
        >>> over(pd.Series([3, 5, 4]))
        'n = 3 to 5'
    """
    few, most = (0, 0) if not len(counts) else (int(counts.min()), int(counts.max()))
    return f"n = {most}" if few == most else f"n = {few} to {most}"


def loss_curves(history: pd.DataFrame) -> Figure:
    """Mean loss over the samples, by passes, relative to each sample's first step."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for name in history["experiment"].unique():
        rows = history[history.experiment == name].dropna(subset=["loss"])
        first = rows.groupby(["dataset", "sample"])["loss"].transform("first")  # rows are in the order of the steps
        curve = (rows["loss"] / first).groupby(rows["passes"]).agg(["mean", "count"])
        axis.plot(curve.index, curve["mean"].to_numpy(), marker=".", label=f"{name} ({over(curve['count'])})")
    axis.set(xlabel="passes", ylabel="loss / loss of the first step")
    if axis.lines:
        axis.legend(fontsize=6, ncol=2)
    return finished(figure)


def pareto(gains: pd.DataFrame, samples: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Mean gain against seconds an image, and the table with those that nothing beats in both (`front`); n: samples."""
    table = pd.DataFrame({
        "gain": gains.groupby("experiment")["gain"].mean(),
        "seconds": samples.groupby("experiment")["seconds"].mean(),
        "n": gains.groupby("experiment")["gain"].count(),
    }).astype(float).dropna()  # fmt: skip
    table = table.sort_values(["seconds", "gain"], ascending=[True, False])
    table["front"] = table.gain > table.gain.cummax().shift(fill_value=-np.inf)
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.scatter(table.seconds, table.gain, c=np.where(table.front, "tab:orange", "tab:gray"))
    axis.plot(table.seconds[table.front], table.gain[table.front], "tab:orange", linewidth=1)
    for row in table.itertuples():
        label = row.Index if table.n.nunique() == 1 else f"{row.Index} (n = {row.n:.0f})"
        axis.annotate(label, (row.seconds, row.gain), fontsize=6)
    axis.set(xlabel="seconds an image", ylabel=f"mean gain, {over(table.n)}")
    if len(table):
        axis.set_xscale("log")
    axis.axhline(0, color="k", linewidth=0.5)
    return finished(figure), table


def best_row(front: pd.DataFrame) -> str | None:
    """The trained experiment of `pareto`'s table with the highest mean gain; None if there is none."""
    trained = front.drop(index=["original", "control_lr0"], errors="ignore")
    return trained["gain"].idxmax() if len(trained) else None


def gallery_samples(gains: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """The best two and the worst two samples of an experiment, best first."""
    rows = gains[gains.experiment == experiment].sort_values("gain", ascending=False)
    return pd.concat([rows.head(2), rows.tail(2)]).drop_duplicates(["dataset", "sample"])


def _kept(runs: Runs, row: Any) -> dict[str, np.ndarray]:
    """What was kept of the prediction of a row (experiment, dataset, sample): arrays by name; none if it is not there."""
    shards = [shard for shard in runs.shards if shard.parent.name == row.experiment]
    path = prediction_file(shards, row.dataset, row.sample)
    return dict(np.load(path)) if path is not None else {}


def gallery(runs: Runs, chosen: pd.DataFrame) -> Figure:
    """Image, both depths and both error maps of each chosen row (experiment, dataset, sample, gain)."""
    lines = []
    for row in chosen.itertuples():
        data = _kept(runs, row)
        if not data:
            continue
        depths = {"before": data["depth_original"], "after": data["depth_final"]}
        line = [(f"{row.sample}: {row.gain:+.3f}", data["image"], {})]
        line += [depth_panel(title, depth) for title, depth in depths.items()]
        if "depth_truth" in data:
            line += [error_panel(f"error {title}", depth, data["depth_truth"]) for title, depth in depths.items()]
        lines.append(line)
    return finished(panels(lines, 2.4, 2.1, fontsize=8)[0])


def gallery_cloud(runs: Runs, row: Any) -> go.Figure | None:
    """Plotly point cloud of a gallery row, as finally predicted; None if it was not kept."""
    data = _kept(runs, row)
    if not data:
        return None
    points = unproject(torch.from_numpy(data["depth_final"]), torch.from_numpy(data["intrinsics"]).float())
    return point_cloud(torch.from_numpy(data["image"]).permute(2, 0, 1).float() / 255, points)


def _gain_over(table: pd.DataFrame, x: str, label: str) -> Axes:
    """A point a photograph: the true gain in delta1 over the column x."""
    table = table.assign(gain=table["depth_final"] - table["depth_original"])
    axis = table.plot.scatter(x, "gain", s=12, alpha=0.6, figsize=(5, 3.3), title=f"{len(table)} photographs")
    axis.set(xlabel=label, ylabel="gain in delta1 (affine depth)")
    axis.axhline(0, color="gray", linewidth=0.8)
    return axis


def plot_held_back(table: pd.DataFrame) -> Figure:
    """What the held-back tracks say (improvement of their error) against the true gain in delta1, a point a photograph.

    table: of `runs.scene_study.study`.
    """
    known = table.dropna(subset=["held_back_original", "held_back_corrected"])
    known = known.assign(said=known["held_back_original"] - known["held_back_corrected"])
    return finished(_gain_over(known, "said", "error taken away at held-back tracks").figure)


def plot_gain(table: pd.DataFrame, by: str) -> Figure:
    """Gain in delta1 of each photograph that was not refused over a column of `study`'s table, and the means."""
    known = table[table["refused"] == ""]
    axis = _gain_over(known, by, by)
    means = known["depth_final"].sub(known["depth_original"]).groupby(known[by]).mean()
    axis.plot(means.index, means.to_numpy(), color="black", marker="o", label="mean")
    axis.legend()
    return finished(axis.figure)


def plot_estimates(table: pd.DataFrame) -> Figure:
    """The gate's estimate of each sample against the true gain of adapting, coloured by decision."""
    figure, axis = plt.subplots(figsize=(5.2, 4))
    for decision, part in table.groupby("decision"):
        axis.scatter(part.signal_estimate, part.gain_adapted, s=14, label=decision, color=COLOURS.get(decision))
    axis.axhline(0, color="0.7", lw=0.8)
    axis.axvline(0, color="0.7", lw=0.8)
    axis.set(xlabel="estimate", ylabel="true gain of the adapted prediction")
    axis.legend()
    return finished(figure)


def plot_risk_coverage(curves: dict[str, pd.DataFrame]) -> Figure:
    """Gain and harm against the share of samples that are adapted; curves: of `calibration.risk_coverage`, by name."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, column, label in zip(axes, ("gain", "worse"), ("mean gain in delta1", "share losing more than 0.01")):
        for name, curve in curves.items():
            axis.plot(curve.coverage, curve[column], label=f"{name} (n = {len(curve) - 1})")
        axis.set(xlabel="share adapted", ylabel=label)
    last = next(iter(curves.values())).gain.iloc[-1]
    axes[0].plot([0, 1], [0, last], color="0.7", ls=":", label="at random")
    axes[0].legend()
    return finished(figure)


def plot_failures(rows: pd.DataFrame, shards: list[Path]) -> Figure:
    """Image, original and adapted inverse depth and where they differ, of the samples in `rows` (dataset, sample).

    shards: folders of results of runs that measured (`gate.mode: measure`), whose final prediction is the adapted one.
    """
    lines = []
    for _, row in rows.iterrows():
        with np.load(prediction_file(shards, row.dataset, row["sample"])) as content:
            image, before, after = (content[key] for key in ("image", "depth_original", "depth_final"))
        ratio = np.log(np.maximum(after, 1e-6) / np.maximum(before, 1e-6))
        ratio -= np.nanmedian(ratio)
        limit = max(float(np.nanquantile(np.abs(ratio), 0.99)), 1e-3)
        lines.append([
            ("image", image, {}),
            depth_panel("original", before),
            depth_panel(f"adapted (gate: {row.decision})", after),
            (f"change of log depth, within {limit:.2f}", ratio, {"cmap": "RdBu", "vmin": -limit, "vmax": limit}),
        ])  # fmt: skip
    return finished(panels(lines, 2.75, 2.3)[0])
