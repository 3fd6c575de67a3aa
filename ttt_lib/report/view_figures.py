"""Pictures of views: what the student sees, its target, what the mask calls known, and which views a run trains on."""

from __future__ import annotations

from typing import Any

import matplotlib
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
    titles = titles or [kind.replace("+photometric", "+colour") for kind in view.kind]
    near = {"cmap": matplotlib.colormaps["magma"].with_extremes(bad="0.5"), "vmin": 0, "vmax": 1}
    depths, masks = view.points[..., 2], zip(view.image, view.mask, view.negative)
    rows = [
        [(title, to_array(image), {}) for title, image in zip(titles, view.image)],
        [("target, 1 / depth", inverse_depth(depth, mask), near) for depth, mask in zip(depths, view.mask)],
        [("known", paint_mask(*each), {}) for each in masks],
    ]
    height, wide = view.image.shape[-2:]
    return finished(panels(rows, width, width * height / wide + 0.2, fontsize=8)[0], pad=0.3)


def plot_from_above(clouds: dict[str, Tensor]) -> Figure:
    """Point maps (H,W,3) seen from above: x to the right, z away from the camera. Each under its own name."""
    figure, axis = plt.subplots(figsize=(4.5, 3.6))
    for name, points in clouds.items():
        cloud = points[torch.isfinite(points).all(-1)].cpu()
        cloud = cloud[:: max(1, len(cloud) // ABOVE)]
        axis.scatter(cloud[:, 0], cloud[:, 2], s=0.6, label=name)
    axis.legend(fontsize=8, loc="lower right", markerscale=6)
    axis.plot(0, 0, "k^", markersize=6)
    axis.set(xlabel="x", ylabel="z (the camera is the triangle)")
    axis.set_aspect("equal", adjustable="datalim")
    return finished(figure)


def plot_costs(costs: pd.DataFrame) -> Figure:
    """Mean over views of the loss of `exact_targets.compare_targets`, one bar a target; log scale."""
    groups = costs.groupby("target", sort=False)["loss"]
    mean = groups.mean().clip(lower=1e-8)
    wrong = ["tab:red" if any(w in name for w in ("kept", "plain", "no mask")) else "tab:blue" for name in mean.index]
    axis = mean.plot.barh(logx=True, color=wrong, figsize=(6, 0.4 * len(mean) + 0.8), fontsize=8)
    axis.set(xlabel=f"loss of a perfect student, mean over views ({over(groups.count())})", ylabel="")
    axis.invert_yaxis()
    return finished(axis.figure)
