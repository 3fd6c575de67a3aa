"""One kernel for one notebook after another: nothing of one is left for the next, and one that died is replaced."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest

from ttt_lib.runs.notebook import Kernel, kernel_environment

PARAMETERS = 'output_dir = ""\nending = ""\nseconds = 0'
LOOK = """
import json, os, sys, signal
import matplotlib.pyplot as plt
from ipywidgets import IntSlider, Widget
found = {"process": os.getpid(), "left": "thing" in globals(), "figures": plt.get_fignums(), "folder": os.getcwd(),
         "widgets": len(getattr(Widget, "widgets", {})), "threads": os.environ["OMP_NUM_THREADS"],
         "warm": hasattr(sys, "mark"), "python": sys.executable}
json.dump(found, open(os.path.join(output_dir, "found.json"), "w"))
thing, sys.mark, slider = 1, True, IntSlider()
plt.ioff()
figure = plt.figure()
if ending == "error":
    raise ValueError("it went wrong")
if ending == "death":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def look(tmp_path):
    """Executes the notebook in a folder of its own, and says what it found there."""
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(LOOK)]
    kernelspec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernelspec), tmp_path / "look.ipynb")
    kernel = Kernel(threads=1)

    def execute(name: str, ending: str = "") -> dict:
        folder = tmp_path / name
        folder.mkdir()
        parameters = {"output_dir": str(folder), "ending": ending}
        try:
            kernel.execute(tmp_path / "look.ipynb", folder / "look.ipynb", parameters)
        finally:
            found = json.loads((folder / "found.json").read_text())
        os.rename(folder, tmp_path / f"{name}.moved")  # as a job does
        return {
            **found,
            "counts": [c.execution_count for c in nbformat.read(tmp_path / f"{name}.moved/look.ipynb", 4).cells],
        }

    yield execute
    process = kernel.manager.provisioner.pid if kernel.manager else None
    kernel.close()
    assert process is None or not Path(f"/proc/{process}").exists()


def test_a_notebook_finds_nothing_of_the_one_before_but_what_is_loaded(look, tmp_path):
    first, second = look("first"), look("second")
    assert first["process"] == second["process"] and not first["warm"] and second["warm"]
    for name, found in (("first", first), ("second", second)):
        assert not found["left"] and found["figures"] == [] and found["threads"] == "1"
        assert found["folder"] == str(tmp_path / name)
    assert first["widgets"] == second["widgets"] and first["counts"] == second["counts"]


@pytest.mark.parametrize("ending", ["error", "death"])
def test_after_a_failure_there_is_a_new_kernel(look, ending):
    first = look("first")
    with pytest.raises(Exception, match="it went wrong" if ending == "error" else "died"):
        look("failing", ending)
    after = look("after")
    assert after["process"] != first["process"] and not after["warm"]


def test_the_kernel_is_this_interpreter_whatever_is_installed_as_python3(look, tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/no/such/python"], "display_name": "another", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    assert look("first")["python"] == sys.executable


def test_a_kernel_does_not_give_its_memory_back_at_once_as_a_dask_worker_does(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")  # dask's own, for its workers
    assert "MALLOC_TRIM_THRESHOLD_" not in kernel_environment(1)
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "65536"
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")  # a user's
    assert kernel_environment(None)["MALLOC_TRIM_THRESHOLD_"] == "131072"
