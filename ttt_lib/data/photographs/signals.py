"""What a reconstruction is worth, in numbers: parallax, agreement with another, flatness, direction of motion; and which
of its observations become tracks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ttt_lib.data.photographs.job import AMPLE, CELLS, LONGEST_SIDE, Job, Needed, Selection, SparseModel

MOST_ANGLE = 2.0  # degrees of the median parallax: no more is asked, however few pixels that is
MAX_ERROR = 1.0  # pixels
MIN_POINTS, MIN_CELLS = 50, 8
MOST = 1.0  # of |log depth ratio| that another focal length makes: what goes to infinity there
AHEAD_ANGLE, AHEAD_CELLS = 1.0, 6  # of cameras that move ahead: what lies in front of them has hardly any parallax


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def centres(model: SparseModel) -> np.ndarray:
    """Where the cameras stand in the world, (I,3)."""
    return -np.einsum("iba,ib->ia", model.pose[:, :3, :3], model.pose[:, :3, 3])


def _farthest(rays: np.ndarray, reference: np.ndarray, point: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each point the largest angle between its rays (M,3) and its reference (P,3), and the row of that ray."""
    cosine = (rays * reference[point]).sum(-1)
    order = np.lexsort((cosine, point))  # of each point the smallest cosine first
    present, start = np.unique(point[order], return_index=True)
    row = np.zeros(count, dtype=np.int64)
    row[present] = order[start]
    angle = np.zeros(count)
    angle[present] = np.degrees(np.arccos(np.clip(cosine[row[present]], -1, 1)))
    return angle, row


def parallax(model: SparseModel) -> np.ndarray:
    """Of each point the largest angle between two rays to it, (P,) degrees.

    The ray farthest from the first, then the one farthest from that: exact for cameras on a line.
    """
    count = len(model.xyz)
    if not len(model.point):
        return np.zeros(count)
    rays = _unit(model.xyz[model.point] - centres(model)[model.seen_by])
    first = np.zeros((count, 3))
    first[model.point[::-1]] = rays[::-1]
    _, row = _farthest(rays, first, model.point, count)
    return _farthest(rays, rays[row], model.point, count)[0]


def least_parallax(model: SparseModel, ahead: bool, needed: Needed = AMPLE) -> tuple[float, float]:
    """Degrees that the median of a reconstruction must have, and that a track must have.

    Pixels tell how far noise moves a point along its ray: a long lens or a large picture needs a smaller angle for as many.
    """
    focals = model.intrinsics[:, 0] * _shrinking(model.size)
    focals = focals[np.isfinite(focals)]  # a fisheye has none
    pixel = math.degrees(1 / np.median(focals)) if len(focals) else MOST_ANGLE / AMPLE.median
    angle = min(max(needed.median * pixel, needed.least), AHEAD_ANGLE if ahead else MOST_ANGLE)
    return angle, angle if ahead else needed.track * angle


def _shrinking(size: np.ndarray) -> np.ndarray:
    """By what factor pictures of these sizes (N,2) were made smaller before they were matched, (N,)."""
    return np.minimum(1.0, LONGEST_SIDE / np.maximum(size.max(-1, initial=1), 1))


def common(one: SparseModel, other: SparseModel) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the observations that two reconstructions from the same features have both, in front of the camera."""

    def keys(model: SparseModel) -> np.ndarray:
        return model.image[model.seen_by].astype(np.int64) * 2**32 + model.feature

    _, first, second = np.intersect1d(keys(one), keys(other), return_indices=True)
    positive = (one.depth[first] > 0) & (other.depth[second] > 0)
    return first[positive], second[positive]


def log_ratio(one: SparseModel, other: SparseModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the common observations in both, and the log of their depth in one over that in the other.

    The median over all is taken away, since no reconstruction knows its scale.
    """
    first, second = common(one, other)
    ratio = np.log(one.depth[first] / other.depth[second])
    return first, second, ratio - np.median(ratio) if len(ratio) else ratio


def robust_cost(error: np.ndarray) -> np.ndarray:
    """What each reprojection error in pixels costs: its square, from half a pixel on its length."""
    return np.sqrt(1 + 4 * error**2) - 1


def disagreement(one: SparseModel, other: SparseModel, least: int) -> tuple[float, dict[int, float]]:
    """How differently two reconstructions from the same features see the depth of their common points.

    Returns the median |`log_ratio`|, and the same of each photograph that both have. Infinite where fewer than `least`
    observations are common.
    """
    first, _, ratio = log_ratio(one, other)
    ratio = np.abs(ratio)
    both = [int(i) for i in one.image if i in other.image]
    if len(first) < least:
        return float("inf"), dict.fromkeys(both, float("inf"))
    image = one.image[one.seen_by[first]]
    each = {i: float(np.median(ratio[image == i])) if (image == i).sum() >= 10 else float("inf") for i in both}
    return float(np.median(ratio)), each


