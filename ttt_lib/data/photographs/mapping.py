"""Reconstructions from verified matches: the first, and others that must agree with it."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from ttt_lib.data.photographs import signals
from ttt_lib.data.photographs.features import USUAL_FOCAL, Picture
from ttt_lib.data.photographs.job import MIN_MATCHES, Job, Refusal
from ttt_lib.data.photographs.process import SparseModel, read_sparse_model
from ttt_lib.data.photographs.tracks import (
    AHEAD_ANGLE,
    MAPPED_ANGLE,
    MIN_ANGLE,
    MIN_POINTS,
    Selection,
    select_tracks,
    summarize,
)

log = logging.getLogger(__name__)

FOCALS = (0.5, 0.63, 0.8, 1.0, 1.26, 1.6)  # of the width: tried where nothing is known of the camera
RANGE = math.log(4 / 3)  # a refined focal length stays within a third of its prior
AGREEMENT = 0.05  # median |log depth ratio|: 0.0003 to 0.009 of right reconstructions, 0.4 and more of wrong ones
FLAT = 0.92  # of the matches, explained by one homography; of the points, on one plane
SHARE = 0.7  # of the matches that the second and third reconstruction see


def _run(job: Job, name: str, focals: np.ndarray, **options) -> dict:
    """A run of the worker's `reconstructions`; focals over the width."""
    two = len(job.kept) == 2
    return {
        "name": name, "seed": job.seed, "method": "incremental", "focals": (focals * job.widths()).tolist(),
        "fixed": two, "share": 1.0, "start": None, "min_angle": MAPPED_ANGLE, "two_view": True, "photographs": job.kept,
        **options,
    }  # fmt: skip


def _models(job: Job, runs: list[dict]) -> dict[str, SparseModel]:
    """The reconstructions of the runs that gave one; images are places in `job.pictures`."""
    failed = job.run("reconstructions", runs=runs)
    if failed:
        log.info("reconstruction: %s", failed)
    found = {run["name"]: read_sparse_model(job.folder / f"{run['name']}.npz") for run in runs}
    for model in found.values():
        if model is not None:
            model.image = model.image - 1
    return {name: model for name, model in found.items() if model is not None and len(model.image) >= 2}


def _focals(job: Job, model: SparseModel, otherwise: np.ndarray) -> np.ndarray:
    """The focal length of each camera over the width."""
    result = otherwise.copy()
    for row, index in enumerate(model.image):
        result[job.camera_of[index]] = model.intrinsics[row, 0] / model.size[row, 0]
    return result


def _support(model: SparseModel) -> float:
    """How much a reconstruction explains: photographs first, then points, each by how well it fits."""
    return len(model.image) * 1e7 + float(np.exp(-(np.minimum(model.error, 5) ** 2)).sum())


def _first(job: Job, about: dict[str, Any], priors: list[float | None]) -> tuple[SparseModel, np.ndarray, bool]:
    """The first reconstruction, the focal lengths that it began with, and whether they were held."""
    two = len(job.kept) == 2
    tried = [np.array([p or guess for p in priors]) for guess in (FOCALS if None in priors else [USUAL_FOCAL])]
    models = _models(job, [_run(job, f"first{k}", focals) for k, focals in enumerate(tried)])
    if not models:
        raise Refusal(_no_model(job))
    best = max(map(_support, models.values()))
    good = [tried[int(name[5:])] for name, model in models.items() if _support(model) >= 0.97 * best]
    middle = min(good, key=lambda focals: abs(math.log(float(np.median(focals)) / USUAL_FOCAL)))
    model = models[f"first{next(k for k, focals in enumerate(tried) if focals is middle)}"]
    if two:
        return model, middle, True
    refined = _focals(job, model, middle)
    limits = [RANGE if p else math.log(2.5) for p in priors]
    if (np.abs(np.log(refined / middle)) <= limits).all():
        return model, middle, False
    about["focal_refined"] = [round(float(f), 4) for f in refined]  # ran away: held where it began
    held = _models(job, [_run(job, "held", middle, fixed=True)])
    if not held:
        raise Refusal(
            f"the focal length runs away (from {middle[0]:.2f} to {refined[0]:.2f} of the width) and nothing fits "
            "without: take photographs from more different places, or say the focal length."
        )
    return held["held"], middle, True


def _no_model(job: Job) -> str:
    among = [flat for (i, j), flat, n in zip(job.pairs, job.flat, job.inliers) if n >= MIN_MATCHES]
    if among and min(among) > FLAT:
        return (
            "the camera only turned, or everything in sight is flat or far away: no depth can be told from that; "
            "take the photographs from places a step apart."
        )
    return (
        "no cameras could be found that explain the matches: take more photographs, closer together but not from one "
        "place, of a scene that stands still."
    )


