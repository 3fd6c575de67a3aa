"""Lenses with distortion: a picture, its tracks and its camera become those of one pinhole camera."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rendered_walls import FOCAL, depth_error, walk
from small_models import SIZE, cloud, text, write_model

from ttt_lib.core.errors import DataError
from ttt_lib.data.images import read_photo
from ttt_lib.data.photographs.job import Lens
from ttt_lib.data.photographs.load import load_scene
from ttt_lib.data.photographs.measured import measure_depth
from ttt_lib.data.photographs.scene import Scene, track_points
from ttt_lib.data.photographs.stereo import pair_disparity, to_gray
from ttt_lib.data.photographs.transforms import FLIP
from ttt_lib.data.photographs.undistort import (
    can_be_undistorted,
    covered,
    places_in_picture,
    read_undistorted,
    undistorted,
)
from ttt_lib.data.photographs.writers import write_colmap, write_transforms
from ttt_lib.geometry.cameras import project, transform_points

LENSES = {
    "SIMPLE_RADIAL": (140, 83, 58, -0.28), "RADIAL": (140, 83, 58, -0.2, 0.05),
    "OPENCV": (140, 150, 83, 58, -0.2, 0.05, 0.004, -0.003),
    "FULL_OPENCV": (140, 150, 83, 58, -0.2, 0.05, 0.004, -0.003, 0.01, 0.02, -0.01, 0.003),
    "SIMPLE_DIVISION": (140, 83, 58, -0.15), "DIVISION": (140, 150, 83, 58, 0.1),
}  # fmt: skip
K, WIDTH, HEIGHT = -0.2, 320, 216
CAMERA = {"w": WIDTH, "h": HEIGHT, "fl_x": FOCAL * WIDTH, "cx": WIDTH / 2, "cy": HEIGHT / 2, "k1": K}
PYCOLMAP = """
import sys, numpy, pycolmap
model, width, height, params, rays = sys.argv[1], *map(eval, sys.argv[2:5]), numpy.load(sys.argv[5])
camera = pycolmap.Camera(model=model, width=width, height=height, params=params)
numpy.save(sys.argv[5], camera.img_from_cam(numpy.c_[rays, numpy.ones(len(rays))]))
"""


def lens(model: str) -> Lens:
    return Lens(model, *SIZE, LENSES[model])


def by_pycolmap(lens: Lens, rays: np.ndarray, folder: Path) -> np.ndarray:
    """Where pycolmap's camera sees rays (N,2), in its pixels. In a process of its own, as everywhere."""
    np.save(folder / "rays.npy", rays)
    subprocess.run([sys.executable, "-c", PYCOLMAP, *map(str, lens), str(folder / "rays.npy")], check=True)
    return np.load(folder / "rays.npy")


def rays_of(lens: Lens, uv: np.ndarray) -> np.ndarray:
    """Of places (N,2) in the picture without distortion."""
    fx, fy, cx, cy = lens.pinhole.params
    return (uv - [cx, cy]) / [fx, fy]


def smooth(height: int, width: int) -> torch.Tensor:
    """A picture (3,H,W) whose every place has another colour."""
    row, column = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([row, column, (row + column) / 2])


def save(image: torch.Tensor, path: Path, orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    array = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, exif=exif)


def misses(scene: Scene) -> torch.Tensor:
    """By how many pixels each track misses the place where another photograph's camera and depth put its point."""
    result = []
    for one, other in zip(scene.photographs, scene.photographs[1:] + scene.photographs[:1]):
        mine, theirs = one.tracks.common(other.tracks)
        points = transform_points(track_points(other)[theirs], one.pose.double())
        size = torch.tensor(one.image.shape[:0:-1])
        result.append(((project(points, one.intrinsics.double()) - one.tracks.uv[mine]) * size).norm(dim=-1))
    return torch.cat(result)


@pytest.mark.parametrize("model", LENSES)
def test_the_maps_are_those_of_colmaps_cameras(model, tmp_path):
    column, row = places_in_picture(lens(model), SIZE)
    v, u = np.indices(SIZE[::-1]) + 0.5
    expected = by_pycolmap(lens(model), rays_of(lens(model), np.stack([u.ravel(), v.ravel()], -1)), tmp_path)
    assert np.abs(np.stack([column.ravel(), row.ravel()], -1) + 0.5 - expected).max() < 1e-3
    assert np.abs(expected - np.stack([u.ravel(), v.ravel()], -1)).max() > 2  # and it does bend
    part = places_in_picture(lens(model), SIZE, range(70, 90))
    assert np.array_equal(part[0], column[70:90]) and np.array_equal(part[1], row[70:90])


