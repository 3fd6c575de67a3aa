"""Notebooks through papermill, in kernels of this very interpreter with a fixed number of threads."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from ttt_lib.core.files import write_json

ENVIRONMENT = threading.Lock()  # os.environ is one for all threads of a process, so kernels start one after another
START_WITHIN = 300  # seconds
DASK_TRIM = {"MALLOC_TRIM_THRESHOLD_": "65536"}  # what a dask worker has in its environment, for its own sake
NOTEBOOKS_EACH = 60  # of one kernel: memory that its heap has lost in pieces comes back with the next

# What a notebook leaves in a kernel goes when it has ended; modules and their caches stay.
FORGET = """
import sys
if "ipywidgets" in sys.modules:
    sys.modules["ipywidgets"].Widget.close_all()
if "matplotlib.pyplot" in sys.modules:
    sys.modules["matplotlib.pyplot"].close("all")
get_ipython().reset(new_session=True)
if "torch" in __import__("sys").modules and __import__("torch").cuda.is_initialized():
    __import__("torch").cuda.empty_cache()
"""


class Kernel:
    """One kernel for one notebook after another: the interpreter, its imports and caches are warm from the second on.

    It starts with the first notebook. A notebook finds an empty namespace, no figure and no widget of another; after
    one that failed there is a new kernel. threads: of the kernel; None leaves them to the environment.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads, self.manager, self.done = threads, None, 0

    def _run(self, folder: str | Path, code: str = "") -> None:
        """Let the kernel work in `folder`, and run the code there."""
        from jupyter_client import BlockingKernelClient

        client = BlockingKernelClient(connection_file=self.manager.connection_file)
        client.load_connection_file()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=START_WITHIN)
            code = f"__import__('os').chdir({str(folder)!r})\n{code}"
            reply = client.execute(code, store_history=False, reply=True, timeout=60)
            if reply["content"]["status"] != "ok":
                raise RuntimeError(f"the kernel cannot be used again: {reply['content'].get('evalue')}")
        finally:
            client.stop_channels()

    def execute(self, notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
        """`execute` in this kernel, which leaves `output`'s folder again (Windows moves no folder that is in use)."""
        from jupyter_client import AsyncKernelManager

        if self.done >= NOTEBOOKS_EACH:
            self.close()
        try:
            if self.manager is None:
                self.manager = AsyncKernelManager(kernel_name="python3")
                atexit.register(self.close)
                with ENVIRONMENT, own_kernel(), thread_limits(self.threads):  # papermill starts it
                    execute(notebook, output, parameters, self.manager)
            else:
                self._run(output.parent)
                execute(notebook, output, parameters, self.manager)
            self._run(tempfile.gettempdir(), FORGET)
            self.done += 1
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the kernel, if there is one; the next notebook gets a new one."""
        from jupyter_client.utils import run_sync

        manager, self.manager, self.done = self.manager, None, 0
        atexit.unregister(self.close)
        if manager is not None and manager.has_kernel:
            with suppress(Exception):  # it has ended by itself
                run_sync(manager.shutdown_kernel)(now=True)


@cache
def kept_kernel(threads: int) -> Kernel:
    """The kernel of this process that its jobs share."""
    return Kernel(threads)


def execute(notebook: Path, output: Path, parameters: dict[str, Any], manager: Any = None) -> None:
    """Run a notebook with those of the parameters that its parameters cell knows; the cell that fails raises.

    manager: of the kernel it runs in, started if it is not, and left running; None: a kernel of its own.
    """
    import nbformat
    import papermill

    logging.getLogger("papermill").setLevel(logging.WARNING)
    tagged = nbformat.read(notebook, as_version=4)
    cell = next((c for c in tagged.cells if "parameters" in c.metadata.get("tags", [])), None)
    known = {name: value for name, value in parameters.items() if cell is None or f"\n{name} =" in f"\n{cell.source}"}
    places = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)]  # papermill formats them
    papermill.execute_notebook(
        *places, parameters=known, kernel_name="python3", progress_bar=False, cwd=str(output.parent),
        log_output=False, start_timeout=START_WITHIN, km=manager,
    )  # fmt: skip


def _put(values: dict[str, str | None]) -> None:
    """Into the environment; None takes a name out of it."""
    for key, value in values.items():
        os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


@contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    """Inside, these values are in the environment; then what was there before."""
    before = {key: os.environ.get(key) for key in values}
    _put(values)
    try:
        yield
    finally:
        _put(before)


@contextmanager
def own_kernel() -> Iterator[None]:
    """Make `python3` mean this interpreter: a kernel spec of our own comes first in the search path."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "kernels" / "python3"
        spec.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--IPKernelApp.log_level=ERROR"]
        write_json(spec / "kernel.json", {"argv": argv, "display_name": "Python 3", "language": "python"})
        search = os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")]))
        with _environment({"JUPYTER_PATH": search}):
            yield


def thread_limits(threads: int | None) -> AbstractContextManager[None]:
    """Environment for the kernel: its thread count (None: as it is), no spinning while it waits, and no `DASK_TRIM`.

    With that a kernel gives back each tensor's memory and asks for it anew: two fifths of its time went there.
    """
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if threads is not None else ()
    dropped = {key: None for key, value in DASK_TRIM.items() if os.environ.get(key) == value}
    return _environment({**dict.fromkeys(counts, str(threads)), "OMP_WAIT_POLICY": "PASSIVE", **dropped})
