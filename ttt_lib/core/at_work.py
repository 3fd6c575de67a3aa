"""A sign of life on a terminal, for what takes long and cannot say how far it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from tqdm import tqdm

EVERY = 1.0  # seconds


@contextmanager
def at_work(what: str, disabled: bool | None = None) -> Iterator[None]:
    """Inside, a line on stderr that says what is done and counts the time; it is gone at the end.

    disabled: None: shown on a terminal only, so that it fills no log.
    """
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False, disable=disabled) as bar:
        ended = Event()

        def count() -> None:
            while not ended.wait(EVERY):
                bar.refresh()

        counting = Thread(target=count, daemon=True)
        counting.start()
        try:
            yield
        finally:
            ended.set()
            counting.join()
