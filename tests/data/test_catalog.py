"""Sets by name, place and registration: paths are absolute where they enter, options are those of the opener."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from ttt_lib.core.config import build_experiment
from ttt_lib.core.errors import ConfigError, DataError, UserError
from ttt_lib.core.registry import DATASETS
from ttt_lib.core.schema import DataConfig
from ttt_lib.core.types import Sample
from ttt_lib.data.catalog import describe_sources, list_datasets, open_dataset
from ttt_lib.data.samples import SampleSet
from ttt_lib.geometry.cameras import project


@pytest.fixture
def mine():
    """A kind of data with an option of its own, registered for one test."""

    @DATASETS.register("mine")
    def open_mine(brightness: float, count: int = 2, fail: bool = False) -> SampleSet:
        if fail:
            raise TypeError("a mistake inside")
        names = [str(i) for i in range(count)]
        return SampleSet("mine", names, lambda name: Sample(name, "mine", torch.full((3, 16, 16), brightness)))

    yield open_mine
    DATASETS.pop("mine"), DATASETS.about.pop("mine")


def test_a_registered_kind_of_data_has_options_of_its_own(mine):
    config = build_experiment({"name": "x", "data": [{"kind": "mine", "brightness": 0.25, "count": 3}]})
    again = build_experiment(json.loads(json.dumps(config.as_parameters())))  # the way through a notebook
    (entry,) = again.data
    samples = open_dataset(entry.kind, **entry.options())
    assert len(samples) == 3 and float(samples[0].image.mean()) == 0.25
    assert list_datasets() == ["moge", "images", "motorcycle", "synthetic", "shifted", "tours", "mine"]
    assert describe_sources(["mine"]) == [{"kind": "mine"}]


def test_options_that_the_opener_lacks_are_named_and_mistakes_inside_it_keep_their_trace(mine):
    with pytest.raises(ConfigError, match="does not take these options.*brightness"):
        open_dataset("mine")
    with pytest.raises(ConfigError, match="does not take these options.*colour"):
        open_dataset("mine", brightness=1.0, colour=3)
    with pytest.raises(TypeError, match="a mistake inside"):
        open_dataset("mine", brightness=1.0, fail=True)


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"kind": "images", "pth": "x"}, "pth: unknown key; allowed here: .*path"),
        ({"kind": "mine", "brightnes": 1}, "brightnes: unknown key; allowed here: baselines, brightness"),
        ({"kind": "video"}, "no such kind of data; there are moge, images"),
    ],
)
def test_unknown_kinds_and_keys_are_refused_by_the_configuration(mine, entry, words):
    with pytest.raises(UserError, match=words):
        build_experiment({"name": "x", "data": [entry]})


def test_the_names_of_the_packages_own_kinds_are_taken():
    with pytest.raises(UserError, match="data set 'images'.*taken"):
        DATASETS.register("images")(lambda path: None)


def test_every_path_is_absolute_once_it_is_in(tmp_path, monkeypatch):
    """Relative to the working folder, in a file of sets relative to the file, `~` the home."""
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    (tmp_path / "sets" / "NYUv2").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(home / "photos" / "a.png")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert DataConfig(kind="images", path="home/photos").path == str(home / "photos")
    assert DataConfig(kind="images", path="~/photos").path == str(home / "photos")
    assert DataConfig(kind="images", path="https://x/y").path == "https://x/y"
    for entry in ("home/photos", "~/photos", "./home/../home/photos"):
        assert describe_sources([entry]) == [{"kind": "images", "path": str(home / "photos")}]
    (tmp_path / "sets" / "sets.json").write_text(json.dumps({"a": {"path": "NYUv2"}, "b": {"path": "~/photos"}}))
    monkeypatch.chdir(tmp_path / "sets")
    for name in ("sets.json", "../sets/sets.json"):
        paths = [entry["path"] for entry in describe_sources([name])]
        assert paths == [str(tmp_path / "sets" / "NYUv2"), str(home / "photos")]


def test_names_take_some_samples_of_a_set_and_are_part_of_what_it_is():
    some = open_dataset("shifted", names=["003_defocus_blur_4", "001_fog_2"], count=6, width=32, height=24)
    assert some.names == ["003_defocus_blur_4", "001_fog_2"] and some[1].name == "001_fog_2"
    assert some.data_hash() != open_dataset("shifted", count=6, width=32, height=24).data_hash()
    with pytest.raises(DataError, match="shifted has no sample '009' .1 of the `names`"):
        open_dataset("shifted", names=["009"], count=6)
    config = build_experiment({"name": "x", "data": [{"kind": "shifted", "names": ["001_fog_2"], "draw": 1}]})
    assert config.data[0].options() == {"names": ["001_fog_2"], "draw": 1}


@pytest.mark.parametrize("kind, options", [("motorcycle", {}), ("shifted", {"count": 2, "shifts": ["low_light"]})])
def test_a_second_look_is_the_same_scene_in_a_mirror_with_other_noise(kind, options):
    first, again, third = (open_dataset(kind, draw=i, width=64, height=48, **options) for i in range(3))
    assert again.names == first.names and again.name == f"{kind}.again"
    assert len({samples.data_hash() for samples in (first, again, third)}) == 3
    one, other = first[1], again[1]
    assert (other.name, other.dataset) == (one.name, f"{kind}.again")
    assert torch.equal(other.depth.flip(-1).nan_to_num(0), one.depth.nan_to_num(0))
    assert torch.equal(other.mask.flip(-1), one.mask) and other.intrinsics[0, 2] == 1 - one.intrinsics[0, 2]
    known = other.mask
    seen = project(other.points[known], other.intrinsics)  # every point is still seen where its pixel is
    grid = torch.stack(torch.meshgrid((torch.arange(64) + 0.5) / 64, (torch.arange(48) + 0.5) / 48, indexing="xy"), -1)
    assert torch.allclose(seen, grid[known], atol=1e-4)
    difference = (other.image.flip(-1) - one.image).abs().mean()
    assert 0.003 < float(difference) < 0.1 and not torch.equal(third[1].image, other.image)
    assert torch.equal(again[1].image, other.image)
