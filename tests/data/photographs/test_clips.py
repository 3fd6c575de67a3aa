"""Clips: sharp frames near evenly spread places, turned as the file says; what is no clip ends in a sentence."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_clips import window, write_clip, write_sound

from ttt_lib.core.errors import DataError
from ttt_lib.data.photographs import clips, load
from ttt_lib.data.photographs.clips import choose, read_clip
from ttt_lib.data.photographs.load import load_scene
from ttt_lib.data.photographs.scene import Scene


def places(clip):
    return [int(picture.name.rpartition("_")[2]) for picture in clip.pictures]


CODECS = {"mp4": "libx264", "mov": "mpeg4", "avi": "mpeg4", "mkv": "ffv1", "webm": "libvpx"}


@pytest.mark.parametrize("suffix, codec", CODECS.items())
def test_frames_are_spread_and_in_order(tmp_path, suffix, codec):
    frames = window(30)
    clip = read_clip(write_clip(tmp_path / f"c.{suffix}", frames, codec), count=5)
    assert clip.frames == 30 and len(clip.pictures) == 5
    assert all(abs(place - middle) <= 2 for place, middle in zip(places(clip), [3, 9, 15, 21, 27]))
    for place, picture in zip(places(clip), clip.pictures):
        truth = torch.from_numpy(frames[place]).permute(2, 0, 1) / 255
        assert (picture.read() - truth).abs().mean() < 0.06, "another frame than its name says"


def test_blurred_frames_are_passed_over(tmp_path):
    path = write_clip(tmp_path / "c.mkv", window(30, blurred=(3, 4, 10, 15, 16, 27)), "ffv1")
    for options in ({"count": 5}, {"every": 5}):
        assert not set(places(read_clip(path, **options))) & {3, 4, 10, 15, 16, 27}
    assert places(read_clip(path, every=10, count=2))[0] in (0, 1, 2)
    assert len(read_clip(path).pictures) == clips.USUAL_COUNT


def test_choice_of_places():
    assert choose(np.zeros(3), None, 10) == [0, 1, 2] and choose(np.zeros(100), 50, None) == [0, 38]
    assert choose(np.arange(8.0), 1, None) == list(range(8))


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_a_turned_clip_is_seen_upright(tmp_path, degrees):
    frames = window(4)
    clip = read_clip(write_clip(tmp_path / "c.mov", frames, "libx264", rotation=degrees), every=2, focal=0.9)
    truth = np.rot90(frames[places(clip)[1]], degrees // 90).copy()
    assert (clip.pictures[1].read() - torch.from_numpy(truth).permute(2, 0, 1) / 255).abs().mean() < 0.06
    assert clip.pictures[1].focal == 0.9 and clip.pictures[1].exact


def test_pixels_become_square(tmp_path):
    path = write_clip(tmp_path / "c.mkv", window(4), aspect=Fraction(4, 3))
    assert read_clip(path).pictures[0].read().shape == (3, 96, round(128 * 4 / 3))


def test_a_long_clip_is_read_by_its_key_frames(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "c.mp4", window(60), key=5)
    monkeypatch.setattr(clips, "LONG", 1000)
    assert read_clip(path, count=3).frames == 12  # of 60
    assert read_clip(path, count=10).frames == 60  # too few key frames for so many
    monkeypatch.setattr(clips, "BUDGET", 20 * clips.LEAST)
    assert read_clip(path, every=2).frames <= 24  # of a clip without end the beginning


def test_frames_last_as_long_as_their_pictures(tmp_path):
    clip = read_clip(write_clip(tmp_path / "c.mp4", window(8)), count=2)
    source = clip.pictures[1].source
    folder = Path(source.args[0]).parent
    again = pickle.loads(pickle.dumps(source))
    copied = copy.deepcopy(clip)
    del clip
    gc.collect()
    assert torch.equal(again(), source())
    del source
    gc.collect()
    assert torch.equal(again(), copied.pictures[1].read())
    del copied
    gc.collect()
    assert not os.path.exists(folder)


def test_what_is_no_clip_ends_in_a_sentence(tmp_path):
    whole = write_clip(tmp_path / "c.mp4", window(20), "libx264").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'c.mp4'}\n")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'c.mp4'}\n#EXT-X-ENDLIST\n")
    write_clip(tmp_path / "one.mp4", window(1))
    for name in ("cut.mp4", "empty.mp4", "list.mp4", "list.m3u8", "one.mp4"):
        with pytest.raises(DataError, match=name):
            read_clip(tmp_path / name)
    with pytest.raises(DataError, match="no moving pictures"):
        read_clip(write_sound(tmp_path / "s.mp4"))
    with pytest.raises(DataError, match="no such file"):
        read_clip(tmp_path / "none.mp4")


def test_a_clip_that_was_cut_off_gives_what_it_holds(tmp_path):
    content = write_clip(tmp_path / "c.mkv", window(30), "mpeg4").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) * 2 // 3])
    assert 10 < read_clip(tmp_path / "cut.mkv").frames < 30


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_pictures_that_move_are_clips(tmp_path, suffix):
    frames = [Image.fromarray(frame) for frame in window(12)]
    path = tmp_path / f"c.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    clip = read_clip(path, every=4)
    assert clip.frames == 12 and len(clip.pictures) == 3
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    try:
        assert 2 <= read_clip(path).frames < 12
    except DataError as error:
        assert suffix == "webp", error  # which is decoded as a whole
    frames[0].save(path)
    with pytest.raises(DataError, match="one photograph"):
        load_scene(path)


def test_a_clip_as_a_scene(tmp_path, monkeypatch):
    given = {}

    def note(pictures, seed, in_order, straight):
        given.update(pictures=pictures, in_order=in_order)
        return Scene([])

    monkeypatch.setattr(load, "reconstruct", note)
    path = write_clip(tmp_path / "c.mp4", window(6))
    load_scene(path, count=3, prior=lambda image: image.shape[2] / 100)
    assert given["in_order"] and [(p.focal, p.exact) for p in given["pictures"]] == [(1.28, False)] * 3
    load_scene(path, focal=0.9)
    assert len(given["pictures"]) == 6 and given["pictures"][0].focal == 0.9
