"""Experiments x shards of samples as papermill jobs: in this process, or on dask.distributed.

A job works in a folder of its own and moves it to `runs/<experiment>/<shard>/` in one step, with a manifest. What has
a manifest with the same settings, model, data and code is done and is never run again; what was made with other
settings is moved aside, never mixed and never deleted.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ttt_lib.core.errors import RunError, UserError, reason
from ttt_lib.core.files import absolute, first_repeated, write_json
from ttt_lib.core.provenance import environment
from ttt_lib.runs.cluster import open_client
from ttt_lib.runs.notebook import Kernel, kept_kernel, one_line
from ttt_lib.runs.progress import Progress

log = logging.getLogger(__name__)

# Sums over another number of threads differ in the last bits, so the count is part of what a result depends on: not
# that of the workers, and one fits any number of them.
THREADS = 1


MANIFEST = "manifest.json"  # of a finished job
WORK, LOCKS = ".work", ".locks"  # folders of what is not finished


@dataclass(frozen=True)
class Job:
    """One experiment on one shard. parameters: for papermill, plain values. identity: hashes of what the result depends
    on (settings, model, data). samples: how many. threads: of the kernel; `run_jobs` makes it part of the identity."""

    experiment: str
    shard_index: int
    shard_count: int
    parameters: dict[str, Any]
    identity: dict[str, str]
    notebooks: tuple[str, ...]
    samples: int = 0
    threads: int = THREADS

    @property
    def shard(self) -> str:
        """Folder name of the shard."""
        return f"{self.shard_index:03d}-of-{self.shard_count:03d}"

    @property
    def name(self) -> str:
        """What its lock and its work folders are called."""
        return f"{self.experiment}.{self.shard}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `done`, `skipped` (was done before) or `failed`, with the reason and where the rest lies."""

    experiment: str
    shard: str
    status: str
    reason: str = ""
    seconds: float = 0.0


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished job; None if there is none, or none that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    usable = isinstance(content, dict) and isinstance(content.get("identity", {}), dict)
    return content if usable else None


def is_done(job: Job, runs: Path) -> bool:
    """Whether this very job (same identity) has finished."""
    manifest = read_manifest(runs / job.experiment / job.shard)
    return manifest is not None and manifest.get("identity") == job.identity


def set_aside(folder: Path, runs: Path) -> None:
    """Move results of other settings out of the way: `runs/superseded/<experiment>/<shard>.<time>`."""
    target = runs / "superseded" / folder.parent.name / f"{folder.name}.{time.time_ns()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):  # another run has moved it
        os.rename(folder, target)


def clear_outdated(jobs: Iterable[Job], runs: Path) -> None:
    """Set aside finished shards of these experiments that do not belong to these jobs (other settings or shards)."""
    wanted = {runs / job.experiment / job.shard: job for job in jobs}
    for experiment in {job.experiment for job in wanted.values()}:
        for folder in sorted((runs / experiment).glob("*-of-*")):
            if folder not in wanted or not is_done(wanted[folder], runs):
                set_aside(folder, runs)


@contextmanager
def job_lock(path: Path) -> Iterator[bool]:
    """Hold the lock of a job; yields False if another process has it. Raises `RunError` where there are no locks.

    The system frees it when its holder ends, however it ends, so there is no stale lock to take over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    with ExitStack() as held:
        try:
            held.enter_context(lock)
        except Timeout:
            pass
        except (OSError, NotImplementedError) as error:
            raise RunError(f"{path.parent}: this file system has no locks ({reason(error)}).") from error
        yield lock.is_locked


def _sync(folder: Path) -> None:
    """Force a folder's files to the disk, so that a power loss after the move cannot leave empty ones."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _clean_work(runs: Path) -> None:
    """Remove what killed runs left: work folders whose lock nobody holds."""
    for folder in (runs / WORK).glob("*"):
        with job_lock(runs / LOCKS / folder.name.rpartition(".")[0]) as abandoned:
            if abandoned:
                shutil.rmtree(folder, ignore_errors=True)


def run_job(job: Job, runs: str | Path, keep: bool = False) -> Outcome:
    """Do one job, unless it is done; never raises. Results appear in one step, or not at all.

    What a failed job had produced is kept in `runs/failed/<experiment>/<shard>`, its notebook with the error in it.
    keep: its kernel stays for the next job of this process (`kept_kernel`), with what is loaded by then.
    """
    runs, begun, status, why = Path(runs), time.time(), "failed", ""
    try:
        with job_lock(runs / LOCKS / job.name) as mine:
            if not mine:
                why = "another run is working on it; run the same command again when that has ended"
            elif is_done(job, runs):
                status = "skipped"
            else:
                why = _try(job, runs, keep)
                status = "failed" if why else "done"
    except Exception as error:  # a folder without write permission, a file system without locks
        why = one_line(error)
    return Outcome(job.experiment, job.shard, status, why, time.time() - begun)


