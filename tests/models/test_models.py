"""Loading, predicting as MoGe does, choosing what trains, undoing it, and one sentence for each mistake."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import adapt, small_experiment
from moge.model.dinov2.models.vision_transformer import vit_small
from moge.model.v1 import MoGeModel as MoGe1
from moge.model.v2 import MoGeModel as MoGe2
from PIL import Image
from true_scene import true_scene

from ttt_lib import adapt_scene
from ttt_lib.adaptation.correction import at_references
from ttt_lib.core.errors import NotSupported, UserError
from ttt_lib.core.registry import MODELS
from ttt_lib.models.base import GeometryModel, restore, select_parameters, snapshot, weights_checksum
from ttt_lib.models.load import list_models, load_model
from ttt_lib.models.moge import MoGe
from ttt_lib.models.moge_layers import EdgeConv2d
from ttt_lib.models.pretraining.stand_in import write_stand_in
from ttt_lib.models.prompts import prompt_tokens
from ttt_lib.models.tiny import TinyMoGe
from ttt_lib.runs.experiment import open_model


def stack(first: int, out: int | None):
    return {
        "dim_in": [first, 2, 2, 2, 2] if out is None else [16, 8, 8, 8, 8], "dim_res_blocks": [16, 8, 8, 8, 8],
        "dim_out": [None] * 4 + [out], "resamplers": ["bilinear"] * 4, "num_res_blocks": 0, "res_block_hidden_norm": "layer_norm",
    }  # fmt: skip


V2 = {
    "encoder": {"backbone": "dinov2_vits14", "intermediate_layers": 2, "dim_out": 16},
    "neck": stack(18, None), "points_head": stack(18, 3), "mask_head": stack(18, 1),
    "scale_head": {"dims": [384, 8, 1]}, "remap_output": "exp", "num_tokens_range": [48, 100],
}  # fmt: skip
V1 = {"encoder": "dinov2_vits14", "intermediate_layers": 1, "dim_proj": 32, "dim_upsample": [32, 32, 32], "dim_times_res_block_hidden": 1,
      "num_res_blocks": 1, "last_conv_channels": 32, "remap_output": "exp", "num_tokens_range": [48, 100]}  # fmt: skip


@pytest.fixture(scope="module", params=["v2", "v1"])
def real_moge(request, tmp_path_factory):
    """MoGe's real classes with a ViT-S encoder and small heads, random weights, saved as their checkpoints are."""
    torch.manual_seed(0)
    network, config = (MoGe2(**V2), V2) if request.param == "v2" else (MoGe1(**V1), V1)
    path = tmp_path_factory.mktemp("moge") / "model.pt"
    torch.save({"model_config": config, "model": network.state_dict()}, path)
    return network.eval(), path, request.param


def test_heads_that_are_left_out_do_not_run_and_change_nothing_else(picture):
    torch.manual_seed(0)
    network = MoGe2(**V2, normal_head=stack(18, 3)).eval()
    model = MoGe(network, "with normals", "metric", 48)
    names, ran = [name for name, _ in network.named_parameters()], []
    for head in ("points_head", "normal_head", "mask_head"):
        getattr(network, head).register_forward_hook(lambda *_, head=head: ran.append(head))
    whole = model.forward(picture.image)
    assert {"points", "normal", "mask", "metric_scale"} == whole.keys() and len(ran) == 3
    for left_out in (("normal",), ("normal", "mask")):
        ran.clear()
        with model.without(left_out):
            fewer = model.forward(picture.image)
        assert whole.keys() - fewer.keys() == set(left_out) and len(ran) == 3 - len(left_out)
        assert all(torch.equal(value, whole[key]) for key, value in fewer.items())
    with pytest.raises(ZeroDivisionError), model.without(("normal", "points")):
        raise ZeroDivisionError
    assert [name for name, _ in network.named_parameters()] == names
    before = weights_checksum(model)
    ran.clear()
    adapted = adapt(model, picture.image[0], small_experiment(model={"name": "x"})(losses={"mask": {"weight": 0.0}}))
    assert adapted.decision == "adapted" and adapted.adapted.normal is not None and weights_checksum(model) == before
    # Only predictions (before, target and its refreshes, after) run the other heads, none of the four training passes.
    assert ran.count("points_head") - ran.count("normal_head") == 4 == ran.count("points_head") - ran.count("mask_head")
    ran.clear()
    everything = small_experiment(model={"name": "x"}, released={"all_heads": True})()
    assert torch.equal(
        adapt(model, picture.image[0], everything).final.points,
        adapt(model, picture.image[0], small_experiment(model={"name": "x"})()).final.points,
    )
    assert ran.count("points_head") - ran.count("normal_head") == 4  # only the second one's
    few = {"global": {"align_resolution": 6}} | {f"local_{level}": {"weight": 0} for level in (4, 16, 64)}
    own = adapt(model, picture.image[0], small_experiment(losses={"own": {}, **few, "mask": {"weight": 0}})())
    assert own.losses == "global 1, edge 1, metric_scale 0.1, mask_bce 0.1, normal_map 0.1"
    assert own.history[0]["normal_map"] > 0 and own.decision == "adapted"


