"""Pictures of several photographs: their tracks, depth before and after, and what held-back tracks know."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttt_lib.adaptation.photographs.evidence import Evidence
from ttt_lib.adaptation.photographs.scene import adapt_scene
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.types import Sample
from ttt_lib.data.catalog import open_dataset
from ttt_lib.models.load import load_model
from ttt_lib.report.figures import inverse_depth, relative_error, to_array
from ttt_lib.runs.catalog import NOTEBOOKS
from ttt_lib.runs.experiment import load_with_profile
from ttt_lib.runs.scene_study import reconstruct_samples


def plot_scene(
    evidence: Iterable[Evidence], results: Iterable[AdaptResult], samples: Iterable[Sample] | None = None
) -> Figure:
    """A row a photograph: tracks on it (near is bright), measured depth, before, after; with samples also both errors."""
    rows = list(zip(evidence, results, samples if samples is not None else [None] * 10_000))
    columns = 6 if samples is not None else 4
    figure, axes = plt.subplots(len(rows), columns, figsize=(2.7 * columns, 2.1 * len(rows)), squeeze=False)
    for axis_row, (known, result, sample) in zip(axes, rows):
        image, tracks = known.photograph.image, known.used
        height, width = image.shape[-2:]
        before, after = result.original.depth, result.final.depth
        depths = {"measured between them": known.measured, "before": before, f"after ({result.decision})": after}
        show = [("photograph and tracks", to_array(image), {})]
        show += [(title, inverse_depth(d), {"cmap": "magma"}) for title, d in depths.items() if d is not None]
        if sample is not None and sample.depth is not None:
            limits = {"cmap": "viridis", "vmin": 0, "vmax": 0.5}
            errors = {"error before": before, "error after": after}
            show += [(title, relative_error(d, sample.depth), limits) for title, d in errors.items()]
        for axis in axis_row:
            axis.axis("off")
        for axis, (title, picture, options) in zip(axis_row, show):
            axis.imshow(picture, **options)
            axis.set_title(title, fontsize=9)
        uv = tracks.uv * tracks.uv.new_tensor([width, height])
        axis_row[0].scatter(uv[:, 0], uv[:, 1], c=1 / tracks.depth, s=3, cmap="autumn")
    figure.tight_layout()
    plt.close(figure)
    return figure


def save_scene_overview(path: str) -> None:
    """README's picture: the motorcycle's two photographs under the experiment `scene`, with their truth."""
    model, samples = load_model("tiny"), list(open_dataset("motorcycle", width=640, height=432).readable())
    config = load_with_profile(NOTEBOOKS / "experiments" / "scene.yaml", "demo", None)
    adapted = adapt_scene(model, reconstruct_samples(model, samples), config)
    figure = plot_scene(adapted.evidence, [adapted.result(known) for known in adapted.evidence], samples)
    figure.savefig(path, dpi=75, pil_kwargs={"quality": 85})


def _gain_over(x: pd.Series, table: pd.DataFrame, label: str) -> tuple[Figure, Axes, pd.Series]:
    """A point a photograph: the true gain in delta1 over x."""
    figure, axis = plt.subplots(figsize=(5, 3.3))
    gain = table["depth_final"] - table["depth_original"]
    axis.scatter(x, gain, s=12, alpha=0.6)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set(xlabel=label, ylabel="gain in delta1 (affine depth)", title=f"{len(gain)} photographs")
    figure.tight_layout()
    plt.close(figure)
    return figure, axis, gain


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
