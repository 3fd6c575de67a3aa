"""Adaptation to several photographs whose truth is known: corrections, training, the decision, and the controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import small_experiment
from true_scene import true_scene, unbounded

from ttt_lib.adaptation.losses.presets import terms_in_words
from ttt_lib.adaptation.photographs.decision import cell_weights, choose, track_errors
from ttt_lib.adaptation.photographs.evidence import (
    Evidence,
    corrected,
    gather,
    held_outside,
    in_scale,
    plausible,
    scaled,
    shifted,
    spread,
)  # fmt: skip
from ttt_lib.adaptation.photographs.scene import _lessons, adapt_scene, guess_focal
from ttt_lib.adaptation.photographs.training import Lesson, TracksConfig, carried, depth_at_tracks, track_loss
from ttt_lib.adaptation.supervision import Supervision
from ttt_lib.adaptation.teacher import draw_views
from ttt_lib.core.errors import UserError
from ttt_lib.core.registry import SUPERVISIONS
from ttt_lib.core.types import Prediction
from ttt_lib.data.photographs.job import UNKNOWN, USUAL_FOCAL
from ttt_lib.data.photographs.scene import Scene, Tracks
from ttt_lib.geometry.cameras import unproject
from ttt_lib.models.base import weights_checksum
from ttt_lib.models.load import load_model

experiment = small_experiment(
    supervision={"photographs": {"stereo": False}}, train={"passes": 4, "accumulation": 2, "batch_size": 1}
)
NO_TRAINING = {"train": {"method": "none", "passes": 0}}


@pytest.fixture(scope="module")
def rendered():
    return true_scene(scale=0.2)


def truth_as_prediction(sample, depth=None, kind="scale_invariant") -> Prediction:
    """The sample's truth, or another depth, as a model would give it."""
    depth = sample.depth if depth is None else depth
    depth = torch.where(sample.mask, depth, depth[sample.mask].median())
    return Prediction(unproject(depth, sample.intrinsics), depth, sample.mask.clone(), sample.intrinsics, kind)


def evidence_of(rendered, number=0, share=0.3) -> Evidence:
    generator = torch.Generator().manual_seed(0)
    return gather(rendered[0], share, generator, stereo=False)[number]


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_tracks_are_split_alike_in_all_photographs(rendered):
    every = gather(rendered[0], 0.3, random(), stereo=False)
    used = torch.cat([each.used.track_id for each in every]).unique()
    held = torch.cat([each.held.track_id for each in every]).unique()
    assert not torch.isin(used, held).any() and 0.25 < len(held) / (len(held) + len(used)) < 0.35


@pytest.mark.parametrize(
    ("how", "bend"),
    [("scale", lambda d: 3 * d), ("affine", lambda d: 3 * d + 2), ("full", lambda d: (0.5 * d.log() + 1).exp())],
)
def test_each_correction_takes_back_what_it_can(rendered, how, bend):
    evidence, sample = evidence_of(rendered), rendered[1][0]
    wrong = truth_as_prediction(sample, bend(sample.depth))
    right = corrected(wrong, evidence, how, random())
    ratio = (right.depth / (0.2 * sample.depth))[sample.mask]  # in the scene's unit of 5 metres
    assert ratio.log().abs().median() < 2e-3 and right.kind == "scale_invariant"
    assert torch.allclose(right.points[..., 2], right.depth, rtol=1e-5)


