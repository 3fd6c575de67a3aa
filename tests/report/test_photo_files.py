"""Photographs through the command: one that fails costs no other, and the record says what its files mean."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_experiment
from PIL import Image

from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.errors import DataError, NumericalError, UserError
from ttt_lib.core.types import Prediction
from ttt_lib.report import photo_files
from ttt_lib.report.figures import SHOWN, plot_before_after, shown
from ttt_lib.report.photo_files import adapt_photos, find_photos, name_results

experiment = small_experiment(train={"passes": 0, "method": "none"})


def adapt_photo(path, output, *rest, **camera):
    """The folder in `output` that is named after the photograph."""
    photo_files.adapt_photo(path, output / path.stem, *rest, **camera)
    return output / path.stem


def photograph(path, size=(64, 48)):
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("error", "said", "traced"),
    [
        (ValueError("of a library"), "b.png: cannot be adapted to (ValueError: of a library).", True),
        (IndexError(), "b.png: cannot be adapted to (IndexError: IndexError).", True),
        (NumericalError("the loss is not finite."), "b.png: cannot be adapted to (the loss is not finite).", False),
        (DataError("b.png: is odd."), "b.png: is odd.", False),
    ],
)
def test_whatever_one_photograph_raises_costs_it_alone(tiny, tmp_path, monkeypatch, caplog, error, said, traced):
    monkeypatch.chdir(tmp_path)
    names = name_results([photograph(tmp_path / f"{letter}.png").relative_to(tmp_path) for letter in "abc"], tmp_path)
    whole = photo_files.write_cloud

    def cloud(path, *rest):
        if path.parent.name.startswith(".b."):
            raise error
        whole(path, *rest)

    monkeypatch.setattr(photo_files, "write_cloud", cloud)
    with caplog.at_level(logging.WARNING):
        found = list(adapt_photos(names, tmp_path / "out", tiny, experiment()))
    assert [folder and folder.name for _, folder, _ in found] == ["a", None, "c"]
    assert found[1][2] == said
    assert any(record.exc_info for record in caplog.records) == traced
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "c"]


def test_the_files_say_what_a_known_camera_leaves_unknown(tiny, tmp_path):
    path = photograph(tmp_path / "a.png")
    folder = adapt_photo(path, tmp_path / "out", tiny, experiment(), intrinsics=(60.0, 60.0, 40.0, 20.0))
    depth, record = np.load(folder / "depth.npy"), json.loads((folder / "record.json").read_text())
    assert depth.shape == (48, 64) and 0.5 < np.isfinite(depth).mean() < 1 and np.isnan(depth).any()
    png = np.asarray(Image.open(folder / "depth.png"))
    assert np.array_equal(png == 0, np.isnan(depth)) and (folder / "cloud.ply").stat().st_size > 1000
    assert record["camera"] == "the intrinsics that were given" and "have no depth" in record["assumptions"]
    assert np.allclose(record["intrinsics"], [[60 / 64, 0, 40 / 64], [0, 60 / 48, 20 / 48], [0, 0, 1]])
    (found,) = adapt_photos({path: "a"}, tmp_path / "out", tiny, experiment(), fov=300.0)
    assert found[1] is None and found[2] == "fov 300: is no horizontal field of view in degrees; it lies from 1 to 179."


def test_a_device_that_failed_ends_all_of_it(tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(photo_files, "write_cloud", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        list(adapt_photos({photograph(tmp_path / "a.png"): "a"}, tmp_path / "out", tiny, experiment()))


def test_a_name_as_long_as_a_system_takes(tiny, tmp_path):
    photo = photograph(tmp_path / ("x" * 251 + ".png"))
    folder = adapt_photo(photo, tmp_path / "out", tiny, experiment())
    assert folder.name == "x" * 251 and (folder / "record.json").is_file()


def test_folders_are_looked_into_and_no_two_results_share_a_name(tmp_path):
    for name in ("one.jpg", "one.png", "two.jpg"):
        photograph(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "deeper").mkdir()
    found = find_photos([str(tmp_path), "elsewhere/two.gif"])
    assert [path.name for path in found] == ["one.jpg", "one.png", "two.jpg", "two.gif"]
    assert list(name_results(found, tmp_path).values()) == ["one.jpg", "one.png", "two.jpg", "two.gif"]
    assert list(name_results(found[1:3], tmp_path).values()) == ["one", "two"]
    with pytest.raises(UserError, match=r"one\.png: two of the photographs"):
        name_results([found[1], tmp_path / "deeper" / "One.PNG"], tmp_path)  # some systems know no case
    with pytest.raises(DataError, match="holds no images"):
        find_photos([tmp_path / "deeper"])


def test_the_record_says_how_depth_is_encoded(tiny, tmp_path):
    folder = adapt_photo(photograph(tmp_path / "a.png"), tmp_path / "out", tiny, experiment())
    record = json.loads((folder / "record.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    said = record["depth_png"]
    value = np.asarray(Image.open(folder / "depth.png")).astype(np.float64)
    read = eval(said["encoding"].split("; ")[0].removeprefix("depth = "), {"value": value, **said})
    depth = np.load(folder / "depth.npy")
    surface = np.isfinite(depth)
    assert said["unit"] == record["unit"] == "metre" and surface.mean() > 0.5
    assert np.allclose(read[surface], depth[surface], rtol=1e-3)
    assert (value[~surface] == 65535).all()


def test_a_picture_of_one_colour_leaves_a_record_that_is_json(tiny, tmp_path):
    Image.new("RGB", (64, 48), "gray").save(tmp_path / "a.png")
    config = small_experiment(gate={"mode": "measure"}, train={"passes": 1, "accumulation": 1})()
    folder = adapt_photo(tmp_path / "a.png", tmp_path / "out", tiny, config)
    record = json.loads((folder / "record.json").read_text(), parse_constant=pytest.fail)
    assert record["signals"] and record["metric_unit"] is None


def test_a_very_long_picture_is_adapted_to(tiny, tmp_path):
    config = small_experiment(train={"passes": 1, "accumulation": 1})()
    photo = photograph(tmp_path / "wide.png", (1600, 16))
    folder = adapt_photo(photo, tmp_path / "out", tiny, config)
    assert np.load(folder / "depth.npy").shape == (16, 1600)
    with pytest.raises(DataError, match="image of 4000 x 16 pixels is too long for 48 tokens; cut it, or raise"):
        adapt_photo(photograph(tmp_path / "wider.png", (4000, 16)), tmp_path / "out", tiny, config)


def test_a_console_that_shows_no_letters_but_english_ones_ends_no_batch(tmp_path):
    for name in ("a.png", "\u00fcn\u00ef \u540d.jpeg", "z.png"):
        photograph(tmp_path / name)
    (tmp_path / "left.dng").touch()
    quick = ["--set", "train.method=none", "--set", "model.num_tokens=48", "--set", "gate.mode=off"]
    done = subprocess.run(
        [sys.executable, "-c", "from ttt_lib.cli import main; main()", "adapt", tmp_path, "-o", tmp_path / "out", *quick],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*/record.json"))) == 3
    assert done.stdout.count(b"->") == 3 and b"\\u540d.jpeg" in done.stdout
    assert b"1 files are skipped" in done.stderr and b"left.dng" in done.stderr


@pytest.mark.parametrize(("image", "side", "size"), [((3, 16, 4000), 96, (16, 4000)), ((3, 160, 4000), 256, (16, 400)),
                                                     ((3, 300, 400), 200, (150, 200)), ((3, 20, 40), None, (20, 40))])  # fmt: skip
def test_views_are_made_from_pictures_with_something_to_crop(image, side, size):
    from ttt_lib.adaptation.adapter import working_image

    assert tuple(working_image(torch.rand(image), side).shape[1:]) == size


def test_a_unit_that_is_taken_for_granted_is_said_and_recorded(tiny, tmp_path, caplog):
    sparse = np.zeros((48, 64), np.uint16)
    sparse[10:20, 10:20] = 2500
    Image.fromarray(sparse).save(tmp_path / "d.png")
    photo, points = photograph(tmp_path / "a.png"), tmp_path / "d.png"
    for unit, metres, said in ((None, 2500 / 256, True), (1 / 256, 2500 / 256, False), (0.001, 2.5, False)):
        caplog.clear()
        folder = adapt_photo(photo, tmp_path / "out", tiny, experiment(), points, unit)
        assert any("taken for 1/256 m, as KITTI" in record.getMessage() for record in caplog.records) == said
        record = json.loads((folder / "record.json").read_text())
        assert record["metric_unit"] == pytest.approx(metres / 2500) and record["metric_points"] == str(points)
        assert record["unit"] == record["depth_png"]["unit"] == "metre"
        assert np.load(folder / "depth.npy")[10:20, 10:20] == pytest.approx(metres, rel=0.05)


def test_a_figure_is_drawn_of_as_many_pixels_as_it_shows():
    """Of what lies there, unknown as unknown; the result itself keeps its size."""
    depth = torch.rand(900, 1400, generator=torch.Generator().manual_seed(0)) + 1
    depth[:300] = torch.nan
    mask = depth > 1.5
    before = Prediction(torch.zeros(900, 1400, 3), depth, mask, None, "metric")
    result = AdaptResult(before, None, replace(before, depth=2 * depth, mask=None), "adapted")
    small, small_mask = shown(depth), shown(mask)
    assert max(small.shape) == SHOWN and torch.equal(small_mask, small > 1.5)
    assert small[:100].isnan().all() and small.isnan().float().mean() < 0.34
    drawn = [axis.images[0].get_array() for axis in plot_before_after(torch.zeros(3, 900, 1400), result).axes]
    assert all(array.shape[:2] == small.shape for array in drawn)
    assert np.array_equal(drawn[1].mask, ~small_mask.numpy()) and np.array_equal(drawn[2].mask, small.isnan().numpy())
    assert np.allclose(drawn[3].compressed(), 2) and np.array_equal(drawn[3].mask, small.isnan().numpy())
    assert result.original.depth.shape == (900, 1400)
