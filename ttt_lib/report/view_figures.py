"""Pictures of views: what the student sees, its target, what the mask calls known, and which views a run trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ttt_lib.adaptation.adapter import Adapter, working_image
from ttt_lib.adaptation.batches import loss_batch
from ttt_lib.adaptation.ensemble import predict_ensemble
from ttt_lib.adaptation.gradients import view_loss
from ttt_lib.adaptation.losses.presets import resolved
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.adaptation.teacher import draw_views, make_renderer
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.schema import ViewConfig
from ttt_lib.core.seeds import sample_generator
from ttt_lib.core.types import Prediction, Sample
from ttt_lib.data.catalog import open_dataset
from ttt_lib.models.base import GeometryModel
from ttt_lib.models.load import load_model
from ttt_lib.report.figures import inverse_depth, to_array
from ttt_lib.report.study_figures import over
from ttt_lib.runs.catalog import NOTEBOOKS
from ttt_lib.runs.experiment import load_with_profile
from ttt_lib.views.carry import View
from ttt_lib.views.draw import make_views
from ttt_lib.views.renderer import NovelViewRenderer

UNKNOWN, SKY = (0.85, 0.1, 0.55), (0.45, 0.7, 0.95)


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
    figure, axes = plt.subplots(1, len(arrays), figsize=(width * len(arrays), height), squeeze=False)
    for axis, (title, array) in zip(axes[0], arrays.items()):
        axis.imshow(array, **(options if array.ndim == 2 else {}))
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    plt.close(figure)
    return figure


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
        negative = view.negative[i] if view.negative is not None else None
        axes[0, i].imshow(to_array(view.image[i]))
        axes[1, i].imshow(inverse_depth(view.points[i, ..., 2], view.mask[i]), cmap="magma", vmin=0, vmax=1)
        axes[1, i].set_facecolor("0.5")
        axes[2, i].imshow(paint_mask(view.image[i], view.mask[i], negative))
        axes[0, i].set_title(titles[i] if titles else view.kind[i].replace("+photometric", "+colour"), fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, name in zip(axes[:, 0], ("the student sees", "target, 1 / depth", "known")):
        axis.set_ylabel(name, fontsize=8)
    figure.tight_layout(pad=0.3)
    plt.close(figure)
    return figure


def plot_from_above(clouds: dict[str, Tensor], title: str = "", most: int = 3000) -> Figure:
    """Point maps (H,W,3) seen from above: x to the right, z away from the camera. Each under its own name."""
    figure, axis = plt.subplots(figsize=(4.5, 3.6))
    for (name, points), colour in zip(clouds.items(), ("tab:blue", "tab:red", "tab:green")):
        cloud = points.reshape(-1, 3)[torch.isfinite(points).all(-1).reshape(-1)]
        cloud = cloud[:: max(1, len(cloud) // most)].cpu()
        axis.scatter(cloud[:, 0], cloud[:, 2], s=0.6, color=colour)
        axis.plot([], [], "o", markersize=4, color=colour, label=name)
    axis.plot(0, 0, "k^", markersize=6, label="camera")
    axis.set(xlabel="x", ylabel="z", title=title)
    axis.set_aspect("equal", adjustable="datalim")
    axis.title.set_fontsize(9)
    axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    plt.close(figure)
    return figure


def plot_costs(costs: pd.DataFrame, column: str = "loss") -> Figure:
    """Mean over views of a score of `exact.compare_targets`, one bar a target; log scale."""
    groups = costs.groupby("target", sort=False)[column]
    mean, counts = groups.mean(), groups.count()
    figure, axis = plt.subplots(figsize=(6, 0.4 * len(mean) + 0.8))
    wrong = [any(word in name for word in ("kept", "plain", "no mask")) for name in mean.index]
    axis.barh(mean.index, mean.clip(lower=1e-8), color=["tab:red" if bad else "tab:blue" for bad in wrong])
    axis.set(xscale="log", xlabel=f"{column} of a perfect student, mean over views ({over(counts)})")
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    figure.tight_layout()
    plt.close(figure)
    return figure


def plot_overview(image: Tensor, result: AdaptResult, view: View, width: float = 2.1) -> Figure:
    """The method in one picture: a photograph and its teacher, three views with their targets, the adapted result.

    image (3,H,W); view: at least three views; targets are inverse depth with unknown pixels magenta and sky blue.
    """
    height = width * image.shape[1] / image.shape[2]
    figure, axes = plt.subplots(2, 5, figsize=(5 * width, 2 * height + 0.9))
    magma = plt.get_cmap("magma")

    def depth_picture(prediction: Prediction) -> np.ndarray:
        return magma(inverse_depth(prediction.depth, prediction.mask))[..., :3]

    columns = [("photograph", to_array(image), "teacher's prediction", depth_picture(result.original))]
    for i, title in zip(range(3), ("a view: crop, colours", "mirror, colours", "another camera")):
        target = magma(inverse_depth(view.points[i, ..., 2], view.mask[i]))[..., :3]
        target[~view.mask[i].cpu().numpy()] = UNKNOWN
        if view.negative is not None:
            target[(view.negative[i] & ~view.mask[i]).cpu().numpy()] = SKY
        columns.append((title, to_array(view.image[i]), "its target, unknown is magenta", target))
    change = (result.adapted.depth / result.original.depth).log().cpu().numpy()
    change = plt.get_cmap("coolwarm")(np.clip(change / 0.2 + 0.5, 0, 1))[..., :3]
    columns.append(("adapted student", depth_picture(result.adapted), "farther (red), nearer (blue)", change))
    for (above, below), (title, picture, caption, map_) in zip(axes.T, columns):
        above.imshow(picture)
        below.imshow(map_)
        above.set_title(title, fontsize=8)
        below.set_xlabel(caption, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.tight_layout(pad=0.4)
    plt.close(figure)
    return figure


def save_overview(path: str | Path) -> None:
    """Make README's picture with the bundled model on the first motorcycle view, as a JPEG at `path`."""
    model, sample = load_model("tiny"), open_dataset(kind="motorcycle", width=480, height=324)[0]
    config = load_with_profile(NOTEBOOKS / "experiments" / "unfreeze_encoder.yaml", "demo", None)
    result = Adapter(model, config).adapt(sample.image, f"{sample.dataset}/{sample.name}")
    target = result.original
    colours = {"probability": 1.0, "severity": 3}
    renderer = NovelViewRenderer("auto", device=sample.image.device)
    views = []
    for seed, settings in enumerate((
        {"mirror": 0.0, "crop": {"scale": (0.6, 0.7)}},
        {"mirror": 1.0, "crop": {"probability": 0.0}},
        {"mirror": 0.0, "crop": {"probability": 0.0}, "novel_view": {"probability": 1.0, "severity": 5}},
    )):  # fmt: skip
        config = ViewConfig(photometric=colours, **settings)
        generator = torch.Generator().manual_seed(seed)
        views.append(
            make_views(sample.image, target.points, target.mask, target.intrinsics, config, 1, generator, renderer)
        )
    plot_overview(sample.image, result, join(views)).savefig(path, dpi=120, pil_kwargs={"quality": 85})
