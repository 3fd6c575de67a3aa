"""The loop's options: parts of a batch, restraint, other supervision; each does what it says and nothing else."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import adapt, small_experiment

from ttt_lib.adaptation import loop as student_module
from ttt_lib.adaptation import teacher as teacher_module
from ttt_lib.adaptation.batches import join_batches, loss_batch
from ttt_lib.adaptation.gradients import pass_gradients
from ttt_lib.adaptation.loop import hand_over, make_optimizer, sharpest_point
from ttt_lib.adaptation.student import LowRank, Student
from ttt_lib.adaptation.supervision import TrainingLog, accumulate, add_terms
from ttt_lib.adaptation.teacher import draw_views
from ttt_lib.core import memory
from ttt_lib.core.config import merge
from ttt_lib.core.errors import UserError
from ttt_lib.core.schema import OptimizerConfig
from ttt_lib.core.seeds import sample_generator
from ttt_lib.models.base import restore, select_parameters, snapshot, weights_checksum
from ttt_lib.models.moge import MoGe

config = small_experiment(train={"optimizer": {"learning_rate": 1e-4}})


class Exact(MoGe):
    """The network in float64: sums in another order differ there by 1e-16, and what differs by more is a mistake.

    In float32 the kernels of another processor, or of another batch size, may round by 1e-5 of the largest gradient.
    """

    def forward(self, images, intrinsics=None):
        output = self.network(images.double(), num_tokens=self.num_tokens)
        return {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}


@pytest.fixture
def exact(student) -> Student:
    """The student in float64, its heads to be trained. It predicts nothing: `passes_of` takes the float32 model's."""
    twin = copy.deepcopy(student.model.network).double()
    model = Exact(twin, student.model.name, student.model.kind, student.model.num_tokens)
    return Student(model, select_parameters(model, ["heads"]))


def passes_of(student, image, settings, count=1):
    """Rows of `count` passes in float64, and the generator that drew them."""
    target, generator = student.model.predict(image), sample_generator(0, "a")
    passes = [
        loss_batch(draw_views(image, target, settings, generator, None), settings, generator) for _ in range(count)
    ]
    fields = ("images", "points", "intrinsics", "share")
    return [replace(rows, **{key: getattr(rows, key).double() for key in fields}) for rows in passes], generator


def gradients(exact, rows, settings, micro_batch):
    training = TrainingLog(micro_batch=micro_batch)
    return (*pass_gradients(exact, rows, settings, training), training)


