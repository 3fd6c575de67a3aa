"""The student: the weights that training moves, inside the network."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ttt_lib.adaptation.low_rank import LowRank
from ttt_lib.models.base import GeometryModel, holding


class Student:
    """The weights that training moves, inside the network.

    named: the network's parameters that the experiment chose; leaves: what the optimizer moves, these very parameters
    or the factors of their low-rank updates. The network itself always holds valid weights.
    """

    def __init__(self, model: GeometryModel, named: list[tuple[str, torch.nn.Parameter]], lora_rank: int = 0) -> None:
        self.model = model
        self.low_rank = LowRank(named, lora_rank) if lora_rank else None
        if self.low_rank is not None:
            named = [(name, p) for name, p in named if name in self.low_rank.factors]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.original = [p.detach().clone() for p in self.parameters]
        self.leaves: list[Tensor] = self.low_rank.leaves() if self.low_rank else list(self.parameters)

    def values(self) -> list[Tensor]:
        """The present weights of `parameters`, detached."""
        if self.low_rank is None:
            return [p.detach() for p in self.parameters]
        return [value.detach() for value in self.low_rank.merged().values()]

    def put(self, values: list[Tensor]) -> None:
        """Make `values` the present weights (not for low-rank updates, which cannot hold any)."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values):
                parameter.copy_(value)

    def weights(self, values: list[Tensor] | None = None) -> AbstractContextManager[None]:
        """Inside, the network holds `values` (default: the present ones), without gradients to them; then its own."""
        return holding(self.parameters, self.values() if values is None else values)

    def attached(self) -> AbstractContextManager[None]:
        """Inside, a forward pass of the network reaches `leaves` with its gradients."""
        return nullcontext() if self.low_rank is None else self.low_rank.attached(self.model.network)
