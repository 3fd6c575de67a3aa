"""What others add: names, clashes, modules of installed distributions, and what an experiment file may say."""

import hashlib
import sys

import pytest
import torch
from conftest import loss_inputs

from ttt_lib.adaptation.gate.signals import held_back_views
from ttt_lib.adaptation.losses.terms import compute_loss
from ttt_lib.core import registry as plugins
from ttt_lib.core.config import build_experiment
from ttt_lib.core.errors import UserError
from ttt_lib.core.registry import LOSSES, SHIFTS, Registry, load_installed
from ttt_lib.core.schema import ViewConfig
from ttt_lib.data.shifts import apply_shift
from ttt_lib.views.draw import make_views


def test_a_name_belongs_to_one_function_and_may_be_registered_again():
    registry = Registry("loss")

    def define(value):
        @registry.register("mine")
        def mine():
            return value

    define(1)
    define(2)  # the cell ran again
    assert registry["mine"]() == 2
    with pytest.raises(UserError, match="'mine'.*taken"):
        registry.register("mine")(len)


def test_the_package_s_own_losses_are_registered_as_yours_are():
    with pytest.raises(UserError, match="taken"):
        LOSSES.register("ssi")(len)
    for name in LOSSES.all_names():
        assert build_experiment({"name": "x", "losses": {name: {}}}).losses[name].weight == 1


def test_unknown_names_are_said_with_those_that_exist():
    with pytest.raises(UserError, match=r"losses\.huber.*no such loss; there are global.*silog"):
        build_experiment({"name": "x", "losses": {"huber": {}}})
    with pytest.raises(UserError, match=r"views\.shift\.names\.0.*no such shift.*low_light.*reflection"):
        build_experiment({"name": "x", "views": {"shift": {"names": ["rain"]}}})


def test_an_added_loss_counts_with_its_weight_and_trains(monkeypatch):
    monkeypatch.setitem(LOSSES, "nearness", lambda inputs: inputs.output["points"][..., 2].mean((1, 2)))
    points = torch.rand(2, 8, 8, 3, requires_grad=True)
    target, camera = torch.rand(2, 8, 8, 3) + 1, torch.eye(3).expand(2, 3, 3)
    terms = {"nearness": {"weight": 0.25}}
    total, values = compute_loss(loss_inputs({"points": points}, target, camera, terms))
    assert torch.isclose(values["nearness"], points[..., 2].mean())
    assert torch.isclose(total, 0.25 * points[..., 2].mean())
    total.backward()
    assert torch.allclose(points.grad[..., 2], torch.full((2, 8, 8), 0.25 / 128))
    off = {"nearness": {"weight": 0.0}, "mask": {}}
    assert "nearness" not in compute_loss(loss_inputs({"points": points}, target, camera, off))[1]


def test_modules_of_installed_distributions_are_imported_once(tmp_path, monkeypatch):
    (tmp_path / "their_losses.py").write_text(
        "from ttt_lib.core.registry import LOSSES\n"
        "@LOSSES.register('theirs')\ndef theirs(inputs):\n    return inputs.target.sum()\n"
    )
    record = tmp_path / "theirs-1.2.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n")
    (record / "entry_points.txt").write_text("[ttt_depth]\nlosses = their_losses\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_installed.cache_clear()
    try:
        assert build_experiment({"name": "x", "losses": {"theirs": {"weight": 2}}}).losses["theirs"].weight == 2
        (loaded,) = load_installed()
        digest = hashlib.sha256((tmp_path / "their_losses.py").read_bytes()).hexdigest()[:16]
        assert loaded == f"theirs 1.2 their_losses {digest}"  # part of a job's identity
        assert "their_losses" in sys.modules
    finally:
        LOSSES.pop("theirs", None)
        sys.modules.pop("their_losses", None)
        load_installed.cache_clear()


def test_a_plugin_that_does_not_import_is_named(monkeypatch):
    class Broken:
        name, value = "broken", "their.module"
        dist = type("Distribution", (), {"name": "theirs", "version": "0.1"})

        def load(self):
            raise ImportError("no module named numbers2")

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Broken()])
    load_installed.cache_clear()
    try:
        with pytest.raises(UserError, match=r"their\.module.*theirs 0\.1.*numbers2"):
            load_installed()
    finally:
        load_installed.cache_clear()


def test_a_string_in_an_experiment_imports_nothing():
    with pytest.raises(UserError, match="no such loss"):
        build_experiment({"name": "x", "losses": {"antigravity": {}}})
    assert "antigravity" not in sys.modules


def _views(picture, shift, count=6, seed=0):
    config = ViewConfig(mirror=0.0, crop={"probability": 0.0}, photometric={"probability": 0.0}, shift=shift)
    points, mask = picture.points[0], picture.mask[0]
    generator = torch.Generator().manual_seed(seed)
    return make_views(picture.image[0], points, mask, picture.intrinsics[0], config, count, generator)


def test_shifted_views_keep_their_targets_and_say_their_shift(picture):
    plain = _views(picture, {})
    shifted = _views(picture, {"names": ["fog", "jpeg"], "probability": 1.0, "severity": 3})
    assert set(shifted.kind) == {"fog", "jpeg"} and set(plain.kind) == {"whole"}
    assert torch.equal(shifted.points.nan_to_num(0), plain.points.nan_to_num(0))
    assert torch.equal(shifted.mask, plain.mask)
    change = (shifted.image - plain.image).abs().flatten(1).mean(1)
    assert (change > 0.005).all() and shifted.image.min() >= 0 and shifted.image.max() <= 1


def test_shifts_of_views_follow_the_seed_probability_and_severity(picture):
    half = {"names": ["low_light"], "probability": 0.5}
    one, again, other = (_views(picture, half, 24, seed) for seed in (0, 0, 1))
    assert torch.equal(one.image, again.image) and not torch.equal(one.image, other.image)
    assert 4 <= sum(kind == "low_light" for kind in one.kind) <= 20
    assert torch.equal(_views(picture, half, 3).image, one.image[:3])  # how many follow does not matter
    assert torch.equal(_views(picture, {**half, "severity": 0}).image, _views(picture, {}).image)
    mild, strong = (_views(picture, {"names": ["low_light"], "probability": 1.0, "severity": s}) for s in (1, 5))
    assert strong.image.mean() < mild.image.mean() < _views(picture, {}).image.mean()


def test_shifts_fit_views_that_are_narrow_and_stay_out_of_held_back_ones(tiny, picture):
    strip = torch.rand(3, 16, 700)
    for name in SHIFTS:
        shifted = SHIFTS[name](strip, torch.ones(16, 700), 5, torch.Generator().manual_seed(0))
        assert shifted.shape == strip.shape and shifted.isfinite().all()
    config = build_experiment({"name": "x", "views": {"shift": {"names": ["night"], "probability": 1.0}}})
    image = picture.image[0]
    held = held_back_views(tiny, image, tiny.predict(image), config, torch.Generator().manual_seed(0), members=[])
    assert not any("night" in kind for kind in held.view.kind)


def test_an_added_shift_does_not_change_the_bundled_ones(picture, monkeypatch):
    image, depth = picture.image[0], picture.points[0, ..., 2]
    before = [apply_shift(name, image, depth, 3, seed=4) for name in ("fog", "reflection")]
    monkeypatch.setitem(SHIFTS, "aaa", lambda image, depth, severity, generator: 1 - image)
    assert torch.equal(apply_shift("aaa", image, depth, 1), ((1 - image) * 255).round() / 255)
    after = [apply_shift(name, image, depth, 3, seed=4) for name in ("fog", "reflection")]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
