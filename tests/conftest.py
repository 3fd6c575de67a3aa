"""Shared pieces: small networks, images and experiments, and one thread for steady times on shared machines."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from ttt_lib import cli
from ttt_lib.adaptation.adapter import Adapter
from ttt_lib.adaptation.known_distances import KnownDistances
from ttt_lib.adaptation.losses.terms import LossInputs, draw_seeds
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Supervision
from ttt_lib.core.config import ExperimentConfig, build_experiment, merge
from ttt_lib.core.provenance import cores
from ttt_lib.models.base import GeometryModel, select_parameters
from ttt_lib.models.load import load_model
from ttt_lib.models.moge import MoGe
from ttt_lib.models.pretraining.train import new_model, save_checkpoint
from ttt_lib.runs.notebook import Kernel

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "name": "test",
    "model": {"name": "tiny", "num_tokens": 48},
    "train": {"passes": 4, "batch_size": 2, "accumulation": 2, "optimizer": {"learning_rate": 1e-3}},
    "views": {"longest_side": 96},
    "losses": {"global": {"align_resolution": 6}, "mask": {"weight": 0.1}},
}


class Watching(Supervision):
    """Calls a function after each step of the training."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.on_step = on_step

    def after_step(self, student: Student, last: bool) -> None:
        self.on_step()


def adapt(model, image, config, name="image", references=None, on_step=None, **given) -> AdaptResult:
    """`Adapter.adapt` in one call, with known distances where there are some; `on_step` is called after each step."""
    supervision = [KnownDistances(references, config)] if references is not None else []
    supervision += [Watching(on_step)] if on_step is not None else []
    return Adapter(model, config).adapt(image, name, supervision, **given)


def loss_inputs(output, target, intrinsics, terms, generator=None, **options) -> LossInputs:
    """What `compute_loss` takes, for terms given as plain settings."""
    config = build_experiment({"name": "x", "losses": terms})
    seeds = draw_seeds(len(target), generator or torch.Generator().manual_seed(1)).tolist()
    share = options.pop("share", torch.ones(len(target)))
    known = torch.isfinite(target).all(-1)
    negative = options.pop("negative", torch.zeros_like(known))
    return LossInputs(
        output, target, known, negative, intrinsics, terms=config.losses, seeds=seeds, share=share, **options
    )


def small_experiment(**base) -> Callable[..., ExperimentConfig]:
    """`SMALL` with `base` laid over it, as a function that lays a test's own settings over both."""
    content = merge(SMALL, base)
    return lambda **overrides: build_experiment(content, overrides=overrides)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Of `-n auto`, one more than there are cores: an eighth of the time a test waits for a process that it started."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist's own hook reads it
    return 1 + cores()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first in the share of each of xdist's workers: what is left at the end is quick to share out."""
    shares: list[list[pytest.Item]] = [[] for _ in range(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))]
    if len(shares) == 1:
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    slow = [f for f in files.values() if any(item.get_closest_marker("slow") for item in f)]
    for turn, file in enumerate(slow):
        shares[turn % len(shares)] += file
    for file in (f for f in files.values() if f not in slow):
        min(shares, key=len).extend(file)
    items[:] = [item for share in shares for item in share]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def ttt(monkeypatch, capsys) -> Callable[..., CompletedProcess]:
    """`ttt-depth` with these words, in this process: what a process of its own would give, seconds earlier."""

    def run(*words: object) -> CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["ttt-depth", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)  # as typer does, if not always
        return CompletedProcess(words, end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def kernel() -> Iterator[Kernel]:
    """For notebooks, one after another: what the first one loads is there for the next."""
    kernel = Kernel(threads=1)
    yield kernel
    kernel.close()


@pytest.fixture(scope="session")
def untrained_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of the small network with random weights."""
    path = tmp_path_factory.mktemp("model") / "untrained.pt"
    save_checkpoint(new_model(0, imagenet=False), path)
    return path


@pytest.fixture(scope="session")
def _tiny() -> GeometryModel:
    return load_model("tiny", "cpu", num_tokens=48)


@pytest.fixture
def tiny(_tiny) -> GeometryModel:
    """The bundled model at 48 tokens, a copy of its own for each test."""
    return MoGe(copy.deepcopy(_tiny.network), _tiny.name, _tiny.kind, 48)


@pytest.fixture(scope="session")
def picture():
    """A room and a table with exact geometry, 96 x 128."""
    from ttt_lib.data.scenes.generate import make_pictures

    return make_pictures(["room", "table"], 5, (96, 128))


@pytest.fixture(scope="session")
def image(picture) -> torch.Tensor:
    """The room alone, (3, 96, 128)."""
    return picture.image[0]


@pytest.fixture
def student(tiny) -> Student:
    """The small model, its heads to be trained."""
    return Student(tiny, select_parameters(tiny, ["heads"]))