def bends(model: SparseModel, others: list[SparseModel]) -> np.ndarray:
    """How much farther each of its observations lies in others from the same features, (M,K): `log_ratio`, at most MOST,
    which is also what an observation gets that is behind the camera there."""
    result = np.full((len(model.depth), len(others)), MOST)
    for column, other in zip(result.T, others):
        _, here, ratio = log_ratio(other, model)
        column[here] = np.clip(ratio, -MOST, MOST)
    return result


def flatness(model: SparseModel) -> float:
    """The share of the points that lie within half a per cent of their depth on one plane: 1 for a poster."""
    if len(model.xyz) < 10:
        return 0.0
    generator = np.random.default_rng(0)
    scale = np.median(np.linalg.norm(model.xyz - centres(model).mean(0), axis=-1))
    best = 0.0
    for _ in range(200):
        a, b, c = model.xyz[generator.choice(len(model.xyz), 3, replace=False)]
        normal = np.cross(b - a, c - a)
        if np.linalg.norm(normal) > 1e-9 * scale**2:
            best = max(best, float((np.abs((model.xyz - a) @ _unit(normal)) < 0.005 * scale).mean()))
    return best


def moves_ahead(model: SparseModel) -> bool:
    """Whether the cameras moved along their optical axis, by the median over neighbours."""
    places = centres(model)
    steps = _unit(np.diff(places, axis=0))
    axes = _unit(model.pose[:-1, 2, :3])
    return bool(len(steps)) and float(np.median(np.abs((steps * axes).sum(-1)))) > 0.85


def support(model: SparseModel) -> float:
    """How much a reconstruction explains: photographs first, then points, each by how well it fits."""
    return len(model.image) * 1e7 + fitted(model)


def fitted(model: SparseModel) -> float:
    """How many of its observations fit, each by how well it does."""
    return float(np.exp(-(np.minimum(model.error, 5) ** 2)).sum())


def focals_of(job: Job, model: SparseModel, otherwise: np.ndarray) -> np.ndarray:
    """The focal length of each camera over the width."""
    result = otherwise.copy()
    result[[job.camera_of[index] for index in model.image]] = model.intrinsics[:, 0] / model.size[:, 0]
    return result


def cells_of(uv: np.ndarray) -> np.ndarray:
    """The cell of a picture in which each place (N,2) in [0,1] lies, (N,) from 0 to CELLS^2 - 1, row by row."""
    column, row = np.clip((uv * CELLS).astype(np.int64), 0, CELLS - 1).T
    return row * CELLS + column


def _filled_cells(uv: np.ndarray) -> int:
    return len(np.unique(cells_of(uv)))


def select_tracks(model: SparseModel, ahead: bool, needed: Needed = AMPLE) -> Selection:
    """Observations that fit, in front of the camera, inside the picture, of points with parallax.

    Where a photograph has enough points that three photographs see, those that only two see are left out: nothing
    checks where along the ray they lie. ahead: whether the cameras move along their axis.
    """
    size = model.size[model.seen_by].astype(float)
    error = model.error * _shrinking(size)
    uv = model.uv / size
    angle = parallax(model)
    inside = ((uv >= 0) & (uv <= 1)).all(-1) & np.isfinite(model.depth) & (model.depth > 0)
    good = inside & (error < MAX_ERROR) & (angle[model.point] >= least_parallax(model, ahead, needed)[1])
    views = np.bincount(model.point[good], minlength=len(model.xyz))
    which = good & (views[model.point] >= 2)
    least = AHEAD_CELLS if ahead else MIN_CELLS
    weak = {}
    for row, image in enumerate(model.image):
        here = which & (model.seen_by == row)
        checked = here & (views[model.point] >= 3)
        if checked.sum() >= MIN_POINTS and _filled_cells(uv[checked]) >= least:
            which &= ~here | checked
            here = checked
        points, cells = int(here.sum()), _filled_cells(uv[here])
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
    cells = [_filled_cells(uv[picked.which & (model.seen_by == row)]) for row in rows]
    return {
        "points": len(points),
        "parallax": float(np.median(picked.angle[points])) if len(points) else 0.0,
        "cells": min(cells, default=0),
        "error": float(np.median(picked.error[picked.which])) if len(points) else float("nan"),
    }
