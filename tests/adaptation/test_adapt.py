"""The loop: weights come back to the bit, rate 0 changes nothing, failures keep the original."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import adapt, small_experiment

from ttt_lib.adaptation import gradients as gradients_module
from ttt_lib.adaptation.adapter import working_image
from ttt_lib.core.errors import UserError
from ttt_lib.core.seeds import sample_generator
from ttt_lib.models.base import weights_checksum

config = small_experiment()


def test_adaptation_changes_the_prediction_and_leaves_the_weights(tiny, image):
    before = weights_checksum(tiny)
    result = adapt(tiny, image, config())
    assert weights_checksum(tiny) == before
    assert result.decision == "adapted" and result.passes_done == 4 and len(result.history) == 2
    assert not torch.equal(result.final.depth, result.original.depth)
    assert torch.equal(tiny.predict(image).depth, result.original.depth)
    assert {"step", "loss", "global", "mask", "gradient_norm", "seconds", "known"} <= result.history[0].keys()
    assert result.seconds > 0 and result.peak_memory_mb > 0
    assert not any(p.requires_grad or p.grad is not None for p in tiny.network.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_rate_zero_is_the_original_to_the_bit(tiny, image, optimizer):
    rate = {"train": {"optimizer": {"name": optimizer, "learning_rate": 0.0}}, "teacher": {"refresh_every": 1}}
    for predict_with in ("student", "teacher"):
        rate["train"]["predict_with"] = predict_with
        result = adapt(tiny, image, config(**rate))
        assert result.decision == "adapted"
        assert torch.equal(result.final.points, result.original.points)
        assert torch.equal(result.final.depth, result.original.depth)


def test_the_same_seed_gives_the_same_and_another_does_not(tiny, image):
    torch.manual_seed(1)
    first = adapt(tiny, image, config(), name="a")
    torch.manual_seed(2)
    second = adapt(tiny, image, config(), name="a")
    other = adapt(tiny, image, config(), name="b")
    assert torch.equal(first.final.depth, second.final.depth)
    assert not torch.equal(first.final.depth, other.final.depth)
    draws = [torch.rand(3, generator=sample_generator(*key)) for key in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_weights_come_back_after_an_interruption(tiny, image, error):
    before = weights_checksum(tiny)

    def stop():
        raise error

    with pytest.raises(error):
        adapt(tiny, image, config(), on_step=stop)
    assert weights_checksum(tiny) == before


def test_a_loss_that_is_not_finite_keeps_the_original(tiny, image, monkeypatch):
    before = weights_checksum(tiny)
    real, calls = gradients_module.compute_loss, []

    def broken(*arguments, **options):
        loss, terms = real(*arguments, **options)
        calls.append(1)
        return (loss * float("nan") if len(calls) > 2 else loss), terms

    monkeypatch.setattr(gradients_module, "compute_loss", broken)
    result = adapt(tiny, image, config())
    assert result.decision == "original" and "not finite in step 2" in result.reason
    assert result.adapted is None and torch.equal(result.final.depth, result.original.depth)
    assert weights_checksum(tiny) == before and len(result.history) == 1


def test_a_huge_rate_keeps_the_original(tiny, image):
    before = weights_checksum(tiny)
    result = adapt(tiny, image, config(train={"optimizer": {"name": "sgd", "learning_rate": 1e6}}))
    assert weights_checksum(tiny) == before
    assert result.decision == "original" and "not finite" in result.reason
    assert torch.equal(result.final.depth, result.original.depth) and torch.isfinite(result.final.depth).all()


def trained_names(tiny, image, parts) -> set[str]:
    """Which parameters differ right after the first step."""
    start = {name: p.detach().clone() for name, p in tiny.network.named_parameters()}
    changed: set[str] = set()

    def look():
        changed.update(name for name, p in tiny.network.named_parameters() if not torch.equal(p, start[name]))

    adapt(tiny, image, config(train={"parts": parts}), on_step=look)
    return changed


def test_only_the_named_parts_train(tiny, image):
    assert {name.split(".")[0] for name in trained_names(tiny, image, ["heads"])} == {"points_head", "mask_head"}
    assert {name.split(".")[0] for name in trained_names(tiny, image, ["neck"])} == {"neck"}
    assert {name.split(".")[0] for name in trained_names(tiny, image, ["encoder"])} == {"encoder"}
    biases = trained_names(tiny, image, ["*.bias"])
    assert biases and all(name.endswith("bias") for name in biases)
    norms = trained_names(tiny, image, ["norms"])
    assert norms == norms & {name for name, _ in tiny.parameter_groups()["norms"]} and norms
    with pytest.raises(UserError, match="decoder.*encoder"):
        adapt(tiny, image, config(train={"parts": ["decoder"]}))


def test_sum_is_accumulation_times_mean(tiny, image):
    """For SGD, summed gradients with rate r move the weights like averaged ones with rate r times the passes."""
    small = {"name": "sgd", "weight_decay": 0.0}
    summed = adapt(
        tiny, image, config(train={"accumulation_mode": "sum", "optimizer": {**small, "learning_rate": 1e-4}})
    )
    mean = adapt(
        tiny, image, config(train={"accumulation_mode": "mean", "optimizer": {**small, "learning_rate": 2e-4}})
    )
    assert torch.allclose(summed.final.depth, mean.final.depth, rtol=1e-4)


def test_the_teacher_lags_behind_the_student(tiny, image):
    teacher = {"ema_decay": 0.9, "refresh_every": 1}
    student = adapt(tiny, image, config(teacher=teacher))
    slow = adapt(tiny, image, config(teacher=teacher, train={"predict_with": "teacher"}))
    frozen = adapt(
        tiny, image, config(teacher={"ema_decay": 1.0, "refresh_every": 1}, train={"predict_with": "teacher"})
    )

    def moved(result):
        return float((result.final.depth - result.original.depth).abs().mean())

    assert 0 < moved(slow) < moved(student)
    assert moved(frozen) == 0


def test_tta_averages_without_training(tiny, image):
    before = weights_checksum(tiny)
    result = adapt(tiny, image, config(train={"method": "tta"}))
    assert weights_checksum(tiny) == before and result.decision == "averaged" and not result.history
    ratio = result.final.depth / result.original.depth
    assert 0.7 < ratio.median() < 1.3 and not torch.equal(result.final.depth, result.original.depth)


def test_no_passes_is_the_original(tiny, image):
    result = adapt(tiny, image, config(train={"method": "none", "passes": 0}))
    assert result.decision == "original" and result.final is result.original


def test_novel_views_take_part(tiny, image):
    views = {"novel_view": {"probability": 1.0, "severity": 2, "backend": "torch"}}
    result = adapt(tiny, image, config(views=views))
    assert result.decision == "adapted" and result.view_stats["novel"] == 8
    assert 0.3 < result.history[0]["known"] < 1


def test_the_released_behaviour_can_be_switched_on(tiny, image):
    """Each switch changes the result."""
    base = adapt(tiny, image, config(views={"mirror": 1.0}))
    for switch in ("mirror_keeps_x", "first_sample_only", "mask_positive_and_negative"):
        other = adapt(tiny, image, config(views={"mirror": 1.0}, released={switch: True}))
        assert not torch.equal(base.final.depth, other.final.depth), switch


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_files_of_the_release_are_written_change_nothing_and_are_gone_afterwards(
    tiny, image, monkeypatch, micro_batch
):
    places, written, real = set(), [], gradients_module.np.save

    def save(path, array):
        real(path, array)
        places.add(path.parent)
        written.append((path.name, len(array)))

    train = {"micro_batch": micro_batch, "passes": 4, "batch_size": 2, "accumulation": 2}
    plain = adapt(tiny, image, config(train=train))
    monkeypatch.setattr(gradients_module.np, "save", save)
    result = adapt(tiny, image, config(train=train, released={"write_files": True}))
    assert torch.equal(plain.final.depth, result.final.depth)
    assert sum(count for name, count in written if name == "points.npy") == 8  # views in all
    assert len(places) == 8 // micro_batch and not any(place.exists() for place in places)


def test_large_photographs_are_shrunk_for_views_but_predicted_whole(tiny):
    image = torch.rand(3, 300, 200, generator=torch.Generator().manual_seed(0))
    assert working_image(image, 96).shape == (3, 96, 64) and working_image(image, 400) is image
    result = adapt(tiny, image, config())
    assert result.final.depth.shape == (300, 200)


def test_bfloat16_stays_close(tiny, image):
    mixed = copy.copy(tiny)
    mixed.autocast = "bfloat16"
    ratio = mixed.predict(image).depth / tiny.predict(image).depth
    assert (ratio / ratio.median() - 1).abs().median() < 0.05
    assert adapt(mixed, image, config()).decision == "adapted"


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_caller_s_modes_change_nothing(tiny, image, inside):
    plain = adapt(tiny, image, config())
    with inside():
        same = adapt(tiny, image.clone(), config())
    assert same.decision == plain.decision == "adapted" and torch.equal(same.final.depth, plain.final.depth)


def test_images_of_other_types_and_another_default_type(tiny, image):
    plain = adapt(tiny, image, config())
    for other in (image.double(), (image * 255).round().to(torch.uint8)):
        found = adapt(tiny, other, config())
        assert found.decision == "adapted" and torch.allclose(found.original.depth, plain.original.depth, rtol=0.1)
    torch.set_default_dtype(torch.float64)
    try:
        same = adapt(tiny, image, config())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(same.final.depth, plain.final.depth)


def test_what_requires_gradients_is_as_before(tiny, image):
    first = next(tiny.network.parameters())
    first.requires_grad_(True)
    adapt(tiny, image, config())
    assert first.requires_grad and sum(p.requires_grad for p in tiny.network.parameters()) == 1


def test_weights_are_kept_for_sequences_only(tiny, image):
    assert adapt(tiny, image, config()).weights is None
    assert adapt(tiny, image, config(train={"reset": "never"})).weights is not None