def _try(job: Job, runs: Path, keep: bool) -> str:
    """Work in a folder of its own and move it to its place; says why that failed, nothing where it did not."""
    final, kept = (folder / job.experiment / job.shard for folder in (runs, runs / "failed"))
    work = runs / WORK / f"{job.name}.{uuid.uuid4().hex}"  # nobody else's, not even an orphaned kernel's
    try:
        log.info("%s: begins in %s", job.name, work)
        with nullcontext(kept_kernel(job.threads)) if keep else closing(Kernel(job.threads)) as kernel:
            _fill(job, work, kernel)
        if final.exists():
            set_aside(final, runs)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.rename(work, final)
        shutil.rmtree(kept, ignore_errors=True)  # of an earlier try
        return ""
    except BaseException as error:
        log.info("%s: failed", job.name, exc_info=error)
        with suppress(OSError):  # the disk is full, or there is nothing to keep
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.rename(work, kept)
        if not isinstance(error, Exception):
            raise
        return one_line(error) + (f" (what it left is in {kept})" if kept.exists() else "")


def _fill(job: Job, work: Path, kernel: Kernel) -> None:
    """Execute the job's notebooks into `work` and write the manifest; all of it is on the disk when this returns."""
    begun = time.time()
    work.mkdir(parents=True)
    parameters = {
        **job.parameters, "output_dir": str(work.resolve()), "shard_index": job.shard_index,
        "shard_count": job.shard_count, "threads": job.threads,
    }  # fmt: skip
    for notebook in job.notebooks:
        kernel.execute(Path(notebook), work / Path(notebook).name, parameters)
    manifest = {
        "experiment": job.experiment, "shard": job.shard, "identity": job.identity, "settings": job.parameters,
        "threads": job.threads, **environment(), "started": begun, "finished": time.time(),
        "seconds": time.time() - begun,
    }  # fmt: skip
    write_json(work / MANIFEST, manifest)
    _sync(work)


def run_jobs(
    jobs: list[Job],
    runs: str | Path,
    workers: int = 1,
    scheduler: str | None = None,
    cluster_file: str | None = None,
    announce: Callable[[str], None] = print,
    threads: int = THREADS,
    every: float = 30.0,
) -> list[Outcome]:
    """Run all jobs and report each; a failing one does not stop the others.

    workers: 1 works in this process, in a kernel that stays (`kept_kernel`); more start a `LocalCluster`; with
    `scheduler` (an address) or `cluster_file` (for dask-jobqueue) the jobs go there, and all see `runs` under the same
    path. announce: gets one line an event. threads: of every job, whatever the number of workers. every: seconds between
    looks at the samples done. Returns an outcome a job, in the order of `jobs`. Raises `UserError` if two jobs are the
    same or the folder cannot be written.
    """
    jobs = [replace(job, threads=threads, identity={**job.identity, "threads": str(threads)}) for job in jobs]
    if (twice := first_repeated((job.experiment, job.shard) for job in jobs)) is not None:
        raise UserError(f"experiment {twice[0]}: is there twice; give each a name of its own.")
    try:
        runs = Path(absolute(runs)).resolve()
        runs.mkdir(parents=True, exist_ok=True)
        _clean_work(runs)
        clear_outdated(jobs, runs)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UserError(f"--runs {runs}: cannot be written ({reason(error)}).") from error
    outcomes = {job.name: Outcome(job.experiment, job.shard, "skipped") for job in jobs if is_done(job, runs)}
    waiting = [job for job in jobs if job.name not in outcomes]
    if outcomes:
        announce(f"{len(outcomes)} of {len(jobs)} jobs were done before and are skipped")
    if waiting:
        with Progress({job.name: job.samples for job in waiting}, len(jobs), runs / WORK, announce, every) as progress:
            for job, outcome in _finish(waiting, runs, workers, scheduler, cluster_file, announce):
                outcomes[job.name] = outcome
                line = f"{outcome.status:7s} {job.experiment} {job.shard}: {outcome.seconds:.0f} s; "
                progress.job_ended(job.name, line, f"\n  {outcome.reason}" if outcome.reason else "")
    with suppress(OSError):  # of a disk that is full by now; the next run cleans up
        _clean_work(runs)
    return [outcomes[job.name] for job in jobs]


def _finish(
    jobs: list[Job], runs: Path, workers: int, scheduler: str | None, cluster_file: str | None,
    announce: Callable[[str], None],
) -> Iterator[tuple[Job, Outcome]]:  # fmt: skip
    """Do the jobs here or on a cluster; each with its outcome as it ends."""
    if workers <= 1 and not scheduler and not cluster_file:
        yield from ((job, run_job(job, runs, keep=True)) for job in jobs)
        return
    with open_client(min(max(workers, 1), len(jobs)), scheduler, cluster_file, announce) as client:
        from distributed import as_completed

        ours = scheduler is None  # workers that end with this run, and their kernels with them
        futures = {client.submit(run_job, job, str(runs), ours, pure=False, retries=1): job for job in jobs}
        for future in as_completed(list(futures)):
            job, error = futures.pop(future), future.exception()
            if error is None:
                yield job, future.result()
            else:
                yield job, Outcome(job.experiment, job.shard, "failed", f"the worker died: {one_line(error)}")
            future.release()
