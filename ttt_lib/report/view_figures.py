"""Pictures of views: what the student sees, its target, what the mask calls known, and which views a run trains on."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ttt_lib.adaptation.adapter import working_image
from ttt_lib.adaptation.batches import loss_batch
from ttt_lib.adaptation.ensemble import predict_ensemble
from ttt_lib.adaptation.gradients import view_loss
from ttt_lib.adaptation.losses.presets import resolved
from ttt_lib.adaptation.teacher import draw_views, make_renderer
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.seeds import sample_generator
from ttt_lib.core.types import Sample
from ttt_lib.models.base import GeometryModel
from ttt_lib.report.figures import finished, inverse_depth, panels, to_array
from ttt_lib.report.study_figures import over
from ttt_lib.views.carry import View

UNKNOWN, SKY = (0.85, 0.1, 0.55), (0.45, 0.7, 0.95)
ABOVE = 3000  # points of a cloud seen from above, about


def first_views(network: GeometryModel, sample: Sample, config: ExperimentConfig, passes: int = 3) -> tuple[View, list]:
    """The views of the first passes that `adapt` makes for this sample, and the loss of each pass before any training.

    They are the same views, pixel by pixel, as long as the target is the original model's prediction, which it is
    until its first refresh. The loss takes numbers from the same generator.
    """
    config, image = resolved(config, network), working_image(sample.image.to(network.device), config.views.longest_side)
    target = predict_ensemble(network, image, config.ensemble.members if config.ensemble.target else [])
    generator = sample_generator(config.seed, f"{sample.dataset}/{sample.name}")
    renderer = make_renderer(config, image.device)
    views, losses = [], []
    for _ in range(passes):
        view = draw_views(image, target, config, generator, renderer)
        views.append(view)
        if config.train.method != "tta":
            losses.append(view_loss(network, loss_batch(view, config, generator), config))
    return join(views), losses


def join(views: list[View]) -> View:
    """Several batches of views as one, with their counts added."""
    names = ("image", "points", "mask", "negative", "intrinsics", "transform")
    joined = {name: torch.cat([getattr(view, name) for view in views]) for name in names}
    stats = {key: sum(view.stats[key] for view in views) for key in views[0].stats}
    return View(**joined, kind=[kind for view in views for kind in view.kind], stats=stats)


def plot_row(pictures: dict[str, np.ndarray | Tensor], width: float = 2.6, **options: Any) -> Figure:
    """Pictures side by side under their titles: images (3,H,W), or maps (H,W) with `imshow` options for them."""
    arrays = {
        title: to_array(picture) if isinstance(picture, Tensor) and picture.ndim == 3 else np.asarray(picture)
        for title, picture in pictures.items()
    }
    height = max(array.shape[0] / array.shape[1] for array in arrays.values()) * width + 0.3
    row = [(title, array, options if array.ndim == 2 else {}) for title, array in arrays.items()]
    return finished(panels([row], width, height, fontsize=8)[0], pad=0.3)


def paint_mask(image: Tensor, known: Tensor, negative: Tensor | None = None) -> np.ndarray:
    """The image (3,H,W) with unknown pixels painted magenta and sky (negative) pale blue: (H,W,3)."""
    array = to_array(image).copy()
    array[~known.cpu().numpy()] = UNKNOWN
    if negative is not None:
        array[(negative & ~known).cpu().numpy()] = SKY
    return array


def plot_views(view: View, titles: list[str] | None = None, width: float = 2.4) -> Figure:
    """One column a view: image, inverse depth of the target, and known (as it is), sky (blue), unknown (magenta)."""
    count, (height, wide) = len(view.image), view.image.shape[-2:]
    figure, axes = plt.subplots(3, count, figsize=(width * count, 3 * width * height / wide + 0.4), squeeze=False)
    for i in range(count):
        axes[0, i].imshow(to_array(view.image[i]))
        axes[1, i].imshow(inverse_depth(view.points[i, ..., 2], view.mask[i]), cmap="magma", vmin=0, vmax=1)
        axes[1, i].set_facecolor("0.5")
        axes[2, i].imshow(paint_mask(view.image[i], view.mask[i], view.negative[i]))
        axes[0, i].set_title(titles[i] if titles else view.kind[i].replace("+photometric", "+colour"), fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, name in zip(axes[:, 0], ("the student sees", "target, 1 / depth", "known")):
        axis.set_ylabel(name, fontsize=8)
    return finished(figure, pad=0.3)


def plot_from_above(clouds: dict[str, Tensor]) -> Figure:
    """Point maps (H,W,3) seen from above: x to the right, z away from the camera. Each under its own name."""
    figure, axis = plt.subplots(figsize=(4.5, 3.6))
    for (name, points), colour in zip(clouds.items(), ("tab:blue", "tab:red", "tab:green")):
        cloud = points.reshape(-1, 3)[torch.isfinite(points).all(-1).reshape(-1)]
        cloud = cloud[:: max(1, len(cloud) // ABOVE)].cpu()
        axis.scatter(cloud[:, 0], cloud[:, 2], s=0.6, color=colour)
        axis.plot([], [], "o", markersize=4, color=colour, label=name)
    axis.plot(0, 0, "k^", markersize=6, label="camera")
    axis.set(xlabel="x", ylabel="z")
    axis.set_aspect("equal", adjustable="datalim")
    axis.legend(fontsize=8, loc="lower right")
    return finished(figure)


def plot_costs(costs: pd.DataFrame) -> Figure:
    """Mean over views of the loss of `exact_targets.compare_targets`, one bar a target; log scale."""
    groups = costs.groupby("target", sort=False)["loss"]
    mean, counts = groups.mean(), groups.count()
    figure, axis = plt.subplots(figsize=(6, 0.4 * len(mean) + 0.8))
    wrong = [any(word in name for word in ("kept", "plain", "no mask")) for name in mean.index]
    axis.barh(mean.index, mean.clip(lower=1e-8), color=["tab:red" if bad else "tab:blue" for bad in wrong])
    axis.set(xscale="log", xlabel=f"loss of a perfect student, mean over views ({over(counts)})")
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    return finished(figure)