def test_what_a_lens_did_not_see_is_unknown_and_no_sky(rendered):
    def right_part(size):
        seen = torch.ones(size, dtype=torch.bool)
        seen[:, : size[1] // 4] = False
        return seen

    scene, model, config = rendered[0], load_model("tiny", "cpu", num_tokens=48), experiment(**NO_TRAINING)
    partly = replace(scene, photographs=[replace(each, seen=right_part) for each in scene.photographs])
    whole, part = (adapt_scene(model, each, config) for each in (scene, partly))
    for _, result in part.results():
        for prediction in (result.original, result.final):
            unseen = ~right_part(prediction.depth.shape)
            assert torch.isnan(prediction.depth[unseen]).all() and torch.isnan(prediction.points[unseen]).all()
            assert not prediction.mask[unseen].any() and torch.isfinite(prediction.depth[~unseen]).all()
    views = []
    for adaptation in (whole, part):
        lesson = _lessons(adaptation, random())[0]
        views.append(draw_views(lesson.image, lesson.target, adaptation.config, random(), None))
    assert torch.equal(views[0].negative, views[1].negative)  # where there is no surface: nothing more than before
    assert views[1].mask.sum() < views[0].mask.sum()


def test_a_disparity_becomes_depth(rendered):
    evidence, sample = evidence_of(rendered), rendered[1][0]
    disparity = torch.where(sample.mask, 4 / sample.depth - 0.1, 0.5)
    relative = replace(truth_as_prediction(sample), disparity=disparity, kind="disparity")
    right = corrected(relative, evidence, "full", random())
    assert ((right.depth / (0.2 * sample.depth))[sample.mask].log().abs().median() < 0.01) and right.disparity is None


def test_measured_depth_is_taken_where_it_is_known_and_carried_on(rendered):
    evidence, sample = evidence_of(rendered), rendered[1][0]
    wrong = truth_as_prediction(sample, sample.depth * (1 + 0.3 * torch.linspace(-1, 1, 160)))
    measured = torch.where(sample.mask & (torch.arange(160) % 3 > 0), 0.2 * sample.depth, torch.nan)
    right = corrected(wrong, replace(evidence, measured=unbounded(measured)), "full", random())
    error = (right.depth / (0.2 * sample.depth)).log().abs()
    assert (
        error[torch.isfinite(measured)].quantile(0.95) < 0.01
    )  # the measured depth itself but for the weak coarse part
    assert error[sample.mask].median() < 0.02


def test_a_correction_is_not_believed_beyond_its_tracks():
    depth = torch.linspace(1, 100, 4000).reshape(40, 100)
    wild = depth * torch.where(depth < 10, 2.0, 2.0 + (depth - 10) ** 2)
    held = held_outside(wild, depth, torch.linspace(1, 10, 200))
    assert torch.allclose(held, 2 * depth, rtol=0.02)
    assert torch.equal(held_outside(wild, depth, torch.linspace(1, 10, 5)), wild)  # too few to say where they end
    last = depth * torch.where(depth < 9.6, 2.0, 4.0)  # a curve that swings at its very end: more than that is read
    assert torch.allclose(held_outside(last, depth, torch.linspace(1, 10, 200))[depth > 10], 2 * depth[depth > 10])


def test_residuals_fade_far_from_what_is_known():
    residual = torch.full((64, 64), torch.nan)
    residual[:8, :8] = 0.5
    field = spread(residual)
    assert torch.equal(field[:8, :8], residual[:8, :8]) and 0.1 < field[9, 4] < 0.5 and field[-1, -1].abs() < 0.05
    assert not spread(torch.full((9, 7), torch.nan)).any()


def test_wrong_matches_in_small_islands_are_dropped():
    around = torch.full((64, 64), 2.0)
    measured = around.clone() * 1.1
    measured[20:23, 30:33] = 6.0
    kept = plausible(measured, around)
    assert torch.isnan(kept[20:23, 30:33]).all() and torch.isfinite(kept).sum() == 64 * 64 - 9


def test_errors_count_each_cell_alike():
    uv = torch.tensor([[0.1, 0.1]] * 9 + [[0.9, 0.9]])
    tracks = Tracks(uv, torch.ones(10), torch.arange(10), torch.ones(10))
    weights = cell_weights(tracks)
    assert weights[:9].sum() == pytest.approx(0.5) and weights[9] == pytest.approx(0.5)


def test_the_held_back_tracks_decide(rendered):
    evidence, sample = evidence_of(rendered), rendered[1][0]
    bent = truth_as_prediction(sample, sample.depth * (1 + 0.4 * torch.linspace(-1, 1, 160)))
    right = corrected(truth_as_prediction(sample), evidence, "scale", random())
    judged = choose(bent, {"corrected": right}, evidence, random())
    assert judged.choice == "corrected" and judged.signals["held_back_corrected"] < 0.01 and not judged.reason
    # the same again is no better, and the simpler one stays
    judged = choose(bent, {"corrected": right, "adapted_corrected": right}, evidence, random())
    assert judged.choice == "corrected"
    worse = replace(right, depth=bent.depth * 0.2)
    assert choose(truth_as_prediction(sample), {"corrected": worse}, evidence, random()).choice == "original"


def test_what_cannot_be_told_keeps_the_original(rendered):
    evidence, sample = evidence_of(rendered), rendered[1][0]
    bent = truth_as_prediction(sample, sample.depth * (1 + 0.4 * torch.linspace(-1, 1, 160)))
    right = corrected(truth_as_prediction(sample), evidence, "scale", random())
    few = replace(evidence, held=evidence.held[torch.arange(5)])
    judged = choose(bent, {"corrected": right}, few, random())
    assert judged.choice == "original" and "only 5 tracks" in judged.reason
    broken = replace(right, depth=torch.full_like(right.depth, torch.nan))
    assert (track_errors(broken, evidence.held) == 1).all()
    assert choose(bent, {"corrected": broken}, evidence, random()).choice == "original"


@pytest.mark.parametrize("output", ["points", "depth", "disparity"])
def test_tracks_are_compared_after_the_fit_that_an_output_leaves_open(rendered, output):
    evidence, sample = evidence_of(rendered), rendered[1][0]
    depth = torch.where(sample.mask, sample.depth, 3.0)
    open_ = {"points": 2 * depth - 1, "depth": 5 * depth, "disparity": 3 / depth + 0.4}[output]
    given = {"points": torch.stack([open_] * 3, -1)} if output == "points" else {output: open_}
    given = {key: value[None].requires_grad_() for key, value in given.items()}
    found = depth_at_tracks(given, evidence)
    assert (found / evidence.used.depth).log().abs().median() < 0.01
    for form in ("huber", "l1"):
        loss = track_loss(given, evidence, TracksConfig(form=form))
        assert 0 <= float(loss.detach()) < 0.05
        assert torch.isfinite(torch.autograd.grad(loss, given[output])[0]).all()


def test_other_photographs_show_what_they_see(rendered):
    scene, samples = rendered
    lessons = [
        Lesson(sample.image, evidence_of(rendered, number), corrected(
            truth_as_prediction(sample), evidence_of(rendered, number), "scale", random()))
        for number, sample in enumerate(samples)
    ]  # fmt: skip
    shown = carried(lessons, 0)
    known = torch.isfinite(shown.depth)
    error = (shown.depth / (0.2 * samples[0].depth))[known & samples[0].mask].log().abs()
    assert 0.3 < known.float().mean() < 1 and error.median() < 0.01 and (error > 0.1).float().mean() < 0.03


def test_a_scene_is_corrected_without_training(tiny, rendered):
    scene, samples = rendered
    before = weights_checksum(tiny)
    adaptation = adapt_scene(tiny, scene, experiment(**NO_TRAINING))
    results = {photograph.name: result for photograph, result in adaptation.results()}
    assert list(results) == [sample.name for sample in samples] and not adaptation.weights
    scores = []
    for sample in samples:
        result = results[sample.name]
        assert result.decision in ("corrected", "original") and result.signals["tracks"] > 50
        scores.append(result.signals["held_back_original"] - result.signals["held_back_corrected"])
    assert max(scores) > 0 and weights_checksum(tiny) == before
    # metres: by the model's own guess, one factor for all photographs
    factor = adaptation.scene.photographs[0].tracks.depth / scene.photographs[0].tracks.depth
    assert factor.std() < 1e-4 * factor.mean()


def test_training_learns_and_leaves_the_model_as_it_was(tiny, rendered):
    before = weights_checksum(tiny)
    config = experiment(train={"passes": 18, "accumulation": 3, "optimizer": {"learning_rate": 3e-4}})
    adaptation = adapt_scene(tiny, rendered[0], config)  # each step sees each of the three photographs
    losses = [entry["loss"] for entry in adaptation.log.history]
    assert adaptation.weights and sum(losses[-3:]) < sum(losses[:3]) and adaptation.log.passes_done == 18
    result = next(iter(adaptation.results()))[1]
    assert result.adapted is not None and weights_checksum(tiny) == before
    assert result.losses == terms_in_words(adaptation.config) != ""
    again = adapt_scene(tiny, rendered[0], config)
    assert all(torch.equal(value, again.weights[name]) for name, value in adaptation.weights.items())


def test_rate_zero_equals_the_correction(tiny, rendered):
    still = experiment(train={"optimizer": {"learning_rate": 0.0}}, supervision={"photographs": {"decide": False}})
    trained = next(iter(adapt_scene(tiny, rendered[0], still).results()))[1]
    plain = next(iter(adapt_scene(tiny, rendered[0], experiment(**NO_TRAINING)).results()))[1]
    assert trained.decision == "adapted_corrected" and torch.equal(trained.adapted.depth, trained.final.depth)
    assert trained.signals["held_back_adapted_corrected"] == pytest.approx(
        plain.signals["held_back_corrected"], rel=0.2
    )


@pytest.mark.parametrize("losses", [{"tracks": {"weight": 1.0}}, {"tracks": {"form": "l1"}, "ssi": {}}])
def test_tracks_alone_train_too(tiny, rendered, losses):
    target = "none" if len(losses) == 1 else "corrected"
    config = experiment(train={"passes": 6, "accumulation": 3}).model_copy(
        update={"losses": small_experiment(losses=losses)().losses, "supervision": experiment(
            supervision={"photographs": {"target": target}}).supervision})  # fmt: skip
    config = config.model_copy(update={"losses": {k: v for k, v in config.losses.items() if k in losses}})
    adaptation = adapt_scene(tiny, rendered[0], config)
    assert {"tracks", "loss"} <= adaptation.log.history[0].keys() and len(adaptation.log.history) == 2
    assert adaptation.log.history[-1]["tracks"] < adaptation.log.history[0]["tracks"] * 1.2


@pytest.mark.parametrize(
    "method",
    [
        {"supervision": {"source": {"keep": 0.5}}},
        {"supervision": {"fisher": {"weight": 1e3, "passes": 3}}},
        {"supervision": {"last": {"steps": 2}}},
        {"train": {"random_change": "weights"}},
    ],
    ids=lambda method: next(iter(next(iter(method.values())))),
)
def test_methods_that_hold_or_change_the_weights_join(tiny, rendered, method):
    """They see the same views in the same turns, so only what they do to the weights differs."""
    trained = {"passes": 4, "accumulation": 2, "optimizer": {"learning_rate": 1e-3}}
    plain = adapt_scene(tiny, rendered[0], experiment(train=trained))
    config = experiment(
        train=trained | method.get("train", {}),
        supervision={"photographs": {"stereo": False}, **method.get("supervision", {})},
    )
    joined = adapt_scene(tiny, rendered[0], config)
    assert [entry["known"] for entry in joined.log.history] == [entry["known"] for entry in plain.log.history]
    original = dict(tiny.network.named_parameters())

    def moved(adaptation):
        return torch.stack([(value - original[name]).norm() for name, value in adaptation.weights.items()]).norm()

    if "train" in method:  # as far, elsewhere
        assert moved(joined) == pytest.approx(float(moved(plain)), rel=1e-3)
        assert any(not torch.equal(value, plain.weights[name]) for name, value in joined.weights.items())
    else:
        assert 0 < moved(joined) < 0.95 * moved(plain)


def test_statistics_of_features_are_asked_of_the_photograph_whose_turn_it_is(tiny, rendered):
    asked = {"photographs": {"stereo": False}, "actmad": {"weight": 0.01}}
    train = {"passes": 3, "accumulation": 1, "optimizer": {"learning_rate": 0.0}}
    adaptation = adapt_scene(tiny, rendered[0], experiment(train=train, supervision=asked))
    values = [entry["actmad"] for entry in adaptation.log.history]
    assert len(values) == 3 and len({round(value, 6) for value in values}) == 3  # three photographs, no weight moved


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"supervision": {"photographs": {}, "norm_statistics": {}}}, "supervision.norm_statistics"),
        ({"train": {"bidirectional": 1.0}}, "train.bidirectional"),
        ({"train": {"prompt_tokens": 2}}, "train.prompt_tokens"),
        ({}, "supervision.mine"),
    ],
)
def test_what_is_made_for_one_image_is_refused_by_name(tiny, rendered, monkeypatch, options, named):
    if not options:  # one of the user's, always on, which says nothing of several photographs
        SUPERVISIONS.load_home()
        items = [*SUPERVISIONS.items(), ("mine", lambda episode: Supervision())]
        monkeypatch.setattr(SUPERVISIONS, "items", lambda: items)
        monkeypatch.setitem(SUPERVISIONS.about, "mine", {})
    with pytest.raises(UserError, match=f"{named}: made for one image"):
        adapt_scene(tiny, rendered[0], experiment(**options))


