"""`pytest -m gpu` is the check of a new GPU: what only a GPU does, beside the CPU. The bodies run here too, pretended."""

from __future__ import annotations

import os
from collections import Counter
from itertools import product

import pytest
import torch
from conftest import adapt, small_experiment
from places import REAL, at, everywhere, on_gpus
from true_scene import true_scene

from ttt_lib.adaptation.loop import Steps
from ttt_lib.adaptation.photographs.scene import adapt_scene
from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Episode, TrainingLog, configured
from ttt_lib.core.seeds import sample_generator
from ttt_lib.models.base import training, weights_checksum
from ttt_lib.runs import cluster
from ttt_lib.runs.loops import compare_loops
from ttt_lib.views.pyrender_backend import gl_renderer
from ttt_lib.views.renderer import NovelViewRenderer

# Few and small steps: rounding differs between devices, and a large rate makes more of it.
config = small_experiment(
    views={"longest_side": 64}, train={"passes": 2, "accumulation": 1, "optimizer": {"learning_rate": 1e-5}}
)
ALL_TERMS = {
    "local_4": {"num_patches": 64},
    "local_16": {"num_patches": 128},
    "local_64": {"num_patches": 256},
    "normal": {},
    "edge": {},
}  # of MoGe-1, and edges


@pytest.fixture
def place(request):
    with at(request.param) as found:
        yield found


def assert_near(there, here, rel=2e-2):
    """Two results of one image: the same views, a loss and a prediction that agree but for rounding."""
    assert there.decision == here.decision, there.reason
    for one, other in zip(there.history, here.history, strict=True):
        assert one["known"] == pytest.approx(other["known"], abs=0.01)
        assert one["loss"] == pytest.approx(other["loss"], rel=rel)
    there, here = there.final.depth.cpu(), here.final.depth.cpu()
    difference = (there - here).abs() / here
    assert difference.nanmedian() < rel / 10


@pytest.mark.parametrize(
    ("place", "optimizer", "renderer"),
    [("pretended", "adamw", "none"), ("pretended", "sgd", "torch"), ("pretended", "adamw", "pyrender")]
    + [pytest.param("cuda", *both, marks=pytest.mark.gpu) for both in product(["adamw", "sgd"], ["none", "torch", "pyrender"])],
    indirect=["place"],
)  # fmt: skip
def test_the_loop_gives_what_the_cpu_gives(tiny, image, place, optimizer, renderer):
    if renderer == "pyrender":
        NovelViewRenderer("pyrender")  # raises where there is no GL, which is no pass
    novel = {} if renderer == "none" else {"novel_view": {"probability": 1.0, "backend": renderer}}
    settings = config(views=novel, train={"optimizer": {"name": optimizer}})
    here = adapt(tiny, image, settings)
    model = place.copy_of(tiny)
    before = weights_checksum(model)
    there = adapt(model, image, settings)
    assert there.final.depth.device == place.device and weights_checksum(model) == before
    assert_near(there, here)
    assert there.view_stats == here.view_stats


@pytest.mark.slow
@on_gpus
def test_every_term_of_the_loss_runs_there(tiny, image, place):
    settings = config(
        losses=ALL_TERMS, train={"bidirectional": 0.5, "sharpness_radius": 1e-3, "l2_sp": 1e-3}, views={"cutmix": 1.0}
    )
    there, here = adapt(place.copy_of(tiny), image, settings), adapt(tiny, image, settings)
    assert there.decision == here.decision == "adapted"
    # The same numbers draw the patches; where rounding decides which pixel is chosen, one of the many may be another.
    assert there.history[0]["loss"] == pytest.approx(here.history[0]["loss"], rel=0.05)
    assert there.history[0].keys() == here.history[0].keys()


@on_gpus
def test_the_gate_and_the_ensemble_decide_there_as_here(tiny, image, place):
    settings = config(gate={"mode": "measure", "views": 1}, ensemble={"members": ["mirror", "finer"]})
    there, here = adapt(place.copy_of(tiny), image, settings), adapt(tiny, image, settings)
    assert_near(there, here)
    assert there.signals.keys() == here.signals.keys() and len(here.signals) > 5


@pytest.mark.slow
@on_gpus
def test_photographs_of_a_scene_are_adapted_there(tiny, place):
    scene = true_scene(scale=0.2)[0]
    settings = config(supervision={"photographs": {"stereo": True}}, train={"batch_size": 1})
    there, here = (list(adapt_scene(model, scene, settings).results()) for model in (place.copy_of(tiny), tiny))
    for (_, one), (_, other) in zip(there, here, strict=True):
        # Two passes change next to nothing, so rounding may decide whether the trained one counts: both are corrected.
        assert {one.decision, other.decision} <= {"corrected", "adapted_corrected"}, (one.reason, other.reason)
        assert one.signals["held_back_corrected"] == pytest.approx(other.signals["held_back_corrected"], rel=0.1)
        depth = one.final.depth.cpu()
        assert depth.nanmedian() == pytest.approx(float(other.final.depth.nanmedian()), rel=2e-2)


@everywhere
def test_bfloat16_trains_near_float32(tiny, image, place):
    model = place.copy_of(tiny)
    plain = adapt(model, image, config())
    model.autocast = "bfloat16"
    rounded = adapt(model, image, config())
    assert rounded.decision == "adapted"
    assert rounded.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=0.15)
    if place.name != "pretended":  # which has no autocast
        assert rounded.history[0]["loss"] != plain.history[0]["loss"]


