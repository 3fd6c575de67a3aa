"""MoGe's convolutions on a GPU: the picture's edge repeated without leaving the layout that cuDNN computes in.

All convolutions of MoGe's neck and heads repeat the edge by a pixel. For that torch turns every map from channels-last to
channels first, and cuDNN turns it back; under autocast it is float32 on that way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RepeatEdge(torch.autograd.Function):
    """`F.pad(maps, (1, 1, 1, 1), "replicate")` of maps (B,C,H,W) of at least two rows and columns, in their layout.

    Example:
        >>> RepeatEdge.apply(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))[0, 0].tolist()
        [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0], [3.0, 3.0, 4.0, 4.0]]
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        """The padded maps, (B,C,H+2,W+2)."""
        batch, channels, height, width = maps.shape
        size = batch, channels, height + 2, width + 2
        padded = torch.empty(size, dtype=maps.dtype, device=maps.device, memory_format=_layout(maps))
        rows = padded[:, :, 1:-1]
        rows[..., 1:-1] = maps
        rows[..., :: width + 1] = maps[..., :: width - 1]  # first and last at once: each is a kernel of its own
        padded[:, :, :: height + 1] = rows[:, :, :: height - 1]
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """What repeated pixels get, added to the pixel that was repeated."""
        height, width = gradient.shape[2] - 2, gradient.shape[3] - 2
        own = gradient[:, :, 1:-1, 1:-1].clone(memory_format=_layout(gradient))
        rows = gradient[:, :, :: height + 1]
        own[:, :, :: height - 1] += rows[..., 1:-1]
        own[..., :: width - 1] += gradient[:, :, 1:-1, :: width + 1]
        own[:, :, :: height - 1, :: width - 1] += rows[..., :: width + 1]
        return own


def _layout(maps: Tensor) -> torch.memory_format:
    last = maps.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class EdgeConv2d(nn.Conv2d):
    """`nn.Conv2d` with `padding=1, padding_mode="replicate"`: the same numbers and the same state."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if min(input.shape[-2:]) < 2:
            return super()._conv_forward(input, weight, bias)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):  # which would cast them after they were padded
            input = input.to(torch.get_autocast_dtype(kind))
        return F.conv2d(RepeatEdge.apply(input), weight, bias, self.stride, 0, self.dilation, self.groups)


def keep_layout(network: nn.Module) -> None:
    """Make a network's convolutions that repeat the edge by a pixel `EdgeConv2d`, and the network channels-last. In place.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="replicate"))
        >>> keep_layout(network)
        >>> type(network[0]).__name__
        'EdgeConv2d'
    """
    for module in network.modules():
        repeats = type(module) is nn.Conv2d and module.padding_mode == "replicate"
        if repeats and tuple(module._reversed_padding_repeated_twice) == (1, 1, 1, 1):
            module.__class__ = EdgeConv2d
    network.to(memory_format=torch.channels_last)
