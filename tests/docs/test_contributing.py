"""The examples of CONTRIBUTING.md run as they stand, one after the other, and do what the text says."""

import re
import shlex

import pytest
import torch
import yaml
from conftest import ROOT

from ttt_lib.core.errors import UserError
from ttt_lib.core.registry import LOSSES, MODELS, SHIFTS, SUPERVISIONS
from ttt_lib.data.shifts import BUILT_IN
from ttt_lib.runs.experiment import experiment_from_parameters


@pytest.fixture
def registries():
    """What the examples add is gone afterwards."""
    registries = (LOSSES, SHIFTS, MODELS, SUPERVISIONS)
    for registry in registries:
        registry.load_home()  # once a process: what is put back below has to hold it
    held = [(registry, dict(registry)) for registry in registries]
    yield
    for registry, before in held:
        registry.clear()
        registry.update(before)


def test_examples_run_as_they_stand(registries, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "example"}

    exec(blocks[0], space)
    exec(blocks[1], space)
    assert space["result"].history[0]["log_ratio"] > 0
    assert float(capsys.readouterr().out) == space["result"].history[0]["log_ratio"]

    exec(blocks[2], space)
    assert float(capsys.readouterr().out) == space["result"].history[0]["flat_floor"] > 0
    again = space["adapt"](space["model"], space["sample"], "unfreeze_encoder", overrides={
        "train": {"passes": 2, "accumulation": 1}, "supervision": {"flat_floor": {"weight": 0.0}},
    })  # fmt: skip
    assert not torch.equal(again.adapted.depth, space["result"].adapted.depth)  # its weight counts
    with pytest.raises(UserError, match=r"supervision\.flat_floor\.shore: unknown key; allowed here: share, weight"):
        space["adapt"](space["model"], space["sample"], overrides={"supervision": {"flat_floor": {"shore": 1}}})

    exec(blocks[3], space)
    assert "snow" not in BUILT_IN and space["snowy"].names == ["000_snow_1"]
    sample = space["snowy"][0]
    assert int((sample.image == 1).all(0).sum()) > 0
    views = space["adapt"](
        space["model"], space["sample"], "unfreeze_encoder",
        overrides={"train": {"passes": 2, "accumulation": 1}},
    )  # fmt: skip
    assert not torch.equal(views.adapted.depth, space["result"].adapted.depth)  # snow fell on the views

    exec(blocks[4], space)
    assert space["small"].name == "small:7"
    result = space["result"]
    assert result.adapted.points.isfinite().all() and not torch.equal(result.adapted.depth, result.original.depth)

    measured = space["adapt"](
        space["small"], space["sample"], "recommended", profile="demo",
        overrides={"model": {"name": "small:7"}, "train": {"parts": ["heads"], "passes": 2, "accumulation": 1}},
    )  # fmt: skip
    assert "consistency_score" in measured.signals and "drift_features" not in measured.signals  # it has no encoder

    exec(blocks[5], space)
    assert "log_ratio" in space["result"].history[0]


def test_every_file_that_a_document_names_is_there():
    for document, least in (("CONTRIBUTING.md", 10), ("README.md", 1)):
        text = (ROOT / document).read_text()
        named = set(re.findall(r"`((?:ttt_lib|tests|notebooks|docs)/[\w/.]+)`", text))
        assert len(named) >= least, named
        assert not [name for name in named if not (ROOT / name).exists()], document


def test_the_rooms_it_draws_are_those_of_the_package():
    """In the order in which each says what it may import (`test_rooms` reads the imports themselves)."""
    drawn = re.search(r"^core <.*$", (ROOT / "CONTRIBUTING.md").read_text(), re.M).group()
    named = re.findall(r"[a-z]+", drawn.replace("(not each other)", ""))
    rooms = {path.parent.name for path in (ROOT / "ttt_lib").glob("*/__init__.py")}
    above = {path.stem for path in (ROOT / "ttt_lib").glob("*.py")}
    assert set(named) - above == rooms and len(named) == len(set(named))
    for number, room in enumerate(named):
        said = re.search(
            r"May import: (.*?)\.", (ROOT / "ttt_lib" / room / "__init__.py").read_text() if room in rooms else ""
        )
        if said and said.group(1) not in ("no other room", "every room", "every room but report"):
            assert set(re.findall(r"\w+", said.group(1))) <= set(named[:number]), room


def test_the_papermill_command_of_the_docs_is_a_complete_experiment(tmp_path):
    command = re.search(
        r"^papermill notebooks/.*?[^\\\\]$", (ROOT / "docs/gpu_servers.md").read_text(), re.M | re.S
    ).group()
    words = shlex.split(command.replace("\\\n", " "))
    file, profile, extra = (words[words.index(option) + 1] for option in ("-f", "-p", "-y"))
    assert profile == "profile" and words[words.index("-p") + 2] == "paper"
    parameters = yaml.safe_load((ROOT / file).read_text()) | yaml.safe_load(extra)
    config = experiment_from_parameters(parameters, "paper")
    assert config.data[0].kind == "moge" and config.train.passes == 512
