"""An explorer of several photographs for JupyterLab: tracks, depth before and after, the cloud."""

from __future__ import annotations

import ipywidgets
from IPython.display import display

from ttt_lib.adaptation.photographs.scene import SceneAdaptation
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.report.figures import cloud_figure, picture
from ttt_lib.report.scene_cloud import SceneCloud
from ttt_lib.report.scene_figures import plot_scene


class SceneExplorer(ipywidgets.VBox):
    """Pick a photograph of an adapted scene and see its tracks, its depth before and after, and what decided.

    The last tab shows the clouds of all photographs, before and after. Predictions are made when they are first shown.
    """

    def __init__(self, adaptation: SceneAdaptation, points: int = 20_000) -> None:
        self.adaptation, self.points = adaptation, points
        self.evidence = {each.photograph.name: each for each in adaptation.evidence}
        if not self.evidence:
            super().__init__([ipywidgets.Label(adaptation.scene.refused or "there are no photographs")])
            return
        self.results: dict[str, AdaptResult] = {}
        self.photograph = ipywidgets.Dropdown(options=list(self.evidence), description="photograph")
        self.cloud = ipywidgets.ToggleButtons(options=["none", "before", "after"], description="cloud")
        self.shown, self.said = ipywidgets.Image(format="jpeg"), ipywidgets.HTML()
        # An Output that is written to while a cell runs makes nbclient (papermill, nbconvert) send on the socket whose next
        # message it waits for, and miss that one: notebooks hung. This one is empty until somebody asks for a cloud.
        self.clouds = ipywidgets.Output()
        super().__init__([self.photograph, self.said, self.shown, self.cloud, self.clouds])
        self.photograph.observe(lambda change: self.show(), "value")
        self.cloud.observe(lambda change: self.show_cloud(), "value")
        self.show()

    def result(self, name: str) -> AdaptResult:
        """The result of a photograph."""
        if name not in self.results:
            self.results[name] = self.adaptation.result(self.evidence[name])
        return self.results[name]

    def show(self) -> None:
        """Draw the photograph that is chosen."""
        name = self.photograph.value
        result = self.result(name)
        errors = {k.removeprefix("held_back_"): v for k, v in result.signals.items() if k.startswith("held_back_")}
        count = errors.pop("tracks", 0)
        said = ", ".join(f"{key} {value:.3f}" for key, value in errors.items())
        self.said.value = f"<b>{result.decision}</b>; error at {count:.0f} held-back tracks: {said}. {result.reason}"
        self.shown.value = picture(plot_scene([self.evidence[name]], [result]), "jpeg", dpi=85)

    def show_cloud(self) -> None:
        """Draw the cloud of all photographs, as the original or as the final predictions have it."""
        self.clouds.clear_output(wait=True)
        if self.cloud.value == "none":
            return
        cloud = SceneCloud()
        for name, known in self.evidence.items():
            result = self.result(name)
            prediction = result.final if self.cloud.value == "after" else result.original
            cloud.add(known.photograph, result.image, prediction)
        with self.clouds:
            display(cloud_figure(*cloud.merged(), self.points))
