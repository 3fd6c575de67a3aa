"""A reconstruction from photographs alone, and others that must agree with it; tracks by known cameras, which must agree with
the matches. Runs in a process of its own."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pycolmap

from ttt_lib.data.photographs import focal, signals
from ttt_lib.data.photographs.distortion import look_for_distortion, settle_distortion
from ttt_lib.data.photographs.job import MIN_MATCHES, SCANT, Job, Lens, Refusal, SparseModel
from ttt_lib.data.photographs.mapping import attempt, place, refitted
from ttt_lib.data.photographs.matching import extract, match, too_few, verify
from ttt_lib.data.photographs.signals import MIN_POINTS, select_tracks, summarize

AGREEMENT = 0.05  # median |log depth ratio|: 0.0003 to 0.02 of right reconstructions, 0.1 and more of wrong ones
DOUBT = 0.12  # the same, of two whose focal lengths are a standard deviation apart: below, each photograph decides
IGNORANCE = 0.04  # of it what more photographs would take away
EXPLAINED = 0.88  # of the matches, median over photographs: 0.93 and more of right ones, 0.87 and less of what moved
PLACED = 0.8  # the same, of a single photograph
FLAT = 0.92  # of the points, on one plane
SHARE = 0.7  # of the matches that the second and third reconstruction see
WHOLE = 0.8  # of what that lets expect: a global reconstruction with fewer points is a fragment
AHEAD = "take more frames, further apart, or move sideways (the camera moved straight ahead)"
NO_MODEL = (
    "no cameras could be found that explain the matches: take more photographs, closer together but not from one "
    "place, of a scene that stands still."
)
FIT = 0.6  # of the matches: 1.0 of right cameras, 0.3 where two were exchanged, 0.7 where they are a few px off
FIT_EACH = 0.5  # of one photograph's matches
MAX_MEDIAN_ERROR = 1.5  # pixels


def reconstruct(job: Job) -> Job:
    """The job with a reconstruction that two others confirm and its tracks, or with why there is none."""
    try:
        match(job)
        try:
            _agreed(job)
        except Refusal as refusal:
            if refusal.sure or len(job.kept) > focal.MANY:  # so many that some stand apart, and it takes minutes
                raise
            # What has little parallax was left out; where most of a scene is far away, that was the better half of it.
            job.needed, job.about = SCANT, {"second_try": True}
            _agreed(job)
    except Refusal as refusal:
        job.refused = str(refusal)
    return job


def _agreed(job: Job) -> None:
    """Fill in the job's model and picked, and leave out the photographs that have too few tracks. Raises `Refusal`."""
    about = job.about
    belief = _belief(job)
    job.model, others = _reconstructions(job, belief)
    model, places = job.model, job.model.image.tolist()
    about["focal"] = [round(float(f), 4) for f in signals.focals_of(job, model, belief.focals)]
    _check_cameras(job, model)
    picked = job.picked = select_tracks(model, about["forward"], job.needed)
    for image, share in zip(places, model.explained):
        if share < PLACED:
            picked.weak[image] = f"its place explains only {share:.0%} of its matches"
    about.update(summarize(model, picked))
    _check_tracks(job)
    results = [signals.disagreement(model, other, MIN_POINTS) for other in others]
    about["agreement"] = max((value for value, _ in results), default=float("inf"))
    if len(results) < 2 or about["agreement"] > AGREEMENT:
        raise Refusal(
            "reconstructions from parts of the matches contradict each other, so none can be trusted: take more "
            "photographs, from places further apart, of a scene that stands still and does not repeat itself."
        )
    for image in places:
        if image not in picked.weak and max(values.get(image, math.inf) for _, values in results) > AGREEMENT:
            picked.weak[image] = "its place among the others is not certain"
    _check_tracks(job)
    about.update(summarize(model, picked))
    for index in job.kept[:]:
        if index in picked.weak or index not in places:
            job.leave_out(index, picked.weak.get(index, "could not be placed among the others"))


