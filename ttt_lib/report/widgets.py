"""Explorers for JupyterLab, made of ipywidgets: they choose settings and show what comes of them."""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import plotly.graph_objects as go
import torch
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor

from ttt_lib.adaptation.photographs.scene import SceneAdaptation
from ttt_lib.core.schema import ViewConfig
from ttt_lib.core.types import Prediction
from ttt_lib.report.figures import cloud_figure, encoded, picture, plot_scene
from ttt_lib.report.scene_cloud import SceneCloud
from ttt_lib.report.view_figures import plot_views
from ttt_lib.views.draw import make_views
from ttt_lib.views.renderer import NovelViewRenderer

# What a view type switches on: mirror, crop, novel view, photometric probabilities (the sliders say how much).
VIEW_TYPES: dict[str, dict[str, Any]] = {
    "everything": {"mirror": 0.5, "crop": {}, "novel_view": 0.7, "photometric": 1.0},
    "colours": {"photometric": 1.0},
    "mirror": {"mirror": 1.0},
    "crop, recentred": {"crop": {"kind": "recentred"}},
    "crop, plain": {"crop": {"kind": "plain"}},
    "other camera": {"novel_view": 1.0},
}


def show_cloud(figure: go.Figure) -> None:
    """Display a plotly point cloud, first seen from near its camera, with a picture for viewers that run no scripts."""
    cloud = figure.data[0]
    figure.update_layout(scene_camera={"eye": {"x": 0.5, "y": -1.6, "z": 0.5}})
    still = plt.figure(figsize=(6, 4))
    axis = still.add_subplot(projection="3d")
    axis.scatter(cloud.x, cloud.y, cloud.z, c=list(cloud.marker.color), s=6, linewidths=0, depthshade=False)
    axis.set_aspect("equal")
    axis.set(xlabel="x", ylabel="z, forward", zlabel="up")
    axis.view_init(elev=15, azim=-75)
    bundle = {
        "application/vnd.plotly.v1+json": json.loads(figure.to_json()),
        "image/jpeg": encoded(picture(still, "jpeg", dpi=85)),
    }
    plt.close(still)
    display(bundle, raw=True)


class Explorer(ipywidgets.VBox):
    """Controls, a picture that is drawn anew when one of them changes, and below it what there is to say of it.

    `draw` gives the figure and the words. An image, because an Output that is written to while a cell runs makes nbclient
    (papermill, nbconvert) send on the socket whose next message it waits for, and miss that one: notebooks hung.
    """

    def __init__(self, *controls: ipywidgets.Widget) -> None:
        self.image = ipywidgets.Image(format="jpeg", layout={"align_self": "flex-start"})  # at its own size
        self.status = ipywidgets.HTML()
        for control in controls:
            control.observe(self.update, names="value")
        columns = [ipywidgets.VBox(controls[:3]), ipywidgets.VBox(controls[3:])]
        super().__init__([ipywidgets.HBox(columns, layout={"flex_flow": "row wrap"}), self.image, self.status])
        self.update()

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """With the picture as it is now, for viewers that run no scripts."""
        return {**super()._repr_mimebundle_(**options), "image/jpeg": encoded(self.image.value)}

    def update(self, _change: dict | None = None) -> None:
        """Draw what the controls ask for and show it."""
        figure, self.status.value = self.draw()
        self.image.value = picture(figure, "jpeg", dpi=85)


