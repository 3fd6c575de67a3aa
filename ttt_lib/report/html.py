"""How samples, predictions and results show themselves: a line of text, and in notebooks a small page of HTML.

Pictures are inline JPEGs of at most `SIDE` pixels and `BUDGET` bytes, so that a saved notebook stays small.
"""

from __future__ import annotations

import base64
import io
import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ttt_lib.adaptation.adapter import AdaptResult
    from ttt_lib.data.samples import Sample
    from ttt_lib.models.base import Prediction

SIDE, BUDGET = 280, 32_000
UNKNOWN = (0.75, 0.75, 0.75)  # gray: no colour of a map
DECISIONS = {
    "original": "the original prediction is used",
    "adapted": "the adapted prediction is used",
    "averaged": "the mean over predictions is used, nothing was trained",
    "accept": "the gate accepted the adapted prediction",
    "blend": "the gate mixed both predictions by region",
    "reject": "the gate kept the original prediction",
}


# ---------------------------------------------------------------------------------------------------------- text


def _first(map_: Tensor | None, dimensions: int) -> Tensor | None:
    """The map itself, or of a batch the first."""
    return map_ if map_ is None or map_.ndim == dimensions else map_[0]


def _range(depth: Tensor, mask: Tensor | None, unit: str) -> str:
    """`1.2 to 9.8 m (median 3.1)` of the known depths."""
    known = torch.isfinite(depth) if mask is None else torch.isfinite(depth) & mask.bool()
    values = depth[known].float()
    if not len(values):
        return "unknown everywhere"
    low, middle, high = (f"{float(v):.3g}" for v in (values.min(), values.median(), values.max()))
    return f"{low} to {high}{unit} (median {middle})"


def _field_of_view(intrinsics: Tensor) -> str:
    fx, fy = float(intrinsics[0, 0]), float(intrinsics[1, 1])
    across, down = (2 * math.degrees(math.atan(0.5 / f)) if f > 0 else math.nan for f in (fx, fy))
    return f"field of view {across:.0f} x {down:.0f} degrees"


def sample_facts(sample: Sample) -> list[str]:
    """Size, depth with its unit, camera: a phrase each."""
    height, width = sample.image.shape[-2:]
    facts = [f"{width} x {height} pixels"]
    if sample.depth is None:
        facts.append("no truth")
    else:
        facts.append(f"true depth {_range(sample.depth, sample.mask, ' m' if sample.is_metric else ' (no unit)')}")
    if sample.mask is not None:
        facts.append(f"known in {float(sample.mask.float().mean()):.0%}")
    if sample.intrinsics is not None:
        facts.append(_field_of_view(sample.intrinsics))
    if sample.segmentation_labels:
        facts.append(f"{len(sample.segmentation_labels)} segments")
    return facts


def prediction_facts(prediction: Prediction) -> list[str]:
    """Kind, size, depth with its unit, camera, surface: a phrase each. Of a batch the numbers are the first's."""
    map_ = prediction.depth if prediction.depth is not None else prediction.disparity
    if map_ is None:
        return [prediction.kind, "empty"]
    height, width = map_.shape[-2:]
    facts = [prediction.kind, f"{width} x {height} pixels"]
    if map_.ndim == 3:
        facts.append(f"{len(map_)} images, of the first")
    mask = _first(prediction.mask, 2)
    if prediction.depth is not None:
        unit = " m" if prediction.kind == "metric" else " (no unit)"
        facts.append(f"depth {_range(_first(prediction.depth, 2), mask, unit)}")
    else:
        facts.append(f"disparity {_range(_first(prediction.disparity, 2), mask, ' (no unit)')}")
    if prediction.intrinsics is not None:
        facts.append(_field_of_view(_first(prediction.intrinsics, 2)))
    if mask is not None:
        facts.append(f"surface in {float(mask.float().mean()):.0%}")
    return [*facts, *filter(None, [prediction.note])]


def result_facts(result: AdaptResult) -> list[str]:
    """Decision, its reason, training and time: a phrase each."""
    facts = [f"{result.decision}: {DECISIONS.get(result.decision, '')}".rstrip(": "), *filter(None, [result.reason])]
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    if result.passes_done:
        facts.append(f"{result.passes_done} passes")
    if losses:
        facts.append(f"loss {losses[0]:.3g} to {losses[-1]:.3g}")
    return [*facts, f"{result.seconds:.1f} s", f"peak memory {result.peak_memory_mb:.0f} MiB"]


