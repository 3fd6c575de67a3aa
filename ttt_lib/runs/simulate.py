"""A large run on paper: jobs over workers as `jobs.py` and dask share them out, with costs that were measured elsewhere.

Jobs are handed out in order, each to the first free worker. A worker that dies takes its job with it: the job begins again
from its start, on the worker that replaces it (`run_jobs` gives each a second try, a second command those that failed twice).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """What one thing takes; seconds and bytes.

    image: seconds of a typical image, its median; spread: standard deviation of the logarithm. start: of a job (kernel,
    imports, model, fingerprints). lifetime: hours after which a worker dies on average (inf: never); back: seconds until
    another takes its place. scheduler: seconds that the one scheduler needs for a job. read: bytes read for an image,
    written: of its results, told: sent between scheduler and worker for a job.
    """

    # Measured (demo profile, 8 shifted scenes, two shared CPU cores, 2026-11-26): spread, start (all of a job that is not
    # adapting, so scoring is in it), written, told. The others are assumptions.
    image: float
    spread: float = 0.26
    start: float = 69.0
    lifetime: float = math.inf
    back: float = 120.0
    scheduler: float = 0.001
    read: float = 4e6
    written: float = 6e5
    told: float = 5e3


def simulate(images: int, shard: int, workers: int, costs: Costs, seed: int = 0) -> dict[str, float]:
    """How a run goes.

    Args:
        images: in all.
        shard: images of a job.
        workers: GPUs, one job at a time each.
        costs: of each thing.
        seed: of times and failures.

    Returns:
        jobs; hours from the first job to the end of the last one; tail: minutes at the end in which not all workers had
        work; busy: share of the workers' time that went into images that were kept; restarts; lost: hours of work begun
        again; scheduler: share of the time that the scheduler is at work (at 1 it is what limits); gigabytes: moved.

    Example:
        >>> found = simulate(100, 10, 2, Costs(image=60.0, spread=0.0, start=0.0, scheduler=0.0))
        >>> found["jobs"], round(found["hours"], 3), found["restarts"]
        (10, 0.833, 0)
    """
    rng = np.random.default_rng(seed)
    jobs = -(-images // shard)
    sizes = np.full(jobs, shard)
    sizes[-1] = images - shard * (jobs - 1)
    times = costs.image * np.exp(costs.spread * rng.standard_normal(images))
    work = np.add.reduceat(times, np.arange(jobs) * shard)
    free = [(0.0, worker) for worker in range(workers)]
    dies = costs.lifetime * 3600 * rng.exponential(size=workers)
    asked, restarts, lost = 0.0, 0, 0.0
    ends = np.zeros(workers)
    for seconds in work:
        while True:
            now, worker = heapq.heappop(free)
            asked = max(asked, now) + costs.scheduler  # one after the other
            end = asked + costs.start + seconds
            if end <= dies[worker]:
                break
            restarts, lost = restarts + 1, lost + max(dies[worker] - asked, 0.0)
            again = max(dies[worker], asked) + costs.back
            dies[worker] = again + costs.lifetime * 3600 * rng.exponential()
            heapq.heappush(free, (again, worker))
        ends[worker] = end
        heapq.heappush(free, (end, worker))
    makespan, tries = float(ends.max()), jobs + restarts
    return {
        "jobs": jobs, "hours": makespan / 3600, "tail": (makespan - float(ends.min())) / 60,
        "busy": float(work.sum()) / (workers * makespan), "restarts": restarts, "lost": float(lost) / 3600,
        "scheduler": tries * costs.scheduler / makespan,
        "gigabytes": (images * (costs.read + costs.written) + tries * costs.told) / 1e9,
    }  # fmt: skip
