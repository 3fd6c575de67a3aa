"""Cameras that somebody else computed: read, turned upright, triangulated, written and read again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rendered_walls import FOCAL, camera, depth_error, render, walk

from ttt_lib.core.errors import DataError
from ttt_lib.data.images import read_photo
from ttt_lib.data.photographs.job import AMPLE
from ttt_lib.data.photographs.load import load_scene
from ttt_lib.data.photographs.scene import Scene
from ttt_lib.data.photographs.transforms import FLIP, lens_of, read_transforms, size_of
from ttt_lib.data.photographs.writers import scene_points, write_colmap, write_transforms

WIDTH, HEIGHT = 320, 216
CAMERA = {"w": WIDTH, "h": HEIGHT, "fl_x": FOCAL * WIDTH, "fl_y": FOCAL * WIDTH, "cx": WIDTH / 2, "cy": HEIGHT / 2}


@pytest.fixture(scope="module")
def views():
    return walk(4)


def write_photos(folder: Path, views, factor: int = 1) -> None:
    folder.mkdir(parents=True)
    for index, view in enumerate(views):
        array = (view.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        image = Image.fromarray(array)
        image.resize((WIDTH // factor, HEIGHT // factor)).save(folder / f"view_{index}.png")


def frames(views, order=(0, 1, 2, 3)) -> list[dict]:
    to_world = [torch.linalg.inv(v.pose.double()).numpy() @ FLIP for v in views]
    return [{"file_path": f"./images/view_{i}", "transform_matrix": to_world[j].tolist()} for i, j in enumerate(order)]


@pytest.fixture(scope="module")
def house(tmp_path_factory, views):
    """A folder of photographs with their true cameras, and the scene that comes of it."""
    folder = tmp_path_factory.mktemp("house")
    write_photos(folder / "images", views)
    (folder / "transforms.json").write_text(json.dumps({**CAMERA, "frames": frames(views)}))
    return folder, load_scene(folder)


def copy_of(house, folder: Path) -> Path:
    """The photographs and a COLMAP model of the scene."""
    shutil.copytree(house[0] / "images", folder / "images")
    write_colmap(folder / "sparse" / "0", house[1])
    assert (folder / "sparse" / "0" / "images.txt").read_text().count(".png\n") == 4  # files, not names of the scene
    return folder


def assert_same_scene(one: Scene, other: Scene, tracks: bool = True) -> None:
    assert [p.name for p in one.photographs] == [p.name for p in other.photographs]
    ids = [scene.track_ids() for scene in (one, other)]
    for a, b in zip(one.photographs, other.photographs, strict=True):
        assert torch.allclose(a.pose, b.pose, atol=1e-6) and torch.allclose(a.intrinsics, b.intrinsics, atol=1e-6)
        assert torch.equal(a.image, b.image)
        if tracks:
            orders = [torch.searchsorted(known, p.tracks.track_id) for known, p in zip(ids, (a, b))]
            assert torch.equal(orders[0].sort().values, orders[1].sort().values)
            x, y = a.tracks[orders[0].argsort()], b.tracks[orders[1].argsort()]
            assert torch.allclose(x.uv, y.uv, atol=1e-6) and torch.allclose(x.depth, y.depth, rtol=1e-5)
            # Where an observation that became no track had moved the point, its reprojection error is another.
            assert ((x.weight - y.weight).abs() > 1e-3).float().mean() < 0.1


def test_known_cameras_give_depth_in_their_own_scale(house, views):
    scene = house[1]
    assert not scene.refused and len(scene.photographs) == 4 and scene.about["explained"] > 0.95
    for photograph, view in zip(scene.photographs, views):
        assert torch.allclose(photograph.pose, view.pose, atol=1e-5)
        assert torch.allclose(photograph.intrinsics, view.intrinsics, atol=1e-6)
        tracks = photograph.tracks
        column, row = (tracks.uv * torch.tensor([WIDTH, HEIGHT])).long().unbind(-1)
        assert (tracks.depth / view.depth[row, column]).nanmedian() == pytest.approx(1, abs=0.005)  # no free factor
        assert depth_error(tracks, view.depth) < 0.01 and tracks.filled_cells() >= 12


def test_known_cameras_side_by_side_are_near_enough(tmp_path):
    """Half a degree, which are three pixels: with known cameras nothing else is uncertain."""
    pair = [render(camera(x=0.06 * k), noise=k) for k in range(2)]
    write_photos(tmp_path / "images", pair)
    (tmp_path / "transforms.json").write_text(json.dumps({**CAMERA, "frames": frames(pair, (0, 1))}))
    scene = load_scene(tmp_path)
    assert not scene.refused and scene.about["parallax"] < AMPLE.track * AMPLE.least
    assert all(depth_error(p.tracks, view.depth) < 0.03 for p, view in zip(scene.photographs, pair, strict=True))


def test_cameras_of_other_photographs_are_refused(house, views, tmp_path):
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps({**CAMERA, "frames": frames(views, (0, 2, 1, 3))}))
    scene = load_scene(house[0] / "images", cameras=path)
    assert "contradict" in scene.refused and scene.about["explained"] < 0.5
    assert len(scene.photographs) == 4 and not len(scene.track_ids())


def test_a_model_is_written_and_read_again(house, tmp_path):
    folder = copy_of(house, tmp_path / "model")
    again = load_scene(folder)
    assert_same_scene(house[1], again)
    assert_same_scene(again, load_scene(folder / "sparse" / "0"))
    files = sorted((folder / "images").iterdir())
    assert_same_scene(again, load_scene(files, cameras=folder))
    part = load_scene(files[:3], cameras=folder / "sparse" / "0")
    assert len(part.photographs) == 3 and [name for name, _ in part.left_out] == ["view_3.png"]
    Image.new("RGB", (40, 30)).save(tmp_path / "other.png")
    more = load_scene([*files, tmp_path / "other.png"], cameras=folder)
    assert (
        len(more.photographs) == 4 and [p.name for p in more.rest] == ["other"] and "no camera" in more.left_out[0][1]
    )
    assert len(load_scene(folder, count=2).photographs) == 2


PYCOLMAP = """
import sys, numpy, pycolmap
model = pycolmap.Reconstruction(sys.argv[1])
model.update_point_3d_errors()
print(model.num_reg_images(), model.num_points3D(), model.compute_num_observations(), model.compute_mean_reprojection_error())
model.write_binary(sys.argv[2])
"""


def test_colmap_reads_what_is_written(house, tmp_path):
    folder = copy_of(house, tmp_path / "model")
    binary = tmp_path / "binary" / "sparse" / "0"
    binary.mkdir(parents=True)
    command = [sys.executable, "-c", PYCOLMAP, str(folder / "sparse" / "0"), str(binary)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images, points, observations, error = map(float, done.stdout.split())
    scene = house[1]
    assert images == 4 and points == len(scene.track_ids()) and error < 0.5
    assert observations == sum(len(p.tracks) for p in scene.photographs)
    shutil.copytree(folder / "images", tmp_path / "binary" / "images")
    again = load_scene(tmp_path / "binary")  # without our mark: its tracks are selected again
    assert_same_scene(scene, again, tracks=False)
    assert len(again.track_ids()) > 0.8 * points


def test_points_are_found_again_from_depths(house):
    ids, xyz = scene_points(house[1])
    assert (np.diff(ids) > 0).all()
    for photograph in house[1].photographs:
        at = np.searchsorted(ids, photograph.tracks.track_id.numpy())
        pose = photograph.pose.double().numpy()
        depth = (xyz[at] @ pose[:3, :3].T + pose[:3, 3])[:, 2]
        assert np.abs(depth / photograph.tracks.depth.numpy() - 1).max() < 1e-5


def test_resized_photographs_fit_and_cropped_ones_do_not(house, views, tmp_path):
    folder = copy_of(house, tmp_path / "model")
    shutil.rmtree(folder / "images")
    write_photos(folder / "images_2", views, factor=2)
    half = load_scene(folder)
    assert half.photographs[0].image.shape == (3, HEIGHT // 2, WIDTH // 2)
    for a, b in zip(half.photographs, house[1].photographs, strict=True):
        assert torch.allclose(a.tracks.uv.sum(), b.tracks.uv.sum()) and torch.allclose(a.intrinsics, b.intrinsics)
    for path in (folder / "images_2").glob("view_[01].png"):
        Image.open(path).crop((0, 0, 100, 100)).save(path)
    assert [name for name, why in load_scene(folder).left_out if "not the shape" in why] == ["view_0", "view_1"]


@pytest.mark.parametrize("orientation, turns", [(6, 1), (3, 2), (8, 3)])
def test_pictures_that_exif_turns_are_seen_upright(house, views, tmp_path, orientation, turns):
    """The model belongs to the pixels as stored; the scene to what is seen: here stored ones are the true ones."""
    folder = copy_of(house, tmp_path / "model")
    exif = Image.Exif()
    exif[274] = orientation
    for path in (folder / "images").iterdir():
        Image.open(path).save(path, exif=exif)
    turned = load_scene(folder)
    assert len(turned.photographs) == 4
    for a, view, before in zip(turned.photographs, views, house[1].photographs, strict=True):
        depth = torch.rot90(view.depth, -turns)
        assert a.image.shape[1:] == depth.shape
        assert torch.equal(a.image, torch.rot90(view.image, -turns, (1, 2)))
        assert depth_error(a.tracks, depth) < 0.01
        # The points stay where they are in the world, and are seen at their places by the turned camera.
        rays = torch.cat([a.tracks.uv, torch.ones(len(a.tracks), 1)], -1) @ torch.linalg.inv(a.intrinsics).mT
        world = (rays * a.tracks.depth[:, None] - a.pose[:3, 3]) @ a.pose[:3, :3]
        rays = torch.cat([before.tracks.uv, torch.ones(len(a.tracks), 1)], -1) @ torch.linalg.inv(before.intrinsics).mT
        expected = (rays * before.tracks.depth[:, None] - before.pose[:3, 3]) @ before.pose[:3, :3]
        assert torch.allclose(world.sort(0).values, expected.sort(0).values, atol=1e-4)
    write_colmap(tmp_path / "again" / "sparse", turned)  # of the stored pixels, as other programs read them
    assert "1 PINHOLE 320 216 " in (tmp_path / "again" / "sparse" / "cameras.txt").read_text()
    shutil.copytree(folder / "images", tmp_path / "again" / "images")
    assert_same_scene(turned, load_scene(tmp_path / "again"))
    files = [tmp_path / "again" / "images" / f"{p.name}.png" for p in turned.photographs]
    write_transforms(tmp_path / "again" / "transforms.json", turned, files)
    (frame, *_), _ = read_transforms(tmp_path / "again" / "transforms.json")
    assert size_of(frame.values) == (WIDTH, HEIGHT) and np.allclose(frame.pose, views[0].pose.numpy(), atol=1e-5)


def test_known_cameras_of_turned_pictures(house, views, tmp_path):
    """Three as they are stored upright, one that its EXIF turns: its camera saw it unturned."""
    shutil.copytree(house[0] / "images", tmp_path / "images")
    exif = Image.Exif()
    exif[274] = 8
    Image.open(tmp_path / "images" / "view_1.png").save(tmp_path / "images" / "view_1.png", exif=exif)
    shutil.copy(house[0] / "transforms.json", tmp_path)
    scene = load_scene(tmp_path)
    assert scene.about["explained"] > 0.95 and len(scene.photographs) == 4
    turned, upright = scene.photographs[1], scene.photographs[2]
    assert turned.image.shape == (3, WIDTH, HEIGHT) and upright.image.shape == (3, HEIGHT, WIDTH)
    assert depth_error(turned.tracks, torch.rot90(views[1].depth, 1)) < 0.01
    assert depth_error(upright.tracks, views[2].depth) < 0.01
    assert turned.intrinsics[1, 1] == pytest.approx(FOCAL)  # over the height now


def test_names_that_differ_in_a_space_alone_stay_two_names(house, tmp_path):
    """COLMAP's text knows no spaces; whoever reads it must not take one photograph for the other."""
    first, second, *_ = house[1].photographs
    files = [tmp_path / "a b.png", tmp_path / "a_b.png"]
    for photograph, file in zip((first, second), files):
        shutil.copy(house[0] / "images" / f"{photograph.name}.png", file)
    written = [replace(p, source=partial(read_photo, file)) for p, file in zip((first, second), files)]
    write_colmap(tmp_path / "sparse", Scene(written))
    lines = (tmp_path / "sparse" / "images.txt").read_text().splitlines()
    names = [line.split()[-1] for line in lines[1::2]]
    assert names == ["a_b_2.png", "a_b.png"]  # the one that has this name keeps it


