"""Two real photographs become tracks whose depth is right up to one scale, the same each time; copies tell nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from rendered_walls import depth_error

from ttt_lib.core.errors import DataError
from ttt_lib.data.motorcycle import open_motorcycle
from ttt_lib.data.photographs import reconstruct as module
from ttt_lib.data.photographs.job import Failed, Picture, apart
from ttt_lib.data.photographs.reconstruct import reconstruct
from ttt_lib.data.photographs.scene import split


@pytest.fixture(scope="module")
def samples():
    return [open_motorcycle(width=384, height=256)[i] for i in range(2)]


def pictures(samples):
    return [Picture(s.name, s.image, focal=float(s.intrinsics[0, 0])) for s in samples]


@pytest.fixture(scope="module")
def scene(samples):
    return reconstruct(pictures(samples), seed=1)


def test_depth_of_the_tracks_is_that_of_the_truth_up_to_scale(samples, scene):
    assert not scene.refused and [p.name for p in scene.photographs] == [s.name for s in samples]
    for photograph, sample in zip(scene.photographs, samples, strict=True):
        assert len(photograph.tracks) > 200 and photograph.tracks.filled_cells() >= 8
        assert depth_error(photograph.tracks, sample.depth) < 0.03  # half a pixel of disparity at this size
        assert bool(((photograph.tracks.weight > 0) & (photograph.tracks.weight <= 1)).all())


def test_the_same_seed_gives_the_same_scene_however_much_is_done_side_by_side(samples, scene, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    again = reconstruct(pictures(samples), seed=1)
    assert again.about == scene.about
    for one, other in zip(scene.photographs, again.photographs, strict=True):
        assert torch.equal(one.tracks.uv, other.tracks.uv) and torch.equal(one.tracks.depth, other.tracks.depth)
        assert torch.equal(one.pose, other.pose) and torch.equal(one.intrinsics, other.intrinsics)


def test_held_back_tracks_are_held_back_in_every_photograph(scene):
    used, held = split(scene, 0.3, torch.Generator().manual_seed(0))
    seen = [{int(i) for p in part.photographs for i in p.tracks.track_id} for part in (used, held)]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == {int(i) for i in scene.track_ids()}
    assert 0.2 < len(seen[1]) / len(scene.track_ids()) < 0.4


def test_copies_and_one_photograph_alone_tell_nothing(samples):
    one = pictures(samples)[0]
    refused = reconstruct([one, Picture("again", one.source, focal=one.focal)])
    assert "copy" in refused.refused and all(len(p.tracks) == 0 for p in refused.photographs)
    with pytest.raises(DataError, match="at least two"):
        reconstruct([one])


def test_how_the_other_process_ends_is_said(samples, tmp_path, monkeypatch):
    with pytest.raises(Failed, match="it took longer than 0 s"):
        apart("mapping.read", 0.001, tmp_path, 2**31)
    with pytest.raises(Failed, match="Error: "):  # the last line of what it said
        apart("mapping.read", 60, tmp_path / "none", 2**31)

    def fail(*_):
        raise Failed("the reconstruction program was ended by signal 9")

    monkeypatch.setattr(module, "apart", fail)
    refused = reconstruct(pictures(samples))
    assert "could not be compared" in refused.refused and "signal 9" in refused.refused
    assert [p.name for p in refused.photographs] == [s.name for s in samples]


@pytest.mark.skipif(sys.platform != "linux", reason="one process looks for all features")
def test_a_process_that_found_no_features_ends_the_job_with_a_sentence(samples, monkeypatch):
    own = module._write_gray

    def forget(image, path):
        told = own(image, path)
        if path.name == "gray_1.npy":
            path.unlink()
        return told

    monkeypatch.setattr(module, "_write_gray", forget)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    refused = reconstruct(pictures(samples))
    assert "could not be compared (RuntimeError: the search for features ended with 1)" in refused.refused
