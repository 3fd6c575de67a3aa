"""Prompt tokens: further tokens of a ViT that are trained while the network stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ttt_lib.core.errors import NotSupported
from ttt_lib.models.base import GeometryModel

SPREAD = 0.02  # of the values they begin with, as the ViT's own tokens


@contextmanager
def prompt_tokens(model: GeometryModel, count: int) -> Iterator[None]:
    """Inside, the ViT of a MoGe network has `count` more tokens, the parameter `*.register_tokens`; then none.

    They stand where DINOv2 puts its registers, behind the class token and without a place in the image, and are left out of
    what the encoder hands on (shallow visual prompts, Jia et al. 2022). Drawn from a fixed seed. Attention sees them from
    the first pass on, so a network changes a little before any training: compare with a rate of 0.

    Raises `NotSupported` for a network without a DINOv2 of MoGe's, or with registers of its own.
    """
    if not count:
        yield
        return
    vit = next((each for each in model.network.modules() if hasattr(each, "num_register_tokens")), None)
    if vit is None or vit.num_register_tokens:
        raise NotSupported(f"train.prompt_tokens: {model.name} has no ViT that takes them; use MoGe's networks, or 0.")
    drawn = torch.randn(1, count, vit.embed_dim, generator=torch.Generator().manual_seed(0))
    try:
        vit.register_tokens = nn.Parameter(SPREAD * drawn.to(model.device), requires_grad=False)
        vit.num_register_tokens = count
        yield
    finally:
        del vit.register_tokens  # a plain None again, not a parameter that is None
        vit.register_tokens, vit.num_register_tokens = None, 0
