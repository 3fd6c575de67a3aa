"""Depth that photographs measure between each other, against the truth of rendered scenes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from true_scene import true_scene

from ttt_lib.data.photographs.measured import BEHIND, bounds, certain, confirmed, measure_depth, without_patches
from ttt_lib.data.photographs.scene import Tracks
from ttt_lib.data.photographs.stereo import LEAST, neighbours, to_gray


@pytest.fixture(scope="module")
def rendered():
    return true_scene(seed=3, views=3, size=(240, 320), scale=0.25)


def errors(depth, sample, scale=0.25):
    known = torch.isfinite(depth) & sample.mask
    return (depth / (sample.depth * scale))[known].log().abs(), float(known.float().mean())


def test_most_of_the_picture_is_measured_in_the_scale_of_the_cameras(rendered):
    scene, samples = rendered
    grays = [to_gray(photograph) for photograph in scene.photographs]
    for number, sample in enumerate(samples):
        error, share = errors(measure_depth(grays, number)[0].depth, sample)
        # a disparity of some 20 pixels to a quarter of one: a per cent
        assert share > 0.5 and error.median() < 0.02 and (error > 0.22).float().mean() < 0.01


def test_what_lies_beside_a_step_or_a_hole_is_not_certain():
    depth = torch.full((40, 40), 2.0)
    depth[:, 20:] = 3.0
    depth[:10, :10] = torch.nan
    depth[30, 5] = torch.nan  # a single pixel takes nothing with it
    kept = torch.isfinite(certain(depth))
    assert not kept[:, 18:22].any() and kept[12:, 23:37].all() and kept[13:29, 1:17].all()
    assert not kept[8:11, 2:8].any() and kept[31, 5] and not kept[30, 5]
    assert not torch.isfinite(certain(torch.full((9, 9), torch.nan))).any()


def test_islands_that_no_track_confirms_are_dropped():
    depth = torch.full((40, 60), torch.nan)
    depth[:, :20], depth[:4, 30:34], depth[30:33, 50:53], depth[20:23, 50:53] = 2.0, 5.0, 3.0, 3.0
    uv = torch.tensor([[0.53, 0.05], [0.85, 0.78], [0.85, 0.53], [0.7, 0.6]])
    tracks = Tracks(uv, torch.tensor([2.0, 3.1, 9.0, 1.0]), torch.arange(4), torch.ones(4))
    kept = torch.isfinite(confirmed(depth, tracks))
    assert kept[:, :20].all() and kept[30:33, 50:53].all()  # large, or met by a track
    assert int(kept.sum()) == 40 * 20 + 9  # a track at another depth confirms nothing
    assert int(torch.isfinite(confirmed(depth, Tracks.none())).sum()) == 40 * 20


def test_a_disparity_bounds_the_depth_by_half_a_pixel():
    disparity, pixel = torch.full((40, 60), torch.nan), torch.full((40, 60), 10.0)
    disparity[:, :20], disparity[:, 20:40] = 2.0, 0.1
    disparity[10:14, 48:52] = 2.0  # a speck
    tracks = Tracks(torch.rand(50, 2), torch.full((50,), 7.0), torch.arange(50), torch.ones(50))
    nearest, farthest = bounds([(disparity, pixel)], tracks)
    inner = (slice(4, -4), slice(4, 16))
    assert torch.allclose(nearest[inner], torch.tensor(4.0)) and torch.allclose(farthest[inner], torch.tensor(10 / 1.5))
    # less than half a pixel may be infinitely far, but is not said to be far behind all tracks
    assert torch.allclose(nearest[4:-4, 22:36], torch.tensor(BEHIND * 7)) and farthest[4:-4, 22:36].isinf().all()
    assert not nearest[:, 44:].any() and farthest[:, 44:].isinf().all() and not nearest[0].any()
    assert not bounds([(disparity * 100, pixel)], tracks)[0][:, :20].any()  # what is near is measured or wrong


def test_patches_of_plain_surfaces_bound_nothing():
    disparity = torch.full((60, 80), torch.nan)
    disparity[:30], disparity[40:44, 10:16], disparity[50:, 40:] = torch.linspace(1, 20, 80), 1.0, -1500.0
    disparity[10:14, 60:66] = 1.0  # in the middle of others, but apart from them in depth
    kept = torch.isfinite(without_patches(disparity))
    assert kept[:30, :58].all() and not kept[10:14, 60:66].any() and not kept[40:44].any()


def test_two_of_several_neighbours_have_to_bound_the_depth():
    pixel, tracks = torch.full((40, 60), 10.0), Tracks(torch.rand(50, 2), torch.full((50,), 7.0), torch.arange(50),
                                                       torch.ones(50))  # fmt: skip
    near, middle, none = ((torch.full((40, 60), value), pixel) for value in (3.5, 3.0, torch.nan))
    nearest, farthest = bounds([near, middle, none], tracks)
    assert nearest[20, 30] == pytest.approx(10 / 4.0) and farthest[20, 30] == pytest.approx(10 / 2.5)
    assert bounds([near, none], tracks)[0][20, 30] == 0 and bounds([near, none], tracks)[1][20, 30].isinf()
    wide = (torch.full((40, 60), 4.5), pixel)
    nearest, farthest = bounds([near, wide, none], tracks)  # all that two of them allow
    assert nearest[20, 30] == pytest.approx(10 / 5.0) and farthest[20, 30] == pytest.approx(10 / 3.0)


def test_bounds_hold_the_truth(rendered):
    scene, samples = rendered
    grays = [to_gray(photograph) for photograph in scene.photographs]
    for number, sample in enumerate(samples):
        measured, true = measure_depth(grays, number)[0], 0.25 * sample.depth
        said = sample.mask & (measured.nearest > 0)
        inside = (measured.nearest <= true) & (true <= measured.farthest)
        assert said.float().mean() > 0.05 and inside[said].float().mean() > 0.95


def test_two_photographs_measure_each_other(rendered):
    scene, samples = rendered
    grays = [to_gray(photograph) for photograph in scene.photographs[:2]]
    assert neighbours(grays, 0) == [1] and neighbours(grays, 1) == [0]
    error, share = errors(measure_depth(grays, 0)[0].depth, samples[0])
    assert share > 0.4 and error.median() < 0.03


def test_a_narrow_neighbour_is_asked_only_where_there_is_no_other(rendered):
    """It measures nothing far away, and what only one of two neighbours measures is dropped."""
    scene, _ = rendered
    own, wide = (to_gray(photograph) for photograph in scene.photographs[:2])
    depth = float(own.tracks.depth.median())
    narrow = replace(wide, centre=own.centre + [0.02 * depth, 0, 0])  # 1.1 degrees: five pixels
    assert own.matrix[0, 0] * 0.02 > LEAST
    assert neighbours([own, wide, narrow], 0) == [1] and neighbours([own, narrow], 0) == [1]
    assert neighbours([own, replace(narrow, centre=own.centre + [0.01 * depth, 0, 0])], 0) == []


def test_nothing_is_measured_where_nothing_can_be(rendered):
    scene, _ = rendered
    own, other = scene.photographs[:2]
    copy = replace(other, pose=own.pose)  # from the same place
    assert measure_depth([to_gray(own), to_gray(copy)], 0)[0] is None
    ahead = own.pose.clone()
    ahead[2, 3] -= 0.1 * float(own.tracks.depth.median())  # straight ahead
    assert measure_depth([to_gray(own), to_gray(replace(other, pose=ahead))], 0)[0] is None
    stranger = replace(other, tracks=Tracks.none())
    assert measure_depth([to_gray(own), to_gray(stranger)], 0)[0] is None


def test_a_map_that_misses_the_tracks_is_dropped(rendered):
    scene, _ = rendered
    photographs = [replace(p, source=p.image.flip(-1)) if number else p for number, p in enumerate(scene.photographs)]
    assert (
        measure_depth([to_gray(photograph) for photograph in photographs], 0)[0] is None
    )  # other pictures than the cameras'


def test_tracks_of_something_else_are_not_met(rendered):
    scene, _ = rendered
    order = torch.randperm(len(scene.photographs[0].tracks), generator=torch.Generator().manual_seed(0))
    tracks = replace(scene.photographs[0].tracks, depth=scene.photographs[0].tracks.depth[order])
    grays = [to_gray(replace(scene.photographs[0], tracks=tracks)), *map(to_gray, scene.photographs[1:])]
    measured, meets = measure_depth(grays, 0)
    assert measured is None and meets < 0.5


def test_a_turned_camera_changes_nothing(rendered):
    scene, samples = rendered
    turned = []
    for photograph in scene.photographs:  # pictures a quarter turn to the left, as a phone held upright
        quarter = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        (fx, _, cx), (_, fy, cy), _ = photograph.intrinsics.tolist()
        camera = torch.tensor([[fy, 0, cy], [0, fx, 1 - cx], [0, 0, 1]])
        tracks = replace(
            photograph.tracks, uv=torch.stack([photograph.tracks.uv[:, 1], 1 - photograph.tracks.uv[:, 0]], -1)
        )
        turned.append(replace(photograph, source=photograph.image.rot90(1, (1, 2)), pose=quarter @ photograph.pose,
                              intrinsics=camera, tracks=tracks))  # fmt: skip
    measured, meets = measure_depth([to_gray(photograph) for photograph in turned], 0)
    error, share = errors(measured.depth.rot90(-1), samples[0])
    assert share > 0.5 and error.median() < 0.02 and meets > 0.95
