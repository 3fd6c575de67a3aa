"""The affine-invariant terms of training against MoGe's own: the same choices, and values and gradients of the same mean."""

from __future__ import annotations

import math

import pytest
import torch
import utils3d
from hypothesis import given, settings
from hypothesis import strategies as st
from moge.train import losses as moge_losses

from ttt_lib.adaptation.losses import affine
from ttt_lib.adaptation.losses.affine import nearest_known, patch_difference, whole_difference
from ttt_lib.geometry.fast_alignment import quantile

LEVELS = {4: (8, 16), 16: (4, 128), 64: (4, 512)}  # side of the alignment and patches of a picture
PATCHES, MOST_TRIES = 128, 256  # as many of 512 as are looked at of 4096
FOCAL = torch.tensor([0.25, 0.22])  # less than that of the pictures, 0.320: small patches have enough pixels


@pytest.fixture(scope="module")
def case():
    """A wavy floor with a thin near pole before it and a hole in it, and a student who bends it, with noise: points, target, known."""
    v, u = torch.meshgrid(torch.linspace(-1, 1, 225), torch.linspace(-1, 1, 300), indexing="ij")
    depth = torch.stack([3 + u + 0.3 * torch.sin(5 * v), 2 - 0.8 * v + 0.2 * torch.sin(7 * u)])
    depth[0][(u - 0.2).abs() < 0.02] = 1.2
    target = torch.stack([1.2 * u * depth, v * depth, depth], -1)
    known = torch.ones(2, 225, 300, dtype=torch.bool)
    known[0, 150:190, 40:110] = False
    noise = 0.005 * torch.randn(2, 225, 300, generator=torch.Generator().manual_seed(0))
    bent = 0.7 * target * (1 + 0.04 * torch.sin(11 * u + 3 * v) + 0.02 * torch.sin(23 * v) + noise)[..., None]
    bent = bent * torch.tensor([1.003, 0.998, 1.0])  # else x and y of one pixel would fit the same scale: a tie
    return bent, torch.where(known[..., None], target, torch.nan), known


def ours(case, level, seeds, scale, rows=slice(None)):
    side, patches = LEVELS[level]
    points, target, known = (each[rows] for each in case)
    return patch_difference(points, target, known, FOCAL[rows], scale[rows], seeds, level, side, patches, 0.0, 1.0)


def moges(case, level, seed, scale, row):
    side, patches = LEVELS[level]
    rows = slice(row, row + 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return moge_losses.affine_invariant_local_loss(
            case[0][rows], case[1][rows], FOCAL[rows], scale[rows], level, side, patches
        )[0].mean()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_nearest_known_pixels_are_those_of_utils3d(height, width, side, share, seed):
    known = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) < share
    there, (*_, row, column) = utils3d.pt.masked_nearest_resize(mask=known, size=(side, side), return_index=True)
    index, some = nearest_known(known, side)
    assert torch.equal(some, there.flatten(1))
    assert torch.equal(index[some], (row * width + column).flatten(1)[some])


