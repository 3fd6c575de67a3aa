"""The loss terms are MoGe's own, over the whole batch, and have the invariances they claim."""

from __future__ import annotations

import pytest
import torch
from conftest import loss_inputs
from moge.train import losses as moge_losses

from ttt_lib.adaptation.losses.moge_terms import focal_of
from ttt_lib.adaptation.losses.terms import compute_loss, unused_outputs
from ttt_lib.core.config import LossConfig, build_experiment
from ttt_lib.core.errors import UserError
from ttt_lib.core.registry import LOSSES

SMALL = {"align_resolution": 8}


@pytest.fixture(scope="module")
def case(picture):
    generator = torch.Generator().manual_seed(0)
    target = torch.where(picture.mask[..., None], picture.points, torch.nan)
    points = picture.points.nan_to_num(50.0) * 1.7
    points = points * (1 + 0.05 * torch.randn(points.shape[:-1], generator=generator)[..., None])
    mask = torch.rand(points.shape[:-1], generator=generator)
    output = {"points": points, "mask": mask, "metric_scale": torch.tensor([0.5, 2.0])}
    return output, target, picture.intrinsics


def run(case, terms, generator=None, **options):
    return compute_loss(loss_inputs(*case, terms, generator, **options))


def test_global_normal_edge_and_scale_equal_moge_view_by_view(case):
    output, target, _ = case
    terms = {"global": {"weight": 1.0, **SMALL}} | {n: {} for n in ("normal", "edge", "metric_scale")}
    total, values = run(case, terms)
    each = [moge_losses.affine_invariant_global_loss(output["points"][i], target[i], 8) for i in range(2)]
    assert torch.allclose(values["global"], torch.stack([e[0] for e in each]).mean(), rtol=1e-6)
    normal = torch.stack([moge_losses.normal_loss(output["points"][i], target[i])[0] for i in range(2)]).mean()
    edge = torch.stack([moge_losses.edge_loss(output["points"][i], target[i])[0] for i in range(2)]).mean()
    scale = torch.stack([moge_losses.metric_scale_loss(output["metric_scale"][i], each[i][2])[0] for i in range(2)])
    assert torch.allclose(values["normal"], normal, rtol=1e-5)
    assert torch.allclose(values["edge"], edge, rtol=1e-5)
    assert torch.allclose(values["metric_scale"], scale.mean(), rtol=1e-5)
    assert torch.allclose(total, sum(values.values()), rtol=1e-6)


def test_local_equals_moge_with_the_same_random_patches(case):
    output, target, intrinsics = case
    settings = {"align_resolution": 4, "num_patches": 3}
    terms = {"global": {"weight": 0.0, **SMALL}, "local_4": settings}
    _, values = run(case, terms, cheap=False)
    seeds = torch.randint(2**31, (2, 3), generator=torch.Generator().manual_seed(1))
    _, _, scale = moge_losses.affine_invariant_global_loss(output["points"], target, 8)
    expected = []
    with torch.random.fork_rng():
        for i in range(2):
            torch.manual_seed(int(seeds[i, 0]))
            expected.append(
                moge_losses.affine_invariant_local_loss(
                    output["points"][i : i + 1], target[i : i + 1], focal_of(intrinsics)[i : i + 1], scale[i : i + 1],
                    level=4, **settings, beta=0.0, trunc=1.0,
                )[0].mean()
            )  # fmt: skip
    assert torch.allclose(values["local_4"], torch.stack(expected).mean())


def test_the_global_random_state_is_left_alone(case):
    terms = {"global": {"weight": 0.0, **SMALL}, "local_4": {"align_resolution": 4, "num_patches": 2}}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = run(case, terms)[0]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(8)
    assert torch.equal(first, run(case, terms)[0])


def test_every_view_of_the_batch_counts(case):
    output, target, intrinsics = case
    terms = {"global": {**SMALL}}
    changed = target.clone()
    changed[1, :40] *= 2.0
    assert run(case, terms)[0] != run((output, changed, intrinsics), terms)[0]


