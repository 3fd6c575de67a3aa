"""Depth Anything, ZoeDepth and DPT/MiDaS from transformers behind the interface of `base.GeometryModel`.

The networks are the library's own; what they are fed is made by `preprocessing.py`; `transformers_loading.py` finds and
checks their files.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_lib.core.errors import UserError
from ttt_lib.core.types import Prediction
from ttt_lib.geometry.cameras import intrinsics_from_fov, unproject
from ttt_lib.models.base import GeometryModel
from ttt_lib.models.preprocessing import Rules, resize_rounded, zoedepth_border

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
    """Depth Anything or DPT/MiDaS: disparity up to scale and shift, or metric depth; no camera.

    fov_x: horizontal field of view in degrees, used where no intrinsics are given (None: `ASSUMED_FOV`). notes:
    assumptions that hold for every picture. The parts are the library's: `backbone` (or `dpt`) is the encoder, `neck`,
    and `head`, `relative_head` and `metric_head` are the heads. average_flipped: `predict` averages the network's maps
    of the picture and of its mirror image, which ZoeDepth's post-processing offers and its paper's numbers use.
    """

    part_of: ClassVar[dict[str, str]] = {**GeometryModel.part_of, "dpt": "encoder"}
    average_flipped = False

    def __init__(
        self,
        network: nn.Module,
        name: str,
        metric: bool,
        rules: Rules,
        num_tokens: int | None = None,
        autocast: str = "none",
        fov_x: float | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(network, name, "metric" if metric else "disparity", num_tokens, autocast)
        self.output: Literal["points", "depth", "disparity"] = "depth" if metric else "disparity"
        self.rules, self.fov_x, self.notes = rules, fov_x, notes

    def pixel_values(self, images: Tensor) -> Tensor:
        """The network's input (B,3,H',W') of images (B,3,H,W) in [0,1], by the model's own rules."""
        rules = self.rules
        size = rules.processed_size(*images.shape[-2:], self.num_tokens)
        values = images * 255
        if rules.resize or self.num_tokens is not None:
            values = resize_rounded(values, size, rules.mode)
        values = self._normalised((values * rules.scale).float())
        if rules.divisor:
            above, left = (-side % rules.divisor // 2 for side in size)
            below, right = (-side % rules.divisor - -side % rules.divisor // 2 for side in size)
            values = F.pad(values, (left, right, above, below))
        return values

    def _normalised(self, values: Tensor) -> Tensor:
        mean, std = (values.new_tensor(v)[:, None, None] for v in (self.rules.mean, self.rules.std))
        return (values - mean) / std

    def _at_size(self, output: Tensor, height: int, width: int) -> Tensor:
        """The network's map (B,h,w) at the picture's size, as `post_process_depth_estimation`."""
        return F.interpolate(output[:, None], (height, width), mode="bicubic", align_corners=False)[:, 0]

    def _run(self, pixels: Tensor) -> tuple[Tensor, list[str] | None]:
        """The network's map (B,h,w), and each picture's domain for networks that choose one."""
        return self.network(pixels).predicted_depth, None

    def _cameras(self, images: Tensor, intrinsics: Tensor | None) -> Tensor:
        """Intrinsics (B,3,3), given or from the field of view."""
        if intrinsics is None:
            intrinsics = intrinsics_from_fov(self.fov_x or ASSUMED_FOV, images.shape[-1] / images.shape[-2])
        return intrinsics.to(images).expand(images.shape[0], 3, 3)

    def forward(self, images: Tensor, intrinsics: Tensor | None = None) -> dict[str, Tensor]:
        """Maps with gradients, float32, at the size of images (B,3,H,W) in [0,1].

        `disparity` (B,H,W) up to scale and shift; or `depth` (B,H,W) in metres and `points` (B,H,W,3), unprojected
        with intrinsics (B,3,3) or the assumed field of view.
        """
        pixels = self.pixel_values(images)
        with self.mixed():
            output, _ = self._run(pixels)
        output = self._at_size(output.float(), *images.shape[-2:])
        if self.output == "disparity":
            return {"disparity": output}
        return {"depth": output, "points": unproject(output, self._cameras(images, intrinsics))}

    def features(self, images: Tensor) -> Tensor:
        """The encoder's last patch features (B,N,C) of images (B,3,H,W) in [0,1], without class token, with gradients.

        float32; after the encoder's last normalisation where it has one; rows of patches one after the other.
        """
        pixels = self.pixel_values(images)
        with self.mixed():
            if getattr(self.network, "backbone", None) is not None:
                tokens = self.network.backbone(pixels).feature_maps[-1]
            else:
                tokens = self.network.dpt(pixels).last_hidden_state
        if tokens.ndim == 4:  # (B,C,h,w) of encoders that reshape
            return tokens.flatten(2).mT.float()
        patches = (pixels.shape[-2] // self.rules.patch) * (pixels.shape[-1] // self.rules.patch)
        return tokens[:, -patches:].float()

    @torch.no_grad()
    def predict(self, images: Tensor, intrinsics: Tensor | None = None) -> Prediction:
        """Prediction without gradients for images (3,H,W) or (B,3,H,W) in [0,1]; intrinsics (3,3) or (B,3,3).

        Metric models: depth in metres, points from the camera that was given or assumed. Disparity models: the
        disparity, and depth and points in an arbitrary unit by `depth_from_disparity`. `note` says what was assumed.
        The network runs in float32, whatever `autocast` is.
        """
        batch = images if images.ndim == 4 else images[None]
        pixels = self.pixel_values(batch)
        output, domain = self._run(pixels)
        if self.average_flipped:
            output = (output + self._run(pixels.flip(-1))[0].flip(-1)) / 2
        output = self._at_size(output, *batch.shape[-2:])
        cameras, notes, extra = self._cameras(batch, intrinsics), list(self.notes), {}
        if intrinsics is None:
            extra["assumed_fov"] = self.fov_x or ASSUMED_FOV
            notes.append(f"a field of view of {extra['assumed_fov']:g} degrees across and square pixels are assumed")
        if domain is not None:
            extra["domain"] = domain if images.ndim == 4 else domain[0]
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
        return Prediction(
            points, depth, known, cameras, self.kind, disparity=disparity, note="; ".join(notes), extra=extra
        )


class ZoeDepthModel(TransformersModel):
    """ZoeDepth: metric depth.

    A network with several heads (NK) chooses one by the picture; `Prediction.extra["domain"]` is the name that its
    configuration gives the head (`nyu` indoors, `kitti` outdoors).
    """

    def pixel_values(self, images: Tensor) -> Tensor:
        """The network's input (B,3,H',W'): a reflected border, resizing with aligned corners, normalisation."""
        rules, values = self.rules, images * (255 * self.rules.scale)
        if rules.border:
            above, beside = zoedepth_border(*images.shape[-2:])
            if above >= images.shape[-2] or beside >= images.shape[-1]:
                raise UserError(f"model {self.name!r}: a picture of {tuple(images.shape[-2:])} pixels is too small.")
            values = F.pad(values, (beside, beside, above, above), mode="reflect")
        if rules.resize or self.num_tokens is not None:
            size = rules.processed_size(*values.shape[-2:], self.num_tokens)
            values = F.interpolate(values, size, mode=rules.mode, align_corners=True)
        return self._normalised(values)

    def _at_size(self, output: Tensor, height: int, width: int) -> Tensor:
        above, beside = zoedepth_border(height, width) if self.rules.border else (0, 0)
        bordered = super()._at_size(output, height + 2 * above, width + 2 * beside)
        return bordered[:, above : above + height, beside : beside + width]

    def _run(self, pixels: Tensor) -> tuple[Tensor, list[str] | None]:
        output = self.network(pixels)
        depth, logits = output.predicted_depth, output.domain_logits
        if logits is None:
            return depth, None
        # The library lets a batch vote for one head; a picture that was outvoted goes through the one of its own.
        domain, voted = logits.argmax(-1), int(logits.sum(0).argmax())
        for other in set(domain.tolist()) - {voted}:
            chosen = (domain == other).nonzero()[:, 0]
            depth = depth.index_copy(0, chosen, self.network(pixels[chosen]).predicted_depth)
        names = [head["name"] for head in self.network.config.bin_configurations]
        return depth, [names[index] for index in domain.tolist()]
