"""The loss terms are MoGe's own, over the whole batch, and have the invariances they claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import utils3d
from conftest import adapt, loss_inputs, small_experiment
from moge.train import losses as moge_losses

from ttt_lib.adaptation.losses.moge_terms import focal_of
from ttt_lib.adaptation.losses.presets import resolved
from ttt_lib.adaptation.losses.terms import compute_loss, unused_outputs
from ttt_lib.core.config import build_experiment
from ttt_lib.core.errors import UserError
from ttt_lib.core.registry import LOSSES
from ttt_lib.core.schema import LossConfig
from ttt_lib.models.base import GeometryModel

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


def test_normals_and_mask_of_moge2_equal_moge(case):
    output, target, intrinsics = case
    known = torch.isfinite(target).all(-1)
    normal = torch.nn.functional.normalize(
        torch.rand(*target.shape, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    negative = ~known
    _, values = run(
        (dict(output, normal=normal), target, intrinsics), {"mask_bce": {}, "normal_map": {}}, negative=negative
    )
    mask = output["mask"]
    assert torch.allclose(
        values["mask_bce"], -torch.where(known, mask, 1 - mask).log().clamp_min(-100).mean(), rtol=1e-5
    )
    expected = []
    for points, seen, predicted in zip(target, known, normal):  # as the loader of its training makes them, edges apart
        normals, there = utils3d.np.point_map_to_normal_map(points.nan_to_num(0.0).numpy(), seen.numpy())
        steep = np.abs((normals * points.numpy()).sum(-1)) <= np.linalg.norm(points.numpy(), axis=-1) * np.cos(
            np.deg2rad(88)
        )
        wanted = torch.from_numpy(np.where((there & ~steep)[..., None], normals, np.nan)).float()
        expected.append(moge_losses.normal_map_loss(predicted, wanted)[0])
    assert float(values["normal_map"]) > 0.1
    assert torch.allclose(values["normal_map"], torch.stack(expected).mean(), rtol=1e-3)


V2 = {  # `configs/train/v2.json`, labels A: function, weight, parameters
    "global": ("affine_invariant_global_loss", 1.0, {"align_resolution": 48}),
    "local_4": ("affine_invariant_local_loss", 1.0, {"level": 4, "align_resolution": 24, "num_patches": 16}),
    "local_16": ("affine_invariant_local_loss", 1.0, {"level": 16, "align_resolution": 12, "num_patches": 256}),
    "local_64": ("affine_invariant_local_loss", 1.0, {"level": 64, "align_resolution": 6, "num_patches": 4096}),
    "edge": ("edge_loss", 1.0, {}),
    "normal_map": ("normal_map_loss", 0.1, {}),
    "metric_scale": ("metric_scale_loss", 0.1, {}),
    "mask_bce": ("mask_bce_loss", 0.1, {}),
}


def test_the_sets_hold_what_the_models_were_trained_with():
    def terms(own, /, **losses):
        class Model(GeometryModel):
            pass

        Model.losses = own
        return resolved(build_experiment({"name": "x", **({"losses": losses} if losses else {})}), Model).losses

    found = terms("moge2")
    assert {name: term.weight for name, term in found.items()} == {name: weight for name, (_, weight, _) in V2.items()}
    assert all(hasattr(moge_losses, function) for function, _, _ in V2.values())
    for name, (_, _, parameters) in V2.items():
        assert all(getattr(found[name], key) == value for key, value in parameters.items() if key != "level"), name
    study = terms("study")
    assert list(study) == ["global", "local_4", "local_16", "local_64", "mask"]
    assert [study[f"local_{level}"].align_resolution for level in (4, 16, 64)] == [16, 8, 4]
    assert terms("moge1").keys() == {*study, "normal"} and terms("moge2", study={}) == study
    laid_over = terms("study", own={"weight": 0.5}, moge2={}, edge={"weight": 0.0}, **{"global": {"trunc": 2.0}})
    assert laid_over["edge"].weight == 0 and laid_over["global"].align_resolution == 48
    assert laid_over["global"].trunc == 2.0 and laid_over["local_4"].weight == 1.0
    assert terms("study", own={"weight": 0.5}, mask={"weight": 2.0})["local_4"].weight == 0.5
    assert terms("study", mask={}).keys() == {"mask"}


def test_the_result_says_which_losses_it_had(tiny, image):
    config = small_experiment()(losses={"moge2": {}, "local_4": {"weight": 0}, "local_16": {"weight": 0},
                                        "local_64": {"weight": 0}, "mask": {"weight": 0}})  # fmt: skip
    result = adapt(tiny, image, config)
    assert result.losses == "global 1, edge 1, metric_scale 0.1, mask_bce 0.1, normal_map 0.1"
    assert {"edge", "mask_bce", "metric_scale"} <= result.history[0].keys() and "mask" not in result.history[0]
    assert adapt(tiny, image, small_experiment()(train={"method": "none"})).losses == ""


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
