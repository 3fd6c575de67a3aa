"""Convolutions that repeat the edge in the layout their maps have, beside torch's own."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import REAL, at
from torch import nn
from torch.nn import functional as F

from ttt_lib.models import moge_layers
from ttt_lib.models.load import load_model
from ttt_lib.models.moge_layers import EdgeConv2d, RepeatEdge, keep_layout

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SIDES = (1, 1, 1, 1)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(2, 6)),
    layout=st.sampled_from(LAYOUTS),
)
def test_padding_is_torchs_and_so_is_its_gradient(size, layout):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(size, dtype=torch.float64, generator=generator).contiguous(memory_format=layout).requires_grad_()
    padded, expected = RepeatEdge.apply(maps), F.pad(maps, SIDES, mode="replicate")
    assert torch.equal(padded, expected)
    above = torch.rand(padded.shape, dtype=torch.float64, generator=generator).contiguous(memory_format=layout)
    found, wanted = (torch.autograd.grad(each, maps, above)[0] for each in (padded, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)  # at most four terms, in another order


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_stays(layout):
    maps = torch.rand(2, 4, 5, 6).contiguous(memory_format=layout).requires_grad_()
    padded = RepeatEdge.apply(maps)
    assert padded.is_contiguous(memory_format=layout)
    (gradient,) = torch.autograd.grad(padded.square().sum(), maps)
    assert gradient.is_contiguous(memory_format=layout)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    repeating = {"padding": 1, "padding_mode": "replicate"}
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, **repeating), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2, **repeating),
        nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2, padding_mode="replicate"),
    )  # fmt: skip


@pytest.mark.parametrize("size", [(9, 12), (2, 3), (1, 7)])  # maps of one row are torch's
def test_a_network_keeps_its_numbers_and_its_state(size):
    plain = _network().double()
    mine = copy.deepcopy(plain)
    keep_layout(mine)
    assert [type(layer) for layer in mine] == [EdgeConv2d, nn.ReLU, EdgeConv2d, nn.Conv2d, nn.Conv2d]
    state = plain.state_dict(), mine.state_dict()
    assert list(state[0]) == list(state[1])
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in state)))
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    results = []
    for network in (plain, mine):
        found = network(images)
        results.append((found, *torch.autograd.grad(found.square().sum(), list(network.parameters()))))
    for wanted, found in zip(*results):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)  # sums in another order, float64
    again = copy.deepcopy(mine)
    assert isinstance(again[0], EdgeConv2d) and torch.equal(again(images), mine(images))


def test_under_autocast_maps_are_small_before_they_are_padded():
    network, images, seen = _network(), torch.rand(1, 3, 8, 8), []

    def spy(maps: torch.Tensor) -> torch.Tensor:
        seen.append(maps.dtype)
        return RepeatEdge.apply(maps)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = network(images)
        keep_layout(network)
        with mock.patch.object(moge_layers, "RepeatEdge", mock.Mock(apply=spy)):
            found = network(images)
    assert seen == [torch.bfloat16] * 2
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("name", ["cpu", REAL])
def test_a_gpu_gets_its_network_so_and_a_cpu_does_not(name):
    with at(name) as place:
        layers = load_model("tiny", str(place.device)).network.modules()
    assert any(isinstance(layer, EdgeConv2d) for layer in layers) == (name != "cpu")
