"""MoGe's layers with less to compute: the same weights under the same names, the same numbers up to rounding.

- MoGe-2's last level has no blocks, so nothing in it bends a map: two upsamplings of all channels to the largest size and a
  convolution of each, the neck's and a head's, are one convolution of the smaller maps to the head's three channels.
- All convolutions of neck and heads repeat the edge by a pixel. For that torch turns every map from channels-last, in
  which cuDNN computes, to channels first and back; under autocast it is float32 on that way. Here a map keeps its
  layout, and the ReLU before such a convolution is taken in the same go.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from moge.model.modules import ConvStack, Resampler
from torch import Tensor, nn
from torch.nn import functional as F

SIDES = (1, 1, 1, 1)


class RepeatEdge(torch.autograd.Function):
    """`F.pad(maps, (1, 1, 1, 1), "replicate")` of maps (B,C,H,W) of at least two rows and columns, in their layout.

    With `relu` of `F.relu(maps)`, which need not be kept for the backward pass: the padded maps say where it cut.

    Example:
        >>> RepeatEdge.apply(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), False)[0, 0].tolist()
        [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0], [3.0, 3.0, 4.0, 4.0]]
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, relu: bool) -> Tensor:
        """The padded maps, (B,C,H+2,W+2)."""
        batch, channels, height, width = maps.shape
        size = batch, channels, height + 2, width + 2
        padded = torch.empty(size, dtype=maps.dtype, device=maps.device, memory_format=_layout(maps))
        rows = padded[:, :, 1:-1]
        if relu:
            torch.clamp_min(maps, 0, out=rows[..., 1:-1])
        else:
            rows[..., 1:-1] = maps
        rows[..., :: width + 1] = rows[..., 1 : width + 1 : width - 1]  # first and last at once: one kernel
        padded[:, :, :: height + 1] = rows[:, :, :: height - 1]
        if relu:
            ctx.save_for_backward(padded)
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """What repeated pixels get, added to the pixel that was repeated."""
        height, width = gradient.shape[2] - 2, gradient.shape[3] - 2
        rows, columns, inside = slice(None, None, height + 1), slice(None, None, width + 1), slice(1, -1)
        cut = ctx.saved_tensors  # once: checkpointing gives them once

        def part(*places: slice) -> Tensor:
            piece = gradient[(..., *places)]
            for padded in cut:
                piece = torch.ops.aten.threshold_backward(piece, padded[(..., *places)], 0)
            return piece

        own = part(inside, inside).contiguous(memory_format=_layout(gradient))
        own[:, :, :: height - 1] += part(rows, inside)
        own[..., :: width - 1] += part(inside, columns)
        own[:, :, :: height - 1, :: width - 1] += part(rows, columns)
        return own, None


def _layout(maps: Tensor) -> torch.memory_format:
    last = maps.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _with_edge(maps: Tensor, relu: bool = False) -> Tensor:
    """Maps (B,C,H,W), after a ReLU if asked, in autocast's type and with their edge repeated by a pixel."""
    kind = maps.device.type
    if torch.is_autocast_enabled(kind):  # which would cast them after they were padded
        maps = maps.to(torch.get_autocast_dtype(kind))
    if min(maps.shape[-2:]) < 2:
        return F.pad(F.relu(maps) if relu else maps, SIDES, mode="replicate")
    return RepeatEdge.apply(maps, relu)


