"""How samples, predictions and results show themselves in notebooks: a small page of HTML.

Pictures are inline JPEGs of at most `SIDE` pixels and `BUDGET` bytes, so that a saved notebook stays small.
"""

from __future__ import annotations

import io
from html import escape

import numpy as np
import torch
from PIL import Image

from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.types import Prediction, Sample, first_map
from ttt_lib.report.figures import encoded, inverse_depth, to_array

SIDE, BUDGET = 280, 32_000
UNKNOWN = (0.75, 0.75, 0.75)  # gray: no colour of a map


def _tag(picture: np.ndarray, title: str) -> str:
    """A picture (H,W,3) in [0,1] with its title under it, as a cell of a table."""
    image = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
    image.thumbnail((SIDE, SIDE))
    for quality in (85, 60, 30, 10):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        if file.tell() <= BUDGET:
            break
    said = escape(title)
    source = f'src="data:image/jpeg;base64,{encoded(file.getvalue())}"'
    return (
        f'<td style="text-align:center;vertical-align:top"><img {source} width="{image.width}" height="{image.height}" '
        f'alt="{said}"><br><small>{said}</small></td>'
    )


def _colours(values: np.ndarray, colour_map: str) -> np.ndarray:
    """(H,W) in [0,1], NaN where unknown -> (H,W,3)."""
    import matplotlib

    return np.where(np.isfinite(values)[..., None], matplotlib.colormaps[colour_map](values)[..., :3], UNKNOWN)


def _depth(prediction: Prediction) -> np.ndarray:
    """Near is bright; what has no surface is gray."""
    mask = first_map(prediction.mask, 2)
    if prediction.depth is None:
        disparity = first_map(prediction.disparity, 2).detach().float().cpu().clamp_min(1e-6)
        return _colours(inverse_depth(1 / disparity, mask), "magma")
    return _colours(inverse_depth(first_map(prediction.depth, 2), mask), "magma")


def _page(title: str, facts: list[str], cells: list[str]) -> str:
    return (
        f"<div><b>{escape(title)}</b><br>{escape(' · '.join(facts))}"
        f'<table style="border:none"><tr>{"".join(cells)}</tr></table></div>'
    )


def sample_html(sample: Sample) -> str:
    """Image and true depth."""
    cells = [_tag(to_array(sample.image), "image")]
    if sample.depth is not None:
        cells.append(_tag(_colours(inverse_depth(sample.depth, sample.mask), "magma"), "true inverse depth"))
    return _page(f"{sample.dataset}/{sample.name}", sample.facts(), cells)


def prediction_html(prediction: Prediction) -> str:
    """Inverse depth, and the normals of models that predict them."""
    if prediction.depth is None and prediction.disparity is None:
        return _page("Prediction", prediction.facts(), [])
    cells = [_tag(_depth(prediction), "inverse depth: near is bright")]
    normal = first_map(prediction.normal, 3)
    if normal is not None:
        cells.append(_tag((normal.detach().float().cpu().nan_to_num().numpy() + 1) / 2, "normals"))
    return _page("Prediction", prediction.facts(), cells)


def result_html(result: AdaptResult) -> str:
    """Image, before, after, and their ratio, or what was not taken; above them decision, reason and time."""
    cells = [_tag(to_array(result.image), "image")] if getattr(result, "image", None) is not None else []
    cells += [_tag(_depth(result.original), "before"), _tag(_depth(result.final), f"after ({result.decision})")]
    if result.final is result.original:
        if result.adapted is not None:
            cells.append(_tag(_depth(result.adapted), "adapted, not used"))
    elif result.final.depth is not None and result.original.depth is not None:
        ratio = (result.final.depth / result.original.depth).detach().float().cpu()
        mask = result.original.mask
        ratio = ratio if mask is None else ratio.masked_fill(~mask.bool().cpu(), torch.nan)
        cells.append(_tag(_colours((ratio.numpy() - 0.8) / 0.4, "coolwarm"), "after / before, 0.8 blue to 1.2 red"))
    return _page("Adaptation", result.facts(), cells)