def test_a_model_without_points_is_triangulated(house, tmp_path, views):
    folder = copy_of(house, tmp_path / "model")
    (folder / "sparse" / "0" / "points3D.txt").unlink()
    scene = load_scene(folder)
    assert not scene.refused and len(scene.track_ids()) > 200 and scene.about["explained"] > 0.9
    assert torch.allclose(scene.photographs[1].pose, views[1].pose, atol=1e-5)


def test_transforms_are_written_and_read_again(house, tmp_path):
    scene = house[1]
    shutil.copytree(house[0] / "images", tmp_path / "images")
    write_transforms(tmp_path / "transforms.json", scene, [f"images/{p.name}.png" for p in scene.photographs])
    content = json.loads((tmp_path / "transforms.json").read_text())
    assert content["camera_model"] == "OPENCV" and content["w"] == WIDTH and len(content["frames"]) == 4
    frames, left_out = read_transforms(tmp_path / "transforms.json")
    assert not left_out and [f.path for f in frames] == [f"images/view_{i}.png" for i in range(4)]
    for frame, photograph in zip(frames, scene.photographs):
        assert np.allclose(frame.pose, photograph.pose.numpy(), atol=1e-6)
        lens = lens_of(frame.values, size_of(frame.values))
        assert lens.params == pytest.approx((FOCAL * WIDTH, FOCAL * WIDTH, WIDTH / 2, HEIGHT / 2), rel=1e-6)
    with pytest.raises(DataError, match="one for each"):
        write_transforms(tmp_path / "t.json", scene, ["a.png"])
    with pytest.raises(DataError, match="no cameras"):
        write_colmap(tmp_path / "none", Scene(scene.photographs, refused="nothing fits."))


