"""Samples: MoGe's layout as MoGe reads it, photographs of every kind, the motorcycle, and what is broken."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from moge.test.dataloader import EvalDataLoaderPipeline
from moge.utils import io as moge_io
from PIL import Image

from ttt_lib.core.errors import UserError
from ttt_lib.core.types import Sample
from ttt_lib.data import moge_layout, motorcycle, samples
from ttt_lib.data.catalog import open_dataset
from ttt_lib.data.samples import SampleSet, write_moge_layout
from ttt_lib.geometry.cameras import project, unproject


@pytest.fixture
def folder(tmp_path):
    """Three frames with an off-centre camera, holes and sky, written in the layout."""
    rng = np.random.default_rng(0)
    for i in range(3):
        image = rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)
        depth = (2 + rng.random((60, 90)) * 5).astype(np.float32)
        depth[:5], depth[5:8] = np.nan, np.inf
        intrinsics = [[1.1, 0, 0.47], [0, 1.6, 0.53], [0, 0, 1]]
        moge_layout.write_frame(tmp_path / f"frame{i}", image, depth, intrinsics)
        labels = np.zeros((60, 90), np.uint8)
        labels[20:50, 20:70] = 1
        moge_io.write_segmentation(tmp_path / f"frame{i}" / "segmentation.png", labels, {"background": 0, "thing": 1})
    moge_layout.write_index(tmp_path, [f"frame{i}" for i in range(3)])
    return tmp_path


def test_the_same_view_as_moges_own_evaluation(folder, monkeypatch):
    """Differential: the part of MoGe's loader that works, on the same frame, gives the same tensors."""
    pipeline = object.__new__(EvalDataLoaderPipeline)
    usual = {"drop_max_depth": 1.4, "max_segments": 5, "min_seg_area": 10}
    settings = {"depth_unit": 2.0, "include_segmentation": True, "has_sharp_boundary": True}
    for key, value in {**usual, **settings}.items():
        setattr(pipeline, key, value)
    monkeypatch.setattr(moge_layout, "USUAL", usual)
    raw = moge_layout.read_raw(folder / "frame1", include_segmentation=True)
    instance = {
        "width": 64, "height": 48, "image": raw.image, "depth": np.nan_to_num(raw.depth, nan=1, posinf=1, neginf=1),
        "depth_mask": np.isfinite(raw.depth), "intrinsics": raw.intrinsics,
        "segmentation_mask": raw.segmentation, "segmentation_labels": dict(raw.labels),
    }  # fmt: skip
    expected = pipeline._process_instance(instance)
    sample = open_dataset(kind="moge", path=folder, width=64, height=48, **settings)[1]
    mask = expected["depth_mask"]
    assert torch.equal(sample.mask, mask) and 0 < mask.float().mean() < 1
    assert torch.equal(sample.image, expected["image"])
    assert torch.allclose(sample.depth[mask], expected["depth"][mask], rtol=1e-6)
    assert torch.allclose(sample.points[mask], expected["points"][mask], rtol=1e-5)
    assert torch.isnan(sample.depth[~mask]).all()
    assert torch.equal(sample.intrinsics, expected["intrinsics"]) and sample.is_metric and sample.has_sharp_boundary
    assert torch.equal(sample.segmentation, expected["segmentation_mask"])
    assert sample.segmentation_labels == expected["segmentation_labels"] == {"thing": 1}


def test_options_shards_and_hash(folder):
    samples = open_dataset(kind="moge", path=folder, width=32, height=24)
    assert [s.name for s in samples.readable()] == samples.names and not samples[0].is_metric
    assert open_dataset(kind="moge", path=folder, subset=2).names == ["frame0", "frame2"]
    assert open_dataset(kind="moge", path=folder)[0].image.shape == (3, 60, 90)
    parts = [samples.shard(i, 2).names for i in range(2)]
    assert sorted(sum(parts, [])) == samples.names and not set(parts[0]) & set(parts[1])
    before = samples.data_hash()
    (folder / "frame1" / "meta.json").write_text(json.dumps({"intrinsics": np.eye(3).tolist()}))
    assert open_dataset(kind="moge", path=folder, width=32, height=24).data_hash() != before
    with pytest.raises(UserError, match="shard"):
        samples.shard(2, 2)


def test_the_identity_of_a_set_is_all_of_its_content(tmp_path):
    """One byte in the middle of an uncompressed picture, with size and times as they were, is another set."""
    path = tmp_path / "photo.bmp"
    Image.fromarray(np.zeros((200, 300, 3), np.uint8)).save(path)
    before, at = open_dataset("images", path=str(path)).data_hash(), path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
    changed = open_dataset("images", path=str(path)).data_hash()
    assert changed != before and path.stat().st_size == at.st_size
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert open_dataset("images", path=str(path)).data_hash() == before  # content, not times


