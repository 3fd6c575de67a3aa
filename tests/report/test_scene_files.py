"""The folder of a scene: one scale, one cloud, cameras that come back, and what a refused scene leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import ipywidgets
import numpy as np
import pytest
import torch
import trimesh
from conftest import small_experiment
from moge.utils import io as moge_io
from PIL import Image
from true_scene import true_scene
from typer.testing import CliRunner

from ttt_lib.adaptation.photographs.scene import adapt_scene
from ttt_lib.adaptation.saved_weights import save_weights, use_weights
from ttt_lib.cli import app
from ttt_lib.core.errors import ModelError, UserError
from ttt_lib.core.files import to_json
from ttt_lib.data.images import read_photo
from ttt_lib.data.photographs.load import load_scene
from ttt_lib.data.photographs.scene import Scene
from ttt_lib.data.photographs.writers import write_colmap
from ttt_lib.geometry.cameras import transform_points
from ttt_lib.models.base import weights_checksum
from ttt_lib.report import scene_cloud
from ttt_lib.report.photo_files import surface_depth
from ttt_lib.report.scene_cloud import SceneCloud
from ttt_lib.report.scene_files import adapt_photographs, write_scene
from ttt_lib.report.widgets import SceneExplorer

experiment = small_experiment(supervision={"photographs": {}}, train={"method": "none", "passes": 0})

CAMERA = torch.tensor([[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]])


@pytest.fixture(scope="module")
def rendered():
    return true_scene(views=3, scale=0.2)


@pytest.fixture
def written(tiny, rendered, tmp_path):
    adaptation = adapt_scene(tiny, rendered[0], experiment())
    lines = []
    record = write_scene(adaptation, tmp_path / "out", lines.append)
    return adaptation, tmp_path / "out", record, lines


def test_the_folder_holds_what_it_promises(written, rendered):
    adaptation, folder, record, lines = written
    names = [sample.name for sample in rendered[1]]
    done = [f"{k}/3 {name}" for k, name in enumerate(names, 1)]
    assert [line.split(":")[0] for line in lines] == [*done, "one cloud, cameras and page"]
    assert names == [row["name"] for row in record["photographs"]]
    assert json.loads((folder / "record.json").read_text(encoding="utf-8")) == json.loads(to_json(record))
    for sample in rendered[1]:
        depth = np.load(folder / "depth" / f"{sample.name}.npy")
        png = moge_io.read_depth(folder / "depth" / f"{sample.name}.png")
        finite = np.isfinite(depth) & np.isfinite(png)
        assert depth.shape == (120, 160) and np.allclose(depth[finite], png[finite], rtol=2e-3)
        assert (folder / "before_after" / f"{sample.name}.jpg").is_file()
        before = np.load(folder / "depth_original" / f"{sample.name}.npy")
        expected = surface_depth(adaptation.model.predict(sample.image))
        assert np.array_equal(before, expected, equal_nan=True) and not np.array_equal(before, depth, equal_nan=True)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert all(name in page for name in names) and "<script" in page and "https://" not in page.split("<script")[0]
    assert not list(folder.parent.glob(".*partial"))


def test_all_depth_is_in_one_scale(written, rendered):
    adaptation, folder, _, _ = written
    factors = []
    for photograph in adaptation.scene.photographs:
        depth = torch.from_numpy(np.load(folder / "depth" / f"{photograph.name}.npy"))
        column, row = (photograph.tracks.uv * torch.tensor([160, 120])).long().unbind(-1)
        factors.append(float((depth[row, column] / photograph.tracks.depth).log().nanmedian()))
    assert np.abs(factors).max() < 0.02  # of the tracks' own


def test_the_cameras_come_back(written):
    adaptation, folder, _, _ = written
    for cameras in (folder / "sparse" / "0", folder / "transforms.json"):
        again = load_scene(folder / "images", cameras=cameras)
        for one, other in zip(adaptation.scene.photographs, again.photographs):
            assert torch.allclose(one.intrinsics, other.intrinsics, atol=1e-4)
            assert torch.allclose(one.pose, other.pose, atol=1e-3)


def test_one_cloud_without_what_hides_other_photographs(written, rendered):
    adaptation, folder, record, _ = written
    for suffix in ("ply", "glb"):
        cloud = trimesh.load(folder / f"cloud.{suffix}")
        cloud = next(iter(cloud.geometry.values())) if isinstance(cloud, trimesh.Scene) else cloud
        assert len(cloud.vertices) == record["cloud_points"] > 5000
    truth = SceneCloud()
    for photograph, sample in zip(rendered[0].photographs, rendered[1]):
        depth = torch.where(sample.mask, sample.depth * 0.2, torch.nan)
        if photograph is rendered[0].photographs[0]:
            depth[50:60, 70:80] *= 0.5  # a piece that floats in front of what the two others see
        truth.add(photograph, sample.image, _prediction(sample, depth))
    points = torch.from_numpy(truth.merged()[0])
    local = transform_points(points, rendered[0].photographs[0].pose)
    uv = local[:, :2] / local[:, 2:] * torch.tensor([1.0, 1.0])
    known = rendered[1][0].depth * 0.2
    assert len(points) > 5000 and (local[:, 2] > 0.8 * known[known.isfinite()].min()).float().mean() > 0.995
    assert uv.isfinite().all()


def test_only_the_nearest_photographs_are_asked_about_a_point(monkeypatch):
    """Five cameras in a row, the third shows a piece in front of a wall; its neighbours see the wall, the others nothing."""
    wall, empty = torch.full((8, 8), 4.0), torch.full((8, 8), torch.nan)
    cloud = SceneCloud()
    for k, depth in enumerate((empty, wall, wall.clone(), wall, empty)):
        pose = torch.eye(4)
        pose[0, 3] = -0.01 * k
        cloud.surfaces.append(scene_cloud._Surface(depth, torch.zeros(8, 8, 3), CAMERA, pose))
    cloud.surfaces[2].depth[3, 3] = 2.0
    for asked, floats in ((24, False), (2, False), (0, True)):
        monkeypatch.setattr(scene_cloud, "ASKED", asked)
        assert [surface.pose[0, 3].item() for surface in cloud._near(2)[:2]] == pytest.approx([-0.01, -0.03][:asked])
        assert (cloud.merged()[0][:, 2].min() < 3) == floats


def test_cubes_hold_means_however_the_points_come():
    points, colours = torch.randn(900, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 2700)
    colours = colours.view(900, 3)
    cube = {}
    for point, colour in zip(points, colours):
        cube.setdefault(tuple((point / 0.5).floor().tolist()), []).append(torch.cat([point, colour]))
    expected = torch.stack([torch.stack(cube[key]).mean(0) for key in sorted(cube)])
    sums = torch.cat([points, colours, torch.ones(900, 1)], 1)
    parts = torch.zeros(0, 7)
    for part in (slice(0, 1), slice(1, 400), slice(400, 400), slice(400, 900)):
        parts = scene_cloud.gathered(torch.cat([parts, sums[part]]), 0.5)
    for cubes in (scene_cloud.gathered(sums, 0.5), parts):
        assert torch.allclose(cubes[:, :6] / cubes[:, 6:], expected, atol=1e-5)
    larger = scene_cloud.gathered(parts, 4.0)  # of fewer cubes the sums are those of the points
    assert 1 < len(larger) < len(parts) and torch.allclose(larger.sum(0), sums.sum(0), atol=1e-3)


def test_a_cloud_has_no_more_points_than_it_may(rendered, monkeypatch):
    monkeypatch.setattr(scene_cloud, "MOST", 400)
    cloud = SceneCloud()
    for photograph, sample in zip(rendered[0].photographs, rendered[1]):
        cloud.add(photograph, sample.image, _prediction(sample, sample.depth * 0.2))
    assert 1 < len(cloud.merged()[0]) <= 400


def _prediction(sample, depth):
    from ttt_lib.core.types import Prediction

    return Prediction(None, depth, sample.mask, sample.intrinsics, "scale_invariant")


def test_a_refused_scene_leaves_the_originals(tiny, rendered, tmp_path):
    plain = [replace(p, pose=None, intrinsics=None) for p in rendered[0].photographs]
    lines = []
    refused = adapt_scene(tiny, Scene(plain, refused="the reason."), experiment())
    record = write_scene(refused, tmp_path / "out", lines.append)
    assert lines == [f"{k}/3 {p.name}: original" for k, p in enumerate(plain, 1)]  # why is said once, before
    assert record["refused"] == "the reason." and not (tmp_path / "out" / "cloud.ply").exists()
    assert all((tmp_path / "out" / "depth" / f"{p.name}.npy").is_file() for p in plain)
    assert all("the reason." in row["reason"] for row in record["photographs"])
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count("the reason.") == 1 and "plotly" not in page and "one scale" not in page
    assert all(f"before_after/{p.name}.jpg" in page for p in plain)
    for photograph in plain:
        pair = [np.load(tmp_path / "out" / name / f"{photograph.name}.npy") for name in ("depth", "depth_original")]
        assert np.array_equal(*pair, equal_nan=True)


def test_a_folder_of_something_else_is_left_alone(tiny, rendered, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="no earlier result"):
        write_scene(adapt_scene(tiny, rendered[0], experiment()), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_weights_are_kept_for_their_model_alone(tiny, rendered, tmp_path, untrained_checkpoint):
    trained = experiment(train={"method": "ttt", "passes": 2, "accumulation": 1, "batch_size": 1})
    adaptation = adapt_scene(tiny, rendered[0], trained)
    before = weights_checksum(tiny)
    save_weights(tmp_path / "place.pt", tiny, adaptation.weights)
    use_weights(tiny, tmp_path / "place.pt")
    named = dict(tiny.network.named_parameters())
    assert weights_checksum(tiny) != before
    assert all(torch.equal(named[name], value) for name, value in adaptation.weights.items())
    with pytest.raises(ModelError, match="another model"):  # they were made from the original weights
        use_weights(tiny, tmp_path / "place.pt")
    for path, said in ((untrained_checkpoint, "no file of adapted weights"), (tmp_path / "no.pt", "no such file")):
        with pytest.raises(ModelError, match=said):
            use_weights(tiny, path)
    (tmp_path / "broken.pt").write_bytes((tmp_path / "place.pt").read_bytes()[:1000])
    with pytest.raises(ModelError, match="no file of adapted weights"):
        use_weights(tiny, tmp_path / "broken.pt")
    with pytest.raises(UserError, match="nothing was trained"):
        save_weights(tmp_path / "none.pt", tiny, {})


def test_the_explorer_shows_each_photograph_and_both_clouds(written, monkeypatch):
    entered = []
    monkeypatch.setattr(ipywidgets.Output, "__enter__", lambda output: entered.append(output))
    explorer = SceneExplorer(written[0], points=500)
    assert "held-back tracks" in explorer.status.value and explorer.result.cache_info().currsize == 1
    first = explorer.image.value
    explorer.photograph.value = explorer.photograph.options[1]
    assert explorer.result.cache_info().currsize == 2
    assert first[:2] == explorer.image.value[:2] == b"\xff\xd8" and first != explorer.image.value
    assert not entered  # else a notebook that is run headlessly may hang: three of three with many such cells did
    explorer.cloud.value = "after"
    assert explorer.result.cache_info().currsize == 3 and set(entered) == {explorer.clouds}
    assert "no." in SceneExplorer(replace(written[0], evidence=[], scene=Scene([], refused="no."))).status.value


def bent_model(folder: Path, scene: Scene, k: float) -> None:
    """A COLMAP model of a scene and its photographs, as lenses with this distortion (SIMPLE_RADIAL) would have made it."""
    write_colmap(folder, scene)
    places = iter(scene.photographs)
    lines = (folder / "images.txt").read_text(encoding="utf-8").splitlines()
    for number in range(2, len(lines), 2):
        photograph = next(places)
        height, width = photograph.image.shape[1:]
        focal, middle = float(photograph.intrinsics[0, 0]) * width, np.array([width, height]) / 2
        values = np.array(lines[number].split(), float).reshape(-1, 3)
        rays = (values[:, :2] - middle) / focal
        values[:, :2] = middle + focal * rays * (1 + k * (rays**2).sum(1, keepdims=True))
        lines[number] = " ".join(f"{u} {v} {int(point)}" for u, v, point in values)
        seen = (np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1) + 0.5 - middle) / focal
        rays = seen.copy()
        for _ in range(60):
            rays = seen / (1 + k * (rays**2).sum(-1, keepdims=True))
        x, y = np.moveaxis((rays * focal + middle - 0.5).astype(np.float32), -1, 0)
        array = photograph.image.permute(1, 2, 0).contiguous().numpy()
        array = cv2.remap(array, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        Image.fromarray((array * 255).clip(0, 255).round().astype(np.uint8)).save(folder / f"{photograph.name}.png")
    (folder / "images.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cameras = [line.split() for line in (folder / "cameras.txt").read_text(encoding="utf-8").splitlines()[1:]]
    lenses = [f"{number} SIMPLE_RADIAL {w} {h} {fx} {cx} {cy} {k}\n" for number, _, w, h, fx, _, cx, cy in cameras]
    (folder / "cameras.txt").write_text("".join(lenses), encoding="utf-8")


def test_lenses_with_distortion_leave_pictures_and_cameras_without(rendered, tmp_path):
    """Known answer: from the true scene as such lenses would see it, the true pictures, cameras and places come back."""
    bent_model(tmp_path / "in", rendered[0], -0.3)
    lines: list[str] = []
    record = adapt_photographs(tmp_path / "in", tmp_path / "out", experiment(), {}, None, None, lines.append)
    assert "3 photographs: the distortion of their lenses is removed" in "\n".join(lines)
    assert record["scene"]["undistorted"] == 3
    adapt_photographs(tmp_path / "in", tmp_path / "other", experiment(), {}, None, None, lines.append)
    for path in (tmp_path / "out" / "depth").glob("*.npy"):  # nothing hangs on the name of the folder
        assert np.array_equal(np.load(path), np.load(tmp_path / "other" / "depth" / path.name), equal_nan=True)
    again = load_scene(tmp_path / "out")
    metres = again.photographs[0].tracks.depth.sum() / rendered[0].photographs[0].tracks.depth.sum()
    for true, found in zip(rendered[0].photographs, again.photographs, strict=True):
        assert torch.allclose(found.pose[:3, :3], true.pose[:3, :3], atol=1e-5)
        assert torch.allclose(found.pose[:3, 3], metres * true.pose[:3, 3], atol=1e-4)
        assert torch.allclose(found.intrinsics, true.intrinsics, atol=1e-5)
        taken = read_photo(tmp_path / "in" / f"{true.name}.png")
        off, before = ((image - true.image)[:, 4:-4, 4:-4].abs().mean() for image in (found.image, taken))
        assert off < 0.25 * before
        order, true_order = (p.tracks.depth.argsort() for p in (found, true))
        assert torch.allclose(found.tracks.uv[order], true.tracks.uv[true_order], atol=1e-4)
        assert torch.allclose(found.tracks.depth[order], metres * true.tracks.depth[true_order], rtol=1e-4)


def test_what_a_pincushion_lens_did_not_see_has_no_depth(rendered, tmp_path):
    bent_model(tmp_path / "in", rendered[0], 0.3)
    adapt_photographs(tmp_path / "in", tmp_path / "out", experiment(), {}, None, None, lambda line: None)
    scene = load_scene(tmp_path / "in")
    for photograph in scene.photographs:
        seen = photograph.seen(photograph.image.shape[1:]).numpy()
        assert 0.01 < (~seen).mean() < 0.3
        for folder in ("depth", "depth_original"):
            depth = np.load(tmp_path / "out" / folder / f"{photograph.name}.npy")
            assert np.isnan(depth[~seen]).all() and np.isfinite(depth[seen]).mean() > 0.9, folder


def test_the_command_from_photographs_to_a_page(tmp_path):
    """Real tracks: copies are refused in a sentence and still have their depth; a folder says what it left out."""
    photo = (np.random.default_rng(0).random((48, 64, 3)) * 255).astype(np.uint8)
    (tmp_path / "in").mkdir()
    for name in "ab":
        Image.fromarray(photo).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "notes.txt").write_text("x", encoding="utf-8")
    done = CliRunner().invoke(app, ["scene", str(tmp_path / "in"), "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0 and "refused: b" in done.output.replace("b.png", "b") and "notes.txt" in done.output
    assert done.output.count("take a second photograph") == 1
    assert sorted(p.name for p in (tmp_path / "out" / "depth").glob("*.npy")) == ["a.npy", "b.npy"]
    with pytest.raises(UserError, match="knows nothing of several photographs"):
        CliRunner().invoke(
            app, ["scene", str(tmp_path / "in"), "-o", str(tmp_path / "o2"), "--experiment", "original"],
            catch_exceptions=False, standalone_mode=False,
        )  # fmt: skip