def test_conventions_of_transforms(tmp_path):
    """A camera at (1, 2, 3) that looks along the world's -z, as Blender's does when it is not turned."""
    matrix = [[1, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]
    path = tmp_path / "transforms.json"
    content = {"camera_angle_x": np.pi / 2, "frames": [{"file_path": "a", "transform_matrix": matrix, "k1": 0.1}]}
    path.write_text(json.dumps(content))
    (frame,), _ = read_transforms(path)
    assert np.allclose(frame.pose @ [1, 2, 1, 1], [0, 0, 2, 1])  # two units ahead of it
    assert np.allclose(frame.pose @ [2, 3, 1, 1], [1, -1, 2, 1])  # to the right is x, above is -y
    lens = lens_of(frame.values, (100, 80))
    assert lens.model == "OPENCV" and lens.params[:5] == pytest.approx((50, 50, 50, 40, 0.1))


@pytest.mark.parametrize(
    "content, words", [
        ([], "frames"), ({"frames": []}, "frames"), ({"frames": [3]}, "file_path"),
        ({"camera_model": "OPENCV_FISHEYE", "frames": [{}]}, "cannot be used"),
        ({"fl_x": "wide", "frames": [{"file_path": "a"}]}, "fl_x"),
        ({"frames": [{"file_path": "a", "transform_matrix": [[1]]}]}, "no frame has a camera"),
        ({"frames": [{"file_path": "a", "transform_matrix": np.diag([1, 1, -1, 1]).tolist()}]}, "mirrors"),
        ({"frames": [{"file_path": "a", "transform_matrix": np.zeros((4, 4)).tolist()}]}, "no rotation"),
        ({"frames": [{"file_path": "a", "transform_matrix": np.eye(4).tolist()}]}, "folder that they lie in"),
    ]
)  # fmt: skip
def test_transforms_that_are_none(tmp_path, content, words):
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        load_scene(tmp_path)


def test_lenses_of_a_transforms_file_that_cannot_be(house, views, tmp_path):
    path = tmp_path / "transforms.json"
    for given, words in (({}, "no focal length"), ({"fl_x": 1e8}, "cannot be"), ({"fl_x": 300, "cx": -1e6}, "centre"),
                          ({"fl_x": 0.9, "cx": 80, "cy": 60}, "cannot be"), ({"fl_x": 300, "cx": 0.5, "cy": 0.5}, "not in pixels"),
                          ({"fl_x": 0.9, "cx": 0.5, "cy": 0.5}, "cannot be")):  # fmt: skip
        path.write_text(json.dumps({**given, "frames": frames(views)}))
        with pytest.raises(DataError, match=words):
            load_scene(house[0] / "images", cameras=path)
    with pytest.raises(DataError, match="neither"):
        load_scene(house[0] / "images", cameras=house[0] / "images")
    with pytest.raises(DataError, match="leave it out"):
        load_scene(house[0], focal=0.9)
