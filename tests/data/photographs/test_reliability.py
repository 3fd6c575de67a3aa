"""What deceives a reconstruction is refused with its cause; wrong guesses of the focal length do no harm."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rendered_walls import FOCAL, camera, depth_error, poster, render, walk

from ttt_lib.data.photographs import agreement, focal
from ttt_lib.data.photographs.focal import Belief, combine, expected
from ttt_lib.data.photographs.job import AMPLE, SCANT, Job, Picture, Refusal
from ttt_lib.data.photographs.matching import MIN_MATCHES, TWINS, _leave_out_strangers, _twins
from ttt_lib.data.photographs.reconstruct import reconstruct
from ttt_lib.data.photographs.signals import AHEAD_ANGLE, least_parallax
from ttt_lib.data.scenes.failures import FAILURES


def pictures(views, **known):
    return [Picture(f"view_{k}", view.image, **known) for k, view in enumerate(views)]


def errors(scene, views):
    return [depth_error(p.tracks, views[int(p.name[5:])].depth) for p in scene.photographs]


@pytest.fixture(scope="module")
def views():
    return walk(3)


@pytest.mark.parametrize("given", [None, 0.45, 2.0])
def test_a_wrong_guess_of_the_focal_length_does_not_bend_the_scene(views, given):
    scene = reconstruct(pictures(views, focal=given))
    assert not scene.refused and len(scene.photographs) == 3
    assert scene.about["focal"][0] == pytest.approx(FOCAL, rel=0.15)  # STEP: from there on it fits worse
    assert max(errors(scene, views)) < 0.03 and scene.about["agreement"] < 0.02


def test_two_photographs_need_a_focal_length_where_the_depth_hangs_on_it(views):
    refused = reconstruct(pictures(views[:2]))
    assert "focal length" in refused.refused and refused.about["focal_doubt"] > 0.04
    known = reconstruct(pictures(views[:2], focal=FOCAL, exact=True))
    assert not known.refused and max(errors(known, views)) < 0.03


def test_tracks_say_how_another_focal_length_would_bend_them(views):
    guessed, exact = (reconstruct(pictures(views, focal=FOCAL, exact=exact)) for exact in (False, True))
    doubts = [torch.cat([p.tracks.bent for p in scene.photographs]).abs() for scene in (guessed, exact)]
    assert doubts[0].shape == (sum(len(p.tracks) for p in guessed.photographs), 2)
    assert 0 < doubts[1].mean() < doubts[0].mean() < 0.2  # a hundredth of the focal length in EXIF, more in a guess
    for photograph in guessed.photographs:
        longer, shorter = (tracks.depth for tracks in photograph.tracks.otherwise())
        assert (longer / photograph.tracks.depth).log() == pytest.approx(photograph.tracks.bent[:, 0], abs=1e-5)
        assert len(shorter) == len(photograph.tracks)
        assert torch.equal(photograph.tracks[:9].bent, photograph.tracks.bent[:9])


def test_frames_of_a_drive_are_reconstructed():
    views = [render(camera(x=0.3, z=0.4 * k), noise=k) for k in range(4)]
    scene = reconstruct(pictures(views), in_order=True)
    assert not scene.refused and scene.about["forward"] and max(errors(scene, views)) < 0.03


@pytest.mark.parametrize("what", ["poster", "turn"])
def test_what_is_flat_and_cameras_that_turn_are_refused(what):
    turned = [render(camera(turn=-6.0 * k), noise=k) for k in range(3)] if what == "turn" else None
    refused = reconstruct(pictures(turned or walk(3, world=poster()))).refused
    assert "only turned" in refused and "flat" in refused


def test_a_pattern_that_repeats_is_refused():
    tile = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)).repeat_interleave(3, 1)
    wall = tile.repeat_interleave(3, 2).repeat(1, 4, 6)
    views = [Picture(str(k), wall[:, 10 * k : 10 * k + 216, 17 * k : 17 * k + 320]) for k in range(3)]
    assert "again and again" in reconstruct(views).refused


def test_photographs_from_nearly_one_place_are_refused_for_that():
    """Far points with few pixels between their rays count, or so few are left that these look as if they had moved."""
    refused = reconstruct(pictures([render(camera(x=0.05 * k), noise=k) for k in range(2)], focal=FOCAL))
    assert "nearly the same place" in refused.refused and refused.about["explained"] > 0.95


def test_little_parallax_is_enough_where_it_is_pixels_enough():
    """A second reconstruction takes what the first one leaves out: a degree is much for what is far away."""
    views = [render(camera(x=0.1 * k), noise=k) for k in range(2)]
    scene = reconstruct(pictures(views, focal=FOCAL, exact=True))
    assert scene.about["seen_parallax"] < AMPLE.least  # 4.4 pixels
    assert not scene.refused and len(scene.photographs) == 2 and max(errors(scene, views)) < 0.05
    assert scene.about["second_try"]


@pytest.mark.parametrize(("sure", "count", "tries"), [(False, 2, 2), (True, 2, 1), (False, focal.MANY + 1, 1)])
def test_a_second_try_is_for_what_more_points_may_mend(monkeypatch, sure, count, tries):
    needed = []

    def refuse(job):
        needed.append(job.needed)
        job.about["flat"] = 0.5
        raise Refusal(f"because, {len(needed)}", sure)

    monkeypatch.setattr(agreement, "match", lambda job: None)
    monkeypatch.setattr(agreement, "_agreed", refuse)
    job = SimpleNamespace(kept=list(range(count)), needed=AMPLE, about={"focal": [1.0]}, refused="")
    agreement.reconstruct(job)
    assert needed == [AMPLE, SCANT][:tries] and job.refused == f"because, {tries}"
    assert ("second_try" in job.about) == (tries == 2) and ("focal" in job.about) == (tries == 1)


@pytest.mark.parametrize(("found", "error", "kept"), [(20, 0.0, False), (65, 0.9, True)])
def test_a_fragment_of_a_global_reconstruction_contradicts_nothing(monkeypatch, found, error, kept):
    """With few photographs it may place a handful of points; then another start of the other kind is asked. A whole one
    that fits badly is heard."""
    job = Job(None, ["a", "b"], [], [], 0, pairs=[(0, 1)], inliers=np.array([99]), straight=True, settled=True)
    asked = []

    def attempt(_, focals, number=0, at_once=False, **options):
        asked.append((number, at_once))
        count = 100 if not number else found if at_once else 70
        errors = np.full(count, error if at_once else 0.0)
        return SimpleNamespace(image=np.arange(2), error=errors, name=(number, at_once))

    monkeypatch.setattr(agreement, "attempt", attempt)
    monkeypatch.setattr(agreement, "refitted", lambda model, factor: model)
    monkeypatch.setattr(agreement.signals, "bends", lambda model, others: None)
    _, others = agreement._reconstructions(job, Belief(np.array([0.9]), np.array([0.1])))
    assert [model.name for model in others] == [(1, False), (2, kept)] and (2, True) in asked


@pytest.mark.parametrize(
    ("focal_length", "width", "degrees"),
    [(100, 320, 2.0), (8 / np.radians(1.5), 320, 1.5), (3 * 8 / np.radians(1.5), 3600, 1.5), (5000, 1200, 1.0), (np.nan, 320, 2.0)],
)  # fmt: skip
def test_parallax_counts_in_pixels_of_what_is_matched(focal_length, width, degrees):
    model = SimpleNamespace(intrinsics=np.full((2, 4), focal_length), size=np.full((2, 2), width))
    assert least_parallax(model, ahead=False) == pytest.approx((degrees, 0.75 * degrees))
    assert least_parallax(model, ahead=True) == (AHEAD_ANGLE, AHEAD_ANGLE)
    scant = 0.75 if np.isnan(focal_length) else np.degrees(3 / (focal_length * min(1, 1200 / width)))
    assert least_parallax(model, False, SCANT) == pytest.approx((scant, 0.5 * scant))


@pytest.mark.parametrize(("count", "chosen"), [(990, 1.26), (800, 0.7)])
def test_a_focal_length_that_fits_fewer_points_does_not_fit_better(monkeypatch, count, chosen):
    """Its cost is of those that are left: with the easy ones alone any focal length looks good."""
    monkeypatch.setattr(focal.signals, "disagreement", lambda *_: (0.01, {}))
    model = lambda count, error: SimpleNamespace(image=np.arange(2), error=np.full(count, error))  # noqa: E731
    models = {0: model(1000, 0.30), 1: model(count, 0.25)}
    belief = focal.compared(models, [np.array([0.7]), np.array([1.26])], np.array([focal.GIVEN]))
    assert belief.focals[0] == chosen


def test_what_moves_is_refused():
    samples = FAILURES["moving"](2, (240, 320))
    refused = reconstruct([Picture(s.name, s.image) for s in samples]).refused
    assert "things moved" in refused


def test_a_stranger_is_left_out_by_name_and_the_rest_goes_on(views):
    stranger = render(camera(), world=poster())
    scene = reconstruct([*pictures(views, focal=FOCAL), Picture("stranger", stranger.image)])
    assert not scene.refused and len(scene.photographs) == 3
    assert [name for name, _ in scene.left_out] == ["stranger"] and "something else" in scene.left_out[0][1]


class Matched:
    """As much of a `Job` as the search for strangers needs: two groups, 0 1 2 and 3 4."""

    def __init__(self):
        self.kept, self.left_out = [0, 1, 2, 3, 4], {}
        self.pairs = [(0, 1), (1, 2), (2, 3), (3, 4)]
        self.inliers = np.array([200, 80, MIN_MATCHES - 1, 900])

    def leave_out(self, index, why):
        self.kept.remove(index)
        self.left_out[index] = why


def test_strangers_that_know_each_other_are_strangers():
    job = Matched()
    _leave_out_strangers(job)
    assert job.kept == [0, 1, 2] and set(job.left_out) == {3, 4}


def test_a_focal_length_that_hardly_exists_may_be_one_that_little_parallax_cannot_tell(monkeypatch):
    """A box on a table, seen under a degree, stood still and repeated nothing."""
    found = Belief(np.array([5.03]), np.array([0.05]), model=object())
    monkeypatch.setattr(agreement.focal, "believed", lambda job: found)
    monkeypatch.setattr(agreement, "_check_cameras", lambda job, model: None)
    with pytest.raises(Refusal, match="5.03 of the width.*too little parallax.*turned before.*--focal"):
        agreement._belief(SimpleNamespace(about={}, straight=True))


def test_belief_lies_between_the_guess_and_what_was_found_by_what_each_is_worth():
    before, no = expected([0.9], [False]), np.array([False])
    equal = combine(np.array([1.0]), before, no, spread=focal.GIVEN, bend=0.2)
    assert np.log(equal.focals[0]) == pytest.approx(np.log([0.9, 1.0]).mean())
    assert equal.doubt == pytest.approx(0.2 * focal.GIVEN / np.sqrt(2))
    blind = combine(np.array([1.0]), before, no, spread=100.0, bend=0.2)
    assert blind.focals[0] == pytest.approx(0.9, rel=1e-4) and blind.doubt == pytest.approx(0.2 * focal.GIVEN, rel=1e-4)


def test_a_guess_that_contradicts_the_photographs_is_forgotten_and_exif_is_not():
    found = np.array([0.9])
    guessed = combine(found, expected([2.0], [False]), np.array([False]), spread=0.05, bend=0.2)
    assert guessed.focals[0] == pytest.approx(0.9, rel=0.02)  # 3 % of the way to USUAL_FOCAL: (0.05 / 0.3)^2
    exact = combine(found, expected([2.0], [True]), np.array([True]), spread=0.05, bend=0.2)
    assert exact.focals[0] == pytest.approx(2.0, rel=0.05)


def test_only_what_more_photographs_would_tell_is_ignorance():
    """What features do to every focal length is left to each photograph's decision."""
    at_best, twice = (Belief(np.ones(1), np.array([k * focal.SYSTEMATIC]), bend=0.5) for k in (1, 2))
    assert at_best.ignorance == 0 and twice.doubt == pytest.approx(focal.SYSTEMATIC)
    assert twice.ignorance == pytest.approx(focal.SYSTEMATIC * np.sqrt(3) / 2)
    assert Belief(np.ones(2), np.array([0.01, 0.01]), bend=0.5).ignorance == 0  # EXIF


def test_a_camera_that_hardly_exists_is_known():
    assert focal.is_unlikely(Belief(np.array([2.7]), np.array([0.05])))
    assert not focal.is_unlikely(Belief(np.array([1.9]), np.array([0.05])))


@pytest.mark.parametrize(("alike", "repeats"), [("small", False), ("large", True), ("none", False)])
def test_only_large_features_say_that_a_pattern_repeats(alike, repeats):
    """600 small and 300 large features: speckles look alike in any picture, tiles are alike at every size."""
    rng = np.random.default_rng(0)
    size = np.r_[rng.uniform(1, 2, 600), rng.uniform(4, 9, 300)]
    descriptors = rng.integers(0, 255, (900, 128)).astype(np.uint8)
    chosen = {"small": size < 3, "large": size > 3, "none": size < 0}[alike]
    descriptors[chosen] = descriptors[0]
    share = _twins(rng.uniform(0, 640, (900, 2)), descriptors, np.argsort(-size))
    assert (share > TWINS) == repeats and (share > 0.95 or share < 0.05)
