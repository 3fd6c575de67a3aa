"""How samples, predictions and results show themselves in notebooks: a small page of HTML.

Pictures are inline JPEGs of at most `SIDE` pixels, so that a saved notebook stays small.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.colors import Normalize
from PIL import Image

from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.types import Prediction, Sample, first_map
from ttt_lib.report.figures import Panel, change_panel, depth_panel, encoded, to_array

SIDE = 280
UNKNOWN = (0.75, 0.75, 0.75)  # gray: no colour of a map
PAGE = Environment(autoescape=True).from_string("""<div><b>{{ title }}</b><br>{{ facts | join(" · ") }}
<table style="border:none"><tr>{% for name, picture in pictures %}<td style="text-align:center;vertical-align:top">
<img src="data:image/jpeg;base64,{{ picture }}" alt="{{ name }}"><br><small>{{ name }}</small></td>{% endfor %}
</tr></table></div>""")


def _jpeg(shown: np.ndarray, cmap: str = "magma", vmin: float = 0.0, vmax: float = 1.0) -> str:
    """A picture (H,W,3) in [0,1], or a map (H,W) in colours, gray where it is NaN."""
    if shown.ndim == 2:
        shown = matplotlib.colormaps[cmap].with_extremes(bad=UNKNOWN)(Normalize(vmin, vmax)(shown))[..., :3]
    image = Image.fromarray((shown.clip(0, 1) * 255).round().astype(np.uint8))
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return encoded(file.getvalue())


def _page(shown: Any, title: str, panels: list[Panel]) -> str:
    pictures = [(name, _jpeg(picture, **options)) for name, picture, options in panels]
    return PAGE.render(title=title, facts=shown.facts(), pictures=pictures)


def _depth(title: str, prediction: Prediction) -> Panel:
    """Near is bright; what has no surface is gray."""
    if prediction.depth is None:
        depth = 1 / first_map(prediction.disparity, 2).float().clamp_min(1e-6)
    else:
        depth = first_map(prediction.depth, 2)
    return depth_panel(title, depth, first_map(prediction.mask, 2))


def sample_html(sample: Sample) -> str:
    """Image and true depth."""
    panels = [("image", to_array(sample.image), {})]
    if sample.depth is not None:
        panels.append(depth_panel("true inverse depth", sample.depth, sample.mask))
    return _page(sample, f"{sample.dataset}/{sample.name}", panels)


def prediction_html(prediction: Prediction) -> str:
    """Inverse depth, and the normals of models that predict them."""
    panels = []
    if prediction.depth is not None or prediction.disparity is not None:
        panels.append(_depth("inverse depth: near is bright", prediction))
    if prediction.normal is not None:
        normal = first_map(prediction.normal, 3).detach().float().cpu().nan_to_num().numpy()
        panels.append(("normals", (normal + 1) / 2, {}))
    return _page(prediction, "Prediction", panels)


def result_html(result: AdaptResult) -> str:
    """Image, before, after, and their ratio, or what was not taken; above them decision, reason and time."""
    panels = [("image", to_array(result.image), {})] if result.image is not None else []
    panels += [_depth("before", result.original), _depth(f"after ({result.decision})", result.final)]
    before, after = result.original, result.final
    if after is before:
        if result.adapted is not None:
            panels.append(_depth("adapted, not used", result.adapted))
    elif after.depth is not None and before.depth is not None:
        title = "after / before, 0.8 blue to 1.2 red"
        panels.append(change_panel(title, before.depth, after.depth, before.mask))
    return _page(result, "Adaptation", panels)