@everywhere
def test_memory_does_not_grow_from_image_to_image(tiny, image, place):
    model = place.copy_of(tiny)
    settings = config(views={"novel_view": {"probability": 0.5, "backend": "torch"}}, train={"passes": 1})
    held = []
    for i in range(50 if place.name == "cuda" else 3):
        adapt(model, image, settings, name=str(i))
        held.append(place.held())
    assert held[-1] <= held[1]


@pytest.mark.gpu
def test_auto_stays_under_a_cap_of_the_memory(tiny, image):
    with at("cuda") as place:
        model = place.copy_of(tiny)
        model.num_tokens, train = 192, {"passes": 32, "accumulation": 32}

        def run(micro_batch):
            torch.cuda.empty_cache()
            return adapt(model, image, config(train={**train, "micro_batch": micro_batch}, views={"longest_side": 128}))

        least, free = run(2), run("auto")
        assert free.micro_batch == 64 and free.peak_memory_mb > least.peak_memory_mb
        cap = (least.peak_memory_mb + free.peak_memory_mb) / 2 * 2**20
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.mem_get_info()[1])
        try:
            capped = run("auto")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert 2 <= capped.micro_batch < 64 and capped.peak_memory_mb <= cap / 2**20
        assert_near(capped, free)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_workers_are_pinned_each_to_its_gpu(where, monkeypatch):
    with at(where):
        devices = ["2", "5"] if where == "cpu" else cluster.visible_gpus()
        monkeypatch.setattr(cluster, "visible_gpus", lambda: devices)
        with cluster.open_client(2, None, None, lambda line: None) as client:
            told = sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values())
            assert told == sorted(devices[i % len(devices)] for i in range(2))
            if where == "cuda":
                assert set(client.run(torch.cuda.device_count).values()) == {1}


@everywhere
def test_both_renderers_draw_the_same_on_the_device(picture, place):
    scene = [part[0].to(place.device) for part in (picture.image, picture.points, picture.mask, picture.intrinsics)]
    camera = torch.eye(4)[None].to(place.device)
    drawn = {}
    for backend in ("torch", "pyrender"):
        renderer = NovelViewRenderer(backend, place.device)
        renderer.set_scene(*scene)
        drawn[backend] = renderer.render(camera, scene[3][None], (96, 128))
        assert drawn[backend].image.device == place.device
    both = drawn["torch"].mask & drawn["pyrender"].mask
    assert both.float().mean() > 0.8
    points = [(view.points - scene[1]).abs().nan_to_num(0.0)[both].mean() for view in drawn.values()]
    assert max(points) < 0.02


# Where the host waits for the device in a step without novel views, with all of MoGe-1's terms: which rows are left, and
# once a step the numbers of the history.
WAITS_A_PASS, WAITS_A_STEP = {"adaptation/batches.py": 1}, 1


@pytest.mark.parametrize("name", ["pretended", REAL])
def test_a_step_waits_for_the_device_a_known_number_of_times(tiny, image, name):
    passes = 3
    settings = config(train={"passes": 2 * passes, "accumulation": passes}, losses=ALL_TERMS)
    with at(name) as place:
        model, image = place.copy_of(tiny), image.to(place.device)
        with training(model, settings.train.parts) as named:
            episode = Episode(settings, Student(model, named), sample_generator(0, "a"), TrainingLog())
            sources = configured(episode)
            for source in sources:
                source.prepare(model, image, model.predict(image))
            steps = Steps(episode.student, sources, settings, episode.generator, episode.log)
            steps.step()  # the first one makes the optimizer's state
            with place.counting() as waits:
                steps.step()
                found = waits()
        assert 0 < len(found) <= passes * sum(WAITS_A_PASS.values()) + WAITS_A_STEP, "\n".join(found)
        if name == "pretended":
            places = Counter(line.split(" in ")[1].partition(":")[0] for line in found)
            assert places == {**{k: n * passes for k, n in WAITS_A_PASS.items()}, "adaptation/loop.py": WAITS_A_STEP}


@pytest.mark.gpu
def test_loops_in_processes_of_their_own_have_the_gpu(image):
    with at("cuda") as place:
        torch.ones(1, device=place.device)  # what is forked from a process that has it already could not have it
        table = compare_loops({name: config(model={"device": "cuda"}) for name in ("one", "other")}, image, repeats=1)
    assert list(table.failed) == ["", ""] and (table.seconds > 0).all()


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with at("pretended") as place, place.counting() as waits:
        there, here = torch.ones(3, device=place.device), torch.ones(3)
        for mistake in (lambda: there + here, lambda: torch.stack([there, here]), lambda: there.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                mistake()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device=place.device, generator=torch.Generator())
        assert (there + 1).device == place.device and torch.equal((there * 2).cpu(), here * 2)
        before = len(waits())
        for waiting in (
            lambda: float(there[0]),
            lambda: there[there > 0],
            lambda: here.to(place.device),
            lambda: there.tolist(),
        ):
            waiting()
        assert len(waits()) == before + 4
        here.to(place.device, non_blocking=True), torch.where(there > 0, there, 0.0), there.sum()
        assert len(waits()) == before + 4


@pytest.mark.gpu
def test_egl_draws_on_the_gpu():
    with at("cuda"):
        from OpenGL import GL

        context = gl_renderer()
        context._platform.make_current()
        name = GL.glGetString(GL.GL_RENDERER).decode()
        assert "llvmpipe" not in name and "softpipe" not in name, f"drawn on the CPU by {name}; set EGL_DEVICE_ID"
