"""Experiments x shards of samples as papermill jobs: in this process, or on dask.distributed.

A job works in a folder of its own and moves it to `runs/<experiment>/<shard>/` in one step, with a manifest. What has
a manifest with the same settings, model, data and code is done and is never run again; what was made with other
settings is moved aside, never mixed and never deleted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ttt_lib.errors import UserError

PACKAGES = ("torch", "dlr-moge", "kornia", "numpy", "pyrender-maintained", "papermill", "ttt-depth")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Job:
    """One experiment on one shard. parameters: as papermill takes them (plain values). identity: what the result
    depends on (hashes of settings, model, data); equal identities mean equal results."""

    experiment: str
    shard_index: int
    shard_count: int
    parameters: dict[str, Any]
    identity: dict[str, str]
    notebooks: tuple[str, ...]
    samples: int = 0
    threads: int = 0

    @property
    def shard(self) -> str:
        """Folder name of the shard."""
        return f"{self.shard_index:03d}-of-{self.shard_count:03d}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `done`, `skipped` (was done before) or `failed`, with the reason and where the rest lies."""

    experiment: str
    shard: str
    status: str
    reason: str = ""
    seconds: float = 0.0


def fingerprint(content: Any) -> str:
    """Short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Short hash of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def git_revision() -> str:
    """Revision of the checkout this package runs from, or `unknown`."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment() -> dict[str, Any]:
    """Versions, machine and device for the manifest."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "packages": versions,
        "python": platform.python_version(),
        "git_revision": git_revision(),
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "host": socket.gethostname(),
    }


# ------------------------------------------------------------------------------------------------- places on disk


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished job, or None."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_done(job: Job, runs: Path) -> bool:
    """Whether this very job (same identity) has finished."""
    manifest = read_manifest(runs / job.experiment / job.shard)
    return manifest is not None and manifest["identity"] == job.identity


def set_aside(folder: Path, runs: Path) -> None:
    """Move results of other settings out of the way: `runs/superseded/<experiment>/<shard>.<n>`."""
    for n in range(10_000):
        target = runs / "superseded" / folder.parent.name / f"{folder.name}.{n}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder, target)
            return


def clear_outdated(jobs: Iterable[Job], runs: Path) -> None:
    """Set aside finished shards of these experiments that do not belong to these jobs (other settings or shards)."""
    wanted = {(job.experiment, job.shard): job for job in jobs}
    for experiment in {job.experiment for job in wanted.values()}:
        for folder in sorted((runs / experiment).glob("*-of-*")):
            job = wanted.get((experiment, folder.name))
            if job is None or not is_done(job, runs):
                set_aside(folder, runs)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def job_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file of a job; yields False if a living process has it. The lock of a dead one is taken over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    for _ in range(2):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            with os.fdopen(descriptor, "w") as file:
                file.write(mine)
            break
        except FileExistsError:
            try:
                owner = json.loads(path.read_text())
                dead = owner["host"] == socket.gethostname() and not _alive(int(owner["pid"]))
            except (OSError, ValueError, KeyError):
                dead = True  # a lock without a name was left by a crash in the middle of writing it
            if not dead:
                yield False
                return
            path.unlink(missing_ok=True)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------- one job


def _execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """papermill, with the kernel of this interpreter whatever kernels the user has installed."""
    import logging

    import nbformat
    import papermill

    logging.getLogger("papermill").setLevel(logging.WARNING)
    tagged = nbformat.read(notebook, as_version=4)
    cell = next((c for c in tagged.cells if "parameters" in c.metadata.get("tags", [])), None)
    known = {name: value for name, value in parameters.items() if cell is None or f"\n{name} =" in f"\n{cell.source}"}
    papermill.execute_notebook(
        str(notebook), str(output), parameters=known, kernel_name="python3", progress_bar=False, cwd=str(notebook.parent),
        log_output=False, start_timeout=300,
    )  # fmt: skip


@contextmanager
def own_kernel() -> Iterator[None]:
    """Make `python3` mean this interpreter: a kernel spec of our own comes first in the search path."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "kernels" / "python3"
        spec.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--IPKernelApp.log_level=ERROR"]
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
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
def _thread_limits(threads: int) -> Iterator[None]:
    """Environment for the kernel: its thread count, and no spinning while it waits."""
    values = {"OMP_WAIT_POLICY": "PASSIVE"}
    if threads:
        values |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


