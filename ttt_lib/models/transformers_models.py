"""Depth Anything, DPT/MiDaS and GLPN from transformers behind the interface of `base.GeometryModel`.

What ZoeDepth, Depth Pro and Prompt Depth Anything do otherwise is in `transformers_special.py`. The networks are the
library's own; what they are fed is made by `preprocessing.py`; `transformers_loading.py` finds and checks their files.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_lib.core.types import Prediction
from ttt_lib.geometry.cameras import intrinsics_from_fov, unproject
from ttt_lib.models.base import GeometryModel
from ttt_lib.models.preprocessing import Rules, resize_rounded

ASSUMED_FOV = 60.0  # degrees, horizontal
DEPTH_RATIO = 10.0  # of the farthest to the nearest depth that is made of a disparity
DISPARITY_QUANTILES = (0.02, 0.98)  # what counts as farthest and nearest


def depth_from_disparity(disparity: Tensor) -> Tensor:
    """A depth (B,H,W) for making views from a disparity (B,H,W) that is known up to scale and shift only.

    The 2% and 98% quantiles of a picture's disparity become 1 / `DEPTH_RATIO` and 1, values outside are clamped, and
    depth is the inverse: 1 for the nearest, `DEPTH_RATIO` for the farthest; 1 everywhere for a constant disparity.
    """
    flat = disparity.flatten(1)
    if flat.shape[1] > 2**20:  # torch.quantile takes 16 million values at most, and sorts them
        flat = flat[:, :: flat.shape[1] // 2**20]
    far, near = torch.quantile(flat, torch.tensor(DISPARITY_QUANTILES, device=flat.device), dim=1)[..., None, None]
    span = near - far
    nearness = torch.where(span > 0, (disparity - far) / torch.where(span > 0, span, 1.0), 1.0).clamp(0, 1)
    return 1 / (1 / DEPTH_RATIO + (1 - 1 / DEPTH_RATIO) * nearness)


class TransformersModel(GeometryModel):
    """Depth Anything, DPT/MiDaS or GLPN: disparity up to scale and shift, or metric depth; no camera.

    Where no camera is known, its field of view is taken as `ASSUMED_FOV` degrees across. The parts are the library's:
    `backbone` (or `dpt`, `glpn`, `depth_pro`) is the encoder, `neck`, `decoder` and `fusion_stage` are the neck, and
    `head`, `relative_head`, `metric_head` and `fov_model` are the heads.
    """

    part_of: ClassVar[dict[str, str]] = {
        **GeometryModel.part_of, "dpt": "encoder", "glpn": "encoder", "depth_pro": "encoder", "depth_pro.neck": "neck",
        "decoder": "neck", "fusion_stage": "neck",
    }  # fmt: skip
    of_one_camera: ClassVar[bool] = True

    def __init__(
        self,
        network: nn.Module,
        name: str,
        metric: bool,
        rules: Rules,
        num_tokens: int | None = None,
        autocast: str = "none",
    ) -> None:
        super().__init__(network, name, "metric" if metric else "disparity", num_tokens, autocast)
        self.output: Literal["points", "depth", "disparity"] = "depth" if metric else "disparity"
        self.rules = rules

    def pixel_values(self, images: Tensor) -> Tensor:
        """The network's input (B,3,H',W') of images (B,3,H,W) in [0,1], by the model's own rules."""
        size = self.rules.processed_size(*images.shape[-2:], self.num_tokens)
        values = self._normalised(resize_rounded(images * 255, size, self.rules.mode) * self.rules.scale)
        rows, columns = (-side % self.rules.divisor for side in size)  # of padding, half on each side
        return F.pad(values, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    def _normalised(self, values: Tensor) -> Tensor:
        mean, std = (values.new_tensor(v)[:, None, None] for v in (self.rules.mean, self.rules.std))
        return (values - mean) / std

    def _at_size(self, output: Tensor, height: int, width: int) -> Tensor:
        """The network's map (B,h,w) at the picture's size, as `post_process_depth_estimation`."""
        return F.interpolate(output[:, None], (height, width), mode="bicubic", align_corners=False)[:, 0]

    def _run(self, pixels: Tensor, whole: bool = True) -> tuple[Tensor, dict[str, Any]]:
        """The network's map (B,h,w), and what else it says: `domain` of networks that choose one, `fov_x`, or `kind`.

        whole: the pictures are not views that were made of it.
        """
        return self.network(pixels).predicted_depth, {}

    def _cameras(self, images: Tensor, intrinsics: Tensor | None, said: dict[str, Any]) -> Tensor:
        """Intrinsics (B,3,3): given, or of the field of view that is known, predicted or assumed."""
        if intrinsics is None:
            fov_x = self.fov_x if self.fov_x is not None else said.get("fov_x", ASSUMED_FOV)
            intrinsics = intrinsics_from_fov(fov_x, images.shape[-1] / images.shape[-2])
        return intrinsics.to(images).expand(images.shape[0], 3, 3)

    def _seen_width(self, images: Tensor) -> float:
        """How many pixels of the network's input the pictures span."""
        return self.rules.processed_size(*images.shape[-2:], self.num_tokens)[1]

    def _metres(self, output: Tensor, images: Tensor, cameras: Tensor) -> Tensor:
        """Depth (B,H,W) of a metric network's map at the pictures' size; times focal / canonical focal, where that is given.

        Who sees a picture of twice the focal length sees things twice as large, and a network that knows one camera
        only takes them for half as far (Metric3D, Yin et al. 2023, section 3.1). ZoeDepth for NYU: 415, the 519 pixels
        of that camera at a width of 640, which the network gets at 512.
        """
        if self.canonical_focal is None:
            return output
        return output * (cameras[:, 0, 0] * (self._seen_width(images) / self.canonical_focal))[:, None, None]

    def _maps(self, images: Tensor, intrinsics: Tensor | None, exact: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Disparity or depth (B,H,W), cameras (B,3,3), and what else the network says."""
        with nullcontext() if exact else self.mixed():
            output, said = self._run(self.pixel_values(images), whole=intrinsics is None)
        output = self._at_size(output.float(), *images.shape[-2:])
        cameras = self._cameras(images, intrinsics, said)
        return output if self.output == "disparity" else self._metres(output, images, cameras), cameras, said

    def forward(self, images: Tensor, intrinsics: Tensor | None = None) -> dict[str, Tensor]:
        """Maps with gradients, float32, at the size of images (B,3,H,W) in [0,1].

        `disparity` (B,H,W) up to scale and shift; or `depth` (B,H,W) in metres and `points` (B,H,W,3), unprojected
        with intrinsics (B,3,3), or the camera that is known, predicted or assumed.
        """
        output, cameras, _ = self._maps(images, intrinsics, exact=False)
        if self.output == "disparity":
            return {"disparity": output}
        return {"depth": output, "points": unproject(output, cameras)}

    def features(self, images: Tensor) -> Tensor:
        """The encoder's last patch features (B,N,C) of images (B,3,H,W) in [0,1], without class token, with gradients.

        float32; after the encoder's last normalisation where it has one; rows of patches one after the other.
        """
        pixels = self.pixel_values(images)
        with self.mixed():
            tokens = self._tokens(pixels)
        if tokens.ndim == 4:  # (B,C,h,w) of encoders that reshape
            return tokens.flatten(2).mT.float()
        return tokens[:, 1:].float()  # behind the class token

    def _tokens(self, pixels: Tensor) -> Tensor:
        """The encoder's last output, (B,C,h,w) or (B,n,C) with the class token before the patches."""
        if getattr(self.network, "backbone", None) is not None:
            return self.network.backbone(pixels).feature_maps[-1]
        return getattr(self.network, "glpn" if hasattr(self.network, "glpn") else "dpt")(pixels).last_hidden_state

    @torch.no_grad()
    def predict(self, images: Tensor, intrinsics: Tensor | None = None) -> Prediction:
        """Prediction without gradients for images (3,H,W) or (B,3,H,W) in [0,1]; intrinsics (3,3) or (B,3,3).

        Metric models: depth in metres, points from the camera that was given or assumed. Disparity models: the
        disparity, and depth and points in an arbitrary unit by `depth_from_disparity`. `note` says what was assumed.
        The network runs in float32, whatever `autocast` is.
        """
        batch = images if images.ndim == 4 else images[None]
        output, cameras, said = self._maps(batch, intrinsics, exact=True)
        notes, extra = [], {}
        if intrinsics is None and self.fov_x is not None:
            notes.append(f"the field of view is taken as known, {self.fov_x:.4g} degrees across")
        elif intrinsics is None and "fov_x" not in said:
            extra["assumed_fov"] = ASSUMED_FOV
            notes.append(f"a field of view of {ASSUMED_FOV:g} degrees across and square pixels are assumed")
        if self.canonical_focal is not None:
            notes.append(f"depth is rescaled from a focal length of {self.canonical_focal:g} pixels")
        if "domain" in said:
            extra["domain"] = said["domain"] if images.ndim == 4 else said["domain"][0]
        kind = said.get("kind", self.kind)
        if kind == "affine_invariant":
            notes.append("no distances are known, so depth is relative")
        disparity, depth = None, output
        if self.output == "disparity":
            disparity, depth = output, depth_from_disparity(output)
            notes.append(
                "the model predicts disparity up to scale and shift; for views its 2% and 98% quantiles are taken as"
                f" the farthest and the nearest point, {DEPTH_RATIO:g} times as far as each other"
            )
        known = torch.isfinite(output) & (depth > 0)
        fields = [unproject(depth, cameras), depth, known, cameras.clone(), disparity]
        if images.ndim == 3:
            fields = [field[0] if field is not None else None for field in fields]
        points, depth, known, cameras, disparity = fields
        return Prediction(points, depth, known, cameras, kind, disparity=disparity, note="; ".join(notes), extra=extra)