@pytest.mark.parametrize("model", LENSES)
@pytest.mark.parametrize("size", [SIZE, (80, 60)])
def test_a_picture_is_that_of_the_pinhole_camera(model, size, tmp_path):
    """One whose colours say where they are: at each pixel there is what pycolmap's camera saw along its ray."""
    (width, height), scale = size, SIZE[0] / size[0]
    straight = undistorted(smooth(height, width), lens(model))
    v, u = np.indices((height, width)) + 0.5
    places = by_pycolmap(lens(model), rays_of(lens(model), np.stack([u.ravel(), v.ravel()], -1) * scale), tmp_path)
    x, y = ((places / scale - 0.5) / [width - 1, height - 1]).clip(0, 1).T
    assert np.abs(straight[0].numpy().ravel() - y).max() < 2e-3 and np.abs(straight[1].numpy().ravel() - x).max() < 2e-3


@pytest.mark.parametrize("params", [(140, 83, 58, 0.25), (140, 83, 58, -0.28)])
@pytest.mark.parametrize("turns", range(4))
def test_what_a_pincushion_lens_did_not_see_is_known(params, turns, tmp_path):
    """There, and only there, pycolmap's camera sees the ray of a pixel beyond the picture that it took."""
    bent, (width, height) = Lens("SIMPLE_RADIAL", *SIZE, params), SIZE
    v, u = np.indices((height, width)) + 0.5
    places = by_pycolmap(bent, rays_of(bent, np.stack([u.ravel(), v.ravel()], -1)), tmp_path).reshape(height, width, 2)
    margin = np.minimum(places, SIZE - places).min(-1)  # how far inside, in pixels
    upright = np.rot90(margin, -turns)
    seen = covered(bent, turns, upright.shape).numpy()
    sure = np.abs(upright) > 1e-2
    assert np.array_equal(seen[sure], (upright > 0)[sure]) and sure.mean() > 0.99
    assert (~seen).mean() > 0.05 if params[-1] > 0 else seen.all()
    half = covered(bent, turns, (upright.shape[0] // 2, upright.shape[1] // 2)).numpy()
    assert half.shape == tuple(np.array(upright.shape) // 2) and abs(half.mean() - seen.mean()) < 0.02


def test_a_lens_without_distortion_changes_nothing(tmp_path):
    image = smooth(*SIZE[::-1])
    for model, params in {"SIMPLE_PINHOLE": LENSES["RADIAL"][:3], "PINHOLE": LENSES["OPENCV"][:4],
                          "SIMPLE_RADIAL": (140, 83, 58, 0.0), "OPENCV": (140, 150, 83, 58, 0, 0, 0, 0)}.items():  # fmt: skip
        plain = Lens(model, *SIZE, params)
        assert not plain.distortion and can_be_undistorted(plain) and undistorted(image, plain) is image
        assert plain.pinhole.params == (140, 150 if "SIMPLE" not in model else 140, 83, 58)
    camera = b"1 SIMPLE_RADIAL 160 120 140 80 60 0\n"
    folder = write_model(tmp_path, {**text(), "cameras.txt": camera})
    scene = load_scene(folder)
    assert "undistorted" not in scene.about
    assert [p.source.func for p in scene.photographs] == [read_photo] * 4
    assert [p.seen for p in scene.photographs] == [None] * 4


@pytest.mark.parametrize("turns, orientation", [(0, 1), (1, 6), (2, 3), (3, 8)])
def test_a_photograph_that_exif_turns_is_straightened_as_it_was_taken(tmp_path, turns, orientation):
    save(smooth(*SIZE[::-1]), tmp_path / "a.png", orientation)
    stored = torch.rot90(read_photo(tmp_path / "a.png"), turns, (1, 2))
    expected = torch.rot90(undistorted(stored, lens("OPENCV")), -turns, (1, 2))
    straight = read_undistorted(tmp_path / "a.png", lens("OPENCV"), turns)
    assert torch.equal(straight, expected) and not torch.equal(stored, torch.rot90(straight, turns, (1, 2)))


def bent_model(folder: Path, lens: Lens) -> Path:
    """The small model as this lens sees it; its pictures are those of `smooth`."""
    xyz, _ = cloud()
    seen = [xyz + [-0.3 * k, 0, 0] for k in range(4)]
    rays = np.concatenate([p[:, :2] / p[:, 2:] for p in seen])
    places = iter(by_pycolmap(lens, rays, folder).reshape(4, -1, 2))
    lines = text()["images.txt"].decode().splitlines()
    for number in range(2, len(lines), 2):
        lines[number] = " ".join(f"{u} {v} {i + 1}" for i, (u, v) in enumerate(next(places)))
    cameras = f"1 {lens.model} {SIZE[0]} {SIZE[1]} {' '.join(map(str, lens.params))}\n"
    files = {**text(), "cameras.txt": cameras.encode(), "images.txt": ("\n".join(lines) + "\n").encode()}
    write_model(folder, files)
    for k in range(4):
        save(smooth(*SIZE[::-1]), folder / "images" / f"p{k}.png")
    return folder


@pytest.mark.parametrize("model", LENSES)
def test_the_tracks_of_a_model_are_where_the_pinhole_camera_sees_them(model, tmp_path):
    scene = load_scene(bent_model(tmp_path, lens(model)))
    assert scene.about["undistorted"] == len(scene.photographs) == 4
    fx, fy, cx, cy = lens(model).pinhole.params
    for k, photograph in enumerate(scene.photographs):
        xyz = cloud()[0] + [-0.3 * k, 0, 0]
        uv = (xyz[:, :2] / xyz[:, 2:] * [fx, fy] + [cx, cy]) / SIZE
        inside = ((uv >= 0) & (uv <= 1)).all(-1)
        assert photograph.tracks.track_id.tolist() == np.flatnonzero(inside).tolist()  # what moved outside is dropped
        assert np.allclose(photograph.tracks.uv.numpy(), uv[inside], atol=1e-5)
        assert np.allclose(photograph.tracks.weight.numpy(), 1, atol=1e-3)
        assert torch.equal(photograph.image, undistorted(read_photo(tmp_path / "images" / f"p{k}.png"), lens(model)))
    assert misses(scene).max() < 1e-3


@pytest.mark.parametrize("turns, orientation", [(1, 6), (2, 3), (3, 8)])
def test_the_tracks_of_turned_photographs_lie_in_their_straight_pictures(tmp_path, turns, orientation):
    folder = bent_model(tmp_path, lens("OPENCV"))
    upright = [replace(p, source=p.image) for p in load_scene(folder).photographs]  # read before the files change
    for path in (folder / "images").iterdir():
        save(smooth(*SIZE[::-1]), path, orientation)
    for one, other in zip(load_scene(folder).photographs, upright, strict=True):
        assert torch.equal(one.image, torch.rot90(other.image, -turns, (1, 2)))
        assert torch.allclose(track_points(one), track_points(other), atol=1e-5)
        for axis in (0, 1):  # the colours say the same place
            found = [sampled(p.image[axis], p.tracks.uv) for p in (one, other)]
            assert torch.allclose(*found, atol=1e-5)


def sampled(map_: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    """A map (H,W) at places (N,2) in [0,1]."""
    grid = (2 * uv - 1)[None, None]
    return torch.nn.functional.grid_sample(map_[None, None], grid, padding_mode="border", align_corners=False)[0, 0, 0]


@pytest.fixture(scope="module")
def views():
    """What a pinhole camera sees, and what a lens with distortion sees from there."""
    return walk(4), walk(4, k=K)


@pytest.fixture(scope="module")
def bent_house(tmp_path_factory, views):
    """A folder of photographs by that lens, one of them turned by its EXIF, with their true cameras; and its scene."""
    folder = tmp_path_factory.mktemp("bent")
    frames = []
    for number, view in enumerate(views[1]):
        save(view.image, folder / "images" / f"view_{number}.png", 8 if number == 1 else 1)
        to_world = torch.linalg.inv(view.pose.double()).numpy() @ FLIP
        frames.append({"file_path": f"images/view_{number}.png", "transform_matrix": to_world.tolist()})
    (folder / "transforms.json").write_text(json.dumps({**CAMERA, "frames": frames}))
    return folder, load_scene(folder)


def test_known_lenses_with_distortion_give_depth_and_pictures_without(bent_house, views):
    scene = bent_house[1]
    assert not scene.refused and scene.about["undistorted"] == 4 and scene.about["explained"] > 0.95
    for number, (photograph, straight, bent) in enumerate(zip(scene.photographs, *views, strict=True)):
        turns = 1 if number == 1 else 0  # quarter turns against the clock, from the one that was taken
        true, taken = (torch.rot90(view.image, turns, (1, 2)) for view in (straight, bent))
        off, before = ((image - true).abs().mean(0) for image in (photograph.image, taken))
        assert off.median() < 0.02 and off.mean() < 0.3 * before.mean()  # noise and texture, as sharp as pixels
        assert depth_error(photograph.tracks, torch.rot90(straight.depth, turns)) < 0.01
    assert misses(scene).median() < 0.25 and misses(scene).quantile(0.95) < 1.2  # 1.1 and 5 with the lens as it is


def test_stereo_measures_between_straightened_photographs(bent_house, views):
    grays = [to_gray(photograph) for photograph in bent_house[1].photographs]
    measured, meets = measure_depth(grays, 2)
    ratio = (measured.depth / views[0][2].depth).log().abs()
    assert meets > 0.9 and ratio.nanmedian() < 0.01 and torch.isfinite(measured.depth).float().mean() > 0.3


def test_stereo_matches_nothing_where_a_border_is_repeated(bent_house):
    one, other = bent_house[1].photographs[2:4]
    left = torch.ones(one.image.shape[1:], dtype=torch.bool)
    left[:, : left.shape[1] // 2] = False
    half = replace(one, seen=lambda size: left)
    (whole, pixel), (part, _) = (pair_disparity(to_gray(each), to_gray(other)) for each in (one, half))
    assert torch.isfinite(whole)[:, : left.shape[1] // 2 - 2].float().mean() > 0.1
    assert not torch.isfinite(part)[:, : left.shape[1] // 2 - 2].any() and torch.isfinite(part).float().mean() > 0.1


def test_what_is_exported_is_one_pinhole_camera(bent_house, tmp_path):
    scene = bent_house[1]
    for photograph in scene.photographs:
        save(photograph.image, tmp_path / "images" / f"{photograph.name}.png")
    write_colmap(tmp_path / "sparse" / "0", scene)
    again = load_scene(tmp_path)
    assert "undistorted" not in again.about
    for one, other in zip(scene.photographs, again.photographs, strict=True):
        assert torch.allclose(one.pose, other.pose, atol=1e-6) and len(one.tracks) == len(other.tracks)
        assert torch.allclose(one.image, other.image, atol=0.5 / 255 + 1e-6)
        places = [p.tracks.uv[p.tracks.depth.argsort()] for p in (one, other)]
        assert torch.allclose(*(p.sort(0).values for p in places), atol=1e-5)
    assert misses(again).median() < 0.25
    originals = [bent_house[0] / "images" / f"{p.name}.png" for p in scene.photographs]
    with pytest.raises(DataError, match="distortion of its lens still"):
        write_transforms(tmp_path / "transforms.json", scene, originals)
    write_transforms(tmp_path / "transforms.json", scene, [f"images/{p.name}.png" for p in scene.photographs])
    again = load_scene(tmp_path / "transforms.json")
    assert again.about["explained"] > 0.95 and misses(again).median() < 0.25


def test_a_model_without_points_is_triangulated_in_straight_pictures(bent_house, tmp_path, views):
    scene = bent_house[1]
    write_colmap(tmp_path, Scene([scene.photographs[k] for k in (0, 2, 3)]))
    (tmp_path / "points3D.txt").unlink()
    lines = [f"{n} SIMPLE_RADIAL {WIDTH} {HEIGHT} {FOCAL * WIDTH} {WIDTH / 2} {HEIGHT / 2} {K}\n" for n in (1, 2, 3)]
    (tmp_path / "cameras.txt").write_text("".join(lines))
    found = load_scene(bent_house[0] / "images", cameras=tmp_path)
    assert found.about["undistorted"] == 3 and misses(found).median() < 0.25
    assert all(depth_error(p.tracks, views[0][k].depth) < 0.01 for p, k in zip(found.photographs, (0, 2, 3)))


def test_photographs_without_a_camera_stay_as_they_were_taken(bent_house, tmp_path):
    content = json.loads((bent_house[0] / "transforms.json").read_text())
    content["frames"][1]["transform_matrix"], content["frames"][2]["transform_matrix"] = (
        content["frames"][2]["transform_matrix"], content["frames"][1]["transform_matrix"],
    )  # fmt: skip
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    scene = load_scene(bent_house[0] / "images", cameras=tmp_path)
    assert "contradict" in scene.refused and "undistorted" not in scene.about
    assert all(p.source.func is read_photo and p.intrinsics is None for p in scene.photographs)


@pytest.mark.parametrize("k1, k2", [(-3.0, 0.0), (1e6, 0.0), (0.0, -1e300), (50.0, 0.0)])
def test_distortion_that_cannot_be_taken_away_is_said(bent_house, tmp_path, k1, k2):
    write_model(tmp_path, {**text(), "cameras.txt": f"1 RADIAL 160 120 140 80 60 {k1} {k2}\n".encode()})
    scene = load_scene(tmp_path)
    assert "distortion cannot be taken away" in scene.refused and len(scene.left_out) == 4
    content = json.loads((bent_house[0] / "transforms.json").read_text())
    (tmp_path / "transforms.json").write_text(json.dumps({**content, "k1": k1, "k2": max(k2, -1e8)}))
    with pytest.raises(DataError, match="distortion cannot be taken away"):
        load_scene(bent_house[0] / "images", cameras=tmp_path / "transforms.json")
