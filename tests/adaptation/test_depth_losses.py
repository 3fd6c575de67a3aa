"""Losses of the other depth models: hand-computed cases, and the invariances they claim."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import loss_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lib.adaptation.losses.depth_terms import (
    feature_alignment_loss,
    gradient_matching_loss,
    median_mad_normalised,
    scale_shift_invariant_loss,
    silog_loss,
)
from ttt_lib.adaptation.losses.terms import compute_loss
from ttt_lib.core.errors import UserError

ALL = torch.ones(1, 1, 5, dtype=torch.bool)


def maps(seed: int, shape=(2, 12, 16)):
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + torch.rand(shape, generator=generator) for _ in range(2))


def test_normalisation_by_hand():
    values = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 10.0]]])  # median 3, mean distance (2 + 1 + 0 + 1 + 7) / 5 = 2.2
    expected = torch.tensor([-2.0, -1.0, 0.0, 1.0, 7.0]) / 2.2
    assert torch.allclose(median_mad_normalised(values, ALL)[0, 0], expected)


def test_scale_shift_invariant_loss_by_hand():
    prediction = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 10.0]]])
    target = torch.tensor([[[0.0, 1.0, 2.0, 3.0, 4.0]]])  # median 2, mean distance 1.2
    a, b = torch.tensor([-2.0, -1, 0, 1, 7]) / 2.2, torch.tensor([-2.0, -1, 0, 1, 2]) / 1.2
    assert torch.allclose(scale_shift_invariant_loss(prediction, target, ALL), (a - b).abs().mean()[None])
    # A pixel that is not known has no part, not even in the median; what is left counts by its share.
    known = torch.tensor([[[True, True, True, True, False]]])
    spoilt = torch.tensor([[[0.0, 1.0, 2.0, 3.0, math.nan]]])
    assert torch.allclose(scale_shift_invariant_loss(prediction, spoilt, known), torch.zeros(1), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 50.0), st.floats(-20.0, 20.0), st.integers(0, 1000))
def test_scale_and_shift_do_not_matter(scale, shift, seed):
    prediction, target = maps(seed)
    known = target > 0.6
    for loss in (scale_shift_invariant_loss, gradient_matching_loss):
        base = loss(prediction, target, known)
        assert torch.allclose(loss(scale * prediction + shift, target, known), base, rtol=1e-2, atol=1e-4)
        assert torch.allclose(loss(prediction, scale * target + shift, known), base, rtol=1e-2, atol=1e-4)
        assert torch.allclose(loss(target * 2 - 1, target, known), torch.zeros(2), atol=1e-4)


def test_gradient_matching_by_hand():
    prediction = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])  # normalised: median 0 (the lower), mean distance 0.5
    target = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    known = torch.ones(1, 2, 2, dtype=torch.bool)
    # Difference [[0, 2], [-2, 0]]: across 2 + 2, down 2 + 2, over 4 pixels. Coarser scales have no neighbours.
    assert torch.allclose(gradient_matching_loss(prediction, target, known), torch.tensor([2.0]))


def test_silog_by_hand_and_its_invariance():
    prediction, target = torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[[1.0, 1.0, 1.0]]])
    known = torch.ones(1, 1, 3, dtype=torch.bool)
    log2 = math.log(2)  # g = 0, log 2, 2 log 2: mean log 2, variance (n - 1) log 2 ^ 2
    expected = 10 * math.sqrt(log2**2 + 0.15 * log2**2)
    assert float(silog_loss(prediction, target, known)) == pytest.approx(expected, rel=1e-5)
    assert float(silog_loss(5 * prediction, target, known, beta=0)) == pytest.approx(10 * log2, rel=1e-5)
    perfect = target.clone().requires_grad_()
    silog_loss(perfect, target, known).sum().backward()
    assert torch.isfinite(perfect.grad).all()


def test_feature_alignment_has_its_tolerance():
    frozen = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    angle = math.acos(0.9)
    student = torch.tensor([[[0.0, 1.0], [math.cos(angle), math.sin(angle)], [-1.0, 0.0]]], requires_grad=True)
    loss = feature_alignment_loss(student, frozen)
    assert float(loss.detach()) == pytest.approx((1 + 2) / 2)  # cosines 0, 0.9 (above 0.85), -1
    loss.sum().backward()
    assert student.grad[0, 1].abs().sum() == 0 and student.grad[0, 0].abs().sum() > 0
    assert float(feature_alignment_loss(3 * frozen, frozen)) == 0


def test_outputs_reach_their_terms():
    v, u = torch.meshgrid(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 16), indexing="ij")
    depth = (2 + u + 0.5 * v)[None]
    target = torch.stack([u * depth[0], v * depth[0], depth[0]], -1)[None]
    camera = torch.tensor([[[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]]])

    def values(output, **terms):
        chosen = {name: {"weight": weight} for name, weight in terms.items()}
        return compute_loss(loss_inputs(output, target, camera, chosen))[1]

    assert float(values({"disparity": 3 / depth + 1}, ssi=1.0)["ssi"]) < 1e-5
    assert float(values({"depth": depth}, ssi=1.0, silog=1.0)["silog"]) < 1e-4
    # Points are aligned in scale and z-shift before their depth is inverted.
    shifted = 2 * target + torch.tensor([0.0, 0.0, 3.0])
    assert float(values({"points": shifted}, ssi=1.0, gradient=1.0)["ssi"]) < 1e-3
    # Of a disparity there are no points: its own terms stay, and take the place of those of points that were alone.
    instead = values({"disparity": 3 / depth + 1}, **{"global": 1.0, "local_4": 1.0, "mask": 1.0})
    assert instead.keys() == {"ssi", "gradient"} and max(map(float, instead.values())) < 1e-5
    assert values({"disparity": depth}, **{"global": 1.0, "gradient": 1.0}).keys() == {"gradient"}
    assert values({"disparity": depth}, **{"global": 0.0, "mask": 1.0}).keys() == set()
    with pytest.raises(UserError, match=r"losses\.silog"):
        values({"disparity": depth}, silog=1.0)
