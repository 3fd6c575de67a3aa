"""The known camera of one photograph: as a user gives it, or by EXIF; and the photograph as a centred camera sees it.

Models take the principal point for the middle of the picture and pixels for square. A photograph of another camera is
turned to the middle of its frame, as the samples of `moge_layout.py` are, and what is predicted of it goes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lib.core.errors import UserError
from ttt_lib.core.types import Prediction, are_normalised_intrinsics
from ttt_lib.data.images import SMALLEST
from ttt_lib.data.known_distances import References
from ttt_lib.data.photographs.exif import read_lens
from ttt_lib.geometry.cameras import (
    fov_from_intrinsics,
    intrinsics_from_fov,
    project,
    recentred_crop,
    unproject,
    unproject_far,
)
from ttt_lib.geometry.warp import depth_edges, sampling_grid

OFF_CENTRE = 1.0  # pixels that a principal point may be off: cameras with the half pixel counted otherwise, and less
OFF_SQUARE = 0.002  # that a pixel's height may differ from its width
OBLONG = 4.0  # times as high as wide, or as wide as high: no camera's pixels
FOV = (1.0, 179.0)  # degrees


@dataclass(frozen=True)
class KnownCamera:
    """intrinsics (3,3) float32, normalised; source: who says so, in words."""

    intrinsics: Tensor
    source: str


def parse_intrinsics(text: str) -> tuple[float, ...]:
    """Four numbers from `fx,fy,cx,cy`, as `--intrinsics` gives them. Raises `UserError`.

    Example:
        >>> parse_intrinsics("500,500,320,240")
        (500.0, 500.0, 320.0, 240.0)
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != 4:
        raise UserError(f"--intrinsics {text}: must be four numbers in pixels, fx,fy,cx,cy such as 500,500,320,240.")
    return found