def test_a_file_is_read_once_for_its_hash(tmp_path, monkeypatch):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    read, plain = [], samples.file_hash
    monkeypatch.setattr(samples, "file_hash", lambda path: read.append(path) or plain(path))
    hashes = {open_dataset("images", path=str(tmp_path)).data_hash() for _ in range(3)}
    assert len(hashes) == 1 and len(read) == 1


def test_only_the_chosen_samples_are_in_the_identity(tmp_path):
    for name in "ab":
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    before = open_dataset("images", path=str(tmp_path), count=1).data_hash()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "b.png")
    assert open_dataset("images", path=str(tmp_path), count=1).data_hash() == before


BREAK = {
    "missing image": (lambda f: (f / "image.jpg").unlink(), "image.jpg"),
    "truncated image": (lambda f: (f / "image.jpg").write_bytes((f / "image.jpg").read_bytes()[:50]), "image.jpg"),
    "half an image": (lambda f: (f / "image.jpg").write_bytes((f / "image.jpg").read_bytes()[:-2000]), "image.jpg"),
    "missing depth": (lambda f: (f / "depth.png").unlink(), "depth.png"),
    "garbage depth": (lambda f: (f / "depth.png").write_bytes(b"not a png"), "depth.png"),
    "plain png as depth": (lambda f: Image.new("L", (90, 60)).save(f / "depth.png"), "depth.png"),
    "no depth at all": (lambda f: moge_io.write_depth(f / "depth.png", _nothing((60, 90))), "depth.png"),
    "another size": (lambda f: moge_io.write_depth(f / "depth.png", np.ones((6, 9), np.float32)), "depth.png"),
    "missing meta": (lambda f: (f / "meta.json").unlink(), "meta.json"),
    "no intrinsics": (lambda f: (f / "meta.json").write_text("{}"), "meta.json"),
    "nan intrinsics": (
        lambda f: (f / "meta.json").write_text('{"intrinsics": [[NaN,0,0],[0,1,0],[0,0,1]]}'),
        "meta.json",
    ),
    "bad json": (lambda f: (f / "meta.json").write_text("{"), "meta.json"),
}


def _nothing(size):
    depth = np.full(size, np.nan, np.float32)
    depth[0, 0] = 1.0
    return depth


@pytest.mark.parametrize("name", BREAK)
def test_a_broken_sample_is_named_and_the_others_go_on(folder, name):
    spoil, file = BREAK[name]
    spoil(folder / "frame1")
    samples = open_dataset(kind="moge", path=folder, width=32, height=24)
    assert [s.name for s in samples.readable()] == ["frame0", "frame2"]
    ((left, reason),) = samples.left_out
    assert left == "frame1" and str(folder / "frame1" / file) in reason


def test_a_turned_image_is_read_as_moges_evaluation_reads_it(folder):
    """Orientation 6 of 60 x 90 pixels is seen as 90 x 60, which the depth must be; a mistake there says so."""
    turned = Image.Exif()
    turned[0x0112] = 6
    with Image.open(folder / "frame1" / "image.jpg") as image:
        image.save(folder / "frame1" / "image.jpg", exif=turned, quality=95)
    with pytest.raises(UserError, match="EXIF orientation turns: store it upright"):
        moge_layout.read_raw(folder / "frame1")
    depth = np.ones((90, 60), np.float32)
    moge_io.write_depth(folder / "frame1" / "depth.png", depth)
    raw = moge_layout.read_raw(folder / "frame1")
    assert np.array_equal(raw.image, moge_io.read_image(folder / "frame1" / "image.jpg"))
    assert raw.image.shape == (90, 60, 3)


