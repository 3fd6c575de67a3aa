"""Models that lie: their counts are found out before memory is taken, their cameras before they are used."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from small_models import PARAMS, SIZE, binary, cloud, text, write_model

from ttt_lib.core.errors import DataError
from ttt_lib.data.photographs import colmap
from ttt_lib.data.photographs.colmap_files import find_model, list_model
from ttt_lib.data.photographs.load import load_scene
from ttt_lib.data.photographs.scene import track_points


@pytest.mark.parametrize("files", [binary, text])
def test_a_model_says_what_it_holds(tmp_path, files):
    write_model(tmp_path, files())
    listing = list_model(find_model(tmp_path))
    assert listing.images == {k + 1: (f"p{k}.png", 1) for k in range(4)} and listing.points == 150 and not listing.own
    assert (listing.lenses[1].model, listing.lenses[1].params) == ("PINHOLE", PARAMS)
    scene = load_scene(tmp_path)
    assert [p.name for p in scene.photographs] == ["p0", "p1", "p2", "p3"] and not scene.refused
    xyz, uv = cloud()
    for k, photograph in enumerate(scene.photographs):
        tracks = photograph.tracks
        inside = ((uv[k] >= 0) & (uv[k] <= SIZE)).all(-1)
        assert tracks.track_id.tolist() == np.flatnonzero(inside).tolist()
        assert torch.allclose(tracks.uv.double(), torch.from_numpy(uv[k][inside] / SIZE), atol=1e-6)
        assert torch.allclose(tracks.depth.double(), torch.from_numpy(xyz[inside, 2]), atol=1e-6)
        assert photograph.pose[0, 3] == pytest.approx(-0.3 * k)


def test_photographs_are_in_the_order_of_their_names(tmp_path):
    files = text()
    folder = write_model(tmp_path, {**files, "images.txt": files["images.txt"].replace(b"p0.png", b"p10.png")})
    (folder / "images" / "p0.png").rename(folder / "images" / "p10.png")
    scene = load_scene(folder)
    assert [p.name for p in scene.photographs] == ["p1", "p2", "p3", "p10"]
    assert [float(p.pose[0, 3]) for p in scene.photographs] == pytest.approx([-0.3, -0.6, -0.9, 0])
    assert torch.equal(scene.photographs[3].image, torch.tensor([0, 90, 120]).view(3, 1, 1).expand(3, 120, 160) / 255)
    _, uv = cloud()
    inside = ((uv[0] >= 0) & (uv[0] <= SIZE)).all(-1)
    assert torch.allclose(scene.photographs[3].tracks.uv.double(), torch.from_numpy(uv[0][inside] / SIZE), atol=1e-6)


def test_geographic_coordinates_keep_their_precision(tmp_path):
    files = binary()
    images, points = bytearray(files["images.bin"]), bytearray(files["points3D.bin"])
    east = 4.5e6
    for k in range(4):
        at = images.index(f"p{k}.png".encode()) - 28  # of the translation
        images[at : at + 8] = struct.pack("<d", -0.3 * k - east)
    for i in range(150):
        at = 8 + i * (43 + 8 + 32) + 8
        points[at : at + 8] = struct.pack("<d", struct.unpack("<d", points[at : at + 8])[0] + east)
    write_model(tmp_path, {**files, "images.bin": bytes(images), "points3D.bin": bytes(points)})
    scene = load_scene(tmp_path)
    assert scene.about["origin"] == [east, 0, 0]
    places = [-float(p.pose[0, 3]) for p in scene.photographs]
    assert places == pytest.approx([0, 0.3, 0.6, 0.9], abs=1e-6)
    points_ = [track_points(p)[0] for p in scene.photographs]
    assert all(torch.allclose(p, points_[0], atol=1e-5) for p in points_)


def test_of_several_models_the_one_with_most_images_is_read(tmp_path):
    files = binary()
    few = b"".join([struct.pack("<Q", 1), files["images.bin"][8 : 8 + (len(files["images.bin"]) - 8) // 4]])
    empty = {"cameras.bin": files["cameras.bin"], "points3D.bin": bytes(8)}
    write_model(tmp_path / "sparse" / "0", {**empty, "images.bin": few})
    write_model(tmp_path / "sparse" / "1", files)
    write_model(tmp_path, {})
    scene = load_scene(tmp_path)
    assert len(scene.photographs) == 4 and [name for name, _ in scene.left_out] == ["sparse/0"]


def huge(content: bytes, at: int) -> bytes:
    return content[:at] + struct.pack("<Q", 2**61) + content[at + 8 :]


COUNTS = [("cameras.bin", 0), ("images.bin", 0), ("images.bin", 8 + 64 + 7), ("points3D.bin", 0), ("points3D.bin", 51)]


@pytest.mark.parametrize("name, at", COUNTS)
def test_counts_beyond_the_file_are_no_counts(tmp_path, name, at, monkeypatch):
    monkeypatch.setattr(colmap, "apart", None)  # pycolmap must not see it
    files = binary()
    assert huge(files[name], at) != files[name]
    write_model(tmp_path, {**files, name: huge(files[name], at)})
    with pytest.raises(DataError, match=f"{name}.*cut off"):
        load_scene(tmp_path)


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin", "points3D.bin"])
def test_files_that_are_cut_off(tmp_path, name, monkeypatch):
    monkeypatch.setattr(colmap, "apart", None)
    files = binary()
    for length in (0, 4, 20, len(files[name]) // 2, len(files[name]) - 1):
        write_model(tmp_path, {**files, name: files[name][:length]})
        with pytest.raises(DataError, match=name):
            load_scene(tmp_path)


CHANGES = {
    "negative size": ("cameras.txt", b"160 120", b"-160 120"),
    "no size": ("cameras.txt", b"160 120", b"0 120"),
    "huge size": ("cameras.txt", b"160 120", b"99999999999 120"),
    "focal nan": ("cameras.txt", b"140.0 140.0", b"nan 140.0"),
    "few parameters": ("cameras.txt", b"140.0 140.0 80.0", b"140.0"),
    "unknown kind": ("cameras.txt", b"PINHOLE", b"KALEIDOSCOPE"),
    "camera that is not there": ("images.txt", b"0 0 1 p1.png", b"0 0 7 p1.png"),
    "the same image twice": ("images.txt", b"2 1 0 0 0", b"1 1 0 0 0"),
    "no number": ("images.txt", b"2 1 0 0 0", b"two 1 0 0 0"),
    "too few values": ("images.txt", b" 0 0 1 p1.png", b""),
    "no text": ("points3D.txt", b"1 2 3 0.1", b"\xff\xfe\0"),
    "image that is not there": ("points3D.txt", b" 2 0 ", b" 77 0 "),
    "place that is not there": ("points3D.txt", b" 2 0 ", b" 2 99999 "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_models_that_contradict_themselves(tmp_path, change):
    name, old, new = CHANGES[change]
    files = text()
    assert old in files[name]
    write_model(tmp_path, {**files, name: files[name].replace(old, new, 1)})
    with pytest.raises(DataError, match=str(tmp_path)):
        load_scene(tmp_path)


def test_images_whose_cameras_cannot_be_are_left_out_by_name(tmp_path):
    files = binary()
    start = [files["images.bin"].index(f"p{k}.png".encode()) - 60 for k in range(4)]  # of the rotation
    images = bytearray(files["images.bin"])
    images[start[1] : start[1] + 8] = struct.pack("<d", np.nan)
    images[start[2] + 32 : start[2] + 40] = struct.pack("<d", 1e300)  # of the place
    points = bytearray(files["points3D.bin"])
    points[16:24] = struct.pack("<d", np.inf)
    write_model(tmp_path, {**files, "images.bin": bytes(images), "points3D.bin": bytes(points)})
    scene = load_scene(tmp_path)
    assert [p.name for p in scene.photographs] == ["p0", "p3"]
    assert [name for name, why in scene.left_out if "pose" in why] == ["p1", "p2"]
    assert 0 not in scene.track_ids() and len(scene.track_ids()) > 50
    assert all(torch.isfinite(p.tracks.depth).all() for p in scene.photographs)


@pytest.mark.parametrize("camera", [b"0.9 80 60", b"140 0.5 0.5", b"0.9 0.5 0.5", b"140 80 1e9", b"14000 80 60"])
def test_a_camera_of_which_a_part_is_not_in_pixels_is_none(tmp_path, camera):
    write_model(tmp_path, {**text(), "cameras.txt": b"1 SIMPLE_PINHOLE 160 120 " + camera + b"\n"})
    scene = load_scene(tmp_path)
    assert "has a camera that cannot be" in scene.refused and len(scene.left_out) == 4, (scene.refused, scene.left_out)


def test_a_fisheye_lens_is_refused(tmp_path):
    files = text()
    cameras = b"1 OPENCV_FISHEYE 160 120 140 140 80 60 0 0 0 0\n"
    write_model(tmp_path, {**files, "cameras.txt": cameras})
    scene = load_scene(tmp_path)
    assert "fisheye" in scene.refused and len(scene.left_out) == 4 and len(scene.photographs) == 4
    (tmp_path / "points3D.txt").unlink()
    with pytest.raises(DataError, match="fisheye"):
        load_scene(tmp_path)


def test_photographs_that_are_not_there_are_said(tmp_path):
    folder = write_model(tmp_path, binary())
    (folder / "images" / "p1.png").unlink()
    (folder / "images" / "p2.png").write_bytes(b"none")
    scene = load_scene(folder)
    assert [p.name for p in scene.photographs] == ["p0", "p3"]
    assert [name for name, _ in scene.left_out] == ["p1.png", "p2"]
    (folder / "images" / "p3.png").unlink()
    assert "fewer than two" in load_scene(folder).refused
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="0 are in.*give the folder"):
        load_scene(folder)