def assert_close_gradients(found, expected) -> None:
    """Of the same parameters, not all zero, and equal in float64 (a sum of some 1e5 terms rounds by 1e-11 at most)."""
    assert any(b is not None and b.abs().max() > 0 for b in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype == torch.float64
            assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def assert_equal_terms(found, expected) -> None:
    assert found.keys() == expected.keys()
    for key in found:
        assert torch.allclose(found[key], expected[key], rtol=1e-9), key


LOCAL = {"local_4": {"align_resolution": 4, "num_patches": 4}}


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_parts_of_the_batch_give_the_whole_gradient(student, exact, image, cutmix):
    settings = config(train={"batch_size": 3}, losses=LOCAL, views={"cutmix": cutmix})
    (rows,), generator = passes_of(student, image, settings)
    state = generator.get_state()
    whole, terms, _ = gradients(exact, rows, settings, 3)
    parts, part_terms, _ = gradients(exact, rows, settings, 1)
    assert torch.equal(generator.get_state(), state)
    assert_close_gradients(parts, whole)
    assert_equal_terms(part_terms, terms)


def gpu_is_full():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("ask", [gpu_is_full, lambda: torch.empty(2**46)], ids=["gpu", "cpu"])  # 256 TiB
def test_out_of_memory_halves_the_part_and_changes_nothing(student, exact, image, monkeypatch, ask):
    settings = config(train={"batch_size": 4}, losses=LOCAL)
    (rows,), _ = passes_of(student, image, settings)
    whole, terms, _ = gradients(exact, rows, settings, 4)
    real, failed = exact.model.forward, []

    def small_memory(images, intrinsics=None):
        assert not any(each() is not None for each in failed)  # what the failed part held is gone by now
        if len(images) > 1:
            output = real(images, intrinsics)
            failed.append(weakref.ref(output["points"]))
            ask()
        return real(images, intrinsics)

    monkeypatch.setattr(exact.model, "forward", small_memory)
    parts, part_terms, training = gradients(exact, rows, settings, 4)
    assert len(failed) == 2
    assert training.micro_batch == 1
    assert_equal_terms(part_terms, terms)
    assert_close_gradients(parts, whole)
    monkeypatch.setattr(exact.model, "forward", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        gradients(exact, rows, settings, 4)


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
@pytest.mark.parametrize("micro_batch", [4, 6, 1])
def test_joined_passes_have_the_sum_of_their_gradients(student, exact, image, cutmix, micro_batch):
    settings = config(losses=LOCAL, views={"cutmix": cutmix})
    passes, _ = passes_of(student, image, settings, 3)
    joined = join_batches(passes)
    assert len(joined) == 1 and len(joined[0].images) == 6
    whole, terms, _ = gradients(exact, joined[0], settings, micro_batch)
    total, sums = [None] * len(exact.leaves), {}
    for rows in passes:
        one, values, _ = gradients(exact, rows, settings, 2)
        accumulate(total, one)
        add_terms(sums, values)
    assert_close_gradients(whole, total)
    assert_equal_terms(terms, sums)


def test_a_pass_that_compares_fewer_views_counts_by_itself(student, image):
    settings = config(losses=LOCAL)
    target, generator = student.model.predict(image), sample_generator(0, "a")
    views = [draw_views(image, target, settings, generator, None) for _ in range(3)]
    views[1].points[0] = torch.nan  # a view of which nothing is known: its pass is the mean of one view
    passes = [loss_batch(view, settings, generator) for view in views]
    assert [rows.compared for rows in join_batches(passes)] == [2, 1, 2]
    assert [len(rows.images) for rows in join_batches([passes[0], passes[2], passes[1]])] == [4, 2]


MERGED = [
    {},
    {"losses": LOCAL, "views": {"cutmix": 0.5}},
    {"train": {"sharpness_radius": 0.05}},
    {"train": {"bidirectional": 0.5}},
    {"train": {"passes": 5, "accumulation": 3}},
    {"released": {"first_sample_only": True}},
]


@pytest.mark.parametrize("options", MERGED, ids=lambda options: str(options)[1:60])
def test_passes_in_the_network_together_train_as_one_after_the_other(tiny, image, monkeypatch, options):
    sgd = {"optimizer": {"name": "sgd", "learning_rate": 1e-3}, "accumulation": 4}  # AdamW's first step is a sign
    apart = merge({"train": sgd}, options)
    seen, real = [], tiny.forward
    monkeypatch.setattr(tiny, "forward", lambda *given: (seen.append(len(given[0])), real(*given))[1])
    plain = adapt(tiny, image, config(**apart), name="a")
    calls, largest = len(seen), max(seen)
    merged = adapt(tiny, image, config(**merge(apart, {"train": {"micro_batch": 8}})), name="a")
    assert largest == 2 and merged.view_stats == plain.view_stats and merged.passes_done == plain.passes_done
    together = "bidirectional" not in str(options)  # each of its passes looks back from its own views
    assert (len(seen) - calls < calls and max(seen) > 2) == together
    for one, other in zip(merged.history, plain.history, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds"}:
            assert one[key] == pytest.approx(other[key], rel=2e-3), key
    change = (plain.final.depth - plain.original.depth).abs().max()
    assert change > 0 and (merged.final.depth - plain.final.depth).abs().max() < 0.02 * change


def test_joined_passes_halve_when_memory_runs_out(tiny, image, monkeypatch):
    settings = {"accumulation": 4, "micro_batch": 8, "optimizer": {"name": "sgd"}}
    whole = adapt(tiny, image, config(train=settings), name="a")
    real = tiny.forward

    def small_memory(images, intrinsics=None):
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(images, intrinsics)

    monkeypatch.setattr(tiny, "forward", small_memory)
    parts = adapt(tiny, image, config(train=settings), name="a")
    assert (whole.micro_batch, parts.micro_batch) == (8, 2)
    assert parts.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=1e-4)


def test_auto_takes_what_the_memory_holds(tiny, image, monkeypatch):
    settings = config(train={"micro_batch": "auto", "accumulation": 4})
    assert adapt(tiny, image, settings, name="a").micro_batch == 2  # a CPU gains nothing from more

    # A GPU with 100 bytes free, 20 more held by PyTorch, and a peak of 30 for a pass of two views: 0.8 * 120 / 15.
    cuda = {"memory_allocated": 50, "max_memory_allocated": 80, "mem_get_info": (100, 400), "memory_reserved": 70}
    for name, value in {**cuda, "get_per_process_memory_fraction": 0.3}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value, raising=False)
    assert memory.room_for(torch.device("cuda"), 2) == 3  # of 120 bytes that it may have, 50 are in use
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert memory.room_for(torch.device("cuda"), 2) == 6

    class OnGpu:
        device = torch.device("cuda")

    def chosen(**train):
        asked = config(train={"micro_batch": "auto", "accumulation": 4, **train})
        training = TrainingLog(micro_batch=student_module.first_micro_batch(asked))
        return student_module.roomy_micro_batch(asked, training, OnGpu)

    assert chosen() == 6
    assert chosen(accumulation=2) == 4  # a step has no more views
    assert chosen(batch_size=4, accumulation=1) == 4
    run_out = TrainingLog(micro_batch=1)  # the first pass did not fit
    assert student_module.roomy_micro_batch(settings, run_out, OnGpu) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"train": {"lora_rank": 2}},
        {"train": {"lora_rank": 2, "l2_sp": 0.1, "restore_probability": 0.1, "predict_with": "teacher"}},
        {"train": {"l2_sp": 0.1}},
        {"train": {"restore_probability": 0.1}},
        {"train": {"sharpness_radius": 0.05}},
        {"train": {"bidirectional": 0.5}},
        {"views": {"cutmix": 0.5}},
        {"losses": {"feature": {"weight": 1.0}}},
        {"losses": {"ssi": {"weight": 1.0}, "gradient": {"weight": 0.5}}},
        {"ensemble": {"members": ["mirror", "finer", "finer_mirror", "coarser", "coarser_mirror"]}},
        {"train": {"micro_batch": 1}},
        {"train": {"micro_batch": "auto"}},
        {"model": {"checkpointing": True}},
    ],
    ids=lambda options: str(options)[1:60],
)
def test_every_option_trains_and_leaves_the_weights(tiny, image, options):
    before = weights_checksum(tiny)
    names = [name for name, _ in tiny.network.named_parameters()]
    plain = adapt(tiny, image, config(), name="a")
    settings = config(**options)
    result = adapt(tiny, image, settings, name="a")
    again = adapt(tiny, image, settings, name="a")
    assert weights_checksum(tiny) == before
    assert [name for name, _ in tiny.network.named_parameters()] == names
    assert result.decision == "adapted" and len(result.history) == 2
    assert torch.equal(result.final.depth, again.final.depth)
    assert torch.isfinite(result.final.depth).all()
    assert not torch.equal(result.final.depth, result.original.depth)
    if "feature" in str(options):  # within its tolerance after so little training
        assert result.history[0]["feature"] == 0.0
    elif "micro_batch" not in str(options) and "checkpointing" not in str(options):
        assert not torch.equal(result.final.depth, plain.final.depth)