def test_a_refused_scene_and_what_was_left_out_keep_the_original(tiny, rendered):
    scene, samples = rendered
    refused = Scene(
        [replace(p, pose=None, intrinsics=None, tracks=Tracks.none()) for p in scene.photographs], refused="no."
    )
    for _, result in adapt_scene(tiny, refused, experiment()).results():
        assert result.final is result.original and result.reason == "original kept: no."
    partly = replace(
        scene, rest=[replace(scene.photographs[0], name="stranger", pose=None)], left_out=[("stranger", "why")]
    )
    adaptation = adapt_scene(tiny, partly, experiment(**NO_TRAINING))
    results = {photograph.name: result for photograph, result in adaptation.results()}
    assert results["stranger"].reason == "original kept: left out: why" and len(results) == 4


def test_points_of_the_models_own_make_no_gain(tiny, rendered):
    scene, samples = rendered
    own = []
    for photograph in scene.photographs:
        depth = tiny.predict(photograph.image).depth
        column, row = (photograph.tracks.uv * torch.tensor([160, 120])).long().unbind(-1)
        own.append(replace(photograph, tracks=replace(photograph.tracks, depth=depth[row, column])))
    for _, result in adapt_scene(tiny, replace(scene, photographs=own), experiment(**NO_TRAINING)).results():
        assert result.decision == "original" and result.signals.get("held_back_original", 0.0) < 0.02