def _belief(job: Job) -> focal.Belief:
    """What is believed of the focal lengths. Raises `Refusal` where the depth would hang on a guess."""
    about, belief = job.about, focal.believed(job)
    if belief is not None and belief.model is not None and look_for_distortion(job, belief.model):
        belief = focal.believed(job)
    if belief is None:
        raise Refusal(NO_MODEL)
    about["focal"] = [round(float(f), 4) for f in belief.focals]
    about["focal_deviation"], about["focal_doubt"] = belief.largest, belief.doubt
    if belief.model is None:
        return belief
    unlikely = focal.is_unlikely(belief)
    unknown = belief.doubt > DOUBT or belief.ignorance > IGNORANCE
    if unknown or unlikely:
        _check_cameras(job, belief.model)  # another cause, if there is one, says more
    if unlikely:
        raise Refusal(
            f"the photographs fit only a camera that hardly exists (focal length {belief.focals[0]:.2f} of the width): "
            "there is too little parallax to tell it, or a thing turned before a plain background, or the scene moved or "
            "repeats itself; take more photographs, from places further apart, of a scene that stands still, or say the "
            "focal length if it is known (--focal; in Python: focal)."
        )
    if unknown:
        raise Refusal(
            "the depth hangs on the focal length, which these photographs do not tell: "
            + (AHEAD if about["forward"] else "take more of them, from more different places")
            + ", or use files that have it in their EXIF."
        )
    return belief


def _check_cameras(job: Job, model: SparseModel) -> None:
    """How the cameras moved and how well that explains the matches. Raises `Refusal` where it does not, or where they
    hardly moved."""
    about = job.about
    about["forward"] = ahead = signals.moves_ahead(model)
    about["explained"] = float(np.median(model.explained))
    about["seen_parallax"] = seen = float(np.median(signals.parallax(model))) if len(model.xyz) else 0.0
    if about["explained"] < EXPLAINED:
        raise Refusal(
            f"cameras explain only {about['explained']:.0%} of the matches: things moved between the photographs, or "
            "parts of the scene look alike, or the lens bends straight lines; take them of a scene that stands still and "
            "does not repeat itself, not with the widest lens.",
            sure=True,
        )
    least, _ = signals.least_parallax(model, ahead, job.needed)
    if seen < least:
        raise Refusal(
            f"the photographs are taken from nearly the same place (median parallax {seen:.2g} degrees, at least "
            f"{least:.2g} are needed): {AHEAD if ahead else 'take them from places further apart'}."
        )


def _check_tracks(job: Job) -> None:
    """Raises `Refusal` where the tracks tell nothing."""
    about, model, picked = job.about, job.model, job.picked
    about["flat"] = signals.flatness(model)
    if about["flat"] > FLAT:
        raise Refusal(
            "everything that was matched lies in one plane (a wall, a poster): depth cannot be told from that alone; "
            "take in things at several distances.",
            sure=True,
        )
    if sum(image not in picked.weak for image in map(int, model.image)) < 2:
        image, why = next(iter(picked.weak.items()))
        advice = AHEAD if about["forward"] else "take them closer together, or more of them, with texture all over"
        raise Refusal(
            f"too little of the photographs could be measured (of {job.pictures[image].name} {why}): {advice}."
        )


