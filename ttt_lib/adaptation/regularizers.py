"""Training that stays near the original: L2-SP, stochastic restore, sharpness-aware steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ttt_lib.adaptation.student import Student


def distance_gradients(student: Student, weight: float) -> list[Tensor]:
    """Gradient of `weight * sum (theta - theta_0)^2` (L2-SP, Li et al. 2018) for each leaf.

    For low-rank updates the distance is that of the factors from a zero update: B's, since A alone changes nothing.
    """
    if student.low_rank is not None:
        pairs = student.low_rank.factors.values()
        return [g for up, down in pairs for g in (2 * weight * up.detach(), torch.zeros_like(down))]
    return [2 * weight * (p.detach() - o) for p, o in zip(student.parameters, student.original)]


def restore_some(student: Student, probability: float, generator: torch.Generator) -> None:
    """Each number returns to its original with `probability` (CoTTA, Wang et al. 2022, equation 8).

    For low-rank updates whole columns of B return to zero. Draws come from `generator` (CPU).
    """
    with torch.no_grad():
        if student.low_rank is not None:
            for up, _ in student.low_rank.factors.values():
                up[:, (torch.rand(up.shape[1], generator=generator) < probability).to(up.device)] = 0.0
            return
        for parameter, original in zip(student.parameters, student.original):
            back = (torch.rand(parameter.shape, generator=generator) < probability).to(parameter.device)
            parameter.copy_(torch.where(back, original, parameter))


@contextmanager
def sharpest_point(leaves: list[Tensor], gradients: list[Tensor | None], radius: float) -> Iterator[None]:
    """Inside, the weights stand where the loss is worst within `radius`, to first order: theta + radius g / |g|.

    Sharpness-aware minimisation (Foret et al. 2021, equation 2), which SAR uses at test time. Exactly undone after.
    """
    norm = torch.stack([g.square().sum() for g in gradients if g is not None] or [torch.zeros(())]).sum().sqrt()
    own = [leaf.detach().clone() for leaf in leaves]
    try:
        with torch.no_grad():
            for leaf, gradient in zip(leaves, gradients):
                if gradient is not None:
                    leaf.add_(gradient * (radius / norm.clamp_min(1e-12)))
        yield
    finally:
        with torch.no_grad():
            for leaf, value in zip(leaves, own):
                leaf.copy_(value)