def sample_text(sample: Sample) -> str:
    """`Sample(motorcycle/motorcycle_left: 384 x 256 pixels, ...)`."""
    return f"Sample({sample.dataset}/{sample.name}: {', '.join(sample_facts(sample))})"


def prediction_text(prediction: Prediction) -> str:
    """`Prediction(metric, 384 x 256 pixels, depth 1.2 to 9.8 m (median 3.1), ...)`."""
    return f"Prediction({', '.join(prediction_facts(prediction))})"


def result_text(result: AdaptResult) -> str:
    """`AdaptResult(reject: the gate kept the original prediction, 4 passes, 3.5 s, ..., final: ...)`."""
    return f"AdaptResult({', '.join(result_facts(result))}; final: {', '.join(prediction_facts(result.final))})"


# ---------------------------------------------------------------------------------------------------------- HTML


def _tag(picture: np.ndarray, title: str) -> str:
    """A picture (H,W,3) in [0,1] with its title under it, as a cell of a table."""
    from PIL import Image

    image = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
    image.thumbnail((SIDE, SIDE))
    for quality in (85, 60, 30, 10):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        if file.tell() <= BUDGET:
            break
    data = base64.b64encode(file.getvalue()).decode()
    said = escape(title)
    source = f'src="data:image/jpeg;base64,{data}"'
    return (
        f'<td style="text-align:center;vertical-align:top"><img {source} width="{image.width}" height="{image.height}" '
        f'alt="{said}"><br><small>{said}</small></td>'
    )


def _photo(image: Tensor) -> np.ndarray:
    from ttt_lib.report.figures import to_array

    return to_array(image)


def _colours(values: np.ndarray, colour_map: str) -> np.ndarray:
    """(H,W) in [0,1], NaN where unknown -> (H,W,3)."""
    import matplotlib

    return np.where(np.isfinite(values)[..., None], matplotlib.colormaps[colour_map](values)[..., :3], UNKNOWN)


def _depth(prediction: Prediction) -> np.ndarray:
    """Near is bright; what has no surface is gray."""
    from ttt_lib.report.figures import inverse_depth

    mask = _first(prediction.mask, 2)
    if prediction.depth is None:
        disparity = _first(prediction.disparity, 2).detach().float().cpu().clamp_min(1e-6)
        return _colours(inverse_depth(1 / disparity, mask), "magma")
    return _colours(inverse_depth(_first(prediction.depth, 2), mask), "magma")


def _page(title: str, facts: list[str], cells: list[str]) -> str:
    return (
        f"<div><b>{escape(title)}</b><br>{escape(' · '.join(facts))}"
        f'<table style="border:none"><tr>{"".join(cells)}</tr></table></div>'
    )


def sample_html(sample: Sample) -> str:
    """Image and true depth."""
    from ttt_lib.report.figures import inverse_depth

    cells = [_tag(_photo(sample.image), "image")]
    if sample.depth is not None:
        cells.append(_tag(_colours(inverse_depth(sample.depth, sample.mask), "magma"), "true inverse depth"))
    return _page(f"{sample.dataset}/{sample.name}", sample_facts(sample), cells)


def prediction_html(prediction: Prediction) -> str:
    """Inverse depth, and the normals of models that predict them."""
    if prediction.depth is None and prediction.disparity is None:
        return _page("Prediction", prediction_facts(prediction), [])
    cells = [_tag(_depth(prediction), "inverse depth: near is bright")]
    normal = _first(prediction.normal, 3)
    if normal is not None:
        cells.append(_tag((normal.detach().float().cpu().nan_to_num().numpy() + 1) / 2, "normals"))
    return _page("Prediction", prediction_facts(prediction), cells)


def result_html(result: AdaptResult) -> str:
    """Image, before, after, and their ratio, or what was not taken; above them decision, reason and time."""
    cells = [_tag(_photo(result.image), "image")] if getattr(result, "image", None) is not None else []
    cells += [_tag(_depth(result.original), "before"), _tag(_depth(result.final), f"after ({result.decision})")]
    if result.final is result.original:
        if result.adapted is not None:
            cells.append(_tag(_depth(result.adapted), "adapted, not used"))
    elif result.final.depth is not None and result.original.depth is not None:
        ratio = (result.final.depth / result.original.depth).detach().float().cpu()
        mask = result.original.mask
        ratio = ratio if mask is None else ratio.masked_fill(~mask.bool().cpu(), torch.nan)
        cells.append(_tag(_colours((ratio.numpy() - 0.8) / 0.4, "coolwarm"), "after / before, 0.8 blue to 1.2 red"))
    return _page("Adaptation", result_facts(result), cells)
