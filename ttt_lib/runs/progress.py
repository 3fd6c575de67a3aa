"""How far a run is, in lines without control characters: good in a terminal, in JupyterLab and in a batch log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
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

    def _done(self) -> int:
        """Samples of the jobs that have ended, and of those that are at work."""
        done = self.ended
        for path in self.work.glob("*/samples.csv"):
            with suppress(OSError):  # the job has just moved it
                samples = max(path.read_bytes().count(b"\n") - 1, 0)
                done += min(samples, self.open.get(path.parent.name.rpartition(".")[0], 0))
        return done

    def _say(self, done: int, before: str = "", after: str = "") -> None:
        """A line with jobs and samples done, and the time left at the pace so far, between two texts."""
        minutes = (time.time() - self.begun) / max(done, 1) * (self.total - done) / 60
        left = f"about {minutes:.1f} min" if done else "unknown time"
        jobs = f"[{self.jobs - len(self.open)}/{self.jobs}]"
        self.announce(f"{jobs} {before}{done}/{self.total} samples, {left} left{after}")
        self.said = done

    def job_ended(self, name: str, before: str, after: str) -> None:
        """Announce a job's end, with the state of the run between two texts."""
        with self.busy:
            self.ended += self.open.pop(name)
            self._say(self._done(), before, after)

    def _watch(self) -> None:
        while not self.over.wait(self.every):
            with self.busy:
                if (done := self._done()) > self.said:
                    self._say(done)

    def __enter__(self) -> Progress:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
