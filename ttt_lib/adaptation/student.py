"""The student: the weights that training moves, inside the network, or low-rank updates of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ttt_lib.core.errors import UserError
from ttt_lib.models.base import GeometryModel, holding


class Student:
    """The weights that training moves, inside the network.

    named: the network's parameters that the experiment chose; leaves: what the optimizer moves, these very parameters
    or the factors of their low-rank updates. The network itself always holds valid weights.
    """

    def __init__(self, model: GeometryModel, named: list[tuple[str, nn.Parameter]], lora_rank: int = 0) -> None:
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

    def distance_gradients(self, weight: float) -> list[Tensor]:
        """Gradient of `weight * sum (theta - theta_0)^2` (L2-SP, Li et al. 2018) for each leaf.

        For low-rank updates the distance is that of the factors from a zero update: B's, since A alone changes nothing.
        """
        if self.low_rank is not None:
            pairs = self.low_rank.factors.values()
            return [g for up, down in pairs for g in (2 * weight * up.detach(), torch.zeros_like(down))]
        return [2 * weight * (p.detach() - o) for p, o in zip(self.parameters, self.original)]

    @torch.no_grad()
    def restore_some(self, probability: float, generator: torch.Generator) -> None:
        """Each number returns to its original with `probability` (CoTTA, Wang et al. 2022, equation 8).

        For low-rank updates whole columns of B return to zero. Draws come from `generator` (CPU).
        """
        if self.low_rank is not None:
            for up, _ in self.low_rank.factors.values():
                up[:, (torch.rand(up.shape[1], generator=generator) < probability).to(up.device)] = 0.0
            return
        for parameter, original in zip(self.parameters, self.original):
            back = (torch.rand(parameter.shape, generator=generator) < probability).to(parameter.device)
            parameter.copy_(torch.where(back, original, parameter))

    @torch.no_grad()
    def shrink_change(self, keep: float) -> None:
        """theta <- keep theta + (1 - keep) theta_0; a low-rank update shrinks by the same factor, through its B."""
        if self.low_rank is not None:
            for up, _ in self.low_rank.factors.values():
                up.mul_(keep)
            return
        for parameter, original in zip(self.parameters, self.original):
            parameter.lerp_(original, 1 - keep)


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
            parameter.requires_grad_(False)
            # 1 where there is no such dimension.
            outputs, inputs = parameter.shape[:1].numel(), parameter.shape[1:].numel()
            if min(outputs, inputs) > rank:
                down = torch.randn(rank, inputs, generator=generator).to(parameter) / inputs**0.5
                up = torch.zeros(outputs, rank, device=parameter.device, dtype=parameter.dtype)
                self.factors[name] = (up.requires_grad_(), down.requires_grad_())
                self.weights[name] = parameter.detach()
        if not self.factors:
            raise UserError(f"train.lora_rank {rank}: none of the chosen parts has a matrix of a higher rank.")

    def leaves(self) -> list[Tensor]:
        """The factors, B and A of each matrix."""
        return [factor for pair in self.factors.values() for factor in pair]

    def merged(self) -> dict[str, Tensor]:
        """W + B A by name, with gradients to the factors."""
        return {
            name: self.weights[name] + (up @ down).reshape(self.weights[name].shape)
            for name, (up, down) in self.factors.items()
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
