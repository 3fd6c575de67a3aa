"""Notebooks through papermill, in a kernel of this very interpreter with a fixed number of threads."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ttt_lib.core.files import write_json

ENVIRONMENT = threading.Lock()  # os.environ is one for all threads of a process, so kernels start one after another


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook with those of the parameters that its parameters cell knows; the cell that fails raises."""
    import nbformat
    import papermill

    logging.getLogger("papermill").setLevel(logging.WARNING)
    tagged = nbformat.read(notebook, as_version=4)
    cell = next((c for c in tagged.cells if "parameters" in c.metadata.get("tags", [])), None)
    known = {name: value for name, value in parameters.items() if cell is None or f"\n{name} =" in f"\n{cell.source}"}
    places = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)]  # papermill formats them
    papermill.execute_notebook(
        *places, parameters=known, kernel_name="python3", progress_bar=False, cwd=str(output.parent),
        log_output=False, start_timeout=300,
    )  # fmt: skip


@contextmanager
def own_kernel() -> Iterator[None]:
    """Make `python3` mean this interpreter: a kernel spec of our own comes first in the search path."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "kernels" / "python3"
        spec.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--IPKernelApp.log_level=ERROR"]
        write_json(spec / "kernel.json", {"argv": argv, "display_name": "Python 3", "language": "python"})
        before = os.environ.get("JUPYTER_PATH")
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, before]))
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("JUPYTER_PATH", None)
            else:
                os.environ["JUPYTER_PATH"] = before


@contextmanager
def thread_limits(threads: int) -> Iterator[None]:
    """Environment for the kernel: its thread count, and no spinning while it waits."""
    values = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    values["OMP_WAIT_POLICY"] = "PASSIVE"
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
