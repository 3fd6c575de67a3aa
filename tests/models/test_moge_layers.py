"""Lighter layers beside MoGe's own and torch's: the same values, gradients, state and layout."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import REAL, at
from torch import nn
from torch.nn import functional as F

from ttt_lib.adaptation.student import Student
from ttt_lib.models import moge_layers
from ttt_lib.models.base import training
from ttt_lib.models.load import load_model
from ttt_lib.models.moge import MoGe
from ttt_lib.models.moge_layers import (
    SIDES,
    EdgeConv2d,
    LastOutput,
    LinearMaps,
    PassedOn,
    ReluEdgeConv2d,
    RepeatEdge,
    as_published,
    lighten,
)
from ttt_lib.models.tiny import TinyMoGe, default_config

LAYOUTS = (torch.contiguous_format, torch.channels_last)
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # sums in another order, float64


def numbers(*size: int, seed: int = 0) -> torch.Tensor:
    """Float64 in [-1,1], some of them zero, where a ReLU has its corner."""
    drawn = 2 * torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1
    return torch.where(drawn.abs() < 0.1, 0.0, drawn)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(2, 6)),
    layout=st.sampled_from(LAYOUTS),
    relu=st.booleans(),
)
def test_padding_is_torchs_and_so_is_its_gradient(size, layout, relu):
    maps = numbers(*size).contiguous(memory_format=layout).requires_grad_()
    padded, expected = RepeatEdge.apply(maps, relu), F.pad(F.relu(maps) if relu else maps, SIDES, mode="replicate")
    assert torch.equal(padded, expected)
    above = numbers(*padded.shape, seed=1).contiguous(memory_format=layout)
    found, wanted = (torch.autograd.grad(each, maps, above)[0] for each in (padded, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)  # at most four terms, in another order


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_stays(layout, relu):
    maps = numbers(2, 4, 5, 6).contiguous(memory_format=layout).requires_grad_()
    padded = RepeatEdge.apply(maps, relu)
    assert padded.is_contiguous(memory_format=layout)
    (gradient,) = torch.autograd.grad(padded.square().sum(), maps)
    assert gradient.is_contiguous(memory_format=layout)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    outputs=st.integers(1, 3),
    shared=st.booleans(),
)
def test_linear_maps_are_doubled_and_convolved_ones(size, outputs, shared):
    batch, channels, height, width = size
    coarse, kernel, bias = numbers(*size), numbers(outputs, channels, 3, 3, seed=1), numbers(outputs, seed=2)
    fine, pixels = numbers(1 if shared else batch, 2, 2 * height, 2 * width, seed=3), numbers(outputs, 2, seed=4)
    fine, last = fine.expand(batch, -1, -1, -1), nn.Conv2d(outputs, 2, 1).double()
    given = [each.requires_grad_() for each in (coarse, kernel, bias, pixels)]
    doubled = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    wanted = F.conv2d(F.pad(doubled, SIDES, mode="replicate"), kernel, bias) + F.conv2d(fine, pixels[..., None, None])
    padded = F.pad(coarse, SIDES, mode="replicate")
    sum_of_two = LinearMaps([(padded, kernel)], [], bias) + LinearMaps([], [(fine, pixels)], torch.zeros_like(bias))
    for expected, found in ((wanted, sum_of_two), (last(wanted), sum_of_two.through(last))):
        torch.testing.assert_close(found.computed(), expected, **EXACT)
        gradients = [
            torch.autograd.grad(each.square().sum(), given, retain_graph=True) for each in (expected, found.computed())
        ]
        torch.testing.assert_close(*gradients[::-1], **EXACT)


def plain_network() -> nn.Sequential:
    torch.manual_seed(0)
    repeating = {"padding": 1, "padding_mode": "replicate"}
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, **repeating), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2, **repeating), nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2, padding_mode="replicate"),
    )  # fmt: skip


@pytest.mark.parametrize("size", [(9, 12), (2, 3), (1, 7)])  # maps of one row are torch's
def test_a_network_keeps_its_numbers_and_its_state(size):
    plain = plain_network().double()
    mine = copy.deepcopy(plain)
    lighten(mine)
    kinds = [EdgeConv2d, PassedOn, ReluEdgeConv2d, nn.ReLU, nn.Conv2d, nn.Conv2d]
    assert [type(layer) for layer in mine] == kinds
    state = plain.state_dict(), mine.state_dict()
    assert list(state[0]) == list(state[1])
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in state)))
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    results = []
    for network in (plain, mine):
        found = network(images)
        results.append((found, *torch.autograd.grad(found.square().sum(), list(network.parameters()))))
    torch.testing.assert_close(*results[::-1], **EXACT)
    again = copy.deepcopy(mine)
    assert [type(layer) for layer in again] == kinds and torch.equal(again(images), mine(images))
    as_published(mine)
    assert [type(layer) for layer in mine] == [type(layer) for layer in plain]
    assert torch.equal(mine(images), plain(images))


def small_moge(blocks: list[int], head_blocks: list[int]) -> TinyMoGe:
    """MoGe-2 with a small encoder, random weights, float64, and the published resamplers and norms."""
    config = default_config()
    torch.manual_seed(0)
    for name, own in (("neck", blocks), ("points_head", head_blocks), ("mask_head", head_blocks)):
        config[name] |= {
            "resamplers": ["conv_transpose"] * 3 + ["bilinear"], "num_res_blocks": own,
            "res_block_in_norm": "none", "res_block_hidden_norm": "none",
        }  # fmt: skip
    return TinyMoGe(**config).double().eval()


def values_and_gradients(network: nn.Module) -> list[torch.Tensor]:
    image = torch.rand(2, 3, 40, 52, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = network(image, 12)
    parameters = [parameter.requires_grad_() for parameter in network.parameters()]
    gradients = torch.autograd.grad(found["points"].square().sum() + found["mask"].sum(), parameters, allow_unused=True)
    return [found["points"], found["mask"], *(each for each in gradients if each is not None)]


@pytest.mark.parametrize(
    ("blocks", "head_blocks", "linear"),
    [([0, 1, 1, 1, 0], [0, 1, 1, 1, 0], True), ([0, 0, 0, 0, 1], [0] * 5, False), ([0] * 5, [0, 0, 0, 0, 1], False)],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_moge_2_whose_last_level_has_no_blocks_computes_it_at_once(blocks, head_blocks, linear, checkpointing):
    plain = small_moge(blocks, head_blocks)
    mine = copy.deepcopy(plain)
    lighten(mine)
    heads = [mine.points_head, mine.mask_head]
    assert [type(head.output_blocks[-1]) is LastOutput for head in heads] == [linear] * 2
    if checkpointing:
        mine.enable_gradient_checkpointing()
    wanted = values_and_gradients(plain)
    assert len(wanted) > 60
    torch.testing.assert_close(values_and_gradients(mine), wanted, **EXACT)
    if not checkpointing:
        as_published(mine)
        assert [type(each) for each in mine.modules()] == [type(each) for each in plain.modules()]


def test_the_largest_maps_have_as_many_channels_as_a_head_gives():
    network, seen = small_moge([0, 1, 1, 1, 0], [0, 1, 1, 1, 0]), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 4 and 48 <= out.shape[2] <= 50 and out.shape[0] == 2:
                seen.append(out.shape[1])
            return out

    lighten(network)
    with Watch(), torch.no_grad():
        network(torch.rand(2, 3, 40, 52, dtype=torch.float64), 12)
    assert 0 < max(seen) <= 4  # 3 of points; before the shuffle there are twelve, of half the size


def test_low_rank_updates_and_heads_left_out_reach_the_lighter_layers():
    found = []
    for change in (lambda network: None, lighten):
        network = small_moge([0, 1, 1, 1, 0], [0, 1, 1, 1, 0])
        change(network)
        model = MoGe(network, "small", "metric", 12)
        with training(model, ["neck", "heads"]) as named:
            student = Student(model, named, lora_rank=2)
            for up, _ in student.low_rank.factors.values():
                with torch.no_grad():
                    up += 0.01
            with student.attached(), model.without(("mask",)):
                points = network(torch.full((1, 3, 40, 52), 0.5, dtype=torch.float64), 12)["points"]
                gradients = torch.autograd.grad(points.square().sum(), student.leaves, allow_unused=True)
        found.append([points.detach(), *(each for each in gradients if each is not None)])
    assert len(found[0]) > 20
    torch.testing.assert_close(*found, **EXACT)


def test_under_autocast_maps_are_small_before_they_are_padded():
    network, images, seen = plain_network(), torch.rand(1, 3, 8, 8), []

    def spy(maps: torch.Tensor, relu: bool) -> torch.Tensor:
        seen.append(maps.dtype)
        return RepeatEdge.apply(maps, relu)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = network(images)
        lighten(network)
        with mock.patch.object(moge_layers, "RepeatEdge", mock.Mock(apply=spy)):
            found = network(images)
    assert seen == [torch.bfloat16] * 2
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)  # bfloat16 keeps 8 bits


def test_under_autocast_the_last_level_is_no_further_from_exact_numbers():
    exact = small_moge([0, 1, 1, 1, 0], [0, 1, 1, 1, 0])
    rounded = copy.deepcopy(exact).float()
    image = torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(1))
    wanted, errors = exact(image.double(), 12)["points"], []
    for change in (as_published, lighten):
        change(rounded)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors.append((rounded(image, 12)["points"].double() - wanted).square().mean().sqrt())
    assert 0 < errors[1] <= 1.1 * errors[0]  # its weights are multiplied in float32, so fewer numbers are rounded


@pytest.mark.gpu
def test_a_gpu_gets_its_network_so():
    with at(REAL.values[0]) as place:
        layers = load_model("tiny", str(place.device)).network.modules()
    assert any(isinstance(layer, LastOutput) for layer in layers)