def run_job(job: Job, runs: str | Path) -> Outcome:
    """Do one job, unless it is done; never raises. Results appear in one step, or not at all.

    What a failed job had produced is kept in `runs/failed/<experiment>/<shard>`, its notebook with the error in it.
    """
    runs, begun = Path(runs), time.time()
    final = runs / job.experiment / job.shard
    work = runs / ".work" / f"{job.experiment}.{job.shard}.{socket.gethostname()}.{os.getpid()}"

    def ended(status: str, reason: str = "") -> Outcome:
        return Outcome(job.experiment, job.shard, status, reason, time.time() - begun)

    try:
        with job_lock(runs / ".locks" / f"{job.experiment}.{job.shard}") as mine:
            if not mine:
                return ended("failed", "another run is working on it; run the same command again when that has ended")
            if is_done(job, runs):
                return ended("skipped")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            parameters = {
                **job.parameters, "output_dir": str(work.resolve()), "shard_index": job.shard_index,
                "shard_count": job.shard_count, "threads": job.threads,
            }  # fmt: skip
            try:
                with own_kernel(), _thread_limits(job.threads):
                    for notebook in job.notebooks:
                        _execute(Path(notebook), work / Path(notebook).name, parameters)
                manifest = {
                    "experiment": job.experiment, "shard": job.shard, "identity": job.identity,
                    "settings": job.parameters, **environment(),
                    "started": begun, "finished": time.time(), "seconds": time.time() - begun,
                }  # fmt: skip
                (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
                if final.exists():
                    set_aside(final, runs)
                final.parent.mkdir(parents=True, exist_ok=True)
                os.rename(work, final)
                return ended("done")
            except BaseException as error:
                kept = runs / "failed" / job.experiment / job.shard
                shutil.rmtree(kept, ignore_errors=True)
                kept.parent.mkdir(parents=True, exist_ok=True)
                if work.exists():
                    os.rename(work, kept)
                if not isinstance(error, Exception):
                    raise
                return ended("failed", f"{_one_line(error)} (what it left is in {kept})")
    except Exception as error:  # a full disk, a folder without write permission
        return ended("failed", f"{type(error).__name__}: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", None)
    text = f"{name}: {value}" if value is not None else "".join(traceback.format_exception_only(error))
    return " ".join(text.split())[:400]


# --------------------------------------------------------------------------------------------------- many jobs


@contextmanager
def _open_client(workers: int, scheduler: str | None, cluster_file: str | None, announce: Callable[[str], None]) -> Any:
    from distributed import Client, LocalCluster

    try:
        if scheduler:
            client, cluster = Client(scheduler, timeout="20s"), None
        elif cluster_file:
            try:
                import dask_jobqueue
            except ImportError as error:
                raise UserError('--cluster: needs dask-jobqueue; `pip install -e ".[cluster]"`.') from error
            try:
                settings = yaml.safe_load(Path(cluster_file).read_text(encoding="utf-8"))
                cluster = getattr(dask_jobqueue, settings.pop("class", "SLURMCluster"))(
                    **settings.pop("options", settings)
                )
            except (OSError, AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
                raise UserError(
                    f"--cluster {cluster_file}: {_one_line(error)}; it holds `class` and `options`."
                ) from error
            cluster.scale(jobs=workers)
            client = Client(cluster)
        else:
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50,
                memory_limit=0,
            )  # fmt: skip
            client = Client(cluster)
    except OSError as error:
        raise UserError(f"--scheduler {scheduler}: no scheduler answers there ({_one_line(error)}).") from error
    try:
        announce(f"dashboard: {client.dashboard_link}")
        if cluster is not None and scheduler is None and cluster_file is None:
            _pin_gpus(client, workers)
        yield client
    finally:
        client.close()
        if cluster is not None:
            cluster.close()


def _set_device(index: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(index)


def _pin_gpus(client: Any, workers: int) -> None:
    """One GPU a worker, where there are GPUs; more workers than GPUs share them in turn."""
    listed = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    count = len([line for line in (listed or "").splitlines() if line.startswith("GPU")])
    for i, address in enumerate(client.scheduler_info(n_workers=-1)["workers"] if count else []):
        client.run(_set_device, i % count, workers=[address])


def run_jobs(
    jobs: list[Job],
    runs: str | Path,
    workers: int = 1,
    scheduler: str | None = None,
    cluster_file: str | None = None,
    announce: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run all jobs and report each; a failing one does not stop the others.

    workers: 1 works in this process; more start a `LocalCluster`; with `scheduler` (an address) or `cluster_file` (a
    dask-jobqueue description) the jobs go there, and all see `runs` under the same path. announce: gets one line an
    event, without control characters. Returns an outcome a job, in the order of `jobs`.
    """
    runs = Path(runs).resolve()
    runs.mkdir(parents=True, exist_ok=True)
    clear_outdated(jobs, runs)
    waiting = [job for job in jobs if not is_done(job, runs)]
    outcomes = {(j.experiment, j.shard): Outcome(j.experiment, j.shard, "skipped") for j in jobs if j not in waiting}
    if outcomes:
        announce(f"{len(outcomes)} of {len(jobs)} jobs were done before and are skipped")
    begun, total, ended = time.time(), max(sum(max(job.samples, 1) for job in waiting), 1), 0

    def note(job: Job, outcome: Outcome) -> None:
        nonlocal ended
        outcomes[(job.experiment, job.shard)] = outcome
        ended += max(job.samples, 1)
        left = (time.time() - begun) / ended * (total - ended)
        announce(
            f"[{len(outcomes)}/{len(jobs)}] {outcome.status:7s} {job.experiment} {job.shard}: {job.samples} samples, "
            f"{outcome.seconds:.0f} s; about {left / 60:.1f} min left"
            + (f"\n  {outcome.reason}" if outcome.reason else "")
        )

    if waiting and workers <= 1 and not scheduler and not cluster_file:
        for job in waiting:
            note(job, run_job(job, runs))
    elif waiting:
        with _open_client(max(workers, 1), scheduler, cluster_file, announce) as client:
            from distributed import as_completed

            futures = {client.submit(run_job, job, str(runs), pure=False, retries=1): job for job in waiting}
            for future in as_completed(list(futures)):
                job = futures[future]
                error = future.exception()
                lost = f"the worker died: {_one_line(error)}" if error is not None else ""
                note(job, Outcome(job.experiment, job.shard, "failed", lost) if lost else future.result())
                future.release()
    _clean_work(runs)
    return [outcomes[(job.experiment, job.shard)] for job in jobs]


def _clean_work(runs: Path) -> None:
    """Remove work folders whose process on this host is gone (a killed run's leftovers)."""
    for folder in (runs / ".work").glob("*"):
        *_, host, pid = folder.name.rsplit(".", 2)
        if host == socket.gethostname() and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def as_dict(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Plain values for JSON."""
    return [asdict(outcome) for outcome in outcomes]
