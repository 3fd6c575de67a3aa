"""Which observations of a reconstruction become tracks, and what they come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_lib.data.photographs import signals
from ttt_lib.data.photographs.features import LONGEST_SIDE
from ttt_lib.data.photographs.process import SparseModel
from ttt_lib.data.photographs.scene import CELLS, Photograph, Tracks

MAPPED_ANGLE = 1.0  # degrees between two rays to a point: what a reconstruction takes
MIN_ANGLE = 1.5  # what becomes a track
MAX_ERROR = 1.0  # pixels
MIN_POINTS, MIN_CELLS = 50, 8
AHEAD_ANGLE, AHEAD_CELLS = 1.0, 6  # of cameras that move ahead: what lies in front of them has hardly any parallax


@dataclass
class Selection:
    """which (M,) bool: the observations that become tracks; error (M,) in pixels of a picture of at most LONGEST_SIDE;
    angle (P,) degrees, the parallax of each point; weak: image -> why its tracks are too few."""

    which: np.ndarray
    error: np.ndarray
    angle: np.ndarray
    weak: dict[int, str]


def _cells(uv: np.ndarray) -> int:
    column, row = np.clip((uv * CELLS).astype(int), 0, CELLS - 1).T
    return len(np.unique(row * CELLS + column))


def select_tracks(model: SparseModel, ahead: bool = False) -> Selection:
    """Observations that fit, in front of the camera, inside the picture, of points with parallax.

    Where a photograph has enough points that three photographs see, those that only two see are left out: nothing
    checks where along the ray they lie. ahead: whether the cameras move along their axis.
    """
    size = model.size[model.seen_by].astype(float)
    error = model.error * np.minimum(1.0, LONGEST_SIDE / np.maximum(size.max(-1, initial=1), 1))
    uv = model.uv / size
    angle = signals.parallax(model)
    inside = ((uv >= 0) & (uv <= 1)).all(-1) & np.isfinite(model.depth) & (model.depth > 0)
    good = inside & (error < MAX_ERROR) & (angle[model.point] >= (AHEAD_ANGLE if ahead else MIN_ANGLE))
    views = np.bincount(model.point[good], minlength=len(model.xyz))
    which = good & (views[model.point] >= 2)
    least = AHEAD_CELLS if ahead else MIN_CELLS
    weak = {}
    for row, image in enumerate(model.image):
        here = which & (model.seen_by == row)
        checked = here & (views[model.point] >= 3)
        if checked.sum() >= MIN_POINTS and _cells(uv[checked]) >= least:
            which &= ~here | checked
            here = checked
        points, cells = int(here.sum()), _cells(uv[here])
        if points < MIN_POINTS:
            weak[int(image)] = f"only {points} of its points have a depth ({MIN_POINTS} are needed)"
        elif cells < least:
            weak[int(image)] = f"its {points} points with a depth lie in {cells} of 16 cells ({least} are needed)"
    return Selection(which, error, angle, weak)


def summarize(model: SparseModel, picked: Selection) -> dict[str, Any]:
    """The signals points, parallax, cells and error of a selection; see `Scene`."""
    points = np.unique(model.point[picked.which])
    uv = model.uv / model.size[model.seen_by]
    rows = [row for row, image in enumerate(model.image) if int(image) not in picked.weak]
    cells = [_cells(uv[picked.which & (model.seen_by == row)]) for row in rows]
    return {
        "points": len(points),
        "parallax": float(np.median(picked.angle[points])) if len(points) else 0.0,
        "cells": min(cells, default=0),
        "error": float(np.median(picked.error[picked.which])) if len(points) else float("nan"),
    }


def normalized_intrinsics(model: SparseModel, row: int) -> Tensor:
    """(3,3) float32 of an image: divided by its width and height."""
    (fx, fy, cx, cy), (width, height) = model.intrinsics[row], model.size[row]
    matrix = [[fx / width, 0, cx / width], [0, fy / height, cy / height], [0, 0, 1]]
    return torch.tensor(matrix, dtype=torch.float32)


def to_photographs(
    model: SparseModel, picked: Selection, names: list[str], sources: list[Tensor | Callable[[], Tensor]]
) -> list[Photograph]:
    """The photographs that are not weak, with their tracks. names, sources: of each image of the model."""
    result = []
    for row, image in enumerate(model.image):
        if int(image) in picked.weak:
            continue
        here = np.flatnonzero(picked.which & (model.seen_by == row))
        _, once = np.unique(model.point[here], return_index=True)  # a point that one picture sees twice
        here = here[np.sort(once)]
        tracks = Tracks(
            torch.from_numpy(model.uv[here] / model.size[row]).float(),
            torch.from_numpy(model.depth[here]).float(),
            torch.from_numpy(model.point[here]).long(),
            torch.from_numpy(np.exp(-(picked.error[here] ** 2))).float(),
        )
        pose = torch.from_numpy(model.pose[row]).float()
        result.append(Photograph(names[row], sources[row], normalized_intrinsics(model, row), tracks, pose))
    return result