def test_a_scene_is_adapted_to_by_a_moge_2_with_a_vit():
    """The same commands for other networks: random weights know nothing, so only the form can be checked."""
    torch.manual_seed(0)
    model = MoGe(MoGe2(**V2).eval().requires_grad_(False), "random", "metric", 48)
    scene, before = true_scene(views=2, scale=0.2, size=(56, 84), points=200)[0], weights_checksum(model)
    quick = {"train": {"parts": ["heads"], "passes": 2, "accumulation": 1}, "views": {"longest_side": 84}}
    adapted = adapt_scene(model, scene, "scene_trained", overrides=quick, progress=False)
    assert adapted.log.passes_done == 2 and not adapted.failed and weights_checksum(model) == before
    for photograph, result in adapted.results():
        ratio = at_references(result.adapted.depth[None], photograph.tracks)[0] / photograph.tracks.depth
        assert result.final.kind == "metric" and ratio.log().abs().nanmedian() < 0.5


def test_the_stand_in_has_the_shape_of_the_published_network(tmp_path, picture):
    write_stand_in(tmp_path / "vits.pt", steps=1)
    model = load_model(str(tmp_path / "vits.pt"), "cpu", num_tokens=60)
    sizes = {part: sum(p.numel() for _, p in named) for part, named in model.parameter_groups().items()}
    assert 21e6 < sizes["encoder"] < 23e6
    assert sum(value.numel() for value in model.network.state_dict().values()) == 35_103_662  # as published
    assert model.forward(picture.image[:1]).keys() == {"points", "normal", "mask", "metric_scale"}
    assert model.kind == "metric"


def test_moge_1_and_2_load_and_predict_as_moge_does(real_moge, picture):
    network, path, version = real_moge
    model = load_model(str(path), "cpu", num_tokens=48)
    assert model.kind == ("metric" if version == "v2" else "scale_invariant")
    assert model.losses == {"v1": "moge1", "v2": "moge2"}[version] and load_model("tiny").losses == "study"
    image = picture.image[0][:, :, :100]  # not the shape of the token grid
    expected = network.infer(image, num_tokens=48, apply_mask=False, use_fp16=False)
    found = model.predict(image)
    same = load_model(str(path), "cpu", num_tokens=48).as_published().predict(image)
    for key in ("points", "depth", "intrinsics", "mask"):
        assert torch.equal(getattr(same, key), expected[key]), key
        # Lighter layers round elsewhere; the camera, which is fitted, stops a little beside (1e-5 of it here).
        torch.testing.assert_close(getattr(found, key), expected[key], rtol=1e-3, atol=1e-4)
    assert not found.points.is_inference()
    select_parameters(model, ["heads"])
    output = model.forward(picture.image)
    output["points"].sum().backward()
    groups = model.parameter_groups()
    assert any(p.grad is not None for _, p in groups["heads"]) and all(p.grad is None for _, p in groups["encoder"])
    assert bool(groups["neck"]) == (version == "v2") and groups["norms"]
    names = [name for part in ("encoder", "neck", "heads") for name, _ in groups[part]]
    assert sorted(names) == sorted(name for name, _ in model.network.named_parameters())


