"""Training that stays near the original: low-rank updates, L2-SP, stochastic restore, sharpness-aware steps; and what a
change as large gives that nothing was learned in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ttt_lib.adaptation.student import Student
    from ttt_lib.core.types import Prediction


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


def random_change(original: list[Tensor], values: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """`original`, each tensor moved in a random direction as far as it is from `values`. Draws come from `generator` (CPU).

    Example:
        >>> (moved,) = random_change([torch.zeros(4)], [torch.full((4,), 0.5)], torch.Generator().manual_seed(0))
        >>> round(float(moved.norm()), 4)
        1.0
    """
    moved = []
    for start, end in zip(original, values):
        direction = torch.randn(start.shape, generator=generator).to(start)
        factor = (end - start).norm() / direction.norm().clamp_min(1e-12)
        moved.append(start.clone().add_(direction * factor))  # in the layout of `start`, which kernels round by
    return moved


def equal_effect(
    student: Student, image: Tensor, original: Prediction, values: list[Tensor], moved: list[Tensor]
) -> list[Tensor]:
    """`moved`, so far from the original weights that the prediction changes as much as with `values`, or at the most
    2^14 times as far.

    The distance is doubled until that is so, then halved in between (far off, a network gives hardly any finite depth, so
    the whole range cannot be bisected). The change is the mean |log depth - log original depth| around its median, over (H,W).
    """

    def effect(weights: list[Tensor]) -> float:
        with student.weights(weights):
            found = student.model.predict(image)
        of = (lambda p: p.disparity) if original.depth is None else (lambda p: p.depth)
        change = of(found).log() - of(original).log()
        return float((change - change.nanmedian()).abs().nanmean())

    def at(power: float) -> list[Tensor]:
        return [start.clone().add_(2**power * (end - start)) for start, end in zip(student.original, moved)]

    power, wanted = -4.0, effect(values)
    while power < 14 and effect(at(power + 1)) < wanted:
        power += 1
    for step in (0.5, 0.25, 0.125, 0.0625):
        power += step if effect(at(power + step)) < wanted else 0.0
    return at(power)


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
