"""Tiny networks of the real classes, built from configuration, against transformers called directly."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from true_scene import true_scene

from ttt_lib.adaptation.correction import at_references
from ttt_lib.adaptation.ensemble import predict_mirrored
from ttt_lib.adaptation.photographs.scene import guess_focal
from ttt_lib.core.errors import UserError
from ttt_lib.data.known_distances import References
from ttt_lib.geometry.cameras import intrinsics_from_fov, unproject, uv_map
from ttt_lib.models.base import restore, select_parameters, snapshot, weights_checksum
from ttt_lib.models.load import load_model
from ttt_lib.models.preprocessing import resize_rounded
from ttt_lib.models.transformers_models import DEPTH_RATIO, depth_from_disparity
from ttt_lib.models.transformers_special import PROMPT_SIZE, _border

TRANSFORMER = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
NECK = {"neck_hidden_sizes": [8, 12, 16, 24], "fusion_hidden_size": 16}
ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]
FAMILIES = ("da_relative", "da_metric", "zoe_n", "zoe_nk", "dpt", "dpt_hybrid", "dpt_beit", "dpt_dinov2", "pro", "prompt",
            "glpn")  # fmt: skip
KINDS = {"da": "DepthAnything", "zo": "ZoeDepth", "dp": "DPT", "pr": "DepthPro", "gl": "GLPN"}
LEVELS = (
    2  # of 255: half one through Pillow's rounding between the passes (bicubic rows weigh it by 1.4), half at each end
)
METRIC = ("da_metric", "zoe_n", "zoe_nk", "dpt_dinov2", "pro", "prompt", "glpn")


def _dinov2(**more):
    return transformers.Dinov2Config(
        **TRANSFORMER, mlp_ratio=2, image_size=56, patch_size=14, out_features=ALL_STAGES, **more
    )


def _beit():
    return transformers.BeitConfig(
        **TRANSFORMER, image_size=64, patch_size=16, out_features=ALL_STAGES, reshape_hidden_states=False,
        use_relative_position_bias=True, use_absolute_position_embeddings=False,
    )  # fmt: skip


def _config(family: str):
    """Configuration, and what preprocessor_config.json says."""
    dpt_file = {"image_processor_type": "DPTImageProcessor", "do_resize": True, "resample": 3, "do_rescale": True,
                "rescale_factor": 1 / 255, "do_normalize": True, "do_pad": False}  # fmt: skip
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if family == "glpn":
        config = transformers.GLPNConfig(
            depths=[1] * 4, hidden_sizes=[8, 12, 16, 24], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8
        )
        return config, {
            "image_processor_type": "GLPNImageProcessor",
            "do_resize": True,
            "resample": 2,
            "size_divisor": 32,
        }
    if family == "pro":
        vit = transformers.Dinov2Config(**TRANSFORMER, mlp_ratio=2, image_size=32, patch_size=8)
        config = transformers.DepthProConfig(
            image_model_config=vit, patch_model_config=vit, fov_model_config=vit, patch_size=32, fusion_hidden_size=16,
            intermediate_hook_ids=[3, 1], intermediate_feature_dims=[16, 16], scaled_images_feature_dims=[24, 24, 16],
            use_fov_model=True,
        )  # fmt: skip
        return config, {"image_processor_type": "DepthProImageProcessor", "size": {"height": 128, "width": 128}}
    if family == "prompt":
        config = transformers.PromptDepthAnythingConfig(
            backbone_config=_dinov2(reshape_hidden_states=False), reassemble_hidden_size=24, head_hidden_size=8,
            patch_size=14, **NECK,
        )  # fmt: skip
        return config, dpt_file | half | {"image_processor_type": "PromptDepthAnythingImageProcessor", "size":
                                          {"height": 70, "width": 70}, "keep_aspect_ratio": True,
                                          "ensure_multiple_of": 14}  # fmt: skip
    if family.startswith("da"):
        kind = {"depth_estimation_type": "metric", "max_depth": 20} if family == "da_metric" else {}
        config = transformers.DepthAnythingConfig(
            backbone_config=_dinov2(reshape_hidden_states=False), reassemble_hidden_size=24, head_hidden_size=8,
            patch_size=14, **NECK, **kind,
        )  # fmt: skip
        rules = {"size": {"height": 70, "width": 70}, "keep_aspect_ratio": True, "ensure_multiple_of": 14,
                 "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # fmt: skip
        return config, dpt_file | rules
    if family.startswith("zoe"):
        heads = [{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}]
        if family == "zoe_nk":
            heads = [heads[0] | {"name": "nyu"}, {"name": "kitti", "n_bins": 8, "min_depth": 0.001, "max_depth": 80.0}]
        config = transformers.ZoeDepthConfig(
            backbone_config=_beit(), **NECK, num_relative_features=8, bottleneck_features=16, bin_embedding_dim=16,
            num_attractors=[4, 2, 2, 1], bin_configurations=heads, num_patch_transformer_layers=4,
            patch_transformer_hidden_size=128, patch_transformer_intermediate_size=16,
            patch_transformer_num_attention_heads=2,
        )  # fmt: skip
        rules = {"image_processor_type": "ZoeDepthImageProcessor", "do_pad": True, "do_rescale": True,
                 "do_normalize": True, "rescale_factor": 1 / 255, "do_resize": True, "resample": 2,
                 "size": {"height": 64, "width": 96}, "keep_aspect_ratio": True, "ensure_multiple_of": 32}  # fmt: skip
        return config, rules | half
    if family == "dpt":
        config = transformers.DPTConfig(**TRANSFORMER, **NECK, image_size=64, backbone_out_indices=[0, 1, 2, 3])
        return config, dpt_file | half | {"size": {"height": 64, "width": 64}, "keep_aspect_ratio": False}
    if family == "dpt_hybrid":
        backbone = transformers.BitConfig(
            embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1], layer_type="bottleneck",
            global_padding="same", out_features=["stage1", "stage2", "stage3"], embedding_dynamic_padding=True,
            num_groups=4,
        )  # fmt: skip
        config = transformers.DPTConfig(
            **TRANSFORMER, neck_hidden_sizes=[16, 24, 24, 24], fusion_hidden_size=16, image_size=64, is_hybrid=True,
            backbone_config=backbone, backbone_featmap_shape=[1, 32, 4, 4], reassemble_factors=[1, 1, 1, 0.5],
            backbone_out_indices=[0, 1, 2, 3],
        )  # fmt: skip
        return config, dpt_file | half | {"size": {"height": 64, "width": 64}, "keep_aspect_ratio": False}
    if family == "dpt_beit":
        config = transformers.DPTConfig(backbone_config=_beit(), **NECK)
        rules = {"size": {"height": 64, "width": 64}, "keep_aspect_ratio": True, "ensure_multiple_of": 32}
        return config, dpt_file | half | rules
    # As facebook/dpt-dinov2-*: no resizing, padding to the patch, means and deviations for 0 ... 255.
    config = transformers.DPTConfig(backbone_config=_dinov2(reshape_hidden_states=False), **NECK)
    rules = {"do_resize": False, "do_rescale": False, "do_pad": True, "size_divisor": 14,
             "size": {"height": 64, "width": 64}, "image_mean": [123.675, 116.28, 103.53],
             "image_std": [58.395, 57.12, 57.375]}  # fmt: skip
    return config, dpt_file | rules


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a tiny random model of a family; its outputs vary over the picture and its heads are not dead."""

    @functools.cache
    def make(family: str) -> Path:
        path = tmp_path_factory.mktemp(family)
        config, rules = _config(family)
        torch.manual_seed(3)
        kind = "PromptDepthAnything" if family == "prompt" else KINDS[family[:2]]
        network = getattr(transformers, f"{kind}ForDepthEstimation")(config)
        with torch.no_grad():
            for parameter in network.parameters():
                # The library's own initialisation (0.02) hardly lets the picture through.
                parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
            if family == "pro":
                network.fov_model.head.layers[-1].bias.add_(70.0)  # degrees
                network.head.layers[-2].weight.mul_(3e-6)  # as large as inverse depths are
                network.head.layers[-2].bias.fill_(0.5)
            elif hasattr(network, "head") and family != "glpn":  # a ReLU at the end would cut random outputs off
                last = network.head.conv3 if hasattr(network.head, "conv3") else network.head.head[4]
                last.bias.add_(0.0 if family == "da_metric" else 3.0)
        network.save_pretrained(path)
        (path / "preprocessor_config.json").write_text(json.dumps(rules))
        return path

    return make


