"""The field of residuals: known fields are found, noise is not, edges in depth keep their sides apart."""

from __future__ import annotations

import torch

from ttt_lib.adaptation.residual_field import residual_field

SIZE = (48, 64)


def scene(seed=0, count=150):
    generator = torch.Generator().manual_seed(seed)
    v, u = torch.meshgrid(torch.linspace(0, 1, SIZE[0]), torch.linspace(0, 1, SIZE[1]), indexing="ij")
    depth = 2 + v
    places = torch.randperm(depth.numel(), generator=generator)[:count]
    row, column = places // SIZE[1], places % SIZE[1]
    uv = torch.stack([(column + 0.5) / SIZE[1], (row + 0.5) / SIZE[0]], -1)
    return u, v, depth, uv, places, generator


def test_a_smooth_error_is_taken_back():
    u, v, depth, uv, places, _ = scene()
    truth = depth * torch.exp(0.3 * torch.sin(3 * u) - 0.1)
    field = residual_field(depth, uv, depth.flatten()[places], truth.flatten()[places])
    before, after = (truth / depth).log().abs().mean(), (truth / (depth * field.exp())).log().abs().mean()
    assert after < 0.3 * before


def test_noise_is_not_taken_for_a_field():
    _, _, depth, uv, places, generator = scene()
    noisy = depth.flatten()[places] * torch.exp(0.1 * torch.randn(len(places), generator=generator))
    field = residual_field(depth, uv, depth.flatten()[places], noisy)
    assert field is None or float(field.abs().mean()) < 0.03


def test_a_step_in_depth_keeps_its_sides_apart():
    u, _, _, uv, places, _ = scene()
    depth = torch.where(u < 0.5, 2.0, 6.0)
    truth = torch.where(u < 0.5, 2.4, 5.0)
    field = residual_field(depth, uv, depth.flatten()[places], truth.flatten()[places])
    error = (truth / (depth * field.exp())).log().abs()
    assert float(error.max()) < 0.06


def test_few_references_or_wild_ones_change_little():
    _, _, depth, uv, places, _ = scene()
    found = depth.flatten()[places]
    assert residual_field(depth, uv[:10], found[:10], 2 * found[:10]) is None
    wild = found.clone()
    wild[::10] *= 5
    field = residual_field(depth, uv, found, wild)
    assert field is None or float(field.abs().max()) < 0.05
    assert residual_field(depth, uv, found, found) is None
