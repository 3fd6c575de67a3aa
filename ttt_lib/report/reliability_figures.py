"""Figures of `04_reliability.ipynb`: estimated against true gains, risk against coverage, failures."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ttt_lib.report.figures import depth_panel, finished, panels
from ttt_lib.runs.gallery import prediction_file

COLOURS = {"accept": "tab:green", "blend": "tab:orange", "reject": "tab:red"}


def plot_estimates(table: pd.DataFrame) -> Figure:
    """The gate's estimate of each sample against the true gain of adapting, coloured by decision."""
    figure, axes = plt.subplots(figsize=(5.2, 4))
    for decision, part in table.groupby("decision"):
        axes.scatter(part.signal_estimate, part.gain_adapted, s=14, label=decision, color=COLOURS.get(decision))
    axes.axhline(0, color="0.7", lw=0.8)
    axes.axvline(0, color="0.7", lw=0.8)
    axes.set(xlabel="estimate", ylabel="true gain of the adapted prediction")
    axes.legend()
    return finished(figure)


def plot_risk_coverage(curves: dict[str, pd.DataFrame]) -> Figure:
    """Gain and harm against the share of samples that are adapted; curves: of `calibration.risk_coverage`, by name."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, curve in curves.items():
        axes[0].plot(curve.coverage, curve.gain, label=f"{name} (n = {len(curve) - 1})")
        axes[1].plot(curve.coverage, curve.worse, label=name)
    last = next(iter(curves.values())).gain.iloc[-1]
    axes[0].plot([0, 1], [0, last], color="0.7", ls=":", label="at random")
    axes[0].set(xlabel="share adapted", ylabel="mean gain in delta1")
    axes[1].set(xlabel="share adapted", ylabel="share losing more than 0.01")
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