@pytest.fixture(scope="session")
def load(folder):
    return lambda family, **options: load_model(str(folder(family)), "cpu", **options)


def _pictures(count: int = 2, size: tuple[int, int] = (60, 82), seed: int = 0) -> list[np.ndarray]:
    """8-bit pictures with structure at several scales."""
    generator, pictures = np.random.default_rng(seed), []
    for _ in range(count):
        layers = [
            np.asarray(
                Image.fromarray(generator.integers(0, 256, (n, n + 1, 3), dtype=np.uint8)).resize(size[::-1], 3),
                dtype=np.float64,
            )
            for n in (3, 9, 40)
        ]
        pictures.append(np.mean(layers, 0).round().astype(np.uint8))
    return pictures


def _batch(pictures: list[np.ndarray]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) for p in pictures]).float() / 255


def _close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-5) -> None:
    """Largest difference relative to the largest value."""
    assert a.shape == b.shape
    assert float((a - b).abs().max() / b.abs().max()) < rtol


def _direct_network(path: Path):
    return transformers.AutoModelForDepthEstimation.from_pretrained(path).eval()


def _pil_processor(path: Path):
    """The library's processor that works without torchvision: `...Pil` in transformers 5, the plain one before."""
    rules = json.loads((path / "preprocessor_config.json").read_text())
    name = rules.pop("image_processor_type")
    if "DepthPro" in name:
        return SimpleNamespace(__name__=name), rules
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name), rules


