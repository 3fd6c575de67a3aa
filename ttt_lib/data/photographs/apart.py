"""pycolmap in a process of its own: a function of this sub-package is called there and its result comes back.

Seeds and logs of pycolmap stay there, a crash of it ends one job, and the libraries inside it do not meet those of Pillow
(loaded together, the PNG encoder of one writes over the other's memory). The modules that are called there know neither
Pillow nor torch: it must start at once. One thread and fixed seeds: the same job gives the same result.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from importlib import import_module
from typing import Any

from ttt_lib.core.errors import printable

log = logging.getLogger(__name__)


class Failed(Exception):
    """The process ended without a result; says in words how."""


def apart(task: str, patience: float, *arguments: Any) -> Any:
    """What a function gives in another process. Raises `Failed`.

    Args:
        task: `module.function` of this sub-package.
        patience: seconds that it may take.
        arguments: of the function.
    """
    program = f"import sys; sys.path[:] = {list(map(str, sys.path))}; from {__name__} import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    content = pickle.dumps((*task.split("."), arguments))
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], input=content, env=environment, capture_output=True, timeout=patience
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"it took longer than {patience:.0f} s") from error
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if said:
        log.log(logging.WARNING if done.returncode else logging.DEBUG, "%s: %s", task, "\n".join(said[-20:]))
    if done.returncode < 0:
        raise Failed(f"the reconstruction program was ended by signal {-done.returncode}")
    if done.returncode:
        raise Failed(printable(said[-1] if said else f"exit status {done.returncode}", 200))
    return pickle.loads(done.stdout)


def main() -> None:
    """Call what the standard input names. The result goes to the standard output, and nothing else may."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import pycolmap

    pycolmap.logging.minloglevel = 2  # errors
    module, function, arguments = pickle.load(sys.stdin.buffer)
    result = getattr(import_module(f"{__package__}.{module}"), function)(*arguments)
    with answer:
        pickle.dump(result, answer)
