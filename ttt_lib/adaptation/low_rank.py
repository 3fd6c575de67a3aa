"""Low-rank updates of chosen weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ttt_lib.core.errors import UserError


class LowRank:
    """Updates W + B A of rank r for the matrices among `named` (LoRA, Hu et al. 2021); the rest stays as it is.

    Convolutions count as matrices of (outputs, inputs * kernel). B is zero at first, so training starts from W; A is
    drawn from a fixed seed. Raises `UserError` when no parameter is large enough.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], rank: int) -> None:
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.weights: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for name, parameter in named:
            outputs = parameter.shape[0] if parameter.ndim >= 2 else 0
            inputs = parameter.numel() // max(outputs, 1)
            if min(outputs, inputs) <= rank:
                parameter.requires_grad_(False)
                continue
            down = torch.randn(rank, inputs, generator=generator).to(parameter) / inputs**0.5
            up = torch.zeros(outputs, rank, device=parameter.device, dtype=parameter.dtype)
            self.factors[name] = (up.requires_grad_(), down.requires_grad_())
            self.weights[name] = parameter.detach()
            parameter.requires_grad_(False)
        if not self.factors:
            raise UserError(f"train.lora_rank {rank}: none of the chosen parts has a matrix of a higher rank.")

    def leaves(self) -> list[Tensor]:
        """The factors, B and A of each matrix."""
        return [factor for pair in self.factors.values() for factor in pair]

    def merged(self) -> dict[str, Tensor]:
        """W + B A by name, with gradients to the factors."""
        return {
            name: weight + (up @ down).reshape(weight.shape)
            for (name, weight), (up, down) in zip(self.weights.items(), self.factors.values())
        }

    @contextmanager
    def attached(self, network: nn.Module) -> Iterator[None]:
        """Inside, the modules of `network` compute with the merged weights."""
        places = []
        try:
            for name, value in self.merged().items():
                path, _, leaf = name.rpartition(".")
                held = network.get_submodule(path)._parameters
                places.append((held, leaf, held[leaf]))
                held[leaf] = value  # the dictionary takes any tensor, and keeps its order
            yield
        finally:
            for held, leaf, parameter in places:
                held[leaf] = parameter
