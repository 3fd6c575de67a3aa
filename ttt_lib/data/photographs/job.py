"""What is known so far while photographs are reconstructed, and how that ends early."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ttt_lib.data.photographs.features import Gray, Picture
from ttt_lib.data.photographs.process import run_worker

MIN_MATCHES = 40  # verified matches with some other photograph


class Refusal(Exception):
    """Ends a reconstruction inside this sub-package; its text becomes `Scene.refused`."""


@dataclass
class Job:
    """What is known so far of a reconstruction in a folder."""

    folder: Path
    pictures: list[Picture]
    seed: int
    grays: list[Gray] = field(default_factory=list)
    camera_of: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    inliers: np.ndarray = field(default_factory=lambda: np.zeros(0))
    moved: np.ndarray = field(default_factory=lambda: np.zeros(0))
    flat: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def leave_out(self, index: int, why: str) -> None:
        """From here on without this photograph."""
        self.kept.remove(index)
        self.left_out[index] = why

    def widest(self) -> list[int] | None:
        """Of the pairs with many matches the one whose matches moved furthest; None of two photographs."""
        many = max(MIN_MATCHES, float(self.inliers.max(initial=0)) / 4)
        good = [k for k, p in enumerate(self.pairs) if self.inliers[k] >= many and set(p) <= set(self.kept)]
        if len(self.kept) == 2 or not good:
            return None
        return list(self.pairs[max(good, key=lambda k: self.moved[k])])

    def widths(self) -> np.ndarray:
        """Of each camera, pixels of the gray picture."""
        return np.array([self.grays[self.camera_of.index(c)].width for c in range(max(self.camera_of) + 1)], float)

    def priors(self) -> list[float | None]:
        """Of each camera the median of what is known of its focal length, over the width; EXIF before anything else."""
        result: list[float | None] = []
        for camera in range(max(self.camera_of) + 1):
            known = [p for p, c in zip(self.pictures, self.camera_of) if c == camera and p.focal]
            known = [p for p in known if p.exact] or known
            result.append(float(np.median([p.focal for p in known])) if known else None)
        return result

    def exact(self) -> list[bool]:
        """Of each camera whether EXIF gives its focal length."""
        cameras = {c for p, c in zip(self.pictures, self.camera_of) if p.focal and p.exact}
        return [camera in cameras for camera in range(max(self.camera_of) + 1)]

    def run(self, task: str, **arguments: Any) -> str:
        """Do a task of the worker; what `run_worker` returns."""
        return run_worker(self.folder, task, 300 + 60 * len(self.pictures), **arguments)