def test_low_rank_updates_start_at_the_weights_and_have_their_rank(tiny):
    named = select_parameters(tiny, ["neck"])
    before = snapshot(tiny, named)
    try:
        low_rank = LowRank(named, 3)
        originals = dict(named)
        for name, merged in low_rank.merged().items():
            assert torch.equal(merged, originals[name])
        with torch.no_grad():
            for up, _ in low_rank.factors.values():
                up.normal_()
        name, merged = next(iter(low_rank.merged().items()))
        change = (merged - originals[name]).detach().reshape(len(merged), -1)
        assert torch.linalg.matrix_rank(change) == 3
        image = torch.rand(1, 3, 64, 64)
        plain = tiny.forward(image)["points"]
        with low_rank.attached(tiny.network):
            inside = tiny.forward(image)["points"]
            inside.sum().backward()
        assert not torch.equal(plain, inside)
        assert torch.equal(plain, tiny.forward(image)["points"])
        assert all(factor.grad is not None for factor in low_rank.leaves())
        with pytest.raises(UserError, match="rank"):
            LowRank([(name, p) for name, p in named if p.ndim == 1], 2)
    finally:
        restore(tiny, before)


def test_checkpointing_gives_the_same_gradients(student, exact, image):
    (rows,), _ = passes_of(student, image, config())
    plain = gradients(exact, rows, config(), 2)[0]
    exact.model.save_memory()
    saved = gradients(exact, rows, config(), 2)[0]
    assert_close_gradients(saved, plain)


