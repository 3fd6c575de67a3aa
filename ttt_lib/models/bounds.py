"""What a model's files ask for, measured before anything of that size is made: files may be damaged, or hostile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

PLAIN = 1 << 16  # whole numbers of a configuration up to here are looked at by what they make together
LARGEST_SIDE = 16384  # pixels that a picture may be resized to
LAYERS = 64  # layers that a network may have with fewer tensors than that
SPARE = 1 << 20  # numbers that a network may have beside those of its file


def check_numbers(value: Any, largest: int, layers: int, where: str, key: str = "") -> None:
    """Numbers of a configuration against what may be the largest one, or for layers the number of tensors.

    A width is a side of some tensor, and each layer has a tensor: so a network that fits its file is never refused, and
    another one is before anything of its size is made. Raises `ValueError`.
    """
    if isinstance(value, dict):
        for inner, content in value.items():
            check_numbers(content, largest, layers, where, str(inner))
    elif isinstance(value, list | tuple):
        for content in value:
            check_numbers(content, largest, layers, where, key)
    elif isinstance(value, int | float):
        counts_layers = "layers" in key or key == "depths" or ("_blocks" in key and not key.startswith("dim"))
        limit = layers if counts_layers else largest
        if not abs(value) <= limit:
            raise ValueError(f"{where} says {key} {value}, more than {limit}, which there can be")


def build_empty(
    build: Callable[[], nn.Module], config: dict[str, Any], stored: Iterable[tuple[int, ...]], size: int, where: str
) -> nn.Module:
    """What `build` makes of a configuration, on the meta device, where it asks for no more than its file holds.

    stored: shapes of the file's tensors; size: its bytes. A network may have twice the stored numbers: what a file lacks
    would be initialised, so it would be there before anybody complains. Raises `ValueError`.
    """
    shapes = list(stored)
    longest = max((side for shape in shapes for side in shape), default=0)
    check_numbers(config, max(PLAIN, longest), max(LAYERS, len(shapes)), where)
    # DINOv2 of MoGe reads its drop rates from a linspace, and on the meta device there is nothing to read.
    with torch.device("meta"), patch.object(torch, "linspace", partial(torch.linspace, device="cpu")):
        network = build()
    wanted = sum(tensor.numel() for tensor in network.state_dict().values())
    # A shape is only what a file says of itself; no number takes less than a byte.
    held = min(sum(math.prod(shape) for shape in shapes), size)
    if wanted > 2 * held + SPARE:
        raise ValueError(f"{where} asks for {wanted} weights and the file holds {held}")
    return network
