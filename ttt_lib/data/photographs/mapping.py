"""A reconstruction from verified matches, and others that must agree with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ttt_lib.data.photographs import focal, signals
from ttt_lib.data.photographs.job import Job, Refusal
from ttt_lib.data.photographs.process import SparseModel
from ttt_lib.data.photographs.runs import describe, focals_of, reconstruct_all
from ttt_lib.data.photographs.tracks import (
    AHEAD_ANGLE,
    MIN_POINTS,
    Selection,
    select_tracks,
    summarize,
)

AGREEMENT = 0.05  # median |log depth ratio|: 0.0003 to 0.02 of right reconstructions, 0.1 and more of wrong ones
DOUBT = 0.04  # the same, of two whose focal lengths are a standard deviation apart
EXPLAINED = 0.8  # of a photograph's matches: 0.85 and more where it stands right, 0.7 and less in scenes that moved
SEEN_ANGLE = 2.0  # degrees, the median parallax of what is reconstructed; with less, noise bends the scene
FLAT = 0.92  # of the points, on one plane
SHARE = 0.7  # of the matches that the second and third reconstruction see
NO_MODEL = (
    "no cameras could be found that explain the matches: take more photographs, closer together but not from one "
    "place, of a scene that stands still."
)


def agreed(job: Job, about: dict[str, Any]) -> tuple[SparseModel, Selection]:
    """A reconstruction that two others confirm, and its tracks. Raises `Refusal`."""
    focals = _focals(job, about)
    model, others = _reconstructions(job, focals)
    about["focal"] = [round(float(f), 4) for f in focals_of(job, model, focals)]
    about["forward"] = ahead = signals.moves_ahead(model)
    picked = select_tracks(model, ahead)
    about["explained"] = float(np.median(model.explained))
    if about["explained"] < EXPLAINED:
        raise Refusal(
            f"cameras explain only {about['explained']:.0%} of the matches: things moved between the photographs, or "
            "parts of the scene look alike; take them of a scene that stands still and does not repeat itself."
        )
    for image, share in zip(map(int, model.image), model.explained):
        if share < EXPLAINED:
            picked.weak.setdefault(image, f"its place explains only {share:.0%} of its matches")
    about.update(summarize(model, picked))
    _check(job, model, picked, about)
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


def _focals(job: Job, about: dict[str, Any]) -> np.ndarray:
    """The focal lengths to reconstruct with. Raises `Refusal` where the depth would hang on a guess."""
    belief = focal.believed(job)
    if belief is None:
        raise Refusal(NO_MODEL)
    about["focal"] = [round(float(f), 4) for f in belief.focals]
    about["focal_deviation"], about["focal_doubt"] = float(belief.deviation.max()), belief.doubt
    if focal.is_unlikely(belief) and not all(job.exact()):
        raise Refusal(
            f"the photographs fit only a camera that hardly exists (focal length {belief.focals[0]:.2f} of the width): "
            "the scene moved or repeats itself, or the camera moved straight ahead; take them from places side by side."
        )
    if belief.doubt > DOUBT:
        raise Refusal(
            "the depth hangs on the focal length, which these photographs do not tell: take more of them, from more "
            "different places, or use files that have it in their EXIF."
        )
    return belief.focals


def _check(job: Job, model: SparseModel, picked: Selection, about: dict[str, Any]) -> None:
    """Raises `Refusal` where the tracks tell nothing."""
    ahead = about["forward"]
    least = AHEAD_ANGLE if ahead else SEEN_ANGLE
    where = "the camera moved straight ahead: take more frames, further apart, or move sideways"
    aside = where if ahead else "take the photographs from places further apart"
    everything = signals.parallax(model)
    about.setdefault("seen_parallax", float(np.median(everything)) if len(everything) else 0.0)
    strong = [image for image in map(int, model.image) if image not in picked.weak]
    if about["seen_parallax"] < least:
        raise Refusal(
            f"the photographs are taken from nearly the same place (median parallax {about['seen_parallax']:.1f} "
            f"degrees, at least {least} are needed): {aside}."
        )
    about["flat"] = signals.flatness(model)
    if about["flat"] > FLAT:
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


def _reconstructions(job: Job, focals: np.ndarray) -> tuple[SparseModel, list[SparseModel]]:
    """The reconstruction with these focal lengths, and two more with the same from parts of the matches, with other
    seeds and starts, one of them global. The focal lengths' doubt is known already, and would hide what differs."""
    pairs = [p for p in _by_matches(job) if set(p) <= set(job.kept)] if len(job.kept) > 2 else []

    def other(name: str, number: int, method: str = "incremental") -> dict[str, Any]:
        start = pairs[min(number, len(pairs) - 1)] if pairs and method == "incremental" else None
        return describe(job, name, focals, seed=job.seed + number, share=SHARE, start=start, method=method)

    runs = [describe(job, "held", focals), other("second", 1), other("global", 2, "global")]
    found = reconstruct_all(job, runs)
    if "held" not in found:
        raise Refusal(NO_MODEL)
    model = found.pop("held")
    if "global" not in found or len(found["global"].image) < len(model.image):  # it needs more than there may be
        found.pop("global", None)
        found.update(reconstruct_all(job, [other("third", 2)]))
    return model, [m for m in found.values() if len(m.image) >= len(model.image)]


def _by_matches(job: Job) -> list[list[int]]:
    """Pairs of photographs, those with most matches first."""
    return [list(job.pairs[k]) for k in sorted(range(len(job.pairs)), key=lambda k: -job.inliers[k])]
