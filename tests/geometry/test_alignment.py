"""The fast alignments find MoGe's own optimum, to the bit, and are what the metrics use."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moge.test import metrics as moge_metrics
from moge.utils import alignment as moge

from ttt_lib.geometry import exact_alignment as alignment


def problem(seed: int, count: int, noise: float, outliers: float):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(count, 3, generator=generator) + torch.tensor([0.0, 0.0, 5.0])
    source = (target - torch.rand(3, generator=generator)) / (0.2 + 3 * torch.rand((), generator=generator))
    source = source + noise * torch.randn(count, 3, generator=generator)
    wild = torch.rand(count, generator=generator) < outliers
    source = torch.where(wild[:, None], 10 * torch.randn(count, 3, generator=generator), source)
    return source, target, 1 / target.norm(dim=-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 300), st.sampled_from([0.0, 0.01, 0.3]), st.sampled_from([0.0, 0.3]))
def test_same_optimum_as_moge(seed, count, noise, outliers):
    source, target, weight = problem(seed, count, noise, outliers)

    def cost(scale, shift):
        return (weight[:, None] * (scale * source + shift - target).abs()).sum()

    best = cost(*moge.align_points_scale_xyz_shift(source, target, weight))
    found = cost(*alignment.align_points_scale_xyz_shift_exact(source, target, weight))
    assert found <= best * (1 + 1e-5) + 1e-4

    x, y, w = source[:, 2], target[:, 2], 1 / target[:, 2].abs().clamp_min(0.1)
    (s1, t1), (s2, t2) = moge.align_depth_affine(x, y, w), alignment.align_depth_affine(x, y, w)
    best, found = ((w * (s * x + t - y).abs()).sum() for s, t in ((s1, t1), (s2, t2)))
    assert found <= best * (1 + 1e-5) + 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_to_the_bit_where_the_optimum_is_unique(seed):
    source, target, weight = problem(seed, 700, 0.1, 0.1)
    expected = moge.align_points_scale_xyz_shift(source, target, weight)
    found = alignment.align_points_scale_xyz_shift_exact(source, target, weight)
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])


def test_points_of_no_weight_do_not_count():
    source, target, weight = problem(3, 200, 0.05, 0.0)
    wild = torch.cat([source, 100 * torch.ones(5, 3)]), torch.cat([target, torch.zeros(5, 3)])
    scale, shift = alignment.align_points_scale_xyz_shift_exact(*wild, torch.cat([weight, torch.zeros(5)]))
    expected = alignment.align_points_scale_xyz_shift_exact(source, target, weight)
    assert torch.allclose(scale, expected[0]) and torch.allclose(shift, expected[1])


def test_moges_functions_come_back_also_after_an_error():
    own = moge_metrics.align_depth_affine
    with pytest.raises(RuntimeError), alignment.fast_alignment():
        assert moge_metrics.align_depth_affine is alignment.align_depth_affine
        raise RuntimeError
    assert moge_metrics.align_depth_affine is own


def test_least_squares_are_moges_and_do_not_depend_on_the_place_in_memory():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5001, generator=generator)
    y = 3 * x - 1 + 0.1 * torch.randn(5001, generator=generator)
    theirs, ours = moge.align_affine_lstsq(x, y), alignment.align_affine_lstsq(x, y)
    assert torch.allclose(torch.stack(theirs), torch.stack(ours), rtol=1e-4)
    for offset in range(1, 17):  # the same numbers at another alignment
        moved = [torch.cat([torch.zeros(offset), v])[offset:] for v in (x, y)]
        assert all(torch.equal(a, b) for a, b in zip(alignment.align_affine_lstsq(*moved), ours))