def agreed(job: Job, about: dict[str, Any]) -> tuple[SparseModel, Selection]:
    """A reconstruction that two others confirm, and its tracks. Raises `Refusal`."""
    priors = job.priors()
    try:
        return _attempt(job, about, priors)
    except Refusal as refusal:
        if None in priors or job.exact():
            raise
        log.info("with the given focal length: %s", refusal)
        left_out, kept, kept_about = dict(job.left_out), list(job.kept), dict(about)
        try:  # a model's guess can be far off
            about.clear()
            return _attempt(job, about, [p.focal if p.exact else None for p in _one_each(job)])
        except Refusal:
            job.left_out, job.kept = left_out, kept
            about.clear()
            about.update(kept_about)
            raise refusal from None


def _one_each(job: Job) -> list[Picture]:
    return [job.pictures[job.camera_of.index(camera)] for camera in range(max(job.camera_of) + 1)]


def _attempt(job: Job, about: dict[str, Any], priors: list[float | None]) -> tuple[SparseModel, Selection]:
    """As `agreed`, with these focal lengths over the width, None where one has to be found."""
    model, began, held = _first(job, about, priors)
    focals = _focals(job, model, began)
    about["focal"] = [round(float(f), 4) for f in focals]
    about["forward"] = ahead = signals.moves_ahead(model)
    picked = select_tracks(model, ahead)
    about.update(summarize(model, picked))
    _check(job, model, picked, about)
    others = _others(job, model, focals, held)
    results = [signals.disagreement(model, other, MIN_POINTS) for other in others]
    about["agreement"] = max((value for value, _ in results), default=float("inf"))
    if len(results) < 2 or about["agreement"] > AGREEMENT:
        raise Refusal(
            "reconstructions from parts of the matches contradict each other, so none can be trusted: take more "
            "photographs, from places further apart, of a scene that stands still and does not repeat itself."
        )
    for image in map(int, model.image):
        each = [values.get(image, math.inf) for _, values in results]
        if image not in picked.weak and max(each) > AGREEMENT:
            picked.weak[image] = "its place among the others is not certain"
    _check(job, model, picked, about)
    about.update(summarize(model, picked))
    for index in job.kept[:]:
        if index in picked.weak:
            job.leave_out(index, picked.weak[index])
        elif index not in model.image:
            job.leave_out(index, "could not be placed among the others")
    return model, picked


def _check(job: Job, model: SparseModel, picked: Selection, about: dict[str, Any]) -> None:
    """Raises `Refusal` where the tracks tell nothing."""
    ahead = about["forward"]
    least = AHEAD_ANGLE if ahead else MIN_ANGLE
    where = "the camera moved straight ahead: take more frames, further apart, or move sideways"
    aside = where if ahead else "take the photographs from places further apart"
    everything = signals.parallax(model)
    about.setdefault("seen_parallax", float(np.median(everything)) if len(everything) else 0.0)
    strong = [image for image in map(int, model.image) if image not in picked.weak]
    if len(strong) < 2 and about["seen_parallax"] < least:
        raise Refusal(
            f"the photographs are taken from nearly the same place (median parallax {about['seen_parallax']:.1f} "
            f"degrees, at least {least} are needed): {aside}."
        )
    if signals.flatness(model) > FLAT:
        raise Refusal(
            "everything that was matched lies in one plane (a wall, a poster): depth cannot be told from that alone; "
            "take in things at several distances."
        )
    if len(strong) < 2:
        why = next(iter(picked.weak.values()), "they have no points")
        raise Refusal(
            f"too little of the photographs could be measured (of {job.pictures[int(model.image[0])].name} {why}): "
            + (where if ahead else "take them closer together, or more of them, with texture all over the picture")
            + "."
        )


def _others(job: Job, model: SparseModel, focals: np.ndarray, held: bool) -> list[SparseModel]:
    """Two more reconstructions: parts of the matches, other seeds, starts and focal lengths, one of them global."""
    order = sorted(range(len(job.pairs)), key=lambda k: -job.inliers[k])
    inside = set(map(int, model.image))
    starts = [list(job.pairs[k]) for k in order if set(job.pairs[k]) <= inside][:3]
    if len(inside) == 2:
        starts = []
    spread = 1.0 if held else 1.12

    def other(name: str, number: int, method: str = "incremental") -> dict[str, Any]:
        factor = spread if number % 2 else 1 / spread
        start = starts[min(number, len(starts) - 1)] if starts and method == "incremental" else None
        return _run(
            job, name, focals * factor, seed=job.seed + number, share=SHARE, start=start, method=method, fixed=held
        )

    found = _models(job, [other("second", 1), other("global", 2, "global")])
    full = {name: m for name, m in found.items() if len(m.image) >= len(inside)}
    if "global" not in full:  # it needs more photographs than there may be
        full = {**{k: v for k, v in found.items() if k == "second"}, **_models(job, [other("third", 2)])}
    return list(full.values())