def _processor(path: Path):
    """The library's; of Depth Pro, whose needs torchvision, what its `_preprocess` does, and its own post-processing."""
    kind, rules = _pil_processor(path)
    if "DepthPro" not in kind.__name__:
        return kind(**rules)

    def prepare(images, return_tensors):
        values = (torch.from_numpy(np.array(images)).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
        return {"pixel_values": F.interpolate(values, tuple(rules["size"].values()), mode="bilinear")}

    return prepare


def _depth_pro_post_process(outputs, size: tuple[int, int], monkeypatch) -> torch.Tensor:
    """The library's, imported beside an empty torchvision, of which this part uses nothing."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    stubs = {name: ModuleType(name) for name in names}
    stubs[names[-1]].functional = SimpleNamespace(InterpolationMode=object)
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    module = importlib.import_module("transformers.models.depth_pro.image_processing_depth_pro")
    monkeypatch.setattr(module, "pil_torch_interpolation_mapping", {2: SimpleNamespace(value="bilinear")})
    processed = module.DepthProImageProcessor.post_process_depth_estimation
    done = processed(SimpleNamespace(resample=2), outputs, target_sizes=[size] * len(outputs.predicted_depth))
    return torch.stack([d["predicted_depth"] for d in done])


def _post_process(processor, outputs, size: tuple[int, int], monkeypatch) -> torch.Tensor:
    """The library's own post-processing for pictures of `size`, (B,H,W)."""
    count = len(outputs.predicted_depth)
    if "field_of_view" in outputs:
        return _depth_pro_post_process(outputs, size, monkeypatch)
    if "ZoeDepth" not in type(processor).__name__:
        if not hasattr(processor, "post_process_depth_estimation"):  # before 4.47: as its documentation did
            return F.interpolate(outputs.predicted_depth[:, None], size, mode="bicubic", align_corners=False)[:, 0]
        done = processor.post_process_depth_estimation(outputs, target_sizes=[size] * count)
        return torch.stack([d["predicted_depth"] for d in done])
    if not hasattr(processor, "post_process_depth_estimation"):
        pytest.skip("this transformers has no post-processing of ZoeDepth to compare with")
    # ZoeDepth's needs one function of torchvision, which for tensors is this call of torch.
    module = sys.modules[type(processor).__module__]
    if not hasattr(module, "tvF"):
        resize = lambda x, size, interpolation, antialias: F.interpolate(x[None], size, mode="bicubic")[0]  # noqa: E731
        modes = SimpleNamespace(BICUBIC="bicubic")
        monkeypatch.setattr(module, "tvF", SimpleNamespace(resize=resize, InterpolationMode=modes), raising=False)
    done = processor.post_process_depth_estimation(outputs, source_sizes=[size] * count)
    return torch.stack([d["predicted_depth"] for d in done])


# ------------------------------------------------------------------------------------- agreement with transformers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(60, 82), (82, 60), (150, 190)])
def test_prediction_is_that_of_transformers_called_directly(folder, load, family, size, monkeypatch):
    """Network and post-processing of the library on 8-bit pictures, one at a time: 1e-5; what they are fed up to rounding."""
    model, network, processor = load(family), _direct_network(folder(family)), _processor(folder(family))
    pictures = _pictures(2, size)
    prepared = [processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"] for picture in pictures]
    found = model.pixel_values(_batch(pictures))
    level = model.rules.scale / min(model.rules.std)  # one of 255, as the network sees it
    exact = family in ("zoe_n", "zoe_nk", "pro") or family == "dpt_dinov2"  # nothing is rounded
    assert (found - torch.cat(prepared)).abs().max() <= (1e-5 if exact else LEVELS) * level
    own = model.predict(_batch(pictures))
    monkeypatch.setattr(model, "pixel_values", lambda images: torch.cat(prepared))
    prediction = model.predict(_batch(pictures))
    forward = model.forward(_batch(pictures))[model.output]
    said = [each.disparity if model.kind == "disparity" else each.depth for each in (own, prediction)]
    assert (said[0] - said[1]).abs().mean() < 0.05 * said[1].abs().mean()  # random weights magnify the levels
    for k, inputs in enumerate(prepared):
        with torch.no_grad():
            outputs = network(inputs)
        expected = _post_process(processor, outputs, size, monkeypatch)[0]
        assert expected.std() > 1e-3 * expected.abs().max(), "the model says the same everywhere: the test sees nothing"
        found = prediction.disparity if model.kind == "disparity" else prediction.depth
        _close(found[k], expected)
        _close(forward[k], expected)


def test_known_distances_are_the_prompt_of_prompt_depth_anything(folder, load):
    """As many distances as the prompt has pixels: the library's own way from a depth picture in millimetres."""
    model, network, processor = load("prompt"), _direct_network(folder("prompt")), _processor(folder("prompt"))
    (picture,) = _pictures(1, (56, 70))
    depth = (1000 + 4000 * np.random.default_rng(1).random(PROMPT_SIZE)).astype(np.uint16)
    inputs = processor(images=Image.fromarray(picture), prompt_depth=Image.fromarray(depth), return_tensors="pt")
    with torch.no_grad():
        expected = F.interpolate(network(**inputs).predicted_depth[:, None], (56, 70), mode="bicubic")[:, 0]
    image = _batch([picture])
    references = References(uv_map(*PROMPT_SIZE).reshape(-1, 2), torch.from_numpy(depth / 1000.0).float().flatten())
    alone = model.predict(image)
    with model.knowing(references=references):
        prompted, trained, view = model.predict(image), model.forward(image), model.predict(image, alone.intrinsics)
        mirrored = predict_mirrored(model, image[0])
    _close(prompted.depth, expected, 1e-4)
    _close(trained["depth"], expected, 1e-4)
    assert prompted.kind == "metric" and alone.kind == view.kind == "affine_invariant"
    assert torch.equal(view.depth, alone.depth) and (prompted.depth - alone.depth).abs().max() > 0.1
    with model.knowing(references=references.mirrored()):
        assert torch.equal(mirrored.depth, model.predict(image[0].flip(-1)).depth.flip(-1))
    assert model.known_references is None and "no distances are known" in alone.note
    few = References(torch.tensor([[0.1, 0.1], [0.9, 0.8]]), torch.tensor([2.0, 2.0]))
    with model.knowing(references=few):  # all alike: nothing to divide by
        assert torch.isfinite(model.predict(image).depth).all()


def test_known_distances_prompt_and_train_in_one_adaptation(load):
    from conftest import adapt

    from ttt_lib import load_experiment

    model, image = load("prompt"), _batch(_pictures(1, (56, 70)))[0]
    references = References(torch.rand(30, 2), 1 + torch.rand(30))
    with model.knowing(references=references):
        expected = model.predict(image).depth
    quick = {"parts": ["heads"], "passes": 6, "accumulation": 1, "optimizer": {"learning_rate": 1e-2}}
    config = load_experiment("prompt_depth_anything", overrides={"train": quick})
    result = adapt(model, image, config, references=references)
    assert torch.equal(result.original.depth, expected) and result.final.kind == "metric"
    terms = [entry["metric_reference"] for entry in result.history]
    assert terms[-1] < 0.9 * terms[0] and model.known_references is None


def test_depth_pro_takes_its_own_field_of_view_or_the_known_one(load):
    model, image = load("pro"), _batch(_pictures(1))
    own = model.predict(image)
    assert 5 < float(2 * torch.rad2deg(torch.atan(0.5 / own.intrinsics[0, 0, 0]))) < 175 and not own.note
    known = intrinsics_from_fov(40.0, 82 / 60)[None]
    given = model.predict(image, known)
    # Twice the focal length, twice as far: its network's inverse depth is that of one canonical camera.
    assert torch.allclose(given.depth / own.depth, known[:, 0, 0] / own.intrinsics[:, 0, 0], rtol=1e-4)
    with model.knowing(fov_x=40.0):
        assert torch.equal(model.predict(image).points, given.points)
        assert torch.allclose(model.forward(image)["points"], given.points, rtol=1e-5)


@pytest.mark.parametrize("family", ["da_relative", "da_metric"])
def test_a_plane_under_a_known_camera_off_the_middle(load, monkeypatch, family):
    """A disparity model with known distances and a metric one: the points are where the plane is."""
    from ttt_lib import adapt
    from ttt_lib.data.known_camera import centre_photograph, known_camera

    model, image, given = load(family), _batch(_pictures(1))[0], (70.0, 72.0, 50.0, 25.0)
    camera, plane = known_camera((60, 82), given), torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)  # plane . X = 1
    seen = centre_photograph(image, camera)
    rays = unproject(torch.ones(seen.image.shape[-2:], dtype=torch.float64), seen.intrinsics.double())
    inverse = (rays @ (seen.rotation @ plane)).float()
    answer = 3 * inverse + 0.2 if family == "da_relative" else 1 / inverse
    monkeypatch.setattr(model, "_at_size", lambda output, height, width: answer[None])
    uv = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    own = torch.cat([uv, torch.ones(40, 1)], -1).double() @ torch.linalg.inv(camera.intrinsics.double()).mT
    known = {"references": References(uv, (1 / (own @ plane)).float())} if family == "da_relative" else {}
    quick = {"train": {"passes": 0, "method": "none"}, "gate": {"mode": "off"}, "ensemble": {"members": []}}
    final = adapt(model, image, "original", overrides=quick, intrinsics=given, **known).final
    there = torch.isfinite(final.depth)
    assert (
        final.kind == "metric" and 0.6 < there.float().mean() < 1 and torch.equal(final.intrinsics, camera.intrinsics)
    )
    on_plane = (final.points[there].double() @ plane - 1).abs()
    assert on_plane.mean() < 1e-3 and on_plane.max() < 1e-2
    assert torch.allclose(final.points, unproject(final.depth, camera.intrinsics), equal_nan=True)


@pytest.mark.parametrize("family", ["da_metric", "zoe_n", "glpn", "dpt_dinov2"])
def test_metric_depth_is_rescaled_by_the_ratio_of_focal_lengths(load, family):
    plain, image = load(family), _batch(_pictures(1, (60, 84)))
    wide, tele = (intrinsics_from_fov(fov, 84 / 60)[None] for fov in (90.0, 36.0))
    seen = plain.pixel_values(image).shape[-1]
    if family.startswith("zoe"):
        seen *= 84 / (84 + 2 * _border(60, 84)[1])
    same = load(family, canonical_focal=0.5 * seen)  # at 90 degrees
    before = plain.predict(image, wide).depth
    _close(same.predict(image, wide).depth, before)
    ratio = float(tele[0, 0, 0] / wide[0, 0, 0])
    _close(same.predict(image, tele).depth, ratio * before)
    _close(same.forward(image, tele)["points"][..., 2], ratio * before)
    assert ratio > 3 and "rescaled" in same.predict(image, tele).note


@pytest.mark.parametrize("family", ["da_relative", "pro", "prompt"])
def test_where_no_camera_is_canonical_that_is_said(load, family):
    with pytest.raises(UserError, match="model.canonical_focal: .* belongs to one camera; leave it out"):
        load(family, canonical_focal=400.0)


@pytest.mark.parametrize("mode, number", [("bilinear", 2), ("bicubic", 3)])
@pytest.mark.parametrize("old, new", [((60, 82), (42, 56)), ((33, 70), (98, 126)), ((120, 90), (64, 90))])
def test_resizing_is_that_of_pillow_up_to_its_rounding(mode, number, old, new):
    """Pillow rounds twice and each of us once: at most half a level each at the end, and half a level through the rows."""
    picture = _pictures(1, old)[0]
    expected = np.asarray(Image.fromarray(picture).resize(new[::-1], number)).astype(float)
    found = resize_rounded(_batch([picture]) * 255, new, mode)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, found.round()) and np.abs(found - expected).max() <= LEVELS
    assert (np.abs(found - expected) > 1).mean() < 0.01