class ViewExplorer(Explorer):
    """Pick a picture, a kind of view, severities and a seed, and see three views with targets and masks.

    targets: name -> (image (3,H,W), prediction of it), e.g. `{"room": (image, model.predict(image))}`; `config` is what
    the controls say, to be copied into an experiment.
    """

    def __init__(self, targets: dict[str, tuple[Tensor, Prediction]], count: int = 3) -> None:
        self.targets, self.count = targets, count
        self.renderer = NovelViewRenderer("auto", device=next(iter(targets.values()))[0].device)
        wide = {"style": {"description_width": "9em"}, "layout": {"width": "26em"}}
        slow = {"continuous_update": False, **wide}
        self.picture = ipywidgets.Dropdown(options=list(targets), description="picture", **wide)
        self.view_type = ipywidgets.Dropdown(options=list(VIEW_TYPES), description="view", **wide)
        self.colour = ipywidgets.IntSlider(3, 0, 5, description="colour severity", **slow)
        self.blur = ipywidgets.FloatSlider(0.0, min=0, max=1, step=0.25, description="chance of blur", **slow)
        self.camera = ipywidgets.IntSlider(3, 0, 5, description="camera severity", **slow)
        self.crop = ipywidgets.FloatSlider(0.6, min=0.2, max=1, step=0.05, description="smallest crop", **slow)
        self.seed = ipywidgets.IntSlider(0, 0, 99, description="seed", **slow)
        super().__init__(self.picture, self.view_type, self.seed, self.colour, self.blur, self.camera, self.crop)

    @property
    def config(self) -> ViewConfig:
        """The `views` section of an experiment that the controls stand for."""
        chosen = VIEW_TYPES[self.view_type.value]
        crop = chosen.get("crop")
        return ViewConfig(
            mirror=chosen.get("mirror", 0.0),
            crop={"probability": 0.0} if crop is None else {"scale": (self.crop.value, 1.0), **crop},
            novel_view={"probability": chosen.get("novel_view", 0.0), "severity": self.camera.value},
            photometric={
                "probability": chosen.get("photometric", 0.0), "severity": self.colour.value, "blur": self.blur.value
            },
        )  # fmt: skip

    def draw(self) -> tuple[Figure, str]:
        """The views that the controls ask for."""
        image, target = self.targets[self.picture.value]
        generator = torch.Generator().manual_seed(self.seed.value)
        begun = time.perf_counter()
        view = make_views(
            image, target.points, target.mask, target.intrinsics, self.config, self.count, generator, self.renderer
        )
        spent = (time.perf_counter() - begun) * 1000 / self.count
        known = ", ".join(f"{share:.0%}" for share in view.mask.flatten(1).float().mean(1).tolist())
        return plot_views(view), (
            f"known: {known} of the pixels; {view.stats['redrawn']} drawn again, {view.stats['identity']} stayed in "
            f"place; {spent:.0f} ms a view; {self.renderer.reason}"
        )


class SceneExplorer(Explorer):
    """Pick a photograph of an adapted scene and see its tracks, its depth before and after, and what decided.

    At the end the clouds of all photographs, before or after. Predictions are made when they are first shown.
    """

    def __init__(self, adaptation: SceneAdaptation, points: int = 20_000) -> None:
        self.adaptation, self.points = adaptation, points
        self.evidence = {each.photograph.name: each for each in adaptation.evidence}
        self.result = cache(lambda name: adaptation.result(self.evidence[name]))
        self.photograph = ipywidgets.Dropdown(options=list(self.evidence), description="photograph")
        self.cloud = ipywidgets.ToggleButtons(options=["none", "before", "after"], description="cloud")
        self.clouds = ipywidgets.Output()  # empty until somebody asks for a cloud
        self.cloud.observe(self.show_cloud, "value")
        super().__init__(self.photograph)
        self.children += (self.cloud, self.clouds)

    def draw(self) -> tuple[Figure, str]:
        """The photograph that is chosen."""
        if not self.evidence:
            return plot_scene([], []), self.adaptation.scene.refused or "there are no photographs"
        result = self.result(self.photograph.value)
        errors = {k.removeprefix("held_back_"): v for k, v in result.signals.items() if k.startswith("held_back_")}
        count = errors.pop("tracks", 0)
        said = ", ".join(f"{key} {value:.3f}" for key, value in errors.items())
        said = f"<b>{result.decision}</b>; error at {count:.0f} held-back tracks: {said}. {result.reason}"
        return plot_scene([self.evidence[self.photograph.value]], [result]), said

    def show_cloud(self, _change: dict | None = None) -> None:
        """Draw the cloud of all photographs, as the original or as the final predictions have it."""
        self.clouds.clear_output(wait=True)
        if self.cloud.value == "none" or not self.evidence:
            return
        cloud = SceneCloud()
        for name, known in self.evidence.items():
            result = self.result(name)
            cloud.add(known.photograph, result.image, result.final if self.cloud.value == "after" else result.original)
        with self.clouds:
            display(cloud_figure(*cloud.merged(), self.points))