def test_sharpest_point_is_radius_away_along_the_gradient_and_undone():
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    with sharpest_point([leaf], [torch.tensor([3.0, 4.0])], 0.5):
        assert torch.allclose(leaf, torch.tensor([1.3, 2.4]))
    assert torch.equal(leaf.detach(), torch.tensor([1.0, 2.0]))


def test_the_distance_term_pulls_back(tiny, image):
    fast = {"optimizer": {"learning_rate": 1e-3}, "passes": 6, "accumulation": 1, "reset": "never"}
    free = adapt(tiny, image, config(train=fast), name="a")
    held = adapt(tiny, image, config(train={**fast, "l2_sp": 100.0}), name="a")

    def distance(result):
        own = [p for _, p in tiny.network.named_parameters()]
        return sum(float((a - b).square().sum()) for a, b in zip(result.weights, own, strict=True))

    assert distance(held) < 0.9 * distance(free)


def test_a_random_change_is_as_large_as_the_trained_one_and_learns_nothing(tiny, image):
    fast = {"optimizer": {"learning_rate": 1e-4}, "passes": 2, "accumulation": 1, "reset": "never"}
    kinds = (None, "weights", "prediction")
    trained, norm, effect = (adapt(tiny, image, config(train={**fast, "random_change": k}), name="a") for k in kinds)
    own = [p for _, p in tiny.network.named_parameters()]

    def moves(result):
        return [(a - b).flatten() for a, b in zip(result.weights, own, strict=True)]

    def change(result):
        ratio = result.final.depth.log() - result.original.depth.log()
        return float((ratio - ratio.nanmedian()).abs().nanmean())

    for one, other in zip(moves(trained), moves(norm)):
        assert torch.allclose(one.norm(), other.norm(), rtol=1e-2, atol=1e-7)
        if len(one) > 1000 and one.norm() > 0:
            assert abs(float(torch.cosine_similarity(one, other, dim=0))) < 0.3
    assert change(norm) < 0.5 * change(trained) and change(effect) == pytest.approx(change(trained), rel=0.2)
    still = config(train={"optimizer": {"learning_rate": 0.0}, "random_change": "prediction"})
    assert torch.equal(adapt(tiny, image, still, name="a").final.depth, trained.original.depth)


def test_a_sequence_goes_on_from_the_last_image(tiny, image):
    settings = config(train={"reset": "never"})
    first = adapt(tiny, image, settings, name="a")
    fresh = adapt(tiny, image, settings, name="b")
    warm = adapt(tiny, image, settings, name="b", start=first.weights)
    assert torch.equal(fresh.original.depth, warm.original.depth)
    assert not torch.equal(fresh.final.depth, warm.final.depth)
    still = config(train={"optimizer": {"learning_rate": 0.0}})
    assert torch.equal(adapt(tiny, image, still, start=first.weights).final.depth, first.final.depth)


