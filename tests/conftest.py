"""Shared pieces: a small untrained network, small images, and one thread for steady times on shared machines."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from ttt_lib.models import GeometryModel, load_model
from ttt_lib.pretrain import new_model, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
    return GeometryModel(copy.deepcopy(_tiny.network), _tiny.name, _tiny.kind, 48)


@pytest.fixture(scope="session")
def picture():
    """A room and a table with exact geometry, 96 x 128."""
    from ttt_lib.synthetic import make_pictures

    return make_pictures(["room", "table"], 5, (96, 128))
