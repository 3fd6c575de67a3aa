"""The pictures of a sample's scene, without its truth unless it is asked for."""

from __future__ import annotations

import pytest
import torch

from ttt_lib.core.errors import DataError
from ttt_lib.core.types import Sample
from ttt_lib.data.photographs.groups import scene_of_samples
from ttt_lib.data.samples import SampleSet

NAMES = ["a/0", "b/0", "a/1", "c", "a/2"]


@pytest.fixture
def samples():
    read = []

    def load(name: str) -> Sample:
        read.append(name)
        intrinsics = torch.tensor([[0.8, 0, 0.5], [0, 1.1, 0.5], [0, 0, 1]]) if name != "a/2" else None
        return Sample(name, "set", torch.full((3, 20, 30), NAMES.index(name) / 10), intrinsics=intrinsics)

    scenes = {"a": ["a/0", "a/1", "a/2"], "x": ["b/0", "c"]}
    return SampleSet("set", NAMES, load, scenes=scenes), read


def test_each_sample_of_a_scene_gives_the_same_and_nothing_is_read_before(samples):
    samples, read = samples
    pictures = scene_of_samples(samples, "a/1")
    assert [p.name for p in pictures] == ["a/0", "a/1", "a/2"] and not read
    assert all(p.focal is None and not p.exact for p in pictures)
    assert [float(p.read().max()) for p in pictures] == pytest.approx([0.0, 0.2, 0.4]) and read == ["a/0", "a/1", "a/2"]


def test_the_focal_length_may_be_known(samples):
    samples, _ = samples
    pictures = scene_of_samples(samples, "b/0", true_focal=True)
    assert [(p.name, p.exact) for p in pictures] == [("b/0", True), ("c", True)]
    assert pictures[1].focal == pytest.approx(0.8)
    assert [p.focal for p in scene_of_samples(samples, "a/2", true_focal=True)] == [*[pytest.approx(0.8)] * 2, None]
    assert [p.name for p in scene_of_samples(SampleSet("set", NAMES, samples.load), "c")] == ["c"]
    with pytest.raises(DataError, match="no sample 'd'"):
        scene_of_samples(samples, "d")