@dataclass
class LinearMaps:
    """Maps (B,O,H,W) that are linear in others, before any of them is computed: the sum of three.

    coarse: maps (B,C,H/2,W/2), here with their edge repeated by a pixel, to be doubled bilinearly and then convolved by a
    kernel (O,C,3,3), over whose edge they are repeated too; fine: maps (B,C,H,W) and a matrix (O,C) of their pixels;
    bias (O,).
    """

    coarse: list[tuple[Tensor, Tensor]]
    fine: list[tuple[Tensor, Tensor]]
    bias: Tensor

    def __add__(self, other: LinearMaps) -> LinearMaps:
        return LinearMaps(self.coarse + other.coarse, self.fine + other.fine, self.bias + other.bias)

    def through(self, layer: nn.Conv2d) -> LinearMaps:
        """What a convolution of single pixels makes of them."""
        matrix = layer.weight[..., 0, 0]
        with _whole(matrix):
            coarse = [(maps, torch.einsum("po,ockl->pckl", matrix, kernel)) for maps, kernel in self.coarse]
            fine = [(maps, matrix @ pixels) for maps, pixels in self.fine]
            return LinearMaps(coarse, fine, matrix @ self.bias + layer.bias)

    def computed(self) -> Tensor:
        """The maps.

        A pixel of doubled maps and the ones beside it lie between the same three by three coarse ones, so doubling and
        convolving is one convolution of the coarse maps for each of the four places that a pixel has in a coarse one.
        Repeating the edge before doubling is the same as after it.
        """
        total, bias = 0, self.bias.repeat_interleave(4)
        for maps, kernel in self.coarse:
            total = total + F.conv2d(maps, _of_four_places(kernel), bias)
            bias = None
        total = F.pixel_shuffle(total, 2)
        for maps, pixels in self.fine:
            total = total + F.conv2d(_once(maps), pixels[..., None, None])
        return total


def _whole(weights: Tensor) -> torch.autocast:
    """Inside, weights are multiplied in their own precision."""
    return torch.autocast(weights.device.type, enabled=False)


def _once(maps: Tensor) -> Tensor:
    """Maps (B,C,H,W) that are one for the whole batch, as those of pixels' places are, as (1,C,H,W); others as they are."""
    return maps[:1] if maps.stride(0) == 0 else maps


def _of_four_places(kernel: Tensor) -> Tensor:
    """A kernel (O,C,3,3) over maps that are doubled bilinearly, as (4 O,C,3,3) over the maps themselves.

    Its outputs are in `F.pixel_shuffle`'s order.
    """
    place, tap, coarse = (torch.arange(count, device=kernel.device) for count in (2, 3, 3))
    between = (place[:, None, None] + tap[:, None] - 0.5) / 2 - 0.5  # where the tap's pixel lies on the coarse grid
    share = (1 - (between - (coarse - 1)).abs()).clamp_min(0).to(kernel)
    with _whole(kernel):
        return torch.einsum("ockl,pks,qlt->opqcst", kernel, share, share).flatten(0, 2)


class _Lighter:
    """A layer that does the work of MoGe's, of class `published`."""

    published: ClassVar[type[nn.Module]]


class EdgeConv2d(_Lighter, nn.Conv2d):
    """`nn.Conv2d` with `padding=1, padding_mode="replicate"`: the same numbers and the same state."""

    published, relu = nn.Conv2d, False

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(_with_edge(input, self.relu), weight, bias, self.stride, 0, self.dilation, self.groups)


class ReluEdgeConv2d(EdgeConv2d):
    """The same after a ReLU, whose own layer then passes maps on."""

    relu = True


class PassedOn(_Lighter, nn.ReLU):
    """A ReLU that the next layer takes."""

    published = nn.ReLU

    def forward(self, input: Tensor) -> Tensor:
        """The maps themselves."""
        return input


class SharedConv2d(_Lighter, nn.Conv2d):
    """`nn.Conv2d` of single pixels which of maps that are one for the whole batch gives one, to be added to all."""

    published = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """(B,C,H,W), or the same maps expanded -> (B,O,H,W), or (1,O,H,W)."""
        return super().forward(_once(input))


class LastResampler(_Lighter, Resampler):
    """Doubling and convolving, left to whoever needs its maps."""

    published = Resampler

    def forward(self, input: Tensor) -> LinearMaps:
        """(B,C,h,w) -> maps of twice the size, not computed yet."""
        return LinearMaps([(_with_edge(input), self[1].weight)], [], self[1].bias)