@pytest.mark.parametrize("family", ["da_relative", "dpt", "zoe_n", "prompt"])
def test_sizes_are_those_of_the_processors(folder, load, family):
    """Many shapes of picture through the library's own size rule."""
    model = load(family)
    kind, rules = _pil_processor(folder(family))
    name = "_get_resize_output_image_size" if family == "prompt" else "get_resize_output_image_size"
    rule = getattr(sys.modules[kind.__module__], name)
    keep, multiple = rules["keep_aspect_ratio"], rules.get("ensure_multiple_of", 1)
    for height, width in [(480, 640), (640, 480), (375, 1242), (70, 70), (97, 103), (1080, 1920), (33, 60)]:
        asked = rule(np.zeros((3, height, width)), tuple(rules["size"].values()), keep, multiple)
        asked = (asked.height, asked.width) if hasattr(asked, "height") else tuple(int(v) for v in asked)
        assert model.rules.processed_size(height, width, None) == asked


def test_num_tokens_sets_the_processed_size(load):
    for family, patch, step in (("da_relative", 14, 14), ("zoe_n", 16, 32), ("dpt", 16, 16), ("dpt_dinov2", 14, 14)):
        model = load(family, num_tokens=48)
        rows, columns = model.pixel_values(torch.rand(1, 3, 60, 120)).shape[-2:]
        assert rows % step == 0 and columns % step == 0
        assert 24 <= rows * columns / patch**2 <= 96
        assert family == "dpt" and rows == columns or 1.4 <= columns / rows <= 2.8
        assert model.predict(torch.rand(3, 60, 120)).depth.shape == (60, 120)
        assert model.features(torch.rand(1, 3, 60, 120)).shape[1] == rows * columns // patch**2
    assert load("da_relative", num_tokens=200).pixel_values(torch.rand(1, 3, 70, 140)).shape[-2:] == (140, 280)
    with pytest.raises(UserError, match="one size"):
        load("dpt_hybrid", num_tokens=16)