def test_who_computes_with_lighter_layers(real_moge, untrained_checkpoint):
    def lighter(model):
        return any(isinstance(layer, EdgeConv2d) for layer in model.network.modules())

    assert not lighter(load_model("tiny", "cpu")) and not lighter(load_model(str(untrained_checkpoint), "cpu"))
    experiment = small_experiment(model={"name": str(real_moge[1]), "device": "cpu"})
    assert lighter(open_model(experiment()))
    assert not lighter(open_model(experiment(released={"published_layers": True})))


def test_features_and_metric_depth_of_moge(real_moge, picture):
    model, images = load_model(str(real_moge[1]), "cpu", num_tokens=48), picture.image[:1]
    for parameter in model.network.parameters():
        parameter.requires_grad_(True)
    features = model.features(images)
    assert features.ndim == 3 and features.shape[0] == 1
    height, width = images.shape[-2:]
    rows, columns = round((48 * height / width) ** 0.5), round((48 * width / height) ** 0.5)
    assert features.shape[1] == rows * columns
    features.sum().backward()
    groups = model.parameter_groups()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for _, p in groups["encoder"])
    if model.kind == "metric":
        depth = model.metric_depth(model.forward(images), images)
        assert torch.allclose(depth[0], model.predict(images[0]).depth, rtol=1e-3)
    else:
        with pytest.raises(UserError, match="metric"):
            model.metric_depth(model.forward(images), images)

    def encoder_gradient():
        model.network.zero_grad()
        model.forward(images)["points"].sum().backward()
        return next(p.grad for _, p in groups["encoder"] if p.grad is not None and p.grad.abs().sum() > 0)

    before = encoder_gradient()
    model.save_memory()
    assert torch.allclose(encoder_gradient(), before, rtol=1e-3, atol=1e-5 * float(before.abs().max()))


def test_the_small_model_is_moge_2s_forward(tiny, picture):
    assert isinstance(tiny.network, MoGe2) and tiny.network.forward.__func__ is MoGe2.forward
    one, batch = tiny.predict(picture.image[1]), tiny.predict(picture.image)
    assert batch.points.shape == (2, 96, 128, 3) and batch.mask.dtype == torch.bool
    assert torch.allclose(batch.depth[1], one.depth, rtol=1e-3)
    assert torch.equal(one.depth, one.points[..., 2])
    tiny.network.train()
    norms = [m for m in tiny.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)


def test_select_snapshot_restore(tiny):
    before = weights_checksum(tiny)
    chosen = select_parameters(tiny, ["neck", "*.bias"])
    assert {n for n, p in tiny.network.named_parameters() if p.requires_grad} == {n for n, _ in chosen}
    saved = snapshot(tiny, chosen)
    with torch.no_grad():
        for _, parameter in chosen:
            parameter.add_(torch.randn_like(parameter))
        for buffer in tiny.network.buffers():
            buffer.add_(1)
    assert weights_checksum(tiny) != before
    restore(tiny, saved)
    assert weights_checksum(tiny) == before
    with pytest.raises(UserError, match="'tail'.*encoder, neck, heads, norms"):
        select_parameters(tiny, ["tail"])


def test_a_local_checkpoint_of_the_small_network(untrained_checkpoint):
    model = load_model(str(untrained_checkpoint), "cpu")
    assert model.kind == "metric" and model.name == str(untrained_checkpoint)