class LastInput(_Lighter, nn.Conv2d):
    """What a stack takes in at its last level: pixels' places in a neck, the neck's maps in a head."""

    published = nn.Conv2d

    def forward(self, input: Tensor | LinearMaps) -> LinearMaps:
        """Computed maps or linear ones -> linear ones."""
        if isinstance(input, LinearMaps):
            return input.through(self)
        return LinearMaps([], [(input, self.weight[..., 0, 0])], self.bias)


class LastOutput(_Lighter, nn.Conv2d):
    """A head's own maps from all that is linear before them."""

    published = nn.Conv2d

    def forward(self, input: LinearMaps) -> Tensor:
        """Linear maps -> (B,O,H,W)."""
        return input.through(self).computed()


def _repeats(module: nn.Module) -> bool:
    """Whether it is a convolution that repeats the edge by a pixel."""
    repeats = type(module) is nn.Conv2d and module.padding_mode == "replicate"
    return repeats and tuple(module._reversed_padding_repeated_twice) == SIDES


def _ends_linearly(stack: ConvStack, output: type[nn.Module]) -> bool:
    """Whether the last level only doubles, convolves by three by three and adds, and ends in `output`."""
    doubling, *rest = stack.resamplers[-1] if len(stack.resamplers) else [None]
    return (
        isinstance(doubling, nn.Upsample)
        and (doubling.mode, doubling.scale_factor, doubling.align_corners) == ("bilinear", 2, False)
        and [_repeats(layer) and layer.kernel_size == (3, 3) for layer in rest] == [True]
        and len(stack.res_blocks[-1]) == 0
        and type(stack.input_blocks[-1]) is nn.Conv2d
        and type(stack.output_blocks[-1]) is output
        and all(layer.bias is not None for layer in (rest[0], stack.input_blocks[-1]))
    )


def lighten(network: nn.Module) -> None:
    """Let a MoGe network, or what of it these layers can stand for, compute by them, channels-last. In place.

    Example:
        >>> network = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3, padding=1, padding_mode="replicate"))
        >>> lighten(network)
        >>> [type(layer).__name__ for layer in network]
        ['PassedOn', 'ReluEdgeConv2d']
    """
    _make_last_level_linear(network)
    for stack in network.modules():
        if isinstance(stack, nn.Sequential):
            for before, layer in pairwise(stack):
                if type(before) is nn.ReLU and _repeats(layer):
                    before.__class__, layer.__class__ = PassedOn, ReluEdgeConv2d
    for layer in network.modules():
        if _repeats(layer):
            layer.__class__ = EdgeConv2d
    network.to(memory_format=torch.channels_last)


def _make_last_level_linear(network: nn.Module) -> None:
    """Where neck and heads allow it: a neck alone would hand on what a head cannot take."""
    neck = getattr(network, "neck", None)
    heads = [stack for stack in network.children() if isinstance(stack, ConvStack) and stack is not neck]
    if not isinstance(neck, ConvStack) or not _ends_linearly(neck, nn.Identity):
        return
    if not all(_ends_linearly(head, nn.Conv2d) for head in heads):
        return
    for stack in (neck, *heads):
        stack.resamplers[-1].__class__ = LastResampler
        stack.input_blocks[-1].__class__ = LastInput
    for layer in neck.input_blocks[1:-1]:
        if type(layer) is nn.Conv2d:
            layer.__class__ = SharedConv2d
    for head in heads:
        head.output_blocks[-1].__class__ = LastOutput


def as_published(network: nn.Module) -> None:
    """Undo `lighten`, for comparing with the authors' code. In place."""
    lighter = [layer for layer in network.modules() if isinstance(layer, _Lighter)]
    for layer in lighter:
        layer.__class__ = layer.published
    if lighter:
        network.to(memory_format=torch.contiguous_format)
