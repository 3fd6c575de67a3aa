"""Where jobs run: processes of this machine, a running dask scheduler, or a batch system through dask-jobqueue."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ttt_lib.core.collector import collector_paused
from ttt_lib.core.errors import NotSupported, RunError, UserError, reason
from ttt_lib.core.files import read_yaml

# One process a worker; each job starts a kernel of its own, so the workers themselves stay small.
LOCAL = {"threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": 50, "memory_limit": 0}
ANSWER_WITHIN = 20  # seconds for a scheduler that is said to run


def _batch_system(description: str) -> Any:
    """The dask-jobqueue cluster of a YAML file with `class` and `options`, without workers yet."""
    try:
        import dask_jobqueue
    except ImportError as error:
        raise NotSupported("--cluster: needs dask-jobqueue; `pip install dask-jobqueue`.") from error
    settings, known = read_yaml(description), [name for name in dir(dask_jobqueue) if name.endswith("Cluster")]
    kind = settings.get("class")
    if kind not in known:
        raise UserError(f"--cluster {description}: must hold `options` and `class`, one of {', '.join(known)}.")
    try:
        return getattr(dask_jobqueue, kind)(**settings.get("options", {}))
    except Exception as error:  # whatever the batch system's class makes of the options
        raise UserError(f"--cluster {description}: {kind} does not start so ({reason(error)}).") from error


def _require_single_threads(client: Any, scheduler: str) -> None:
    """A job sets its process's environment (threads, GPU); two in one process would run with each other's."""
    threads = max((worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()), default=1)
    if threads > 1:
        raise UserError(
            f"--scheduler {scheduler}: has a worker with {threads} threads, and jobs need a process each; start the workers"
            " with `dask worker --nthreads 1 --nworkers N`."
        )


@contextmanager
def open_client(
    workers: int, scheduler: str | None, cluster_file: str | None, announce: Callable[[str], None]
) -> Iterator[Any]:
    """A dask client of `scheduler` (an address), of the cluster that `cluster_file` describes, or of local processes."""
    from distributed import Client, LocalCluster

    where, said = f"--scheduler {scheduler}", "no scheduler answers there"
    if not scheduler:
        where = f"--cluster {cluster_file}" if cluster_file else f"--workers {workers}"
        said = "no client can connect to what was started, and it is closed"
    with ExitStack() as opened:  # what was started is closed, whatever fails after it
        # Dask closes a forgotten client when it is collected, which takes the lock that starting and stopping hold: the
        # process would wait for itself for ever. Clients that failed earlier are collected before.
        with collector_paused():
            try:
                if scheduler:
                    client = Client(scheduler, timeout=f"{ANSWER_WITHIN}s")
                else:
                    cluster = _batch_system(cluster_file) if cluster_file else LocalCluster(workers, **LOCAL)
                    opened.callback(cluster.close)
                    if cluster_file:
                        cluster.scale(jobs=workers)
                    client = Client(cluster)
                opened.callback(client.close)
            except UserError:
                raise
            # Of the batch system, of the network, of dask, which knows addresses of any shape.
            except Exception as error:
                raise RunError(f"{where}: {said} ({reason(error)}).") from error
        if scheduler:
            _require_single_threads(client, scheduler)
        announce(f"dashboard: {client.dashboard_link}")
        if not scheduler and not cluster_file:
            _pin_gpus(client)
        yield client


def _set_device(name: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = name


def _pin_gpus(client: Any) -> None:
    """One GPU a worker, where there are GPUs; more workers than GPUs share them in turn."""
    devices = visible_gpus()
    for i, address in enumerate(client.scheduler_info(n_workers=-1)["workers"] if devices else []):
        client.run(_set_device, devices[i % len(devices)], workers=[address])


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them; asked without starting CUDA here."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name.strip() for name in told.split(",") if name.strip()]
    listed = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i in range(sum(line.startswith("GPU") for line in (listed or "").splitlines()))]
