"""Metric references: files, sampling, the correction and the loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ttt_lib.adapt import adapt
from ttt_lib.config import build_experiment
from ttt_lib.data import open_dataset
from ttt_lib.errors import UserError
from ttt_lib.geometry import unproject
from ttt_lib.models import Prediction, weights_checksum
from ttt_lib.references import References, correct, read_references, reference_loss, sample_references

CAMERA = torch.tensor([[0.8, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1.0]])


def plane(height=24, width=32):
    v, u = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return 2 + 3 * v + u


def prediction(depth):
    return Prediction(unproject(depth, CAMERA), depth, torch.ones_like(depth, dtype=torch.bool), CAMERA, "metric")


def references(depth, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(depth.numel(), generator=generator)[:count]
    row, column = places // depth.shape[1], places % depth.shape[1]
    uv = torch.stack([(column + 0.5) / depth.shape[1], (row + 0.5) / depth.shape[0]], -1)
    return References(uv, depth.flatten()[places])


def test_csv_and_png_say_the_same(tmp_path):
    (tmp_path / "points.csv").write_text("u, v, metres\n0.5, 0.5, 2.0\n31.5, 23.5, 4.25\n")
    found = read_references(tmp_path / "points.csv", (24, 32))
    assert torch.allclose(found.uv, torch.tensor([[0.5 / 32, 0.5 / 24], [31.5 / 32, 23.5 / 24]]))
    assert torch.allclose(found.depth, torch.tensor([2.0, 4.25]))
    sparse = np.zeros((24, 32), np.uint16)
    sparse[0, 0], sparse[23, 31] = 512, 1088
    Image.fromarray(sparse).save(tmp_path / "sparse.png")
    png = read_references(tmp_path / "sparse.png", (24, 32))
    assert torch.allclose(png.uv, found.uv) and torch.allclose(png.depth, found.depth)


def test_png_of_moge_is_read_by_its_own_encoding(tmp_path):
    from moge.utils import io as moge_io

    depth = np.full((6, 8), np.nan, np.float32)
    depth[2, 3] = 7.5
    moge_io.write_depth(tmp_path / "d.png", depth)
    found = read_references(tmp_path / "d.png", (60, 80))
    assert torch.allclose(found.uv, torch.tensor([[3.5 / 8, 2.5 / 6]]))
    assert float(found.depth[0]) == pytest.approx(7.5, rel=1e-3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("u,v\n1,2\n", "no column 'metres'"),
        ("u,v,metres\n", "holds no points"),
        ("u,v,metres\n1,2,3\n4,x,6\n", "line 3"),
        ("u,v,metres\n1,2,-1\n", "line 2"),
        ("u,v,metres\n40,2,1\n", "outside"),
        ("", "not a readable CSV"),
    ],
)
def test_wrong_files_are_one_sentence(tmp_path, content, says):
    path = tmp_path / "points.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        read_references(path, (24, 32))
    with pytest.raises(UserError, match="no such file"):
        read_references(tmp_path / "none.csv", (24, 32))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not a readable depth PNG"):
        read_references(tmp_path / "bad.png", (24, 32))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (lambda d: d / 3, "times"),
        (lambda d: (d - 0.7) / 2, "plus"),
        (lambda d: 1 / (2 / d + 0.1), "inverse"),
        (lambda d: d**1.5 * 0.4, "power"),
    ],
)
def test_the_right_correction_is_found(wrong, word):
    truth = plane()
    corrected, said = correct(prediction(wrong(truth)), references(truth, 60))
    assert word in said and "60 references" in said
    assert torch.allclose(corrected.depth, truth, rtol=0.01)
    assert torch.allclose(corrected.points[..., 2], corrected.depth)
    assert corrected.kind == "metric"


def test_one_reference_fixes_the_scale_and_wild_ones_do_not_spoil_it():
    truth = plane()
    corrected, _ = correct(prediction(truth / 5), references(truth, 1))
    assert torch.allclose(corrected.depth, truth, rtol=1e-4)
    wild = references(truth, 100)
    wild.depth[:20] *= 5
    corrected, _ = correct(prediction(truth / 5 * 1.0), wild)
    assert float((corrected.depth / truth - 1).abs().median()) < 0.05
    assert (corrected.depth > 0).all()


def test_references_do_not_count_in_the_scores():
    sample = next(iter(open_dataset(kind="synthetic", count=1, width=96, height=72).readable()))
    found, rest = sample_references(sample, 50, torch.Generator().manual_seed(0))
    assert len(found.depth) == 50
    assert int(sample.mask.sum()) - int(rest.mask.sum()) == 50
    column, row = (found.uv[:, 0] * 96).long(), (found.uv[:, 1] * 72).long()
    assert not rest.mask[row, column].any()
    assert torch.equal(sample.depth[row, column], found.depth)
    with pytest.raises(UserError, match="metric truth"):
        sample_references(replace(sample, is_metric=False), 5, torch.Generator())


def test_the_loss_sees_the_scale_and_trains_it(tiny, picture):
    image, before = picture.image[0], weights_checksum(tiny)
    predicted = tiny.predict(image)
    exact = references(predicted.depth, 30)
    with torch.no_grad():
        assert float(reference_loss(tiny, image, exact)) < 0.02
        doubled = References(exact.uv, 2 * exact.depth)
        assert float(reference_loss(tiny, image, doubled)) == pytest.approx(np.log(2), abs=0.05)
    settings = build_experiment({
        "name": "t", "model": {"name": "tiny"}, "views": {"longest_side": 96},
        "train": {"passes": 6, "accumulation": 1, "optimizer": {"learning_rate": 1e-3}},
        "losses": {"global": {"align_resolution": 6}, "metric_reference": {"weight": 1.0}},
    })  # fmt: skip
    result = adapt(tiny, image, settings, references=doubled)
    assert result.history[-1]["metric_reference"] < result.history[0]["metric_reference"]
    assert weights_checksum(tiny) == before
    assert float((result.final.depth / (2 * predicted.depth)).median()) == pytest.approx(1.0, abs=0.1)