def test_the_regions_of_a_cutmix_weigh_as_much_as_they_are_large(student, image):
    """With one and the same view twice, the mixture is the view, and its two regions must add up to it."""
    from ttt_lib.views.carry import View

    settings = config(views={"crop": {"probability": 0.0}})
    target = student.model.predict(image)
    view = draw_views(image, target, settings, sample_generator(0, "a"), None)
    twice = View(
        *(x[:1].repeat(2, *[1] * (x.ndim - 1)) if isinstance(x, torch.Tensor) else x for x in vars(view).values())
    )
    mixed = config(train={"batch_size": 2}, losses=LOCAL, views={"cutmix": 1.0})
    rows = loss_batch(twice, mixed, sample_generator(0, "b"))
    assert len(rows.of) == 4 and torch.allclose(rows.share[rows.of == 0].sum(), torch.ones(()))

    def mean_terms(one):
        values = []
        for seed in range(12):
            training = TrainingLog(micro_batch=2)
            rows = loss_batch(twice, one, sample_generator(seed, "c"))
            values.append(pass_gradients(student, rows, one, training)[1])
        return {key: sum(float(v[key]) for v in values) / len(values) for key in values[0]}

    whole, regions = mean_terms(config(losses=LOCAL)), mean_terms(mixed)
    assert regions["global"] == pytest.approx(whole["global"], rel=0.25)
    assert regions["local_4"] == pytest.approx(whole["local_4"], rel=0.35)


def test_sharpness_takes_both_gradients_of_one_loss(tiny, image, monkeypatch):
    seen = []
    real = teacher_module.pass_gradients

    def spy(student, batch, *rest):
        seen.append((batch.images.sum().item(), batch.seeds))
        return real(student, batch, *rest)

    monkeypatch.setattr(teacher_module, "pass_gradients", spy)
    adapt(tiny, image, config(train={"sharpness_radius": 0.05, "passes": 2}, losses=LOCAL))
    assert len(seen) == 4 and not torch.equal(seen[0][1], seen[1][1])
    for first, second in ((seen[0], seen[2]), (seen[1], seen[3])):
        assert first[0] == second[0] and torch.equal(first[1], second[1])


def test_the_release_runs_the_whole_batch_and_writes_without_running_again(tiny, image, monkeypatch):
    seen = []
    real = tiny.forward
    monkeypatch.setattr(
        tiny, "forward", lambda images, cameras=None: (seen.append(len(images)), real(images, cameras))[1]
    )
    adapt(tiny, image, config(released={"first_sample_only": True, "write_files": True}))
    assert seen == [2] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_is_torchs_own_however_weights_and_gradients_lie_in_memory(name, dtype):
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(8, 6, 3, 4, generator=generator).to(dtype)
    settings = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.01)
    layouts = [
        start.clone(memory_format=torch.channels_last),
        torch.zeros(8, 6, 3, 8, dtype=dtype)[..., ::2].copy_(start),
    ]
    ours, plain = [each.requires_grad_() for each in layouts], start.clone().requires_grad_()
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    theirs = kind([plain], lr=0.1, weight_decay=0.01, foreach=False, fused=False)
    optimizers = [make_optimizer([each], settings) for each in ours]
    for _ in range(3):
        gradient = torch.randn(start.shape, generator=generator).to(dtype)
        for each, optimizer in zip(ours, optimizers):
            hand_over([gradient], [each])
            optimizer.step()
        plain.grad = gradient
        theirs.step()
    assert not torch.equal(plain, start)
    for each in ours:  # of half precision torch's ways to one step differ by a rounding of the weights, up to 1.5
        near = 1e-12 if dtype == torch.float64 else 3 * 2**-8
        torch.testing.assert_close(each, plain, rtol=0, atol=near, check_stride=False)


def test_impossible_combinations_are_refused():
    with pytest.raises(UserError, match="lora_rank"):
        config(train={"lora_rank": 2, "reset": "never"})
    with pytest.raises(UserError, match=r"gate\.mode decide.*train\.method is tta.*set gate\.mode to off"):
        config(train={"method": "tta"}, gate={"mode": "decide"})
