"""How far a run is, in lines without control characters: good in a terminal, in JupyterLab and in a batch log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path


class Progress:
    """Announces each job that ends, and in between, every `every` seconds, the samples that were done meanwhile.

    open_jobs: samples of each job that is to be done, by its name. jobs: how many there are with those done before.
    work: folder with the jobs' folders `<name>.<anything>`. Samples are counted in the `samples.csv` that a job writes
    there as it goes, so this works for jobs on any machine that sees the folder.
    """

    def __init__(
        self, open_jobs: dict[str, int], jobs: int, work: Path, announce: Callable[[str], None], every: float
    ) -> None:
        self.open, self.jobs, self.work, self.announce, self.every = dict(open_jobs), jobs, work, announce, every
        self.total, self.begun = sum(open_jobs.values()), time.time()
        self.ended = self.said = 0  # samples of jobs that have ended; those of the last line
        self.over, self.busy = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _state(self) -> str:
        """Jobs and samples done, and the time left at the pace so far. Notes how many samples were said."""
        done = self.ended
        for path in self.work.glob("*/samples.csv"):
            samples = self.open.get(path.parent.name.rpartition(".")[0], 0)
            try:
                done += min(samples, max(path.read_bytes().count(b"\n") - 1, 0))
            except OSError:  # the job has just moved it
                pass
        self.said = done
        if not done:
            return f"0/{self.total} samples, unknown time left"
        minutes = (time.time() - self.begun) / done * (self.total - done) / 60
        return f"{done}/{self.total} samples, about {minutes:.1f} min left"

    def job_ended(self, name: str, before: str, after: str) -> None:
        """Announce a job's end, with the state of the run between two texts."""
        with self.busy:
            self.ended += self.open.pop(name)
            self.announce(f"[{self.jobs - len(self.open)}/{self.jobs}] {before}{self._state()}{after}")

    def _watch(self) -> None:
        while not self.over.wait(self.every):
            with self.busy:
                said, state = self.said, self._state()
                if self.said > said:
                    self.announce(f"[{self.jobs - len(self.open)}/{self.jobs}] {state}")

    def __enter__(self) -> Progress:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