def test_shuffled_depths_are_refused(tiny, rendered):
    scene, _ = rendered
    mixed = [
        replace(p, tracks=replace(p.tracks, depth=p.tracks.depth[torch.randperm(len(p.tracks), generator=random())]))
        for p in scene.photographs
    ]
    for _, result in adapt_scene(tiny, replace(scene, photographs=mixed), experiment(**NO_TRAINING)).results():
        assert result.decision == "original"


@pytest.mark.parametrize("scale", [0.2, 20.0])  # in any unit
def test_points_of_another_scene_are_refused(tiny, rendered, scale):
    scene, _ = rendered
    other = true_scene(seed=11, kind="room", scale=scale)[0]
    foreign = [replace(p, tracks=q.tracks) for p, q in zip(scene.photographs, other.photographs)]
    for _, result in adapt_scene(tiny, replace(scene, photographs=foreign), experiment(**NO_TRAINING)).results():
        assert result.decision == "original" and "contradict" in result.reason


@pytest.mark.parametrize(
    ("seen", "meets", "choice"), [(0.6, 0.95, "corrected"), (0.1, 0.95, "original"), (0.6, 0.8, "original")]
)
def test_a_model_that_takes_far_for_near_is_overruled_where_stereo_sees_the_tracks(rendered, seen, meets, choice):
    evidence, sample = replace(evidence_of(rendered), seen=seen, meets=meets), rendered[1][0]
    wrong, right = truth_as_prediction(sample, 1 / sample.depth), truth_as_prediction(sample, sample.depth * 0.2)
    judged = choose(wrong, {"corrected": right}, evidence, random())
    assert judged.choice == choice and judged.signals["rank"] < -0.9


