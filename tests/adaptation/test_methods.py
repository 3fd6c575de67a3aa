"""Methods of other papers as supervisions: each has a known answer, and does something."""

from __future__ import annotations

import pytest
import torch
from conftest import adapt, small_experiment
from torch import nn

from ttt_lib.adaptation.gradients import view_loss
from ttt_lib.adaptation.methods.restraint import Fisher, Last, Source
from ttt_lib.adaptation.methods.statistics import Actmad, NormStatistics, batch_norms, watched
from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Episode, Pass, TrainingLog
from ttt_lib.adaptation.teacher import TeacherOnViews, pixel_trust
from ttt_lib.core.errors import NotSupported, UserError
from ttt_lib.core.registry import SUPERVISIONS
from ttt_lib.core.seeds import sample_generator
from ttt_lib.core.types import Prediction
from ttt_lib.models.base import GeometryModel, select_parameters, weights_checksum

config = small_experiment(train={"optimizer": {"learning_rate": 1e-4}, "passes": 2, "accumulation": 1})
STILL = {"optimizer": {"learning_rate": 0.0}}
PLAIN: dict[str, torch.Tensor] = {}  # without the method, by the settings beside it
MEMBERS = {"members": ["mirror", "finer"]}


class Small(GeometryModel):
    """One normalisation behind nothing: what it sees is the picture."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)), "small", "metric")

    def forward(self, images, intrinsics=None):
        return {"depth": self.network(images)[:, 0].exp()}

    def predict(self, images, intrinsics=None):
        raise NotImplementedError


def built(method, beside=None, **settings):
    """The method as an experiment with these settings has it, beside the supervisions of another episode."""
    name = next(name for name, registered in SUPERVISIONS.items() if registered is method)
    there = beside.supervisions if beside is not None else []
    return method(Episode(config(supervision={name: settings}), None, None, None, there))


@pytest.fixture
def small() -> tuple[Small, Student]:
    model = Small()
    return model, Student(model, select_parameters(model, ["norms"]))


@pytest.fixture
def episode(student):
    made = Episode(config(), student, sample_generator(0, "a"), TrainingLog(micro_batch=2))
    made.supervisions.append(TeacherOnViews(made))
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"supervision": {"fisher": {"weight": 1e5, "passes": 1}}},
        {"supervision": {"source": {"keep": 0.5}}},
        {"supervision": {"source": {"keep": 0.5}}, "train": {"lora_rank": 2}},
        {"supervision": {"fisher": {"weight": 1e5, "passes": 1}, "last": {"steps": 2}}, "train": {"lora_rank": 2}},
        {"supervision": {"last": {"steps": 2}}},
        {"supervision": {"norm_statistics": {}}},
        {"supervision": {"norm_statistics": {"from_views": True}}},
        {"supervision": {"actmad": {}}},
        {"teacher": {"choose_from": 3}},
        {"teacher": {"certainty": 1.0}, "ensemble": {**MEMBERS, "final": False}},
    ],
    ids=lambda options: str(options)[1:70],
)
def test_every_method_trains_and_leaves_weights_and_buffers(tiny, image, options):
    before = weights_checksum(tiny)
    bare = {key: value for key, value in options.items() if key not in ("supervision", "teacher")}
    if str(bare) not in PLAIN:
        PLAIN[str(bare)] = adapt(tiny, image, config(**bare), name="a").final.depth
    result = adapt(tiny, image, config(**options), name="a")
    assert weights_checksum(tiny) == before
    assert result.decision == "adapted" and len(result.history) == 2
    assert torch.isfinite(result.final.depth).all()
    assert not torch.equal(result.final.depth, PLAIN[str(bare)])
    assert not torch.equal(result.final.depth, result.original.depth)


@pytest.mark.parametrize("method", [{"fisher": {"passes": 1}}, {"source": {}}, {"last": {"steps": 3}}, {"actmad": {}}])
def test_rate_zero_is_the_original_to_the_bit(tiny, image, method):
    result = adapt(tiny, image, config(train=STILL, supervision=method))
    assert result.decision == "adapted" and torch.equal(result.final.depth, result.original.depth)


def test_fisher_is_the_mean_square_of_the_gradients_and_weighs_the_distance(episode, student, image):
    teacher = episode.supervisions[0]
    teacher.prepare(student.model, image, student.model.predict(image))
    method = built(Fisher, episode, weight=0.5, passes=2)
    still, terms = method.gradients(student, [Pass()])
    assert not terms and all(each is None or float(each.abs().max()) == 0 for each in still)  # nothing has moved
    importance = torch.cat([each.flatten() for each in method.importance if each is not None])
    assert float(importance.mean()) == pytest.approx(1.0, rel=1e-4) and float(importance.std()) > 1
    teacher.generator.manual_seed(0)
    fresh = built(Fisher, episode, passes=2)._measure(student)
    teacher.generator.manual_seed(0)
    first, second = (teacher.gradients(student, [teacher.draw()])[0] for _ in range(2))
    squares = [None if one is None else one.square() + two.square() for one, two in zip(first, second)]
    factor = fresh[0].sum() / squares[0].sum()
    for one, two in zip(fresh, squares):
        assert (one is None) == (two is None) and (one is None or torch.allclose(one, two * factor, rtol=1e-3))
    with torch.no_grad():
        student.parameters[0] += 2.0
    pull, _ = method.gradients(student, [Pass(), Pass()])
    assert torch.allclose(pull[0], 2 * 2 * 0.5 * 2.0 * method.importance[0])
    plain, weightless = config(), config(supervision={"fisher": {"weight": 0.0, "passes": 1}})
    plain, weightless = (adapt(student.model, image, each, name="a") for each in (plain, weightless))
    assert torch.equal(plain.final.depth, weightless.final.depth)  # the same views
    with pytest.raises(UserError, match="supervision.fisher.*losses"):
        adapt(
            student.model,
            image,
            config(supervision={"fisher": {}}, losses={"global": {"weight": 0}, "mask": {"weight": 0}}),
        )


def test_the_source_pulls_by_its_share_and_the_last_weights_are_averaged(tiny):
    student = Student(tiny, select_parameters(tiny, ["norms"]))
    kept, averages = built(Source, keep=0.75), built(Last, steps=2)
    values = student.values()
    assert averages.weights(values) is values
    with torch.no_grad():
        for step in range(3):
            for parameter, original in zip(student.parameters, student.original):
                parameter.copy_(original + 4.0 * (step + 1))
            averages.after_step(student, False)
    for mean, original in zip(averages.weights(values), student.original):  # of the last two of 4, 8 and 12
        assert torch.allclose(mean, original + 10.0)
    kept.after_step(student, True)
    for parameter, original in zip(student.parameters, student.original):
        assert torch.allclose(parameter, original + 9.0)
    low_rank = Student(tiny, select_parameters(tiny, ["neck"]), lora_rank=2)
    with torch.no_grad():
        for up, _ in low_rank.low_rank.factors.values():
            up.fill_(1.0)
    moved = [value - original for value, original in zip(low_rank.values(), low_rank.original)]
    kept.after_step(low_rank, True)
    for value, original, before in zip(low_rank.values(), low_rank.original, moved):
        assert torch.allclose(value - original, 0.75 * before, atol=1e-6)


def test_statistics_move_towards_what_the_norms_see(small, image, episode):
    model, student = small
    norm, (variance, mean) = model.network[0], torch.var_mean(image, [1, 2])
    built(NormStatistics, momentum=0.25).prepare(model, image, None)
    assert torch.allclose(norm.running_mean, 0.25 * mean) and torch.allclose(norm.running_var, 0.75 + 0.25 * variance)
    norm.reset_running_stats()
    views = built(NormStatistics, episode, momentum=0.5, from_views=True, decay=0.5, lowest=0.0)
    views.prepare(model, image, None)
    assert float(norm.running_mean.abs().max()) == 0
    view = type("View", (), {"image": image[None]})
    gradients, terms = views.gradients(student, [Pass(view), Pass(view)])
    assert gradients == [None, None] and not terms
    assert torch.allclose(norm.running_mean, mean * (1 - 0.75 * 0.875))  # by a quarter, then by an eighth
    whole = built(NormStatistics, momentum=1.0)
    whole.prepare(model, image, None)
    normal = model.network[0](image[None]).detach()
    assert float(normal.mean().abs()) < 1e-5 and float(normal.std()) == pytest.approx(1.0, abs=1e-2)


def test_actmad_by_hand_and_it_brings_the_statistics_nearer(small, tiny, image):
    model, student = small
    norm, (variance, mean) = model.network[0], torch.var_mean(image, [1, 2])
    method = built(Actmad)
    method.prepare(model, image, None)
    term = method.terms(student, [Pass(), Pass()])["actmad"]
    expected = mean.abs().mean() * (1 + norm.eps) ** -0.5 + ((variance - 1) / (1 + norm.eps)).abs().mean()
    assert float(term.detach()) == pytest.approx(2 * float(expected), rel=1e-5)
    norm.running_mean, norm.running_var = mean, variance
    method.prepare(model, image, None)
    assert float(method.terms(student, [Pass()])["actmad"].detach()) == pytest.approx(0.0, abs=1e-5)
    alone = {"supervision": {"actmad": {}}, "losses": {"global": {"weight": 0}, "mask": {"weight": 0}}}
    found = adapt(
        tiny, image, config(train={"parts": ["norms"], "passes": 4, "optimizer": {"learning_rate": 1e-2}}, **alone)
    ).history
    assert found[-1]["actmad"] < 0.8 * found[0]["actmad"]


def test_a_network_without_batch_norms_is_named(image):
    model = Small()
    model.network[0] = nn.GroupNorm(1, 3)
    with pytest.raises(NotSupported, match="small has no batch normalisation"):
        batch_norms(model)
    seen = []
    with watched([nn.BatchNorm2d(3)], lambda *found: seen.append(found)):
        pass
    assert not seen
    with pytest.raises(UserError, match="norm_statistics.*gate.mode to off"):
        NormStatistics(Episode(config(supervision={"norm_statistics": {}}, gate={"mode": "measure"}), *[None] * 3))


def test_of_several_draws_the_most_certain_is_learned_from(episode, student, image):
    teacher = episode.supervisions[0]
    teacher.prepare(student.model, image, student.model.predict(image))
    state = teacher.generator.get_state()
    drawn = [teacher.draw() for _ in range(4)]
    losses = [view_loss(student.model, each.batch, teacher.config) for each in drawn]
    teacher.generator.set_state(state)
    teacher.config = config(teacher={"choose_from": 4})
    chosen = teacher.draw()
    assert torch.equal(chosen.view.image, drawn[losses.index(min(losses))].view.image) and len(set(losses)) > 1


@pytest.mark.parametrize(
    "views",
    [{}, {"cutmix": 0.5}, {"novel_view": {"probability": 0.5, "backend": "torch"}}, {"shift": {"names": ["fog"]}}],
    ids=["plain", "cutmix", "novel", "shift"],
)
def test_passes_drawn_together_are_those_drawn_one_by_one(episode, student, image, views):
    teacher = episode.supervisions[0]
    teacher.config = config(views=views, train={"batch_size": 2})
    teacher.prepare(student.model, image, student.model.predict(image))
    state, counted = teacher.generator.get_state(), []
    found = []
    for draw in (lambda: [teacher.draw() for _ in range(3)], lambda: teacher.draw_passes(3)):
        teacher.generator.set_state(state)
        teacher.log.view_stats = {}
        found.append((draw(), torch.rand(1, generator=teacher.generator)))
        counted.append(dict(teacher.log.view_stats))
    (apart, after), (together, after_too) = found
    assert torch.equal(after, after_too) and counted[0] == counted[1]
    for one, other in zip(apart, together, strict=True):
        assert one.view.kind == other.view.kind and one.batch.compared == other.batch.compared
        for part in ("image", "points", "mask", "negative", "intrinsics", "transform"):
            torch.testing.assert_close(getattr(one.view, part), getattr(other.view, part), equal_nan=True)
        for part in ("images", "of", "points", "share", "seeds"):
            torch.testing.assert_close(getattr(one.batch, part), getattr(other.batch, part), equal_nan=True)


def test_pixels_count_by_the_spread_of_the_predictions(episode, student, image):
    ratio = torch.linspace(-1, 1, 63).reshape(7, 9)  # of the logarithms; its median is zero
    first, mask = torch.full((7, 9), 2.0), torch.ones(7, 9, dtype=torch.bool)
    found = [Prediction(None, each, mask, None, "metric") for each in (first, first * ratio.exp())]
    assert torch.allclose(pixel_trust(found, 0.5), torch.exp(-0.5 * ratio.abs() / ratio.abs().median()), atol=1e-4)

    teacher = episode.supervisions[0]
    teacher.config = config(teacher={"certainty": 1.0}, ensemble=MEMBERS)
    teacher.prepare(student.model, image, student.model.predict(image))
    assert teacher.trust.shape == image.shape[1:]
    known = torch.stack([teacher.draw().view.mask.float().mean() for _ in range(30)])
    assert float(known.mean()) == pytest.approx(float(teacher.trust.mean()), abs=0.15) and float(known.std()) > 0.1
    with pytest.raises(UserError, match="teacher.certainty.*ensemble.members"):
        config(teacher={"certainty": 1.0})
