"""ZoeDepth, Depth Pro and Prompt Depth Anything from transformers: what they do otherwise than `TransformersModel`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lib.data.known_distances import References, spread_distances
from ttt_lib.models.transformers_models import TransformersModel

INVERSE_DEPTHS = (1e-4, 1e4)  # per metre, between which Depth Pro's post-processing keeps them
FOV = (1.0, 179.0)  # degrees that a camera can have, whatever the head of Depth Pro says
PROMPT_SIZE = (192, 256)  # of the LiDAR maps that Prompt Depth Anything was published for


def _border(height: int, width: int) -> tuple[int, int]:
    """ZoeDepth's border in pixels of the picture, (above and below, left and right)."""
    return int(math.sqrt(height / 2) * 3), int(math.sqrt(width / 2) * 3)


class ZoeDepthModel(TransformersModel):
    """ZoeDepth: metric depth.

    A network with several heads (NK) chooses one by the picture; `Prediction.extra["domain"]` is the name that its
    configuration gives the head (`nyu` indoors, `kitti` outdoors).
    """

    def pixel_values(self, images: Tensor) -> Tensor:
        """The network's input (B,3,H',W'): a reflected border, resizing with aligned corners, normalisation."""
        above, beside = _border(*images.shape[-2:])
        values = F.pad(images * (255 * self.rules.scale), (beside, beside, above, above), mode="reflect")
        size = self.rules.processed_size(*values.shape[-2:], self.num_tokens)
        return self._normalised(F.interpolate(values, size, mode=self.rules.mode, align_corners=True))

    def _at_size(self, output: Tensor, height: int, width: int) -> Tensor:
        above, beside = _border(height, width)
        bordered = super()._at_size(output, height + 2 * above, width + 2 * beside)
        return bordered[:, above : above + height, beside : beside + width]

    def _seen_width(self, images: Tensor) -> float:
        height, width = images.shape[-2:]
        above, beside = _border(height, width)
        bordered = width + 2 * beside
        return self.rules.processed_size(height + 2 * above, bordered, self.num_tokens)[1] * width / bordered

    def _run(self, pixels: Tensor, whole: bool = True) -> tuple[Tensor, dict[str, Any]]:
        """Depth, and the name of the head that gave it to each picture, where there are several."""
        heads = self.network.config.bin_configurations
        if len(heads) == 1:
            return self.network(pixels).predicted_depth, {}
        # The library lets a batch vote for one head: each picture goes through by itself.
        alone = [self.network(picture) for picture in pixels.split(1)]
        names = [heads[int(output.domain_logits.argmax())]["name"] for output in alone]
        return torch.cat([output.predicted_depth for output in alone]), {"domain": names}


class DepthProModel(TransformersModel):
    """Depth Pro (Bochkovskii et al. 2024): metric depth, and a field of view of its own, so that none is assumed.

    Its network gives inverse depth for a camera whose focal length is the picture's width; by the focal length that is
    known, or else by its own, that becomes metres (`post_process_depth_estimation` of the library).
    """

    of_one_camera = False

    def pixel_values(self, images: Tensor) -> Tensor:
        """The network's input (B,3,S,S): normalised, then stretched to a square without smoothing."""
        values = self._normalised(images * (255 * self.rules.scale))
        return F.interpolate(values, self.rules.size, mode="bilinear")

    def _at_size(self, output: Tensor, height: int, width: int) -> Tensor:
        return F.interpolate(output[:, None], (height, width), mode="bilinear")[:, 0]

    def _run(self, pixels: Tensor, whole: bool = True) -> tuple[Tensor, dict[str, Any]]:
        """Canonical inverse depth, and the field of view of each picture, where the network has a head for it."""
        output = self.network(pixels)
        fov_x = output.field_of_view
        return output.predicted_depth, {} if fov_x is None else {"fov_x": fov_x.float().clamp(*FOV)}

    def _metres(self, output: Tensor, images: Tensor, cameras: Tensor) -> Tensor:
        return 1 / (output / cameras[:, 0, 0, None, None]).clamp(*INVERSE_DEPTHS)

    def _tokens(self, pixels: Tensor) -> Tensor:
        """Of the encoder that sees the whole picture."""
        return self.network.depth_pro.encoder.image_encoder(pixels).last_hidden_state


class PromptedModel(TransformersModel):
    """Prompt Depth Anything (Lin et al. 2025): metric depth, completed from known distances.

    `known_references`, spread over the picture, are its prompt, on the whole picture; views of it, whose cameras turned,
    go without. Where nothing is known, its depth is relative.
    """

    of_one_camera = False
    _prompt: tuple[References, Tensor] | None = None

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.kind = "affine_invariant"  # alone

    def _run(self, pixels: Tensor, whole: bool = True) -> tuple[Tensor, dict[str, Any]]:
        known = self.known_references if whole else None
        if known is None or bool((known.depth == known.depth[0]).all()):  # of one distance it can make nothing
            return self.network(pixels).predicted_depth, {}
        if self._prompt is None or self._prompt[0] is not known:
            self._prompt = known, spread_distances(known, *PROMPT_SIZE).to(pixels)
        prompt = self._prompt[1].expand(len(pixels), 1, *PROMPT_SIZE)
        return self.network(pixels, prompt_depth=prompt).predicted_depth, {"kind": "metric"}
