"""The examples in the package's docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import inspect
import json
from importlib import import_module

import pytest
from conftest import ROOT

import ttt_lib
from ttt_lib import load_experiment, run_experiment

FILES = [path for path in sorted((ROOT / "ttt_lib").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the examples run: with `runs/original`, as the command leaves it."""
    place = tmp_path_factory.mktemp("examples")
    quick = {"data": [{"kind": "motorcycle", "width": 96, "height": 64}], "model": {"num_tokens": 48}}
    run_experiment(
        load_experiment("original", "demo", quick), place / "runs" / "original" / "000-of-001", progress=False
    )
    (place / "runs" / "original" / "000-of-001" / "manifest.json").write_text(json.dumps({"identity": {}}))
    return place


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("name", ttt_lib.__all__)
def test_public_names_say_what_they_take_and_give(name):
    value = getattr(ttt_lib, name)
    text = inspect.getdoc(value)
    assert "Example:" in text and ">>> " in text
    if inspect.isfunction(value):
        assert ("Args:" in text) == bool(inspect.signature(value).parameters)
        assert "Returns:" in text and "Raises:" in text
