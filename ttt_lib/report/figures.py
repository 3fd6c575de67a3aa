"""Pictures of single results: before and after, tracks, loss curves, point clouds. A study's are in `study_figures.py`."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.photographs.evidence import Evidence
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.types import Sample
from ttt_lib.geometry.cameras import shrunk

SHOWN = 640  # pixels of the longer side of pictures that are shown
Panel = tuple[str, np.ndarray, dict[str, Any]]  # title, picture, options of `imshow`


def picture(figure: Figure, kind: str, **options: Any) -> bytes:
    """The bytes of a figure's picture; kind: `png` or `jpeg`; options: of `savefig`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def encoded(content: bytes) -> str:
    """Bytes as pages and notebooks hold them: base64."""
    return base64.b64encode(content).decode("ascii")


def to_array(image: Tensor) -> np.ndarray:
    """(3,H,W) in [0,1] -> (H,W,3) for matplotlib."""
    return image.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy()


def inverse_depth(depth: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None) -> np.ndarray:
    """1/depth scaled to its 98th percentile, NaN where unknown: near is bright, and scale does not matter."""
    depth = torch.as_tensor(depth).detach().float().cpu()
    known = torch.isfinite(depth) & (depth > 0)
    if mask is not None:
        known &= torch.as_tensor(mask).bool().cpu()
    values = torch.where(known, 1 / depth, torch.nan).numpy()
    top = np.nanpercentile(values, 98) if known.any() else 1.0
    return np.clip(values / max(float(top), 1e-12), 0, 1)


def relative_error(depth: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> np.ndarray:
    """|d - t| / t after scaling the prediction by the median ratio; NaN where the truth is unknown."""
    depth, truth = (torch.as_tensor(map_).float().cpu() for map_ in (depth, truth))
    ratio = np.nanmedian(truth / depth)
    return ((depth * ratio - truth).abs() / truth).numpy()


def depth_panel(title: str, depth: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None) -> Panel:
    """Inverse depth: near is bright."""
    return title, inverse_depth(depth, mask), {"cmap": "magma"}


def error_panel(title: str, depth: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> Panel:
    """Relative error, from 0 to 0.5 and more."""
    return title, relative_error(depth, truth), {"cmap": "viridis", "vmin": 0, "vmax": 0.5}


def finished(figure: Figure, **layout: Any) -> Figure:
    """The figure, laid out (`tight_layout`) and closed: a notebook shows it where it is asked to, and only there."""
    figure.tight_layout(**layout)
    plt.close(figure)
    return figure


def panels(
    rows: Sequence[Sequence[Panel]], width: float, height: float, fontsize: int = 9
) -> tuple[Figure, np.ndarray]:
    """Pictures of so many inches in rows, each under its title: the figure, and its axes (rows, columns)."""
    count, columns = max(len(rows), 1), max(map(len, rows), default=1)
    figure, axes = plt.subplots(count, columns, figsize=(width * columns, height * count), squeeze=False)
    for line, row in zip(axes, rows):
        for axis, (title, shown, options) in zip(line, row):
            axis.imshow(shown, **options)
            axis.set_title(title, fontsize=fontsize)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def change_panel(title: str, before: Tensor, after: Tensor, mask: Tensor | None = None) -> Panel:
    """How many times the depth `after` is the depth `before`: 0.8 and less is blue, 1.2 and more red."""
    ratio = after / before if mask is None else (after / before).masked_fill(~mask.bool(), torch.nan)
    return title, ratio.detach().cpu().numpy(), {"cmap": "coolwarm", "vmin": 0.8, "vmax": 1.2}


def shown(map_: Tensor) -> Tensor:
    """A map (H,W) at a size to be looked at: else most of the time for a photograph went into pixels that no figure shows."""
    return F.interpolate(map_[None, None].float(), shrunk(map_.shape, SHOWN), mode="nearest-exact")[0, 0].to(map_.dtype)


def plot_before_after(image: Tensor, result: AdaptResult, truth: Tensor | None = None) -> Figure:
    """Image, inverse depth before and after, and their relative change; with truth also the truth and both errors.

    At most `SHOWN` pixels of each side are drawn.
    """
    image = F.interpolate(image[None], shrunk(image.shape[-2:], SHOWN), mode="area")[0]
    before, after = shown(result.original.depth), shown(result.final.depth)
    masks = [None if each.mask is None else shown(each.mask) for each in (result.original, result.final)]
    rows = [[
        ("image", to_array(image), {}),
        depth_panel("before", before, masks[0]),
        depth_panel(f"after ({result.decision})", after, masks[1]),
        change_panel("after / before", before, after),
    ]]  # fmt: skip
    if truth is not None:
        truth = shown(truth)
        rows.append([
            depth_panel("truth", truth),
            error_panel("error before", before, truth),
            error_panel("error after", after, truth),
        ])  # fmt: skip
    return finished(panels(rows, 3.2, 2.4)[0])


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


def plot_history(history: pd.DataFrame) -> Figure:
    """The loss of each sample over the optimizer steps (`history.csv`); nothing of those that had no loss."""
    figure, axis = plt.subplots(figsize=(6, 3))
    losses = history.reindex(columns=["dataset", "sample", "step", "loss"]).dropna(subset=["loss"])
    for (_, sample), rows in losses.groupby(["dataset", "sample"]):
        axis.plot(rows["step"], rows["loss"], marker=".", label=sample)
    axis.set(xlabel="optimizer step", ylabel="loss on the views")
    if axis.lines:
        axis.legend(fontsize=7)
    return finished(figure)


def point_cloud(image: Tensor, points: Tensor, mask: Tensor | None = None, most: int = 8000) -> go.Figure:
    """An interactive plotly point cloud; image (3,H,W), points (H,W,3), mask (H,W); at most `most` points.

    Axes as the camera sees them: x right, z forward, -y up.
    """
    image = F.interpolate(image[None], points.shape[:2], mode="area")[0].permute(1, 2, 0)
    depth = points[..., 2]
    keep = torch.isfinite(points).all(-1) & (depth > 0)
    keep &= depth < 20 * depth[keep].median()
    if mask is not None:
        keep &= mask
    return cloud_figure(points[keep].cpu().numpy(), (image[keep].cpu().numpy() * 255).astype(int), most)


def cloud_figure(cloud: np.ndarray, colour: np.ndarray, most: int = 60_000) -> go.Figure:
    """At most so many of the points (N,3), in a camera's axes with colours (N,3) from 0 to 255, as a plotly figure."""
    return go.Figure(cloud_parts(cloud, colour, most))


def cloud_parts(cloud: np.ndarray, colour: np.ndarray, most: int = 60_000) -> dict[str, Any]:
    """As `cloud_figure`, as plain data: a figure checks the colour of each point, a second for a page."""
    if len(cloud) > most:
        chosen = np.random.default_rng(0).choice(len(cloud), most, replace=False)
        cloud, colour = cloud[chosen], colour[chosen]
    digits = 4 - int(np.floor(np.log10(np.abs(cloud).max(initial=1e-6))))
    x, y, z = cloud.round(digits).T
    marker = {"size": 2, "color": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colour]}
    scatter = {"type": "scatter3d", "mode": "markers", "x": x, "y": z, "z": -y, "marker": marker}
    margin = {"l": 0, "r": 0, "t": 0, "b": 0}
    return {"data": [scatter], "layout": {"scene": {"aspectmode": "data"}, "margin": margin, "height": 380}}
