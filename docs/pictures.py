"""Make README's two pictures anew, with the bundled model on the motorcycle: `python docs/pictures.py`, from the checkout."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ttt_lib import AdaptResult, Prediction, adapt, adapt_scene, load_model, load_samples
from ttt_lib.core.schema import ViewConfig
from ttt_lib.report.figures import finished, inverse_depth, plot_scene, to_array
from ttt_lib.report.view_figures import SKY, UNKNOWN, join
from ttt_lib.runs.catalog import NOTEBOOKS
from ttt_lib.runs.scene_study import reconstruct_samples
from ttt_lib.views.carry import View
from ttt_lib.views.draw import make_views
from ttt_lib.views.renderer import NovelViewRenderer


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
    return finished(figure, pad=0.4)


def save_overview(path: Path) -> None:
    """The method: three views of the first photograph and their targets, as a JPEG at `path`."""
    sample = load_samples("motorcycle", width=480, height=324)[0]
    result = adapt(load_model("tiny"), sample, "unfreeze_encoder")
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


def save_scene_overview(path: Path) -> None:
    """Its two photographs under the experiment `scene`, with their truth."""
    model, samples = load_model("tiny"), list(load_samples("motorcycle", width=640, height=432).readable())
    adapted = adapt_scene(model, reconstruct_samples(model, samples))
    figure = plot_scene(adapted.evidence, [adapted.result(known) for known in adapted.evidence], samples)
    figure.savefig(path, dpi=75, pil_kwargs={"quality": 85})


if __name__ == "__main__":
    save_overview(NOTEBOOKS / "overview.jpg")
    save_scene_overview(NOTEBOOKS / "photographs.jpg")
