"""The focal length: what is believed beforehand, what the photographs say, and what its doubt does to the depth.

A wrong focal length bends the scene. How much is measured: a reconstruction is fitted again with its focal lengths held
at STEP times and 1 / STEP times what they are. How much worse those fit says how well the photographs know the focal
length; how much their depth differs says what an error of it costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from ttt_lib.data.photographs import signals
from ttt_lib.data.photographs.job import UNKNOWN, USUAL_FOCAL, Job, SparseModel
from ttt_lib.data.photographs.mapping import attempt, refitted

FOCALS = (0.5, 0.63, 0.8, 1.0, 1.26, 1.6)  # of the width: compared where two photographs must do
STARTS = (0.6, 1.2)  # of the width: where refinement begins too, beside what is believed
MANY = 12  # photographs, from which on one start must do
STEP = 1.15
GIVEN = 0.14  # standard deviation of the logarithm of a model's guess
INDEPENDENT = 150  # measurements; more say less than they seem to, since what is wrong in them is the same for many
SYSTEMATIC = 0.025  # of the log focal length: what features that sit a little beside their places do to it
CONTRADICTS = 2.0  # standard deviations between what is given and what is found, from where on the former is forgotten
POSSIBLE = 2.0  # standard deviations of the log focal length: with those the decision must be the same
SIMILAR = 0.97  # of the observations that fit best
WORSE = 1.1  # times the least mean cost: two photographs tell no more


@dataclass
class Belief:
    """Of each camera the focal length over the width that is believed, and the standard deviation of its logarithm;
    bend: the change of log depth, a median, per log focal length; model: where this was seen, None where nothing had to
    be."""

    focals: np.ndarray
    deviation: np.ndarray
    bend: float = 0.0
    model: SparseModel | None = None

    @property
    def largest(self) -> float:
        """The standard deviation of the camera of which least is known."""
        return float(self.deviation.max())

    @property
    def doubt(self) -> float:
        """The error of depth, a median |log ratio|, that goes with it."""
        return self.largest * self.bend

    @property
    def ignorance(self) -> float:
        """The part of the doubt that more photographs would take away: without what features do to any of them."""
        return self.doubt * math.sqrt(max(0.0, 1 - (SYSTEMATIC / max(self.largest, SYSTEMATIC)) ** 2))


def expected(given: list[float | None], exact: list[bool]) -> Belief:
    """What is believed of each camera before anything is seen; given: over the width, exact: from EXIF."""
    focals = np.array([f or USUAL_FOCAL for f in given])
    deviation = np.array([0.01 if e else GIVEN if f else UNKNOWN for f, e in zip(given, exact)])
    return Belief(focals, deviation)


def believed(job: Job) -> Belief | None:
    """The focal lengths to reconstruct with, after reconstructions with others; None where none gave cameras."""
    given, exact = job.focals()
    belief = expected(given, exact)
    if all(exact):
        return belief
    two = len(job.kept) == 2
    guesses = FOCALS if two else STARTS if len(job.kept) <= MANY else ()
    tried = [belief.focals, *(np.where(exact, belief.focals, guess) for guess in guesses)]
    begins = [None, *[job.widest()] * len(guesses)]
    found = job.side_by_side(*(partial(attempt, job, f, fixed=two, start=start) for f, start in zip(tried, begins)))
    models = {k: each for k, each in enumerate(found) if each is not None}
    if not models:
        return None
    if two:
        return compared(models, tried, belief.deviation)
    best = max(models.values(), key=signals.support)
    spread, bend, shift = knowledge(job, best)
    refined = signals.focals_of(job, best, belief.focals) * math.exp(shift)
    result = combine(refined, belief, np.array(exact), spread, bend)
    result.model = best
    if np.abs(np.log(refined / result.focals)).max() > math.log(STEP):
        there = attempt(job, result.focals, start=job.widest())
        if there is not None:  # what an error costs there may be something else
            _, result.bend, _ = knowledge(job, there)
            result.model = there
    return result


def compared(models: dict[int, SparseModel], tried: list[np.ndarray], deviation: np.ndarray) -> Belief:
    """Two photographs: the expected focal length if it fits about as well as any, else what fits and is most usual.

    models: by their place in `tried`, focal lengths (C,) of which the first are the expected ones.
    """
    best = max(map(signals.fitted, models.values()))
    cost = {
        k: float(signals.robust_cost(m.error).mean()) for k, m in models.items() if signals.fitted(m) >= SIMILAR * best
    }
    good = [k for k in cost if cost[k] <= WORSE * min(cost.values())]
    unusual = np.abs(np.log(tried[0] / USUAL_FOCAL)) > math.log(2)
    if 0 not in good or unusual.any():
        deviation = np.where(deviation < GIVEN, deviation, UNKNOWN)
    chosen = 0 if 0 in good else min(good, key=lambda k: float(np.abs(np.log(tried[k] / USUAL_FOCAL)).max()))
    distance = {k: float(np.abs(np.log(tried[k] / tried[chosen])).max()) for k in models}
    near = sorted((k for k in models if distance[k] > 0.1), key=lambda k: distance[k])[:2]
    bend = max((signals.disagreement(models[chosen], models[k], 1)[0] / distance[k] for k in near), default=math.inf)
    return Belief(tried[chosen], deviation, bend, models[chosen])


def knowledge(job: Job, model: SparseModel) -> tuple[float, float, float]:
    """What three and more photographs say: (deviation of the log focal length, log depth per log focal length, what to
    add to the log focal length).

    The model is fitted again at STEP times and 1 / STEP times its focal lengths. A fit in a flat valley ends before its
    bottom; then the parabola through all three says where that is.
    """
    worse, bent, step = [], [], math.log(STEP)
    for other in job.side_by_side(*(partial(refitted, model, factor) for factor in (STEP, 1 / STEP))):
        worse.append(against(model, other))
        bent.append(signals.disagreement(model, other, 1)[0])
    least, further, shift = min(worse), sum(worse) / 2, 0.0
    if least < 0 < further:
        least, shift = further, step * float(np.clip((worse[1] - worse[0]) / (4 * further), -1, 1))
    return max(SYSTEMATIC, step / math.sqrt(max(least, 1e-6))), max(bent) / step, shift


def against(model: SparseModel, other: SparseModel) -> float:
    """What speaks against a reconstruction with less freedom than the model's: chi squared; negative where it fits better."""
    first, second = signals.common(model, other)
    cost, held = (signals.robust_cost(error).sum() for error in (model.error[first], other.error[second]))
    free = max(2 * len(first) - 3 * len(np.unique(model.point[first])) - 6 * len(model.image), 1)
    return float(free * (held / max(cost, 1e-9) - 1) / math.sqrt(1 + free / INDEPENDENT))


def combine(found: np.ndarray, before: Belief, exact: np.ndarray, spread: float, bend: float) -> Belief:
    """What is believed after the photographs have spoken.

    found: what they refined the focal lengths to; spread, bend: see `knowledge`. A given focal length that contradicts
    them is forgotten, since a network's guess can be wrong by a factor of two.
    """
    far = np.abs(np.log(found / before.focals)) > CONTRADICTS * np.hypot(before.deviation, spread)
    centre = np.where(far & ~exact, USUAL_FOCAL, before.focals)
    deviation = np.where(far & ~exact, UNKNOWN, before.deviation)
    weight = deviation**2 / (deviation**2 + spread**2)
    focals = np.exp(weight * np.log(found) + (1 - weight) * np.log(centre))
    return Belief(focals, deviation * np.sqrt(1 - weight), bend)


def is_unlikely(belief: Belief) -> bool:
    """Whether it is one that hardly any camera has: what the photographs say of it is wrong, and so is the rest."""
    return bool((np.abs(np.log(belief.focals / USUAL_FOCAL)) > 3 * UNKNOWN).any())