# ---------------------------------------------------------------------------------------------------- interface


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_kinds_and_cameras(load, family):
    model, images = load(family), _batch(_pictures())
    metric = family in METRIC
    kind = "affine_invariant" if family == "prompt" else "metric"
    assert (model.kind, model.output) == ((kind, "depth") if metric else ("disparity", "disparity"))
    assert not any(p.requires_grad for p in model.network.parameters()) and not model.network.training
    output = model.forward(images)
    own_camera = family == "pro"
    assert {k: v.shape for k, v in output.items()} == (
        {"depth": (2, 60, 82), "points": (2, 60, 82, 3)} if metric else {"disparity": (2, 60, 82)}
    )
    assert all(value.dtype == torch.float32 for value in output.values())
    both = model.predict(images)
    assert both.points.shape == (2, 60, 82, 3) and both.mask.dtype == torch.bool and both.intrinsics.shape == (2, 3, 3)
    assert both.kind == model.kind and (both.disparity is None) == metric
    assert both.extra == (
        {} if own_camera else {"assumed_fov": 60} | ({"domain": both.extra["domain"]} if family == "zoe_nk" else {})
    )
    assert ("60 degrees" in both.note) != own_camera
    assert ("disparity" in both.note) == (not metric)
    assert torch.equal(both.points[..., 2], both.depth) and not both.depth.requires_grad
    # Half of 60 degrees to the image's border, and square pixels.
    fx, fy = float(both.intrinsics[0, 0, 0]), float(both.intrinsics[0, 1, 1])
    assert fx * 82 == pytest.approx(fy * 60, rel=1e-5) and (own_camera or fx == pytest.approx(0.5 / np.tan(np.pi / 6)))
    single = model.predict(images[1])
    assert single.points.shape == (60, 82, 3) and single.mask.shape == (60, 82) and single.intrinsics.shape == (3, 3)
    _close(single.depth, both.depth[1], 1e-5 if metric else 1e-4)  # the inverse amplifies a disparity's rounding


def test_given_intrinsics_are_used(load):
    camera = torch.tensor([[0.7, 0, 0.4], [0, 0.9, 0.55], [0, 0, 1]])
    for family in ("da_metric", "da_relative"):
        model = load(family)
        image = _batch(_pictures(1))
        found = model.predict(image[0], camera)
        assert "assumed_fov" not in found.extra and "field of view" not in found.note
        assert torch.equal(found.intrinsics, camera)
        v, u = 11, 70
        x, y = ((u + 0.5) / 82 - 0.4) / 0.7, ((v + 0.5) / 60 - 0.55) / 0.9
        assert torch.allclose(found.points[v, u], torch.tensor([x, y, 1.0]) * found.depth[v, u], rtol=1e-5)
        assert torch.equal(model.predict(image, camera[None]).points[0], found.points)
    points = load("da_metric").forward(image, camera[None])["points"]
    assert torch.allclose(points[0], load("da_metric").predict(image[0], camera).points, rtol=1e-5)


def test_a_field_of_view_can_be_given(load):
    found = load("zoe_n", fov_x=90.0).predict(_batch(_pictures(1))[0])
    assert float(found.intrinsics[0, 0]) == pytest.approx(0.5) and not found.extra
    assert "taken as known, 90 degrees" in found.note
    image = _batch(_pictures(1))[0]  # a scene's reconstruction begins with what is known, or predicted, never assumed
    guesses = [guess_focal(load("zoe_n", **options))(image) for options in ({}, {"fov_x": 90.0})]
    assert guesses == [None, pytest.approx(0.5)] and 0.1 < guess_focal(load("pro"))(image) < 10
    with pytest.raises(UserError, match="field of view"):
        load("zoe_n", fov_x=190.0)