def _reconstructions(job: Job, belief: focal.Belief) -> tuple[SparseModel, list[SparseModel]]:
    """The reconstruction with these focal lengths, and two more with the same from parts of the matches, with other
    seeds and starts, one of them global if that finds the points. The focal lengths' doubt is known already, and would
    hide what differs."""
    focals, widest = belief.focals, job.widest()
    step = math.exp(focal.POSSIBLE * belief.largest)
    # From neighbors, a camera that moves ahead may end as one that moves aside.
    whole = job.side_by_side(*(partial(attempt, job, focals, start=start) for start in dict.fromkeys([None, widest])))
    whole = [each for each in whole if each is not None]
    if not whole:
        raise Refusal(NO_MODEL)
    model = max(whole, key=signals.support)
    if look_for_distortion(job, model) or settle_distortion(job, model):
        return _reconstructions(job, belief)
    order = sorted(range(len(job.pairs)), key=lambda k: -job.inliers[k])
    by_matches = [job.pairs[k] for k in order if set(job.pairs[k]) <= set(job.kept)]
    starts = [widest, *by_matches] if widest else [None, None]
    second, third, *bent = job.side_by_side(
        partial(attempt, job, focals, number=1, share=SHARE, start=starts[0]),
        partial(attempt, job, focals, number=2, share=SHARE, at_once=True),
        partial(refitted, model, step),
        partial(refitted, model, 1 / step),
    )
    model.bent = signals.bends(model, bent)
    if not _is_whole(third, model) or len(third.error) < WHOLE * SHARE * len(model.error):
        # The global one needs more than there may be; a fragment contradicts nothing.
        third = attempt(job, focals, number=2, share=SHARE, start=starts[1])
    return model, [each for each in (second, third) if _is_whole(each, model)]


def _is_whole(other: SparseModel | None, model: SparseModel) -> bool:
    """Whether it has as many photographs as the model."""
    return other is not None and len(other.image) >= len(model.image)


def triangulate(job: Job, lenses: list[Lens], poses: np.ndarray) -> Job:
    """The job with points that its photographs see, by cameras that stay as they are, or with why there are none.

    Args:
        job: of pictures as their cameras saw them, without distortion, of the shape of their lenses.
        lenses: one a picture.
        poses: (N,4,4) world -> camera.

    `about` gets `explained`, the share of the matches that the cameras explain; `left_out` says why a photograph's camera
    cannot be right.
    """
    try:
        _triangulate(job, [_scaled(lens, *size) for lens, size in zip(lenses, job.sizes)], poses)
    except Refusal as refusal:
        job.refused = str(refusal)
    return job


def _scaled(lens: Lens, width: int, height: int) -> Lens:
    """The same lens for a picture of another size and the same shape."""
    camera = pycolmap.Camera(**lens._asdict())
    camera.rescale(width, height)
    return Lens(lens.model, width, height, tuple(camera.params))


def _triangulate(job: Job, lenses: list[Lens], poses: np.ndarray) -> None:
    distinct = list(dict.fromkeys(lenses))
    job.camera_of = [distinct.index(lens) for lens in lenses]
    coarse, _ = extract(job, distinct, [True] * len(distinct))
    verify(job, coarse)
    if job.inliers.max(initial=0) < MIN_MATCHES:
        raise too_few(job.inliers.max(initial=0))
    job.model = place(job, poses)
    shares = _became_points(job)
    job.about["explained"] = share = float(np.average(list(shares.values()))) if shares else 0.0
    error = float(np.median(job.model.error)) if len(job.model.error) else np.inf
    if share < FIT or error > MAX_MEDIAN_ERROR:
        raise Refusal(
            f"the given cameras contradict the photographs: {share:.0%} of the matches fit to them, at least "
            f"{FIT:.0%} are needed, with a median error of {error:.1f} px; check that cameras and files belong "
            "together, and in which direction their axes point."
        )
    why = "its camera contradicts its matches with the others ({:.0%} of them fit)"
    job.left_out = {index: why.format(share) for index, share in shares.items() if share < FIT_EACH}


def _became_points(job: Job) -> dict[int, float]:
    """Of each photograph with matches enough the share of them that became points, from 0 to 1."""
    model, places = job.model, range(len(job.pictures))
    points = {i: set(model.point[model.seen_by == row].tolist()) for row, i in enumerate(model.image.tolist())}
    fit, seen = np.zeros(len(places)), np.zeros(len(places))
    for pair, count in zip(job.pairs, job.inliers):
        if count >= MIN_MATCHES:
            both = set.intersection(*(points.get(index, set()) for index in pair))
            fit[list(pair)] += min(len(both), count)
            seen[list(pair)] += count
    return {index: fit[index] / seen[index] for index in places if seen[index]}
