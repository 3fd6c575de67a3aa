"""What held-back tracks cannot tell: depths that lie beyond all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from true_scene import unbounded

from ttt_lib.adaptation.photographs.decision import AFFORDABLE, RISK, beyond, choose, losses_elsewhere
from ttt_lib.adaptation.photographs.evidence import Evidence, corrected
from ttt_lib.core.types import Prediction
from ttt_lib.data.photographs.scene import Photograph, Tracks
from ttt_lib.geometry.cameras import unproject

CAMERA = torch.tensor([[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]])
SIZE = 64


def ramp(far: float, rows: int) -> Prediction:
    """Depth 1 at the bottom to 3; in the highest rows `far`."""
    depth = torch.linspace(3, 1, SIZE)[:, None].repeat(1, SIZE)
    depth[:rows] = far
    return Prediction(
        unproject(depth, CAMERA), depth, torch.ones(SIZE, SIZE, dtype=torch.bool), CAMERA, "scale_invariant"
    )


def tracks_on(depth: torch.Tensor, rows: int, count: int = 400) -> Tracks:
    """Tracks at pixel centres below `rows`, with the depth that is there."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(rows, SIZE, (count,), generator=generator)
    column = torch.randint(0, SIZE, (count,), generator=generator)
    uv = (torch.stack([column, row], -1) + 0.5) / SIZE
    return Tracks(uv, depth[row, column], torch.arange(count), torch.ones(count))


def test_the_share_beyond_the_tracks():
    far = ramp(30.0, 16)
    assert abs(beyond(far, tracks_on(far.depth, 16)) - 0.25) < 0.03  # the hill, and what a hundredth leaves
    assert beyond(far, tracks_on(far.depth, 0)) < 0.03
    far.mask[:16] = False  # sky
    assert beyond(far, tracks_on(far.depth, 16)) < 0.03
    assert beyond(far, Tracks.none()) == 0


def judged(bend: float, far: float):
    """The decision about a prediction that is off by up to `bend` where there are tracks; `far`: of a quarter without."""
    true = ramp(far, 16)
    wave = bend * torch.linspace(0, 12, SIZE).sin()[None]
    bent = Prediction(true.points, true.depth * wave.exp(), true.mask, CAMERA, "scale_invariant")
    every = tracks_on(true.depth, 16)
    evidence = Evidence(Photograph("a", torch.zeros(3, SIZE, SIZE), CAMERA), every[:280], every[280:])
    return choose(bent, {"corrected": true}, evidence, torch.Generator().manual_seed(0))


def test_a_small_gain_does_not_outweigh_what_no_track_sees():
    small = judged(0.05, 30.0)
    assert small.choice == "original" and small.signals["beyond"] > 0.2 and small.signals["held_back_corrected"] < 0.01
    assert judged(0.05, 2.4).choice == "corrected"  # the same gain where nothing lies beyond
    large = judged(0.3, 30.0)
    assert large.choice == "corrected"
    gain = large.signals["held_back_original"] - large.signals["held_back_corrected"]
    assert gain > RISK * large.signals["beyond"]


@pytest.mark.parametrize("largest, choice", [(0.0, "corrected"), (0.04, "corrected"), (0.3, "original")])
def test_what_hangs_on_the_focal_length_is_not_believed_for_a_small_gain(largest, choice):
    """A model that sees what is far nearer than the tracks do, which another focal length bends by `largest` there."""
    true = ramp(3.0, 0)
    behind = ((true.depth - 1) / 2) ** 4
    model = Prediction(true.points, true.depth * (-0.2 * behind).exp(), true.mask, CAMERA, "scale_invariant")
    every = tracks_on(true.depth, 0)
    bend = largest * ((every.depth - 1) / 2) ** 4
    every = replace(every, bent=torch.stack([bend, -bend], -1))
    evidence = Evidence(Photograph("a", torch.zeros(3, SIZE, SIZE), CAMERA), every[:280], every[280:])
    found = choose(model, {"corrected": true}, evidence, torch.Generator().manual_seed(0))
    assert found.choice == choice and ("focal length" in found.reason) == (choice == "original")
    gain = found.signals["held_back_original"] - found.signals["held_back_corrected"]
    assert (found.signals["lost_elsewhere_corrected"] > AFFORDABLE * gain) == (choice == "original")
    known = replace(evidence, held=replace(every[280:], bent=None))
    assert losses_elsewhere(model, {"corrected": true}, known) == {"corrected": 0}


def test_a_small_part_that_was_measured_counts_as_a_small_part():
    right = ramp(3.0, 0)
    wrong = right.depth.clone()
    measured = torch.full((SIZE, SIZE), torch.nan)
    measured[:12, :12] = 2 * right.depth[:12, :12]  # a corner in which stereo sees something else
    every = tracks_on(wrong, 0, 120)
    evidence = Evidence(
        Photograph("a", torch.zeros(3, SIZE, SIZE), CAMERA), every[:100], every[100:], unbounded(measured)
    )
    found = corrected(right, evidence, "full", torch.Generator().manual_seed(0)).depth
    assert ((found / right.depth).log().abs()[24:, 24:] < 0.05).all()


def test_what_was_measured_behind_all_tracks_says_nothing_of_the_rest_there():
    right = ramp(30.0, 16)
    measured = torch.full((SIZE, SIZE), torch.nan)
    measured[:14, :14] = 21.0  # of 30: too far to be measured well
    every = tracks_on(right.depth, 16, 200)
    evidence = Evidence(
        Photograph("a", torch.zeros(3, SIZE, SIZE), CAMERA), every[:180], every[180:], unbounded(measured)
    )
    found = corrected(right, evidence, "full", torch.Generator().manual_seed(0)).depth
    assert ((found / right.depth).log().abs()[:14, 40:] < 0.1).all() and found[4, 4] < 25


def test_a_match_that_measures_nothing_still_bounds_the_depth():
    true = ramp(30.0, 16)
    wrong = replace(true, depth=true.depth.clamp_max(6.0))  # the hill is five times too near
    every = tracks_on(true.depth, 16)
    measured = unbounded(torch.where(true.depth < 2.5, true.depth, torch.nan))
    photograph = Photograph("a", torch.zeros(3, SIZE, SIZE), CAMERA)
    evidence = Evidence(photograph, every[:180], every[180:], measured)
    before = corrected(wrong, evidence, "full", torch.Generator().manual_seed(0)).depth
    assert before[:16].max() < 10
    measured.nearest[:12], measured.farthest[:12] = 24.0, 40.0
    measured.nearest[40:44] = 5.0  # of what is measured nothing is changed
    after = corrected(wrong, evidence, "full", torch.Generator().manual_seed(0)).depth
    assert torch.allclose(after[:12], torch.tensor(24.0)) and torch.equal(after[16:], before[16:])
    measured.nearest[:12], measured.farthest[:12] = 0.0, 4.0
    assert corrected(wrong, evidence, "full", torch.Generator().manual_seed(0)).depth[:12].max() < 4.001
