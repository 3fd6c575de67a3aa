"""Pictures of several photographs: their tracks, depth before and after, and what held-back tracks know."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttt_lib.adaptation.photographs.evidence import Evidence
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.types import Sample
from ttt_lib.report.figures import depth_panel, error_panel, finished, panels, to_array


def plot_scene(
    evidence: Iterable[Evidence], results: Iterable[AdaptResult], samples: Iterable[Sample] | None = None
) -> Figure:
    """A row a photograph: tracks on it (near is bright), measured depth, before, after; with samples also both errors."""
    rows, tracks = [], []
    for known, result, sample in zip(evidence, results, samples if samples is not None else repeat(None)):
        image, before, after = known.photograph.image, result.original.depth, result.final.depth
        measured = known.measured and known.measured.depth
        depths = {"measured between them": measured, "before": before, f"after ({result.decision})": after}
        row = [("photograph and tracks", to_array(image), {})]
        row += [depth_panel(title, depth) for title, depth in depths.items() if depth is not None]
        if sample is not None and sample.depth is not None:
            row.append(error_panel("error before", before, sample.depth))
            row.append(error_panel("error after", after, sample.depth))
        rows.append(row)
        height, width = image.shape[-2:]
        tracks.append((known.used.uv * torch.tensor([width, height]), 1 / known.used.depth))
    figure, axes = panels(rows, 2.7, 2.1)
    for axis, (place, nearness) in zip(axes[:, 0], tracks):
        axis.scatter(place[:, 0], place[:, 1], c=nearness, s=3, cmap="autumn")
    return finished(figure)


def _gain_over(x: pd.Series, table: pd.DataFrame, label: str) -> tuple[Figure, Axes, pd.Series]:
    """A point a photograph: the true gain in delta1 over x."""
    figure, axis = plt.subplots(figsize=(5, 3.3))
    gain = table["depth_final"] - table["depth_original"]
    axis.scatter(x, gain, s=12, alpha=0.6)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set(xlabel=label, ylabel="gain in delta1 (affine depth)", title=f"{len(gain)} photographs")
    return finished(figure), axis, gain


def plot_held_back(table: pd.DataFrame) -> Figure:
    """What the held-back tracks say (improvement of their error) against the true gain in delta1, a point a photograph.

    table: of `runs.scene_study.study`.
    """
    known = table.dropna(subset=["held_back_original", "held_back_corrected"])
    said = known["held_back_original"] - known["held_back_corrected"]
    return _gain_over(said, known, "error taken away at held-back tracks")[0]


def plot_gain(table: pd.DataFrame, by: str) -> Figure:
    """Gain in delta1 of each photograph that was not refused over a column of `study`'s table, and the means."""
    known = table[table["refused"] == ""]
    figure, axis, gain = _gain_over(known[by], known, by)
    means = gain.groupby(known[by]).mean()
    axis.plot(means.index, means.to_numpy(), color="black", marker="o", label="mean")
    axis.legend()
    return figure
