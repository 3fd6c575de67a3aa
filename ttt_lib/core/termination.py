"""SIGTERM as an exception, so that what ends a command from outside leaves no less in order than Ctrl-C."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import Any


def _end(number: int, _frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would come in the middle of the clearing up
    raise SystemExit(128 + number)  # as a shell says it; no `except Exception` keeps it


def end_in_order() -> None:
    """From now on SIGTERM (Slurm's time limit, `timeout`) ends the program by `SystemExit(143)`: what was begun is cleared away.

    For commands that work in this process. What has workers and kernels is better ended at once.
    """
    with suppress(ValueError):  # only the main thread hears signals
        signal.signal(signal.SIGTERM, _end)