def test_a_focal_length_that_a_model_knows_poorly_is_drawn_to_the_usual_one(tiny, monkeypatch):
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    found = float(tiny.predict(image).intrinsics[0, 0])
    guesses = {}
    for deviation in (0.0, UNKNOWN, 100.0):
        monkeypatch.setattr(tiny, "focal_deviation", deviation)
        guesses[deviation] = guess_focal(tiny)(image)
    halfway = (found * USUAL_FOCAL) ** 0.5
    assert list(guesses.values()) == pytest.approx([found, halfway, USUAL_FOCAL], rel=1e-3)
    with tiny.knowing(fov_x=90.0):
        assert guess_focal(tiny)(image) == pytest.approx(0.5)
    assert load_model("tiny", device="cpu").focal_deviation > UNKNOWN  # of photographs, unlike what it was trained on


def test_a_scene_in_another_scale_is_the_same_scene(rendered):
    scene = rendered[0]
    larger = in_scale(scene, 7.0)
    assert torch.allclose(larger.photographs[1].pose[:3, 3], 7 * scene.photographs[1].pose[:3, 3])
    assert torch.allclose(larger.photographs[1].tracks.depth, 7 * scene.photographs[1].tracks.depth)


def test_fits_of_the_original(rendered):
    evidence, sample = evidence_of(rendered), rendered[1][0]
    for fit, bend in ((scaled, 4 * sample.depth), (shifted, 4 * sample.depth + 3)):
        right = fit(truth_as_prediction(sample, bend), evidence.used)
        assert (right.depth / (0.2 * sample.depth))[sample.mask].log().abs().median() < 2e-3


@pytest.mark.parametrize("known", [0, 1, 2])
def test_a_model_that_says_nothing_where_the_tracks_are_keeps_its_prediction(rendered, known):
    evidence, sample = evidence_of(rendered), rendered[1][0]
    sky = torch.full_like(sample.depth, torch.inf)
    column, row = (evidence.used.uv * torch.tensor([160, 120])).long().unbind(-1)
    for k in range(known):
        sky[row[k] - 1 : row[k] + 2, column[k] - 1 : column[k] + 2] = 2.0 + k
    original = replace(truth_as_prediction(sample), depth=sky, mask=torch.isfinite(sky))
    candidates = {how: corrected(original, evidence, how, random()) for how in ("scale", "affine", "full")}
    judged = choose(original, candidates, evidence, random())
    assert judged.choice == "original" and judged.reason


def test_without_tracks_a_prediction_keeps_its_own_scale(rendered):
    own = truth_as_prediction(rendered[1][0])
    assert torch.equal(scaled(own, Tracks.none()).depth, own.depth)
