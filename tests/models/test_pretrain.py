"""Training of the base model: reproducible, resumable, and it learns; the bundled checkpoint and its card agree."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import Future
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch

from ttt_lib.models.load import load_model
from ttt_lib.models.moge import ASSETS
from ttt_lib.models.pretraining import pictures as pretrain_data
from ttt_lib.models.pretraining import train as pretrain

SMALL = dict(batch_size=2, chunk_size=2, window=2, reuse=2.0, warmup=2, learning_rate=1e-3)


@pytest.fixture
def plain_chunks(monkeypatch):
    """Chunks made in this process, small ones: training without waiting for another process to start."""
    monkeypatch.setattr(pretrain_data, "SIZES", ((48, 64), (64, 48)))

    def chunks_here(seed, first, size, scale, device):
        return (pretrain_data.make_chunk(seed, number, size, scale) for number in count(first))

    monkeypatch.setattr(pretrain, "chunks_in_order", chunks_here)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_chunks_depend_on_seed_and_number_alone():
    first, again, other = (pretrain_data.make_chunk(*a) for a in ((0, 2, 1), (0, 2, 1), (0, 3, 1)))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.depth, again.depth)
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


def test_a_run_is_reproducible_and_resumes_to_the_same_weights(plain_chunks, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "new_model", lambda seed, imagenet: _fresh(seed))
    recipe = pretrain.Recipe(steps=6, **SMALL)
    whole = pretrain.train(recipe, tmp_path / "a")
    again = pretrain.train(recipe, tmp_path / "b")
    assert torch.equal(weights(whole), weights(again))
    _interrupted_at(3, recipe, tmp_path / "c", monkeypatch)
    resumed = pretrain.train(recipe, tmp_path / "c")
    assert torch.equal(weights(whole), weights(resumed))
    with pytest.raises(ValueError, match="another recipe"):
        pretrain.train(pretrain.Recipe(steps=7, **SMALL), tmp_path / "a")


def _interrupted_at(step, recipe, folder, monkeypatch):
    """A run that is stopped right after it was kept at a step."""
    keep = pretrain._keep

    def keep_and_stop(*run):
        keep(*run)
        raise KeyboardInterrupt

    with monkeypatch.context() as here, pytest.raises(KeyboardInterrupt):
        here.setattr(pretrain, "SAVE_EVERY", step)
        here.setattr(pretrain, "_keep", keep_and_stop)
        pretrain.train(recipe, folder)
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == step


_original_new_model = pretrain.new_model


def _fresh(seed: int):
    return _original_new_model(seed, imagenet=False)


@pytest.mark.slow
def test_a_short_training_lowers_the_loss(plain_chunks, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "new_model", lambda seed, imagenet: _fresh(seed))
    recipe = pretrain.Recipe(steps=75, **{**SMALL, "batch_size": 4, "chunk_size": 8, "reuse": 6.0})
    pretrain.train(recipe, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_knows_perfect_geometry_and_ignores_scale(picture):
    depth = torch.where(picture.mask, picture.points[..., 2], torch.inf)
    rays = torch.where(picture.mask[..., None], picture.points[..., :2] / picture.points[..., 2:], 0.0)
    output = {
        "points": picture.points.nan_to_num(1.0) * 0.3,
        "mask": picture.mask.float(),
        "metric_scale": torch.full((2,), 1 / 0.3),
    }
    loss, terms = pretrain.geometry_loss(output, depth, rays)
    assert loss < 1e-3 and max(terms.values()) < 1e-3
    wrong = dict(output, points=output["points"] * torch.tensor([1.0, 1.0, 1.5]))
    assert pretrain.geometry_loss(wrong, depth, rays)[1]["ray"] > 0.05
    assert pretrain.geometry_loss(dict(output, mask=1 - output["mask"]), depth, rays)[1]["mask"] > 1


def test_camera_effects_keep_range_and_repeat(picture):
    first, second = (pretrain_data.camera_effects(picture.image, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second) and first.min() >= 0 and first.max() <= 1
    assert (first - picture.image).abs().mean() > 0.01


def test_the_bundled_checkpoint_is_trained_small_and_described():
    path = ASSETS / "tiny.pt"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    card = (ASSETS / "tiny.md").read_text(encoding="utf-8")
    assert path.stat().st_size <= 25 * 2**20
    assert re.search(r"SHA-256[^0-9a-f]*([0-9a-f]{64})", card).group(1) == digest
    for word in ("seed", "steps", "Apache", "device", "limits", "motorcycle"):
        assert word.lower() in card.lower()


def test_the_bundled_model_beats_a_constant_plane_on_the_motorcycle():
    from ttt_lib.core.types import Prediction
    from ttt_lib.data.catalog import open_dataset
    from ttt_lib.evaluation.scores import scores_of

    model = load_model("tiny", "cpu", num_tokens=192)
    for sample in open_dataset(kind="motorcycle").readable():
        found = scores_of(model.predict(sample.image), sample)["depth_affine_invariant"]["delta1"]
        plane = Prediction(None, torch.ones_like(sample.depth), None, None, "scale_invariant")
        guess = scores_of(plane, sample)["depth_scale_invariant"]["delta1"]
        assert found > guess + 0.1


def test_without_effects_a_batch_is_the_clean_pictures(plain_chunks, monkeypatch):
    chunk, cpu = pretrain_data.make_chunk(0, 0, 3), torch.device("cpu")
    changed, same_depth, same_rays = pretrain_data.draw_batch([chunk], 0, 2, 5, cpu)
    monkeypatch.setattr(pretrain_data, "camera_effects", lambda image, generator: image)
    clean, depth, rays = pretrain_data.draw_batch([chunk], 0, 2, 5, cpu)
    assert torch.equal(depth, same_depth) and torch.equal(rays, same_rays) and not torch.equal(clean, changed)
    pictures = torch.from_numpy(chunk.image).float() / 255
    known = torch.cat([pictures, pictures.flip(-1)])
    assert all(any(torch.equal(one, other) for other in known) for one in clean)


class AtOnce:
    """A pool that draws in this process when asked: the pretended GPU is here alone."""

    asked: list = []

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments):
        self.asked.append(arguments[1])
        done = Future()
        done.set_result(function(*arguments))
        return done

    def shutdown(self, **_):
        self.asked.append("closed")


def test_a_gpu_draws_the_same_pictures(monkeypatch):
    from pretend import GPU, pretended_gpu

    monkeypatch.setattr(pretrain_data, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(pretrain_data, "camera_effects", lambda image, generator: image)
    small = pretrain_data.make_chunk(0, 2, 2)
    with pretended_gpu() as gpu:
        source = pretrain_data.chunks_in_order(0, 2, 2, 1, str(GPU))
        there = next(source)
        assert there.image.device == GPU and AtOnce.asked == [2, 3, 4, 5]  # made ahead
        assert np.array_equal(there.image.cpu(), small.image) and np.array_equal(there.depth.cpu(), small.depth)
        gpu.waits.clear()
        monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)  # a GPU's needs a GPU
        image, depth, rays = pretrain_data.draw_batch([there], 0, 2, 5, GPU)
        assert image.device == depth.device == rays.device == GPU
        source.close()
    assert AtOnce.asked[-1] == "closed"
    large = pretrain_data.make_chunk(0, 2, 1, 2)
    assert large.depth.shape[1:] == tuple(2 * side for side in small.depth.shape[1:])


def test_edges_count_where_depth_jumps(picture):
    depth = torch.where(picture.mask, picture.points[..., 2], torch.inf)
    rays = torch.where(picture.mask[..., None], picture.points[..., :2] / picture.points[..., 2:], 0.0)
    sharp = {"points": picture.points.nan_to_num(1.0), "mask": picture.mask.float(), "metric_scale": torch.ones(2)}
    blurred = torch.nn.functional.avg_pool2d(sharp["points"].permute(0, 3, 1, 2), 5, 1, 2, count_include_pad=False)
    soft = dict(sharp, points=blurred.permute(0, 2, 3, 1))
    plain = [float(pretrain.geometry_loss(output, depth, rays)[0]) for output in (sharp, soft)]
    edged = [float(pretrain.geometry_loss(output, depth, rays, 0.5)[0]) for output in (sharp, soft)]
    assert edged[0] < 1e-3 and edged[1] > plain[1] + 0.02


def test_the_recipe_of_a_gpu_resumes_and_tells_its_scores(plain_chunks, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "new_model", lambda seed, imagenet: _fresh(seed))
    recipe = replace(pretrain.RECIPES["gpu_10min"], steps=4, tokens=(12, 24), **SMALL)
    seen = []
    score = lambda model: seen.append(model.training) or {"held_out": float(len(seen))}  # noqa: E731
    whole = pretrain.train(recipe, tmp_path / "a", evaluate=score, evaluate_seconds=0.0)
    assert seen == [False] * 4
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["held_out"] for line in lines if "held_out" in line] == [1.0, 2.0, 3.0, 4.0]
    _interrupted_at(2, recipe, tmp_path / "b", monkeypatch)
    assert torch.equal(weights(whole), weights(pretrain.train(recipe, tmp_path / "b")))
    with pytest.raises(ValueError, match="another recipe"):
        pretrain.train(replace(recipe, edges=0.0), tmp_path / "a")
