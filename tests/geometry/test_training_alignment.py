"""The cheap alignments of training against MoGe's own."""

import pytest
import torch
from moge.utils import alignment as moge_alignment

from ttt_lib.geometry import fast_alignment as training_alignment

ONLY_Z, ALL = torch.tensor([0.0, 0.0, 1.0]), torch.ones(3)


def _problems(points: int, noise: float, outliers: float, shifts: torch.Tensor, seed: int, count: int = 24):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    target = torch.rand(count, points, 3, generator=generator) * torch.tensor([2.0, 2.0, 0.5])
    target = target + torch.tensor([-1.0, -1.0, 1.0])
    source = 1.7 * target + 0.3 * normal(count, 1, 3) * shifts + noise * normal(count, points, 3)
    wild = torch.rand(count, points, 1, generator=generator) < outliers
    source = torch.where(wild, source + 3 * normal(count, points, 3), source)
    weight = (torch.rand(count, points, generator=generator) < 0.8) * (
        1 + torch.rand(count, points, generator=generator)
    )
    return source, target, weight


def _objective(source, target, weight, scale, shift, trunc):
    error = (scale[:, None, None] * source + shift[:, None] - target).abs() * weight[..., None]
    return error.clamp_max(trunc or torch.inf).sum((1, 2))


@pytest.mark.parametrize(("noise", "outliers"), [(0.01, 0.0), (0.05, 0.1), (0.2, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize("trunc", [1.0, None])
@pytest.mark.parametrize(("name", "shifts"), [("z", ONLY_Z), ("xyz", ALL)])
def test_objective_is_that_of_moge(name, shifts, trunc, noise, outliers):
    problem = _problems(64, noise, outliers, shifts, seed=3)
    function = f"align_points_scale_{name}_shift"
    theirs = _objective(*problem, *getattr(moge_alignment, function)(*problem, trunc=trunc), trunc)
    ours = _objective(*problem, *getattr(training_alignment, function)(*problem, trunc=trunc), trunc)
    excess = ours / theirs - 1
    assert excess.min() > -1e-4
    assert excess.mean() < 3e-3
    assert excess.max() < 0.05
    assert (excess.abs() < 1e-4).float().mean() >= (0.95 if name == "z" else 0.75)


@pytest.mark.parametrize(("noise", "outliers"), [(0.01, 0.0), (0.05, 0.1), (0.2, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize(("points", "rounds"), [(16, "QUICK"), (64, "QUICK"), (256, "QUICK"), (16, "THOROUGH")])
def test_few_and_quick_are_nearly_as_good(points, rounds, noise, outliers):
    """How near is measured, not derived: means of at most 0.3 %, single ones of at most 6 %."""
    problem = _problems(points, noise, outliers, ALL, seed=3)
    theirs = _objective(*problem, *moge_alignment.align_points_scale_xyz_shift(*problem, trunc=1.0), 1.0)
    ours = training_alignment.align_points_scale_xyz_shift(*problem, 1.0, getattr(training_alignment, rounds))
    excess = _objective(*problem, *ours, 1.0) / theirs - 1
    assert excess.min() > -1e-4
    assert excess.mean() < 1e-2
    assert excess.max() < 0.12


@pytest.mark.parametrize("share", [0.3, 0.45, 0.55])
def test_a_second_layer_does_not_draw_the_anchors_away(share):
    """Outliers that agree with each other: the middle of all residuals lies between both layers, where no anchor is."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(6, 256, 3, generator=generator) * torch.tensor([2.0, 2.0, 0.5]) + torch.tensor(
        [-1.0, -1.0, 1.0]
    )
    source = 1.7 * target + 0.02 * torch.randn(6, 256, 3, generator=generator)
    other = torch.rand(6, 256, generator=generator) < share
    problem = (source + 6.0 * other[..., None] * ONLY_Z, target, torch.ones(6, 256))
    theirs = _objective(*problem, *moge_alignment.align_points_scale_z_shift(*problem, trunc=1.0), 1.0)
    ours = _objective(*problem, *training_alignment.align_points_scale_z_shift(*problem, trunc=1.0), 1.0)
    assert torch.allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("points", [1, 2, 6])
def test_few_points_are_solved_as_moge_does(points):
    problem = _problems(points, 0.05, 0.1, ALL, seed=1)
    problem = (problem[0], problem[1], problem[2] + 0.5)
    theirs = moge_alignment.align_points_scale_xyz_shift(*problem, trunc=1.0)
    ours = training_alignment.align_points_scale_xyz_shift(*problem, trunc=1.0)
    assert torch.allclose(_objective(*problem, *ours, 1.0), _objective(*problem, *theirs, 1.0), rtol=1e-5, atol=1e-6)


def test_exact_alignment_is_recovered_and_has_mogees_gradient():
    source, target, weight = _problems(100, 0.0, 0.0, ONLY_Z, seed=2, count=3)
    source.requires_grad_()
    scale, shift = training_alignment.align_points_scale_z_shift(source, target, weight, trunc=1.0)
    assert torch.allclose(scale * 1.7, torch.ones(3), atol=1e-4)
    assert torch.allclose(scale[:, None, None] * source + shift[:, None], target, atol=1e-4)
    assert torch.equal(shift[:, :2], torch.zeros(3, 2))
    (scale.sum() + shift.sum()).backward()
    assert float(source.grad.abs().sum()) > 0


def test_nothing_with_weight_gives_zero():
    scale, shift = training_alignment.align_points_scale_xyz_shift(
        torch.rand(2, 40, 3), torch.rand(2, 40, 3), torch.zeros(2, 40)
    )
    assert torch.equal(scale, torch.zeros(2))
    assert torch.equal(shift, torch.zeros(2, 3))


def test_problems_do_not_depend_on_their_batch():
    problem = _problems(64, 0.1, 0.1, ALL, seed=5)
    scale, shift = training_alignment.align_points_scale_xyz_shift(*problem, trunc=1.0)
    for i in (0, 7):
        alone = training_alignment.align_points_scale_xyz_shift(*(x[i] for x in problem), trunc=1.0)
        assert torch.allclose(alone[0], scale[i], rtol=1e-6)
        assert torch.allclose(alone[1], shift[i], atol=1e-6)
