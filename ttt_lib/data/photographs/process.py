"""Starts the worker, and reads the arrays that it writes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ttt_lib.core.errors import printable
from ttt_lib.core.files import write_json

log = logging.getLogger(__name__)
WORKER = Path(__file__).with_name("worker.py")


def run_worker(folder: Path, task: str, timeout: float, **arguments: Any) -> str:
    """Do one task of `worker.py` in a folder. Returns "" or, in words, how it ended: of its errors the last line."""
    write_json(folder / "job.json", {"task": task, **arguments})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": ""}
    try:
        done = subprocess.run(
            [sys.executable, str(WORKER), str(folder)], env=environment, capture_output=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {timeout:.0f} s"
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if said:
        log.log(logging.WARNING if done.returncode else logging.DEBUG, "%s: %s", task, "\n".join(said[-20:]))
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"the reconstruction program was ended by signal {-done.returncode}"
    return printable(said[-1] if said else f"exit status {done.returncode}", 200)


@dataclass
class SparseModel:
    """A reconstruction as arrays: I registered images, P points, M observations of them.

    image (I,) long: its place among the photographs, or its id; name (I,); camera (I,) id; pose (I,4,4) world ->
    camera; size (I,2) width and height; intrinsics (I,4) fx, fy, cx, cy in pixels, NaN of fisheye (I,) bool; xyz (P,3).
    Of an observation: seen_by (M,) row of the image, feature (M,) number of the picture's feature, point (M,) row of
    xyz, uv (M,2) in pixels with the first pixel's centre at 0.5, depth (M,), error (M,) of reprojection in pixels.
    explained (I,): of each image the share of its verified matches that its cameras explain; None where none are known.
    """

    image: np.ndarray
    name: np.ndarray
    camera: np.ndarray
    pose: np.ndarray
    size: np.ndarray
    intrinsics: np.ndarray
    fisheye: np.ndarray
    xyz: np.ndarray
    seen_by: np.ndarray
    feature: np.ndarray
    point: np.ndarray
    uv: np.ndarray
    depth: np.ndarray
    error: np.ndarray
    explained: np.ndarray | None = None


def read_sparse_model(path: Path) -> SparseModel | None:
    """What a task of the worker wrote, or None where it gave no reconstruction."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return SparseModel(**{field.name: arrays[field.name] for field in fields(SparseModel) if field.name in arrays})
