"""Metric references: files, sampling, the correction and the loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import adapt
from moge.utils import io as moge_io
from PIL import Image

from ttt_lib.adaptation.correction import correct
from ttt_lib.adaptation.known_camera import adapt_photograph
from ttt_lib.adaptation.known_distances import reference_loss
from ttt_lib.core.config import build_experiment
from ttt_lib.core.errors import UserError
from ttt_lib.core.types import Prediction
from ttt_lib.data.catalog import open_dataset
from ttt_lib.data.known_distances import References, parse_unit, read_references, sample_references
from ttt_lib.geometry.cameras import unproject
from ttt_lib.models.base import weights_checksum

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


@pytest.mark.parametrize(("place", "true"), [(1.2, lambda d: 2 * d - 3), (30.0, lambda d: 1 / (2 / d - 0.15))])
def test_one_pixel_that_a_correction_would_put_behind_the_camera_forbids_it(place, true):
    """The nearest for a shift of depth, the farthest for one of its inverse: it is enough to look at these two."""
    depth = plane()  # from 2 to 6
    refs = References(references(depth, 60).uv, true(references(depth, 60).depth))
    freely = correct(prediction(depth), refs)[1]
    depth = depth.clone()
    depth[0, 0] = place
    forbidden = correct(prediction(depth), refs)[1]
    kinds = [
        next(k for k in ("inverse depth times", "power", "plus", "times") if k in words)
        for words in (freely, forbidden)
    ]
    assert kinds[0] in ("plus", "inverse depth times") and kinds[1] != kinds[0]


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
        ("u,v,metres\n7,1,2,3\n8,4,5,6\n", "more values than"),
        ("u,v,metres\n1,2,3\n4,5,6,7\n", "not a readable CSV"),
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


def test_commas_at_the_ends_of_lines_shift_nothing(tmp_path):
    (tmp_path / "points.csv").write_text("u,v,metres\n8,6,2,\n16,12,3,\n")
    found = read_references(tmp_path / "points.csv", (24, 32))
    assert torch.allclose(found.uv, torch.tensor([[0.25, 0.25], [0.5, 0.5]]))
    assert found.depth.tolist() == [2, 3]


def sparse_png(path, value=2500, shape=(24, 32)):
    values = np.zeros(shape, np.uint16)
    values[::4, ::4] = value
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("unit", "metres"), [(None, 2500 / 256), ("kitti", 2500 / 256), ("mm", 2.5), ("0.01", 25.0), ("1e-3", 2.5)]
)
def test_a_unit_of_a_png_is_what_it_is_said_to_be(tmp_path, unit, metres):
    path = sparse_png(tmp_path / "d.png")
    found = read_references(path, (24, 32), parse_unit(unit) if unit else None)
    assert found.depth.unique().tolist() == [pytest.approx(metres, rel=1e-6)]
    assert found.unit == pytest.approx(metres / 2500)


@pytest.mark.parametrize("text", ["inch", "", "0", "-1", "nan", "inf", "MM", "1/256"])
def test_a_unit_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="is no unit; use kitti, mm, or"):
        parse_unit(text)


def test_no_unit_is_taken_for_a_file_that_says_its_own(tmp_path):
    (tmp_path / "d.csv").write_text("u,v,metres\n8,6,2\n")
    moge_io.write_depth(tmp_path / "d.png", np.full((24, 32), 3.0, np.float32))
    assert read_references(tmp_path / "d.csv", (24, 32)).unit is None
    assert read_references(tmp_path / "d.png", (24, 32)).unit is None
    for name in ("d.csv", "d.png"):
        with pytest.raises(UserError, match="leave --metric-unit out"):
            read_references(tmp_path / name, (24, 32), 0.001)


@pytest.mark.parametrize(
    ("shape", "says"),
    [((24, 32), ""), ((12, 16), ""), ((7, 9), ""), ((32, 24), "it is turned"), ((16, 12), "it is turned"),
     ((24, 36), "another shape"), ((24, 24), "another shape")],
)  # fmt: skip
def test_a_png_of_another_shape_is_not_stretched(tmp_path, shape, says):
    path = sparse_png(tmp_path / "d.png", shape=shape)
    if not says:
        assert len(read_references(path, (24, 32)).depth)
        return
    with pytest.raises(UserError, match=f"has {shape[1]} x {shape[0]} pixels, the photograph 32 x 24: .*{says}"):
        read_references(path, (24, 32))


@pytest.mark.parametrize("method", ["none", "tta", "ttt"])
@pytest.mark.parametrize(
    ("factor", "unit", "doubted"),
    [(1000 / 256, 1 / 256, True), (256 / 1000, 1 / 1000, True), (3.3, 1 / 256, True), (1.0, 1 / 256, False),
     (2.5, 1 / 256, False), (1000 / 256, None, False)],
)  # fmt: skip
def test_a_unit_that_was_mixed_up_is_doubted(tiny, image, caplog, factor, unit, doubted, method):
    depth = tiny.predict(image).depth
    known = replace(references(depth * factor, 40), unit=unit)
    config = build_experiment({"name": "x", "train": {"method": method, "passes": 1, "accumulation": 1},
                               "views": {"longest_side": 96}, "losses": {"global": {"align_resolution": 6}}})  # fmt: skip
    result = adapt_photograph(tiny, config, image, "x", known)
    told = [record.getMessage() for record in caplog.records if "check the unit" in record.getMessage()]
    assert len(told) == doubted == ("check the unit of their file (--metric-unit)" in result.reason)
    if doubted:
        assert f"{factor:.3g} times the prediction" in told[0] and f"taken for {unit:.4g} m" in told[0]


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "P", "1"])
def test_png_must_have_one_channel_of_16_bits(tmp_path, mode):
    Image.new("L", (8, 6), 200).convert(mode).save(tmp_path / "d.png")
    with pytest.raises(UserError, match="16 bits"):
        read_references(tmp_path / "d.png", (6, 8))


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


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("wrong", [lambda d: d / 3, lambda d: (d - 0.7) / 2, lambda d: 1 / (2 / d + 0.1)])
def test_a_tenth_of_wild_references_does_not_decide(factor, wrong):
    truth = plane()
    wild = references(truth, 100)
    wild.depth[::10] *= factor
    corrected, _ = correct(prediction(wrong(truth)), wild)
    assert float((corrected.depth / truth - 1).abs().max()) < 0.02
    again, _ = correct(prediction(wrong(truth)), wild)
    assert torch.equal(again.depth, corrected.depth)


def test_the_sky_has_no_say():
    truth = plane()
    found = prediction((truth + 3) / 2)
    found.mask[:4] = False
    found.depth[:4] = 0.5  # the correction would put it behind the camera
    visible = references(truth, 300)
    below = visible.uv[:, 1] > 5 / 24
    corrected, said = correct(found, References(visible.uv[below], visible.depth[below]))
    assert "plus -3 m" in said
    assert torch.allclose(corrected.depth[4:], truth[4:], rtol=1e-3)
    assert torch.isposinf(corrected.depth[:4]).all() and torch.isposinf(corrected.points[:4]).all()
    assert torch.isfinite(corrected.points[4:]).all()


def relative(truth, a=40.0, b=-3.0, low=0.3):
    """As a relative model says it: disparity is a / truth + b, the depth is clamped to a part of its range."""
    disparity = a / truth + b
    derived = 1 / (disparity / disparity.max()).clamp(low, 0.8)
    return replace(prediction(derived), kind="disparity", disparity=disparity)


def test_a_model_of_disparity_is_corrected_by_its_disparity():
    truth = plane()
    corrected, said = correct(relative(truth), references(truth, 60))
    assert "disparity times 0.025 plus 0.075" in said and "60 references" in said
    assert torch.allclose(corrected.depth, truth, rtol=1e-3)
    assert torch.allclose(corrected.points[..., 2], corrected.depth)
    assert corrected.kind == "metric" and corrected.disparity is None
    few, said = correct(relative(truth, b=0.0), references(truth, 3))
    assert "plus 0 / m" in said and torch.allclose(few.depth, truth, rtol=1e-3)


def test_corrected_disparities_of_the_surface_are_positive():
    truth = plane()
    found = relative(truth)
    found.disparity[0], found.disparity[1] = -50.0, -50.0
    found.mask[1] = False
    below = references(truth, 300)
    below = References(*(part[below.uv[:, 1] > 3 / 24] for part in (below.uv, below.depth)))
    corrected, _ = correct(found, below)
    assert torch.allclose(corrected.depth[0], 10 * below.depth.max())
    assert torch.isposinf(corrected.depth[1]).all()
    assert torch.allclose(corrected.depth[2:], truth[2:], rtol=1e-3)


def test_a_disparity_without_a_positive_reference_stays():
    truth = plane()
    found = relative(truth, b=-1000.0)
    same, said = correct(found, references(truth, 3))
    assert same is found and "not corrected" in said


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
