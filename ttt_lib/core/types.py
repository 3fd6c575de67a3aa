"""What travels between the rooms: a sample with its truth, and a model's prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ttt_lib.core.errors import DataError

NARROWEST = 1.0  # degrees; a focal length in pixels beside a centre that is not looks like less
INTRINSICS = "`intrinsics` must be a 3x3 camera matrix divided by the image's width and height"


def first_map(map_: Tensor | None, dimensions: int) -> Tensor | None:
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


def _angle(intrinsics: Any, axis: int) -> float:
    """Field of view in degrees along one axis, both sides of the principal point, as
    `geometry.cameras.fov_from_intrinsics` (core imports no room); NaN for a focal length that is not above 0."""
    focal, center = float(intrinsics[axis][axis]), float(intrinsics[axis][2])
    return math.degrees(math.atan(center / focal) + math.atan((1 - center) / focal)) if focal > 0 else math.nan


def _field_of_view(intrinsics: Tensor) -> str:
    return f"field of view {_angle(intrinsics, 0):.0f} x {_angle(intrinsics, 1):.0f} degrees"


def are_normalised_intrinsics(value: Any) -> bool:
    """Whether an array or tensor can be the camera of a photograph: finite, (3,3), a centre not far outside, and a field
    of view of `NARROWEST` at least both ways. What is in pixels, all or half of it, is none.

    Example:
        >>> are_normalised_intrinsics(torch.tensor([[500.0, 0, 0.5], [0, 500, 0.5], [0, 0, 1]]))
        False
    """
    rows = value.tolist() if hasattr(value, "tolist") else value
    if not (isinstance(rows, list) and len(rows) == 3 and all(isinstance(r, list) and len(r) == 3 for r in rows)):
        return False
    finite = all(isinstance(number, int | float) and math.isfinite(number) for row in rows for number in row)
    last = finite and max(abs(a - b) for a, b in zip(rows[2], (0, 0, 1))) < 1e-3
    centred = last and max(abs(rows[0][2] - 0.5), abs(rows[1][2] - 0.5)) <= 1.5
    return centred and all(_angle(rows, axis) >= NARROWEST for axis in (0, 1))  # which NaN is not


@dataclass
class Sample:
    """One image and what is known of it.

    image (3,H,W) float32 in [0,1]; depth (H,W) float32, NaN where unknown; points (H,W,3), NaN where unknown; mask
    (H,W) bool, True where the truth is known; intrinsics (3,3) normalised. Without truth these are None. is_metric:
    depth and points are in metres. segmentation (H,W) long with labels name -> id, for local metrics.

    Example:
        >>> Sample("photo.jpg", "mine", torch.rand(3, 48, 64))
        Sample(mine/photo.jpg: 64 x 48 pixels, no truth)
    """

    name: str
    dataset: str
    image: Tensor
    depth: Tensor | None = None
    points: Tensor | None = None
    mask: Tensor | None = None
    intrinsics: Tensor | None = None
    is_metric: bool = False
    has_sharp_boundary: bool = False
    segmentation: Tensor | None = None
    segmentation_labels: dict[str, int] | None = None

    def __post_init__(self) -> None:
        if self.intrinsics is not None and not are_normalised_intrinsics(self.intrinsics):
            raise DataError(f"sample {self.name!r}: {INTRINSICS}.")

    def facts(self) -> list[str]:
        """Size, depth with its unit, camera: a phrase each."""
        height, width = self.image.shape[-2:]
        unit = " m" if self.is_metric else " (no unit)"
        depth = "no truth" if self.depth is None else f"true depth {_range(self.depth, self.mask, unit)}"
        facts = [f"{width} x {height} pixels", depth]
        if self.mask is not None:
            facts.append(f"known in {float(self.mask.float().mean()):.0%}")
        if self.intrinsics is not None:
            facts.append(_field_of_view(self.intrinsics))
        if self.segmentation_labels:
            facts.append(f"{len(self.segmentation_labels)} segments")
        return facts

    def __repr__(self) -> str:
        return f"Sample({self.dataset}/{self.name}: {', '.join(self.facts())})"


Kind = Literal["metric", "scale_invariant", "affine_invariant", "disparity"]


@dataclass
class Prediction:
    """What a model says of an image (or of B images: all fields with a leading B).

    points (H,W,3) in the camera's frame and depth (H,W), not masked: also where `mask` (H,W) bool says that there is
    no surface; intrinsics (3,3) normalised; normal (H,W,3) or None; disparity (H,W) for models that predict it up to
    scale and shift, else None. kind: `metric` (metres), `scale_invariant`, `affine_invariant` or `disparity`. note:
    assumptions made, in words; extra: what only some models say: `assumed_fov` (degrees, horizontal) where the model
    predicts no camera, `domain` (of ZoeDepth NK: the head that was chosen, one a picture for a batch).

    Example:
        >>> depth = torch.full((48, 64), 2.0)
        >>> Prediction(None, depth, None, None, "metric")
        Prediction(metric, 64 x 48 pixels, depth 2 to 2 m (median 2))
    """

    points: Tensor | None
    depth: Tensor | None
    mask: Tensor | None
    intrinsics: Tensor | None
    kind: Kind
    normal: Tensor | None = None
    disparity: Tensor | None = None
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> list[str]:
        """Kind, size, depth with its unit, camera, surface: a phrase each. Of a batch the numbers are the first's."""
        quantity = "disparity" if self.depth is None else "depth"
        map_, mask = getattr(self, quantity), first_map(self.mask, 2)
        if map_ is None:
            return [self.kind, "empty"]
        height, width = map_.shape[-2:]
        facts = [self.kind, f"{width} x {height} pixels"]
        if map_.ndim == 3:
            facts.append(f"{len(map_)} images, of the first")
        unit = " m" if self.kind == "metric" and quantity == "depth" else " (no unit)"
        facts.append(f"{quantity} {_range(first_map(map_, 2), mask, unit)}")
        if self.intrinsics is not None:
            facts.append(_field_of_view(first_map(self.intrinsics, 2)))
        if mask is not None:
            facts.append(f"surface in {float(mask.float().mean()):.0%}")
        return [*facts, *filter(None, [self.note])]

    def __repr__(self) -> str:
        return f"Prediction({', '.join(self.facts())})"


IDENTITY = ["experiment", "dataset", "sample"]


KEYS = {  # what names a row, and the columns that are there even when no run has any row
    "metrics": ([*IDENTITY, "prediction", "metric", "score"], ["value"]),
    "samples": (IDENTITY, ["seconds"]),
    "history": ([*IDENTITY, "step"], ["passes", "loss"]),
    "left_out": (["dataset", "sample", "reason"], []),
}