def test_missing_folder_index_or_kind(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_dataset(kind="moge", path=tmp_path / "none")
    with pytest.raises(UserError, match="index is missing"):
        open_dataset(kind="moge", path=tmp_path)
    with pytest.raises(UserError, match="'video'.*motorcycle"):
        open_dataset(kind="video")
    with pytest.raises(UserError, match="needs a `path`"):
        open_dataset(kind="moge")
    with pytest.raises(UserError, match="does not take"):
        open_dataset(kind="motorcycle", depth_unit=2.0)
    with pytest.raises(UserError, match="no images"):
        open_dataset(kind="images", path=tmp_path)


def test_writing_and_reading_back(tmp_path, picture):
    intrinsics = picture.intrinsics[0]
    depth = torch.where(picture.mask[0], picture.points[0, ..., 2], torch.inf)
    depth[:4] = torch.nan
    sample = Sample("room", "made", picture.image[0], depth, None, None, intrinsics, is_metric=True)
    assert write_moge_layout([sample], tmp_path) == ["room"]
    raw = moge_layout.read_raw(tmp_path / "room")
    assert np.isnan(raw.depth[:4]).all()
    finite = np.isfinite(depth.numpy())
    assert np.array_equal(np.isfinite(raw.depth), finite) and np.array_equal(
        np.isinf(raw.depth), np.isinf(depth.numpy())
    )
    assert np.allclose(raw.depth[finite], depth.numpy()[finite], rtol=1e-3)
    again = open_dataset(kind="moge", path=tmp_path)[0]
    assert again.is_metric and again.image.shape == sample.image.shape
    known = again.mask
    assert torch.allclose(again.depth[known], depth[known], rtol=2e-3)
    assert (again.image - sample.image).abs().mean() < 0.03
    with pytest.raises(UserError, match="no depth"):
        write_moge_layout([Sample("photo", "x", picture.image[0])], tmp_path / "b")


def test_a_configuration_in_moges_format(folder, tmp_path):
    path = tmp_path / "sets.json"
    path.write_text(json.dumps({"NYUv2": {"path": str(folder)}, "mine": {"path": ".", "width": 20, "height": 10}}))
    first, second = moge_layout.read_eval_config(path)
    assert first["width"] == 640 and first["depth_unit"] == 1.0 and first["name"] == "NYUv2"
    assert second["path"] == str(tmp_path) and second["width"] == 20
    assert len(moge_layout.BENCHMARKS) == 10
    path.write_text("[")
    with pytest.raises(UserError, match="not a JSON"):
        moge_layout.read_eval_config(path)


# ----------------------------------------------------------------------------------------------------- motorcycle


def test_the_motorcycles_calibration_by_photometric_consistency():
    """The right picture, looked up where the left geometry says, must look like the left one; with the disparity's
    sign as in the docstring, or without the offset of the principal points, it does not."""
    frames = motorcycle._motorcycle_frames()
    left, right = frames["motorcycle_left"], frames["motorcycle_right"]
    points = unproject(torch.from_numpy(left.depth), torch.from_numpy(left.intrinsics))

    def difference(baseline: float, lens) -> float:
        uv = project(points - torch.tensor([baseline, 0, 0]), torch.from_numpy(lens))
        seen = torch.nn.functional.grid_sample(
            torch.from_numpy(right.image).permute(2, 0, 1)[None].float() / 255, (2 * uv - 1)[None].nan_to_num(9),
            align_corners=False,
        )[0]  # fmt: skip
        known = torch.isfinite(uv).all(-1) & (uv > 0).all(-1) & (uv < 1).all(-1)
        own = torch.from_numpy(left.image).permute(2, 0, 1).float() / 255
        return float((seen - own).abs().mean(0)[known].median())

    good = difference(motorcycle.BASELINE, right.intrinsics)
    assert good < 0.03
    assert difference(-motorcycle.BASELINE, right.intrinsics) > 3 * good
    assert difference(motorcycle.BASELINE, left.intrinsics) > 3 * good


def test_both_views_have_metric_truth_that_agrees():
    frames = motorcycle._motorcycle_frames()
    left, right = (frames[f"motorcycle_{side}"].depth for side in ("left", "right"))
    assert 2.0 < np.nanmin(left) < np.nanmax(left) < 5.1
    assert 0.05 < np.isnan(left).mean() < 0.1 and np.isnan(right).mean() < 0.25
    assert abs(np.nanmedian(left) - np.nanmedian(right)) < 0.2
    first, second = open_dataset(kind="motorcycle", width=96, height=64).readable()
    assert first.is_metric and first.intrinsics[0, 2] == 0.5 and second.image.shape == (3, 64, 96)
    known = first.mask
    rays = project(first.points[known], first.intrinsics)
    u, v = torch.meshgrid((torch.arange(96) + 0.5) / 96, (torch.arange(64) + 0.5) / 64, indexing="xy")
    assert torch.allclose(rays, torch.stack([u, v], -1)[known], atol=1e-4)


def test_paths_of_a_file_of_sets_count_from_the_file_or_else_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "data" / "NYUv2").mkdir(parents=True)
    path = tmp_path / "configs" / "sets.json"
    path.write_text('{"NYUv2": {"path": "data/NYUv2"}}')
    monkeypatch.chdir(tmp_path)
    assert moge_layout.read_eval_config(path)[0]["path"] == str(tmp_path / "data" / "NYUv2")
    (tmp_path / "configs" / "data" / "NYUv2").mkdir(parents=True)
    assert moge_layout.read_eval_config(path)[0]["path"] == str(tmp_path / "configs" / "data" / "NYUv2")


def test_whatever_a_reader_raises_the_other_samples_are_read():
    def load(name):
        if name == "b":
            raise KeyError("depth")
        return Sample(name, "mine", torch.zeros(3, 20, 20))

    mine = SampleSet("mine", ["a", "b", "c"], load)
    assert [sample.name for sample in mine.readable()] == ["a", "c"]
    assert mine.left_out == [("b", "KeyError: 'depth'")]