@pytest.fixture
def wrong_files(tmp_path, untrained_checkpoint):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    torch.save({"a": torch.ones(1)}, tmp_path / "dictionary.pt")
    torch.save({"model_config": {"architecture": "tiny"}, "model": {}}, tmp_path / "config.pt")
    whole = torch.load(untrained_checkpoint, weights_only=True)
    whole["model"].pop(next(iter(whole["model"])))
    torch.save(whole, tmp_path / "lacks.pt")
    (tmp_path / "truncated.pt").write_bytes(untrained_checkpoint.read_bytes()[:100_000])
    (tmp_path / "empty.pt").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("image.png", "not a readable checkpoint"), ("truncated.pt", "truncated"), ("empty.pt", "not a readable"),
        ("dictionary.pt", "model_config"), ("config.pt", "not a MoGe checkpoint"), ("lacks.pt", "lacks 1 of its weights"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_sentence(wrong_files, file, words):
    with pytest.raises(UserError, match=words) as caught:
        load_model(str(wrong_files / file), "cpu")
    assert str(wrong_files / file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_parallel_and_compiled_training_are_stripped(tmp_path, untrained_checkpoint, before):
    content = torch.load(untrained_checkpoint, weights_only=True)
    content["model"] = {before + key: value for key, value in content["model"].items()}
    torch.save(content, tmp_path / "prefixed.pt")
    found, plain = load_model(str(tmp_path / "prefixed.pt"), "cpu"), load_model(str(untrained_checkpoint), "cpu")
    assert weights_checksum(found) == weights_checksum(plain)


@pytest.mark.parametrize(
    "size", [("dim_res_blocks", [10**6] * 5), ("num_res_blocks", [10**9] * 5), ("dim_in", [1 << 40] * 5)]
)
def test_a_huge_configuration_is_refused_before_anything_is_built(tmp_path, untrained_checkpoint, size, monkeypatch):
    content = torch.load(untrained_checkpoint, weights_only=True)
    content["model_config"]["neck"][size[0]] = size[1]
    torch.save(content, tmp_path / "huge.pt")
    monkeypatch.setattr("ttt_lib.models.tiny.TinyMoGe.__init__", lambda *_, **__: pytest.fail("a network was built"))
    with pytest.raises(UserError, match=f"its configuration says {size[0]} .*more than .*which there can be"):
        load_model(str(tmp_path / "huge.pt"), "cpu")


def test_weights_that_a_file_only_says_it_has_are_refused(tmp_path, untrained_checkpoint):
    content = torch.load(untrained_checkpoint, weights_only=True)
    config = content["model_config"]
    config["neck"]["dim_res_blocks"] = [8192] * 5
    with torch.device("meta"):
        content["model"] = {
            name: torch.zeros((), device="cpu").expand(value.shape)
            for name, value in TinyMoGe(**config).state_dict().items()
        }
    torch.save(content, tmp_path / "hollow.pt")
    with pytest.raises(UserError, match="its configuration asks for [0-9]{9,} weights and the file holds [0-9]{4,6}"):
        load_model(str(tmp_path / "hollow.pt"), "cpu")


def test_moge_3_is_named_while_it_is_lacking(tmp_path):
    (tmp_path / "moge-3-vitl.pt").write_bytes(b"downloaded")
    for name in ("Ruicheng/moge-3-vitl", str(tmp_path / "moge-3-vitl.pt")):
        with pytest.raises(UserError, match="the installed moge has no MoGe-3"):
            load_model(name, "cpu")


class Bare(GeometryModel):
    """A family that says no more than it must."""

    def forward(self, images, intrinsics=None):
        return {"points": self.network(images).movedim(1, -1)}

    def predict(self, images, intrinsics=None):
        raise NotImplementedError


def test_a_family_says_what_it_cannot_do():
    with pytest.raises(TypeError, match="abstract"):
        GeometryModel(torch.nn.Conv2d(3, 1, 1), "mine", "metric")
    model, images = Bare(torch.nn.Conv2d(3, 3, 1), "mine", "metric"), torch.rand(1, 3, 20, 20)
    with pytest.raises(NotSupported, match="gives no features"):
        model.features(images)
    with pytest.raises(NotSupported, match="metric depth"):
        model.metric_depth(model.forward(images), images)
    with pytest.raises(NotSupported, match="checkpointing: not for mine"):
        model.save_memory()
    with model.without(("normal",)):
        assert model.forward(images).keys() == {"points"}
    assert [len(named) for named in model.parameter_groups().values()] == [0, 0, 2, 0]  # heads


def test_built_in_and_added_families_enter_by_the_same_decorator(monkeypatch):
    monkeypatch.setattr(MODELS, "about", MODELS.about.copy())
    assert MODELS.all_names()[:3] == ["moge", "tiny", "hf"]
    assert list_models("tiny") == ["tiny"] and {"tiny", *list_models("moge"), *list_models("hf")} <= set(list_models())
    with pytest.raises(UserError, match="no family is called 'nope'"):
        list_models("nope")

    @MODELS.register("gray", matches=lambda name: name.endswith(".gray"), listed=("a.gray",))
    def load_gray(name, device, **settings):
        return name, device.type, settings

    try:
        assert load_model("b.gray", "cpu", num_tokens=3) == (
            "b.gray", "cpu", {"num_tokens": 3, "autocast": "none", "fov_x": None}
        )  # fmt: skip
        assert list_models("gray") == ["a.gray"]
        assert load_model("owner/c.gray", "cpu")[0] == "owner/c.gray"  # before moge, which takes every hub name
    finally:
        del MODELS["gray"]
    for name in ("tiny:1", "moge:x", "hf:x"):  # families with names of their own are not reached by prefix
        with pytest.raises(UserError, match="neither 'tiny'"):
            load_model(name, "cpu")


@pytest.mark.parametrize("count", [0, -5])
def test_less_than_one_token_is_refused(count):
    with pytest.raises(UserError, match=rf"model\.num_tokens: {count} is less than one token"):
        load_model("tiny", "cpu", num_tokens=count)


def test_unknown_names_and_an_unreachable_hub(tmp_path):
    with pytest.raises(UserError, match="neither 'tiny'"):
        load_model("huge", "cpu")
    with pytest.raises(UserError, match="neither 'tiny'"):
        load_model("/nowhere/model.pt", "cpu")
    with pytest.raises(UserError, match="model.device: 'cuda:99'"):
        load_model("tiny", "cuda:99")
    code = (
        "from ttt_lib.models.load import load_model\nfrom ttt_lib.core.errors import UserError\n"
        "try: load_model('Ruicheng/moge-2-vits-normal', 'cpu')\nexcept UserError as e: print(e)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "cannot be reached" in done.stdout and "pass its path" in done.stdout, done.stderr


def test_a_torchvision_that_cannot_be_imported_counts_as_absent(tmp_path):
    """A package that raises on import, as PyPI's CUDA build does beside a CPU torch, must not break transformers."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    code = "import ttt_lib.models.base, sys; assert sys.modules['torchvision'] is None\n" \
           "from transformers import AutoModelForDepthEstimation; print('fine')"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert "fine" in done.stdout, done.stderr[-2000:]


def test_prompt_tokens_are_registers_that_train_alone_and_go(real_moge, picture):
    model, image = load_model(str(real_moge[1]), "cpu", num_tokens=48), picture.image[0]
    names, before = [name for name, _ in model.network.named_parameters()], weights_checksum(model)
    assert any(name.endswith("ls1.gamma") for name, _ in model.parameter_groups()["norms"])
    plain = model.features(image[None])
    vit = next(each for each in model.network.modules() if hasattr(each, "num_register_tokens"))
    with prompt_tokens(model, 3):
        assert vit.register_tokens.shape == (1, 3, 384) and model.features(image[None]).shape == plain.shape
        sized = torch.rand(1, 3, 56, 84, generator=torch.Generator().manual_seed(0))
        registers = vit_small(patch_size=14, img_size=518, init_values=1.0, block_chunks=0, num_register_tokens=3)
        registers.load_state_dict(vit.state_dict())
        ours, theirs = (each.eval().get_intermediate_layers(sized, n=2) for each in (vit, registers))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, theirs))
    assert torch.equal(model.features(image[None]), plain) and weights_checksum(model) == before
    if real_moge[2] == "v1":  # its random mask sees no surface anywhere, and nothing could be learned
        return
    moved: set[str] = set()
    start = {name: value.clone() for name, value in model.network.named_parameters()}

    def look():
        now = model.network.named_parameters()
        moved.update(name for name, value in now if name not in start or not torch.equal(value, start[name]))

    def trained(rate):
        train = {"parts": ["*.register_tokens"], "prompt_tokens": 4, "passes": 2, "accumulation": 1}
        config = small_experiment(train={**train, "optimizer": {"learning_rate": rate}})()
        return adapt(model, image, config, on_step=look)

    result = trained(1e-2)
    assert result.decision == "adapted" and len(moved) == 1 and moved.pop().endswith("register_tokens")
    assert not torch.equal(result.final.points, trained(0.0).final.points)
    assert [name for name, _ in model.network.named_parameters()] == names and weights_checksum(model) == before


def test_networks_without_a_vit_take_no_prompt_tokens(tiny, image):
    with pytest.raises(NotSupported, match="train.prompt_tokens.*tiny.*no ViT"):
        adapt(tiny, image, small_experiment()(train={"prompt_tokens": 2}))
    with pytest.raises(UserError, match="train.prompt_tokens.*gate.mode to off"):
        small_experiment()(train={"prompt_tokens": 2}, gate={"mode": "measure"})
