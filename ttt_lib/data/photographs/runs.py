"""Runs of the worker's `reconstructions`, and what they gave."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ttt_lib.data.photographs.job import Job
from ttt_lib.data.photographs.process import SparseModel, read_sparse_model
from ttt_lib.data.photographs.tracks import MAPPED_ANGLE

log = logging.getLogger(__name__)


def describe(job: Job, name: str, focals: np.ndarray, **options: Any) -> dict[str, Any]:
    """A run of the worker's `reconstructions`, with what differs from the usual; focals over the width."""
    return {
        "name": name, "seed": job.seed, "method": "incremental", "focals": (focals * job.widths()).tolist(),
        "fixed": True, "share": 1.0, "start": None, "min_angle": MAPPED_ANGLE, "two_view": True,
        "photographs": job.kept, "profile": [], **options,
    }  # fmt: skip


def reconstruct_all(job: Job, runs: list[dict[str, Any]]) -> dict[str, SparseModel]:
    """The reconstructions of the runs that gave one; images are places in `job.pictures`."""
    failed = job.run("reconstructions", runs=runs)
    if failed:
        log.info("reconstruction: %s", failed)
    names = [
        name for run in runs for name in [run["name"], *(f"{run['name']}@{k}" for k in range(len(run["profile"])))]
    ]
    found = {name: read_sparse_model(job.folder / f"{name}.npz") for name in names}
    for model in found.values():
        if model is not None:
            model.image = model.image - 1
    return {name: model for name, model in found.items() if model is not None and len(model.image) >= 2}


def focals_of(job: Job, model: SparseModel, otherwise: np.ndarray) -> np.ndarray:
    """The focal length of each camera over the width."""
    result = otherwise.copy()
    for row, index in enumerate(model.image):
        result[job.camera_of[index]] = model.intrinsics[row, 0] / model.size[row, 0]
    return result


def support(model: SparseModel) -> float:
    """How much a reconstruction explains: photographs first, then points, each by how well it fits."""
    return len(model.image) * 1e7 + float(np.exp(-(np.minimum(model.error, 5) ** 2)).sum())