def _from_pixels(given: Sequence[float] | Tensor, size: tuple[int, int]) -> Tensor:
    """Normalised intrinsics (3,3) of fx, fy, cx, cy in pixels, or of a (3,3) that is normalised already."""
    height, width = size
    try:
        values = torch.as_tensor(given, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if values.shape == (4,):
        fx, fy, cx, cy = values.tolist()
        values = torch.tensor([[fx / width, 0, cx / width], [0, fy / height, cy / height], [0, 0, 1]])
    if not are_normalised_intrinsics(values):
        raise UserError(
            f"intrinsics: are not those of a photograph of {width} x {height} pixels; give fx, fy, cx, cy in its pixels, "
            "or a 3x3 camera matrix divided by width and height."
        )
    shape = float(values[0, 0] * width / (values[1, 1] * height))
    if not 1 / OBLONG < shape < OBLONG:
        raise UserError(f"intrinsics: fx is {shape:.3g} times fy, which no camera has; check their order and the size.")
    return values


def known_camera(
    size: tuple[int, int], intrinsics: Sequence[float] | Tensor | None = None, fov: float | None = None,
    photograph: str | Path | None = None,
) -> KnownCamera | None:  # fmt: skip
    """The camera of a photograph of `size` (H, W), or None where nothing says it.

    Args:
        size: of the upright photograph.
        intrinsics: fx, fy, cx, cy in pixels (the middle of the first pixel is 0.5), or (3,3) normalised.
        fov: horizontal field of view in degrees.
        photograph: the file whose EXIF counts, where neither is given; not if it was cropped to another shape.

    Raises:
        UserError: both are given, or what is given is no camera of such a photograph.

    Example:
        >>> known_camera((480, 640), fov=90.0).intrinsics.diag().tolist()
        [0.5, 0.6666666865348816, 1.0]
    """
    height, width = size
    if intrinsics is not None and fov is not None:
        raise UserError("intrinsics and fov both say the focal length; give one of them.")
    if intrinsics is not None:
        return KnownCamera(_from_pixels(intrinsics, size), "the intrinsics that were given")
    if fov is not None:
        if not FOV[0] <= fov <= FOV[1]:
            raise UserError(f"fov {fov:g}: is no horizontal field of view in degrees; it lies from 1 to 179.")
        return KnownCamera(intrinsics_from_fov(float(fov), width / height), "the field of view that was given")
    lens = read_lens(photograph) if photograph is not None else None
    focal = lens.focal(width, height) if lens is not None and not lens.is_cropped(width, height) else None
    if focal is None:
        return None
    return KnownCamera(_centred(focal * width, size), f"EXIF ({lens.camera})")


@dataclass(frozen=True)
class CentredPhotograph:
    """A photograph as a camera with square pixels sees it whose principal point is the middle of the picture.

    image (3,h,w); intrinsics (3,3) of it. camera: the photograph's own; size: its (H, W); rotation (3,3): from its
    camera to the centred one, None where that is the same and nothing was warped.
    """

    image: Tensor
    intrinsics: Tensor
    camera: KnownCamera
    size: tuple[int, int]
    rotation: Tensor | None = None

    @property
    def fov_x(self) -> float:
        """Horizontal field of view of `image` in degrees."""
        return float(fov_from_intrinsics(self.intrinsics.double())[0])

    def carried(self, references: References) -> References:
        """Known distances of the photograph as those of `image`. Raises `UserError` if none of them lies in it."""
        if self.rotation is None:
            return references
        own = self.camera.intrinsics.double()
        rays = torch.cat([references.uv.double().cpu(), torch.ones(len(references.uv), 1, dtype=torch.float64)], -1)
        points = (rays @ torch.linalg.inv(own).mT * references.depth.double().cpu()[:, None]) @ self.rotation.mT
        uv = project(points, self.intrinsics.double())
        inside = ((uv >= 0) & (uv <= 1)).all(-1) & (points[:, 2] > 0)
        if not bool(inside.any()):
            raise UserError("known distances: none lies in the part of the photograph around its middle that is used.")
        return replace(references, uv=uv[inside].float(), depth=points[inside, 2].float())

    def back(self, prediction: Prediction) -> Prediction:
        """A prediction (h,w) of `image` as one of the photograph (H,W): depth along its own axis, points in its camera.

        Depth is interpolated as its inverse, which is exact on planes, and taken from the nearest pixel at edges.
        Outside `image` depth and points are NaN and the mask is False.
        """
        own = self.camera.intrinsics.to(prediction.depth)
        note = "; ".join(filter(None, [prediction.note, f"the camera is that of {self.camera.source}"]))
        if self.rotation is None:
            points = unproject_far(prediction.depth, own)
            return replace(prediction, points=points, intrinsics=own, note=note)
        grid, along = (t.to(own) for t in _places(self.size, self.camera.intrinsics, self.rotation, self.intrinsics))
        inside = (grid.abs() <= 1).all(-1)

        def sampled(map_: Tensor, mode: str) -> Tensor:
            return F.grid_sample(map_[None, None].to(own), grid[None], mode, "border", align_corners=False)[0, 0]

        depth, mask, normal, disparity = prediction.depth, prediction.mask, prediction.normal, prediction.disparity
        usable = torch.isfinite(depth) & (depth > 0)
        broken = ~usable | depth_edges(torch.where(usable, depth, 1.0))
        smooth = 1 / sampled(1 / torch.where(usable, depth, 1.0), "bilinear")
        found = torch.where(sampled(broken, "bilinear") > 0, sampled(depth, "nearest"), smooth)
        depth = torch.where(inside, found / along, torch.nan)
        if normal is not None:
            seen = torch.stack([sampled(axis, "nearest") for axis in normal.unbind(-1)], -1)
            normal = seen @ self.rotation.to(normal)
        if disparity is not None:
            disparity = torch.where(inside, sampled(disparity, "bilinear") * along, torch.nan)
        lost = f"{1 - float(inside.float().mean()):.0%} of the photograph, at its border, have no depth"
        return replace(
            prediction, depth=depth, points=unproject_far(depth, own), intrinsics=own, normal=normal, disparity=disparity,
            mask=inside if mask is None else inside & (sampled(mask, "nearest") > 0.5), note=f"{note}; {lost}",
        )  # fmt: skip


def _places(size: tuple[int, int], own: Tensor, rotation: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Where in another camera's picture (-1 to 1) the pixels of a camera lie, (H,W,2), and how far along its axis the
    points at depth 1 of this one, (H,W). rotation: from this camera to the other."""
    turned = unproject(torch.ones(*size), own.float()) @ rotation.float().mT
    return sampling_grid(turned, other.float()), turned[..., 2]


def centre_photograph(image: Tensor, camera: KnownCamera) -> CentredPhotograph:
    """The photograph (3,H,W) as a centred camera sees it, at the same focal length in pixels.

    The camera turns until the middle of the photograph is on its axis; the picture is the largest of the photograph's
    shape that it fills (`geometry.cameras.recentred_crop`, which agrees with `moge_layout.target_view`).

    Raises:
        UserError: hardly anything is left.
    """
    size, own = tuple(image.shape[-2:]), camera.intrinsics.double()
    height, width = size
    focal = float(own[0, 0]) * width
    off = max(abs(float(own[0, 2]) - 0.5) * width, abs(float(own[1, 2]) - 0.5) * height)
    if off <= OFF_CENTRE and abs(float(own[1, 1]) * height / focal - 1) <= OFF_SQUARE:
        return CentredPhotograph(image, _centred(focal, size), camera, size)
    middle, whole = torch.full((2,), 0.5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    rotation, crop = recentred_crop(own, middle, whole)
    seen = tuple(int(focal / float(crop[axis, axis]) + 1e-6) for axis in (1, 0))
    if min(seen) < SMALLEST:
        raise UserError(
            f"intrinsics: a picture around the axis of this camera has {seen[1]} x {seen[0]} pixels, too few; check cx, cy."
        )
    intrinsics = _centred(focal, seen)
    grid, _ = _places(seen, intrinsics, rotation.mT, own)
    turned = F.grid_sample(image[None], grid[None].to(image), "bilinear", "border", align_corners=False)[0]
    return CentredPhotograph(turned, intrinsics, camera, size, rotation)


def _centred(focal: float, size: tuple[int, int]) -> Tensor:
    """Intrinsics (3,3) of a picture (h, w) with this focal length in pixels."""
    height, width = size
    return torch.tensor([[focal / width, 0, 0.5], [0, focal / height, 0.5], [0, 0, 1]])