def test_scale_and_depth_shift_do_not_matter_to_the_global_term(case):
    output, target, intrinsics = case
    terms = {"global": {**SMALL}}
    moved = dict(output, points=output["points"] * 3.0 + torch.tensor([0.0, 0.0, 0.7]))
    assert run((moved, target, intrinsics), terms)[0].item() == pytest.approx(run(case, terms)[0].item(), rel=2e-3)


def test_mask_term_by_hand(case):
    output, target, intrinsics = case
    known = torch.isfinite(target).all(-1)
    half = known.clone()
    half[:, :, ::2] = False  # every other column is not known
    target = torch.where(half[..., None], target, torch.nan)
    negative = torch.zeros_like(known)
    negative[:, :10] = True
    case = (output, target, intrinsics)
    _, values = run(case, {"mask": {}}, negative=negative)
    m = output["mask"]
    expected = (half * (1 - m) ** 2 + (negative & ~half) * m**2).mean()
    assert torch.allclose(values["mask"], expected)
    _, none = run(case, {"mask": {}})
    assert torch.allclose(none["mask"], (half * (1 - m) ** 2).mean())
    _, both = run(case, {"mask": {}}, mask_on_both_sides=True)
    assert torch.allclose(both["mask"], (half * ((1 - m) ** 2 + m**2)).mean())


def test_a_perfect_prediction_has_almost_no_loss_and_gradients_flow(case):
    output, target, intrinsics = case
    terms = {"global": {**SMALL}, "normal": {}, "mask": {}}
    perfect = target.nan_to_num(10.0).clone().requires_grad_()
    total, values = compute_loss(loss_inputs({"points": perfect}, target, intrinsics, terms))
    assert values["global"] < 1e-4
    total, _ = run((dict(output, points=output["points"].clone().requires_grad_()), target, intrinsics), terms)
    assert total.requires_grad


def test_only_outputs_that_no_term_reads_are_left_out(monkeypatch):
    def unused(terms):
        return unused_outputs(build_experiment({"name": "x", "losses": terms}).losses)

    assert unused({"global": {}, "mask": {}}) == ("normal",)
    assert unused({"global": {}, "mask": {"weight": 0.0}}) == ("normal", "mask")
    monkeypatch.setitem(LOSSES, "nearness", lambda inputs: inputs.output["normal"].sum())
    assert unused({"global": {}, "nearness": {}}) == ()
    assert unused({"mask": {}, "nearness": {"weight": 0.0}}) == ("normal",)


def test_a_setting_that_a_term_lacks_is_named():
    with pytest.raises(UserError, match=r"losses\.global\.num_patches: unknown key.*align_resolution"):
        build_experiment({"name": "x", "losses": {"global": {"num_patches": 3}}})
    with pytest.raises(UserError, match=r"losses\.local_4\.beta.*greater than or equal to 0"):
        build_experiment({"name": "x", "losses": {"local_4": {"beta": -1}}})


def test_a_term_has_settings_of_its_own():
    class Margin(LossConfig):
        margin: float = 0.25

    try:

        @LOSSES.register("mine", settings=Margin)
        def mine(inputs):
            return inputs.settings.margin * inputs.output["points"].sum((1, 2, 3))

        config = build_experiment({"name": "x", "losses": {"mine": {"margin": 2.0}}})
        assert config.losses["mine"].margin == 2.0 and config.as_parameters()["losses"]["mine"]["margin"] == 2.0
        assert build_experiment(config.as_parameters()).losses == config.losses
        points = torch.ones(2, 4, 4, 3)
        loss, values = compute_loss(loss_inputs({"points": points}, points, torch.eye(3).expand(2, 3, 3), {"mine": {}}))
        assert float(loss) == float(values["mine"]) == 0.25 * 48
        with pytest.raises(UserError, match=r"losses\.mine\.margn: unknown key; allowed here: margin, weight"):
            build_experiment({"name": "x", "losses": {"mine": {"margn": 2.0}}})
    finally:
        LOSSES.pop("mine", None)
        LOSSES.about.pop("mine", None)