def test_over_the_whole_picture_value_and_gradient_are_moges(case):
    points, target, known = case
    points = points.clone().requires_grad_()
    value, scale = whole_difference(points, target, known, 5, 0.0, 1.0)
    theirs, _, their_scale = moge_losses.affine_invariant_global_loss(points, target, 5)
    assert torch.allclose(value, theirs, rtol=1e-5) and torch.allclose(scale, their_scale, rtol=1e-5)
    own, wanted = (torch.autograd.grad(each.sum(), points)[0] for each in (value, theirs))
    assert torch.allclose(own, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    smooth = whole_difference(points, target, known, 5, 0.01, 1.0)[0]
    assert torch.allclose(smooth, moge_losses.affine_invariant_global_loss(points, target, 5, beta=0.01)[0], rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_over_patches_value_and_gradient_have_moges_mean_and_no_more_noise(case, level, monkeypatch):
    """The value, and the gradient along six waves over the picture: each mean within four of its standard errors, the value's
    also within three hundredths and four of its own, which are small enough to see a quarter."""
    monkeypatch.setattr(affine, "PATCHES", PATCHES)
    monkeypatch.setattr(affine, "MOST_TRIES", MOST_TRIES)
    times, points = 14, case[0].clone().requires_grad_()
    case, scale = (points, *case[1:]), torch.full((2,), 1 / 0.7)
    v, u = torch.meshgrid(torch.linspace(0, math.pi, 225), torch.linspace(0, math.pi, 300), indexing="ij")
    waves = torch.stack([torch.cos(i * u + j * v) for i, j in ((0, 0), (1, 0), (0, 2), (3, 1), (5, 5), (9, 2))])

    def numbers(value, row):
        (gradient,) = torch.autograd.grad(value, points)
        return torch.cat([value.detach()[None], torch.einsum("khw,hw->k", waves, gradient[row, ..., 2])])

    louder = []
    for row in range(2):
        own = torch.stack([numbers(ours(case, level, [seed, seed], scale)[row], row) for seed in range(4 * times)])
        wanted = torch.stack([numbers(moges(case, level, seed, scale, row), row) for seed in range(times)])
        error = (own.var(0) / len(own) + wanted.var(0) / len(wanted)).sqrt()
        difference, value = (own.mean(0) - wanted.mean(0)).abs(), float(wanted[:, 0].mean())
        assert value > 0 and error[0] < 0.06 * value
        assert difference[0] < 4 * error[0] + 0.03 * value and (difference[1:] < 4 * error[1:]).all()
        louder.append(own.std(0) / wanted.std(0))
    # A deviation of 14 draws is known to a fifth, and the numbers of one draw hang together. Of a 64th a quarter is looked
    # at: twice the noise.
    assert torch.cat(louder).log().mean() < math.log(1.3 if level < 64 else 1.3 * 2)


def test_a_row_has_the_same_patches_whatever_is_beside_it(case):
    scale = torch.full((2,), 1 / 0.7)
    for level in LEVELS:
        together = ours(case, level, [3, 4], scale)
        alone = [ours(case, level, [seed], scale, slice(row, row + 1))[0] for row, seed in ((0, 3), (1, 4))]
        assert torch.allclose(together, torch.stack(alone), rtol=1e-5)


def test_nothing_known_is_no_difference_and_has_no_gradient(case):
    points, target, known = case
    known = known & torch.tensor([True, False])[:, None, None]
    points = points.clone().requires_grad_()
    for level in LEVELS:
        value = ours((points, torch.where(known[..., None], target, torch.nan), known), level, [0, 1], torch.ones(2))
        assert value[0] > 0 and value[1] == 0
        (gradient,) = torch.autograd.grad(value.sum(), points)
        assert torch.isfinite(gradient).all() and gradient[0].any() and not gradient[1].any()


def test_the_empty_patches_that_a_gpu_takes_along_change_nothing(case, monkeypatch):
    points, scale, found = case[0].clone().requires_grad_(), torch.full((2,), 1 / 0.7), []
    every = ours((points, *case[1:]), 64, [3, 4], scale)
    monkeypatch.setattr(affine, "MINIMUM_PIXELS", 40)  # of 49 in the window: some patches have as many, some have not
    for tells in (True, False):
        monkeypatch.setattr(affine, "_tells", lambda device, tells=tells: tells)
        value = ours((points, *case[1:]), 64, [3, 4], scale)
        found.append((value.detach(), torch.autograd.grad(value.sum(), points)[0]))
    assert (found[0][0] < every).all() and (found[0][0] > 0).all()
    for without, along in zip(*found):
        torch.testing.assert_close(along, without)


@pytest.mark.parametrize(("radius", "side"), [(3, 7), (25, 16), (100, 32)])
def test_every_pixel_of_a_window_is_looked_at_equally_often(radius, side):
    span, starts = 2 * radius + 1, 512
    start = ((torch.arange(starts) + 0.5) / starts)[:, None].expand(-1, 2)  # every start there is
    for offsets in affine._lattice(start, radius, side):
        often = torch.bincount((offsets + radius).flatten(), minlength=span) / (starts * side)
        assert len(often) == span and torch.allclose(often, torch.full((span,), side / span), atol=2 / starts)


def test_what_is_unknown_is_never_picked_nor_what_is_outside_looked_at():
    last = torch.tensor([[1 - 2**-24, 1.0]])  # 4,095 and almost one of 4,096 are all of it in float32
    weight = torch.tensor([[0.0, 2.0, 1.0, 0.0, 0.0]])
    assert quantile(weight, last).tolist() == [[2, 2]] and quantile(weight, 1 - last[:, :1]).tolist() == [[1]]
    assert affine._offsets(last, 3).tolist() == [[3, 3]]


@pytest.mark.parametrize("width", [2, 5])
def test_thin_things_are_centres_as_often_as_moge_chooses_them(case, width):
    _, target, known = (each[1:] for each in case)
    target, radius = target.clone(), 16
    target[:, :, 140 : 140 + width, 2] = 1.0  # a pole before the rest
    reach = 0.5 / 16 / FOCAL[0] * target[..., 2]
    pole = torch.zeros_like(known)
    pole[:, :, 140 : 140 + width] = True
    weight = torch.stack([moge_losses.compute_anchor_sampling_weight(target, known, radius, reach) for _ in range(4)])
    pixels = affine._Pixels(target.reshape(-1, 3).T, reach.flatten(), (225, 300))
    chosen = torch.cat([affine._centres(pixels, known, [seed], radius, 128)[0] for seed in range(60)])
    share, wanted = float(pole.flatten()[chosen].float().mean()), float(weight.mean(0)[pole].sum())
    assert wanted > 3 * float(pole.float().mean())  # chosen more often than its area
    assert share == pytest.approx(wanted, rel=0.1)