def test_depth_made_of_disparity_stays_in_its_range_and_order():
    disparity = (
        torch.rand(2, 40, 50) * torch.tensor([1.0, 300.0])[:, None, None] + torch.tensor([5.0, -7.0])[:, None, None]
    )
    disparity[0, 0, 0] = 1e6  # an outlier must not squeeze everything else
    depth = depth_from_disparity(disparity)
    assert depth.min() == pytest.approx(1) and depth.max() == pytest.approx(DEPTH_RATIO)
    for k in range(2):
        order = disparity[k].flatten().argsort()
        assert (depth[k].flatten()[order].diff() <= 1e-6).all()
        assert depth[k].unique().numel() > 1500
    # Invariant to the scale and shift that the model leaves open.
    assert torch.allclose(depth_from_disparity(disparity[1:] * 3 + 2), depth[1:], rtol=1e-4)
    assert torch.equal(depth_from_disparity(torch.full((1, 4, 4), 2.0)), torch.ones(1, 4, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_pictures(load, family):
    model, images = load(family), _batch(_pictures(3, seed=5))
    together = model.forward(images)
    for k in range(3):
        alone = model.forward(images[k : k + 1])
        for key, value in alone.items():
            _close(together[key][k : k + 1], value)


def test_zoedepth_routes_every_picture_by_itself(load):
    """The library lets the batch vote; the chosen head must not depend on the neighbours."""
    model = load("zoe_nk")
    images = torch.cat([_batch(_pictures(4, seed=s)) for s in range(3)] + [torch.rand(3, 3, 60, 82)])
    classifier = [p for n, p in model.network.named_parameters() if "mlp_classifier" in n]
    logits = model.network(model.pixel_values(images)).domain_logits
    with torch.no_grad():  # a threshold between the pictures, so that both domains occur
        classifier[-1][0] -= (logits[:, 0] - logits[:, 1]).sort().values[4:6].mean()
    together = model.predict(images)
    assert sorted(set(together.extra["domain"])) == ["kitti", "nyu"]
    depth = model.forward(images)["depth"]
    for k, image in enumerate(images):
        alone = model.predict(image)
        assert alone.extra["domain"] == together.extra["domain"][k]
        _close(together.depth[k], alone.depth)
        _close(depth[k], alone.depth)
    assert "domain" not in load("zoe_n").predict(images[0]).extra


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_one_part_and_gradients_reach_all(load, family):
    model = load(family)
    groups = model.parameter_groups()
    names = [name for part in ("encoder", "neck", "heads") for name, _ in groups[part]]
    assert sorted(names) == sorted(name for name, _ in model.network.named_parameters())
    assert {name.split(".")[0] for name, _ in groups["encoder"]} <= {"backbone", "dpt", "depth_pro", "glpn"}
    assert not any("neck" in name for name, _ in groups["encoder"])
    necks = {"pro": {"depth_pro", "fusion_stage"}, "glpn": {"decoder"}}
    assert {name.split(".")[0] for name, _ in groups["neck"]} == necks.get(family, {"neck"})
    heads = {"relative_head", "metric_head"} if family.startswith("zoe") else {"head"}
    heads |= {"fov_model"} if family == "pro" else set()
    assert {name.split(".")[0] for name, _ in groups["heads"]} == heads
    # GLPN's decoder has batch normalisations in sequences; the scales of a ViT's branches count as norms.
    kinds = ("norm", ".convolutional_layer", "layer_scale")
    assert groups["norms"] and all(any(kind in n.lower() for kind in kinds) for n, _ in groups["norms"])
    select_parameters(model, ["encoder", "neck", "heads"])
    model.known_references = References(torch.rand(9, 2), 1 + torch.rand(9)) if family == "prompt" else None
    output = model.forward(_batch(_pictures()))[model.output]
    (output * torch.linspace(-1, 1, output.shape[-1])).mean().backward()
    # The networks themselves leave out mask tokens, the first fusion layer's residual, the last of the relative head,
    # and with several domains the other domain's head and all that only chooses.
    idle = ("mask_token", "layers.0.residual_layer1", "layernorm", "cls_token", "relative_head.conv3") + (
        "patch_transformer", "mlp_classifier",
        {"nyu": "kitti", "kitti": "nyu"}.get(model.predict(_batch(_pictures())[0]).extra.get("domain"), "-"),
    )  # fmt: skip
    for part in ("encoder", "neck", "heads"):
        working = [(name, p) for name, p in groups[part] if not any(word in name for word in idle)]
        reached = [name for name, p in working if p.grad is not None and p.grad.abs().max() > 0]
        assert len(reached) > 0.9 * len(working), sorted({name for name, _ in working} - set(reached))
    first = next(p for name, p in groups["encoder"] if "proj" in name or "embedder" in name)
    assert first.grad.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_training_leaves_no_trace(load, family):
    model, images = load(family), _batch(_pictures())
    checksum, before = weights_checksum(model), model.predict(images)
    parameters = select_parameters(model, ["encoder", "heads"])
    kept = snapshot(model, parameters)
    optimizer = torch.optim.AdamW([p for _, p in parameters], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (model.forward(images)[model.output] - 1).abs().mean().backward()
        optimizer.step()
    assert weights_checksum(model) != checksum
    trained = model.predict(images).points
    assert not torch.equal(trained, before.points) and not trained.requires_grad
    restore(model, kept)
    assert weights_checksum(model) == checksum
    assert torch.equal(model.predict(images).points, before.points)
    assert not any(p.requires_grad or p.grad is not None for p in model.network.parameters())


@pytest.mark.parametrize("family", ["da_relative", "da_metric", "zoe_nk", "dpt", "dpt_hybrid"])
def test_mixed_precision_rounds_the_training_pass_only(load, family):
    plain, mixed, images = load(family), load(family, autocast="bfloat16"), _batch(_pictures())
    a, b = plain.forward(images)[plain.output], mixed.forward(images)[mixed.output]
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    assert (a - b).abs().mean() < 0.05 * a.abs().mean()
    assert torch.equal(plain.predict(images).points, mixed.predict(images).points)
    select_parameters(mixed, ["encoder"])
    mixed.forward(images)[mixed.output].mean().backward()
    assert any(p.grad is not None and p.grad.isfinite().all() for p in mixed.network.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_patches(load, family):
    model, images = load(family), _batch(_pictures())
    pixels = model.pixel_values(images)
    patch = {"glpn": 32, "pro": 32}.get(
        family, 14 if family in ("da_relative", "da_metric", "dpt_dinov2", "prompt") else 16
    )
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch  # Depth Pro's encoder sees a quarter of them
    select_parameters(model, ["encoder"])
    features = model.features(images)
    assert features.shape == (2, rows * columns, 24) and features.dtype == torch.float32
    features.square().mean().backward()
    reached = [n for n, p in model.network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert any("proj" in name for name in reached) and not any(name.startswith(("neck", "head")) for name in reached)
    # The class token is left out: tokens of the library's own encoder, one for each patch behind it.
    network = model.network
    with torch.no_grad():
        encoder = getattr(network, "backbone", None)
        if family in ("pro", "glpn"):
            whole = network.depth_pro.encoder.image_encoder if family == "pro" else network.glpn
            tokens = whole(pixels).last_hidden_state
            tokens = tokens if family == "pro" else F.pad(tokens.flatten(2).mT, (0, 0, 1, 0))  # GLPN has no class token
        else:
            tokens = encoder(pixels).feature_maps[-1] if encoder is not None else network.dpt(pixels).last_hidden_state
    assert tokens.shape[1] == rows * columns + 1
    _close(features.detach(), tokens[:, 1:])


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of a folder to damage."""
    return lambda family: Path(shutil.copytree(folder(family), tmp_path / family))


def test_a_folder_of_another_model(tmp_path):
    transformers.Dinov2Config(**TRANSFORMER).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model type 'dinov2'; known are depth_anything, zoedepth, dpt"):
        load_model(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    "file, damage, says",
    [
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:2000]), "cannot be loaded as depth_anything"),
        ("model.safetensors", lambda p: p.write_bytes(b"<html>404</html>"), "cannot be loaded as depth_anything"),
        ("model.safetensors", lambda p: p.unlink(), "cannot be loaded as depth_anything"),
        ("config.json", lambda p: p.write_text("{"), "config.json: is not a JSON file that can be read"),
        ("preprocessor_config.json", lambda p: p.write_text('{"size": 3.5}'), "preprocessor_config.json is not one of"),
        ("preprocessor_config.json", lambda p: p.write_text('{"resample": 1}'), "resample 1; known are 2"),
        ("preprocessor_config.json", lambda p: p.unlink(), "preprocessor_config.json is not one of depth_anything"),
        (
            "config.json",
            lambda p: p.write_text(p.read_text().replace('"fusion_hidden_size": 16', '"fusion_hidden_size": 8')),
            "cannot be loaded as depth_anything",
        ),
    ],
)
def test_damaged_files(copy, file, damage, says):
    path = copy("da_relative")
    damage(path / file)
    with pytest.raises(UserError, match=says) as caught:
        load_model(str(path), "cpu")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("family", "key", "value", "says"),
    [
        ("da_relative", "num_hidden_layers", 10**12, "config.json says num_hidden_layers 1000000000000, more than"),
        ("da_relative", "hidden_size", 10**9, "hidden_size 1000000000, more than"),
        ("da_relative", "fusion_hidden_size", 8192, "asks for [0-9]{9,} weights and the file holds [0-9]{4,6}"),
        ("dpt", "image_size", 60000, "asks for [0-9]{9,} weights"),
        ("dpt", "neck_hidden_sizes", [30000] * 4, "asks for [0-9]{9,} weights"),
        ("dpt_hybrid", "depths", [10**9, 1, 1], "depths 1000000000, more than"),
        ("zoe_n", "num_patch_transformer_layers", 10**9, "num_patch_transformer_layers 1000000000, more than"),
    ],
)
def test_a_huge_configuration_is_refused_before_anything_is_built(copy, monkeypatch, family, key, value, says):
    path = copy(family)

    def put(content):
        return {k: value if k == key else put(v) if isinstance(v, dict) else v for k, v in content.items()}

    content = put(json.loads((path / "config.json").read_text()))
    (path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(UserError, match=says) as caught:
        load_model(str(path), "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rules", [{"size": {"height": 10**9, "width": 10}}, {"ensure_multiple_of": 1e12}])
def test_pictures_are_not_resized_without_end(copy, rules):
    path = copy("da_relative")
    content = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(content | rules))
    with pytest.raises(UserError, match="preprocessor_config.json says .*, more than 16384"):
        load_model(str(path), "cpu")


def test_shapes_that_a_file_only_says_it_has_allow_nothing(copy):
    path = copy("da_relative")
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["big"] = {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4]}
    new = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])
    content = json.loads((path / "config.json").read_text()) | {"fusion_hidden_size": 8192}
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="cannot be loaded as depth_anything .*deserializing header"):
        load_model(str(path), "cpu")


def test_weights_of_the_older_kind_are_measured_too(copy, monkeypatch):
    from safetensors.torch import load_file

    path = copy("da_relative")
    before = weights_checksum(load_model(str(path), "cpu"))
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert weights_checksum(load_model(str(path), "cpu")) == before
    content = json.loads((path / "config.json").read_text()) | {"fusion_hidden_size": 8192}
    (path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(UserError, match="asks for [0-9]{9,} weights and the file holds [0-9]{4,7}"):
        load_model(str(path), "cpu")


def test_missing_weights(copy):
    """Those of the head must be there; those that no forward pass uses may be missing, and are the same each time."""
    from safetensors.torch import load_file, save_file

    path = copy("da_relative")
    file = path / "model.safetensors"
    weights = load_file(file)
    unused = [key for key in weights if "fusion_stage.layers.0.residual_layer1." in key]
    assert unused
    before = load_model(str(path), "cpu")
    save_file({k: v for k, v in weights.items() if k not in unused}, file, metadata={"format": "pt"})
    first, second = load_model(str(path), "cpu"), load_model(str(path), "cpu")
    assert weights_checksum(first) == weights_checksum(second) != weights_checksum(before)
    image = _batch(_pictures(1))
    assert torch.equal(first.predict(image).disparity, before.predict(image).disparity)
    save_file({k: v for k, v in weights.items() if "head.conv3" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lack 2 of those a depth model needs, first 'head.conv3.bias'"):
        load_model(str(path), "cpu")


def _elsewhere(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_unreachable_hub_is_one_sentence(tmp_path):
    code = """
import time
from ttt_lib.models.load import load_model
from ttt_lib.core.errors import UserError
import transformers
start = time.monotonic()
try: load_model("depth-anything/Depth-Anything-V2-Small-hf", "cpu")
except UserError as error: print(error, time.monotonic() - start < 15)
"""
    said = _elsewhere(code, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert "the hub cannot be reached and no copy of config.json is cached" in said and "their folder" in said
    assert said.strip().endswith("True") and said.count("\n") == 1


def test_a_cached_model_loads_offline(folder, tmp_path):
    """The hub's cache as its client lays it out."""
    repository = tmp_path / "hub" / "models--depth-anything--Tiny-hf"
    commit = "0" * 40
    shutil.copytree(folder("da_relative"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = """
from ttt_lib.models.load import load_model
from ttt_lib.core.errors import UserError
from pathlib import Path
import sys, torch
model = load_model("depth-anything/Tiny-hf", "cpu")
print(model.kind, model.rules.size, model.predict(torch.rand(3, 40, 50)).depth.shape)
(Path(sys.argv[1]) / "model.safetensors").unlink()
try: load_model("depth-anything/Tiny-hf", "cpu")
except UserError as error: print(error)
""".replace("sys.argv[1]", repr(str(repository / "snapshots" / commit)))
    lines = _elsewhere(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).splitlines()
    assert lines[0] == "disparity (70, 70) torch.Size([40, 50])"
    assert "HF_HUB_OFFLINE is set) and no copy of model.safetensors is cached" in lines[1] and len(lines) == 2


def test_transformers_does_not_need_torchvision(folder):
    """The machine's torchvision may be broken, or fine; without it every family loads."""
    code = f"""
import sys; sys.modules["torchvision"] = None
import torch
from ttt_lib.models.load import load_model
for folder in {[str(folder(f)) for f in ("da_relative", "zoe_n", "dpt")]!r}:
    print(load_model(folder, "cpu").predict(torch.rand(3, 40, 50)).depth.shape)
"""
    assert _elsewhere(code).count("[40, 50]") == 3


# --------------------------------------------------------------------------------------------------- in the loop

TERMS = {
    "da_relative": {"ssi": {"weight": 1.0}, "gradient": {"weight": 0.5}},
    "da_metric": {"silog": {"weight": 0.1}, "feature": {"weight": 1.0}},
    "zoe_n": {"silog": {"weight": 0.1}, "metric_reference": {"weight": 1.0}},
    "zoe_nk": {"global": {"align_resolution": 8}, "silog": {"weight": 0.1}},
    "dpt": {"ssi": {"weight": 1.0}},
}


@pytest.mark.parametrize("family", TERMS)
def test_adaptation_runs_on_every_family_and_leaves_the_weights(load, family):
    from conftest import adapt

    from ttt_lib.core.config import build_experiment
    from ttt_lib.data.catalog import open_dataset
    from ttt_lib.data.known_distances import sample_references
    from ttt_lib.evaluation.scores import scores_of

    model = load(family)
    sample = next(iter(open_dataset(kind="synthetic", count=1, width=80, height=60).readable()))
    config = build_experiment({
        "name": "t", "train": {"parts": ["neck", "heads"], "passes": 2, "accumulation": 1, "batch_size": 2,
                               "optimizer": {"learning_rate": 1e-3}},
        "views": {"longest_side": 80, "novel_view": {"probability": 0.5, "backend": "torch"}}, "losses": TERMS[family],
        "ensemble": {"members": ["mirror"]}, "gate": {"mode": "measure", "views": 2},
    })  # fmt: skip
    references, rest = sample_references(sample, 20, torch.Generator().manual_seed(0))
    before = weights_checksum(model)
    metric = "metric_reference" in TERMS[family]
    result = adapt(model, sample.image, config, references=references if metric else None)
    assert weights_checksum(model) == before
    assert len(result.history) == 2 and result.adapted is not None
    assert TERMS[family].keys() <= result.history[0].keys()
    assert not torch.equal(result.adapted.depth, result.original.depth)
    assert np.isfinite(result.signals["consistency_score"])
    scores = scores_of(result.final, rest)
    expected = "depth_affine_invariant" if family in METRIC else "disparity_affine_invariant"
    assert expected in scores


@pytest.fixture(scope="module")
def rendered():
    return true_scene(views=2, scale=0.2, size=(64, 96), points=200)[0]


@pytest.mark.parametrize("family", ["da_relative", "zoe_nk", "dpt", "pro", "prompt", "glpn"])
def test_a_scene_is_adapted_to_by_every_family(load, rendered, tmp_path, family):
    """Correction and training, and the whole folder; random networks know nothing, so only the form can be checked."""
    from ttt_lib import adapt_scene
    from ttt_lib.report.scene_files import write_scene

    model, before = load(family), weights_checksum(load(family))
    quick = {"train": {"parts": ["heads"], "passes": 2, "accumulation": 1}, "views": {"longest_side": 96}}
    adapted = adapt_scene(model, rendered, "scene_trained", overrides=quick, progress=False)
    assert adapted.log.passes_done == 2 and not adapted.failed and weights_checksum(model) == before
    if family == "dpt":
        record = write_scene(adapted, tmp_path / "out")
        assert len(record["photographs"]) == 2 and (tmp_path / "out" / "index.html").is_file()
        assert (tmp_path / "out" / "cloud.glb").exists() == bool(record["cloud_points"])
    if model.output == "disparity":  # whose points are none that the terms of the experiment could compare
        assert {"ssi", "gradient"} <= adapted.log.history[0].keys() and "global" not in adapted.log.history[0]
    for photograph, result in adapted.results():
        assert result.adapted is not None and torch.isfinite(result.adapted.depth).float().mean() > 0.9
        ratio = at_references(result.adapted.depth[None], photograph.tracks)[0] / photograph.tracks.depth
        assert ratio.log().abs().nanmedian() < 0.5, "the correction did not bring it to the tracks"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["da_relative", "zoe_nk", "dpt"])
def test_the_notebook_takes_a_folder_as_the_model(folder, kernel, tmp_path, family):
    import pandas as pd

    from ttt_lib.runs.catalog import NOTEBOOKS

    experiment = "zoedepth" if family == "zoe_nk" else "relative_depth"
    import yaml

    content = yaml.safe_load((NOTEBOOKS / "experiments" / "more" / f"{experiment}.yaml").read_text())
    content["model"] = {"name": str(folder(family))}
    content["train"] |= {"passes": 2, "accumulation": 1}
    content |= {"profile": "", "output_dir": str(tmp_path / "out"), "views": {"longest_side": 80}}
    content["data"] = [{"kind": "synthetic", "count": 1, "width": 80, "height": 60}]
    kernel.execute(NOTEBOOKS / "02_adaptation.ipynb", tmp_path / "out.ipynb", content)
    metrics = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert set(metrics.prediction) == {"original", "final"}
    kind = "depth_metric" if family == "zoe_nk" else "disparity_affine_invariant"
    assert {"original", "final"} == set(metrics.prediction[metrics.metric == kind])


@pytest.mark.parametrize(("family", "key"), [("zoe_n", "do_pad"), ("zoe_n", "do_resize"), ("da_relative", "do_resize")])
def test_rules_that_are_not_followed_are_refused(copy, family, key):
    path = copy(family)
    content = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(content | {key: False}))
    with pytest.raises(UserError, match=f"preprocessor_config.json is not one of .*{key} is false"):
        load_model(str(path), "cpu")
