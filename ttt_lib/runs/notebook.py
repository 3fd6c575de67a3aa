"""Notebooks through papermill, in kernels of this very interpreter with a fixed number of threads."""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.utils import run_sync

START_WITHIN = 300  # seconds
KERNEL_OPTIONS = ["--IPKernelApp.log_level=ERROR", "--HistoryManager.hist_file=:memory:"]
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

    def _start(self) -> None:
        """Start a kernel of this very interpreter, whatever the installed kernel specs call `python3`."""
        installed = KernelSpecManager(kernel_dirs=[])  # none; ipykernel's own is always there
        self.manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=installed)
        atexit.register(self.close)
        run_sync(self.manager.start_kernel)(env=kernel_environment(self.threads), extra_arguments=KERNEL_OPTIONS)

    def _run(self, folder: str | Path, code: str = "") -> None:
        """Let the kernel work in `folder`, and run the code there."""
        client = self.manager.blocking_client()
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
        if self.done >= NOTEBOOKS_EACH:
            self.close()
        try:
            if self.manager is None:
                self._start()
            self._run(output.parent)
            execute(notebook, output, parameters, self.manager)
            self._run(tempfile.gettempdir(), FORGET)
            self.done += 1
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the kernel, if there is one; the next notebook gets a new one."""
        manager, self.manager, self.done = self.manager, None, 0
        atexit.unregister(self.close)
        if manager is not None and manager.has_kernel:
            with suppress(Exception):  # it has ended by itself
                run_sync(manager.shutdown_kernel)(now=True)


@cache
def kept_kernel(threads: int) -> Kernel:
    """The kernel of this process that its jobs share."""
    return Kernel(threads)


def execute(notebook: Path, output: Path, parameters: dict[str, Any], manager: Any) -> None:
    """Run a notebook with these parameters, also those that its parameters cell does not know; the cell that fails raises.

    manager: of the running kernel, which is left running.
    """
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)  # below, it warns of those
    places = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)]  # papermill formats them
    papermill.execute_notebook(*places, parameters=parameters, kernel_name="python3", progress_bar=False, km=manager)


def kernel_environment(threads: int | None) -> dict[str, str]:
    """Environment of a kernel: ours with its thread count (None: as it is), no spinning while it waits, no `DASK_TRIM`.

    With that a kernel gives back each tensor's memory and asks for it anew: two fifths of its time went there.
    """
    values = {key: value for key, value in os.environ.items() if DASK_TRIM.get(key) != value}
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if threads is not None else ()
    return {**values, **dict.fromkeys(counts, str(threads)), "OMP_WAIT_POLICY": "PASSIVE"}


def one_line(error: BaseException) -> str:
    """What an exception says; of a notebook's cell, the exception inside it."""
    name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", None)
    text = f"{name}: {value}" if value is not None else "".join(traceback.format_exception_only(error))
    return " ".join(text.split())[:400]
