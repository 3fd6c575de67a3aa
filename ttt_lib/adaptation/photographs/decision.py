"""Which prediction of a photograph to use, by tracks that neither training nor correction has seen.

The test is a paired bootstrap over the held-back tracks: a prediction takes the place of a simpler one only where the
lower bound of its improvement is above zero, and of the original only where its error is clearly smaller, by more than
may be lost where the prediction is nearer or farther than all tracks, or were the focal length another that is possible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ttt_lib.adaptation.photographs.evidence import Evidence, at_tracks, reach, scaled, shifted
from ttt_lib.core.types import Prediction
from ttt_lib.data.photographs.scene import Tracks

CLIP = 1.0  # of |log ratio|: a track that is missed counts as missed, not by how much
FEWEST_TRACKS, FEWEST_CELLS = 12, 6  # held-back tracks, and cells of the 16 that hold one, that are enough to decide by
WORTHWHILE = 0.8  # of the original's error: what takes its place has to be below
CONTRADICTED = 0.5  # of the tracks that stereo and the other photographs confirm: fewer are not of these pictures
ORDER = 0.1  # rank correlation of predicted depth and tracks: a model that is any good gets near and far right,
SEEN, CONFIRMED = 0.3, 0.9  # and a bad one is not asked, where stereo sees so much of the picture and of the tracks
BEYOND = 0.1  # in log depth outside of what the tracks reach: nothing there is checked by them, and a correction
RISK = 0.15  # may bend it by so much (mean |log ratio|)
AFFORDABLE = 0.7  # of what is gained at held-back tracks: so much may be lost there with another focal length
RESAMPLED, LOWER = 500, 0.05  # bootstrap draws, and the quantile of the improvement that must be above zero


@dataclass
class Judgement:
    """What held-back evidence says: the name of the prediction to use, the signals, and a sentence.

    choice: `original`, or a key of the candidates; signals: for the record; reason: in words.
    """

    choice: str
    signals: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def track_errors(prediction: Prediction, tracks: Tracks) -> Tensor:
    """|log of predicted over true depth| at tracks, (N,) float64 on the CPU, at most CLIP; not a depth: CLIP."""
    found = at_tracks(prediction, tracks).double().cpu()
    ratio = (found / tracks.depth.double().cpu()).log().abs()
    return torch.where(torch.isfinite(ratio), ratio, CLIP).clamp_max(CLIP)


def cell_weights(tracks: Tracks) -> Tensor:
    """Weights (N,) float64 of tracks whose sum over each cell of the picture is the same, in all 1."""
    cells = tracks.cells
    count = torch.bincount(cells, minlength=int(cells.max()) + 1 if len(cells) else 1)
    return 1 / (count[cells].double() * tracks.filled_cells())


def original_errors(original: Prediction, evidence: Evidence) -> Tensor:
    """Errors (N,) of the original at the held-back tracks after the better of a factor, and factor and shift."""
    flat = replace(original, points=None)  # which nobody reads here, and are three times as much to multiply
    fits = [fit(flat, evidence.used) for fit in (scaled, shifted)]
    errors = [track_errors(fit, evidence.held) for fit in fits]
    weights = cell_weights(evidence.held)
    return min(errors, key=lambda each: float((each * weights).sum()))


def _same_order(original: Prediction, tracks: Tracks) -> float:
    """Spearman's rank correlation between the predicted depth at tracks and theirs; NaN where there is none."""
    found = at_tracks(original, tracks).cpu()
    known = ~torch.isnan(found)
    found, depth = found[known], tracks.depth[known]
    if len(found.unique()) < 2 or len(depth.unique()) < 2:
        return math.nan
    return float(spearmanr(found, depth).statistic)


def beyond(original: Prediction, tracks: Tracks) -> float:
    """Share of the predicted surface that is nearer or farther than all but a hundredth of the tracks."""
    depth, span = original.depth, reach(at_tracks(original, tracks))
    surface = torch.isfinite(depth) & (depth > 0)
    surface = surface if original.mask is None else surface & original.mask
    if span is None or not bool(surface.any()):
        return 0.0
    (low, high), log_depth = span, depth[surface].log()
    return float(((log_depth < low - BEYOND) | (log_depth > high + BEYOND)).float().mean())


def losses_elsewhere(original: Prediction, candidates: dict[str, Prediction], evidence: Evidence) -> dict[str, float]:
    """How much farther from the held-back tracks than the original each candidate would be, were the focal length another
    that is possible: the worst mean |log ratio|, at least 0. What far tracks say hangs on it, and they hang together."""
    weights, losses = cell_weights(evidence.held), dict.fromkeys(candidates, 0.0)
    candidates = {name: replace(candidate, points=None) for name, candidate in candidates.items()}
    for used, held in zip(evidence.used.otherwise(), evidence.held.otherwise()):
        kept = original_errors(original, replace(evidence, used=used, held=held))
        for name, candidate in candidates.items():
            loss = float(((track_errors(scaled(candidate, used), held) - kept) * weights).sum())
            losses[name] = max(losses[name], loss)
    return losses


def lower_bound(improvement: Tensor, weights: Tensor, generator: torch.Generator) -> float:
    """The LOWER quantile, over resampled tracks, of the weighted mean improvement (N,)."""
    drawn = torch.randint(len(improvement), (RESAMPLED, len(improvement)), generator=generator)
    means = (improvement * weights)[drawn].sum(1) / weights[drawn].sum(1)
    return float(means.quantile(LOWER))


def choose(
    original: Prediction, candidates: dict[str, Prediction], evidence: Evidence, generator: torch.Generator
) -> Judgement:
    """The prediction of a photograph that its held-back tracks prefer.

    Args:
        original: as the model gave it, in any scale.
        candidates: others by name, in the scene's unit, the simplest first.
        evidence: of the photograph.
        generator: of the bootstrap.

    Returns:
        `original` or one of the candidates' names; signals `held_back_NAME` (mean error over the picture's cells),
        `lost_elsewhere_NAME` (`losses_elsewhere`) and `held_back_tracks`; a sentence where the original stays.
    """
    held = evidence.held
    signals = {
        "held_back_tracks": float(len(held)), "confirmed": evidence.meets, "rank": _same_order(original, evidence.used)
    }  # fmt: skip
    if len(held) < FEWEST_TRACKS or held.filled_cells() < FEWEST_CELLS:
        return Judgement("original", signals, f"original kept: only {len(held)} tracks are left to decide by")
    sure = evidence.seen > SEEN and evidence.meets > CONFIRMED
    if evidence.meets < CONTRADICTED or (signals["rank"] < ORDER and not sure):  # False where nothing was measured
        return Judgement(
            "original", signals, "original kept: the tracks contradict the pictures, so they are of something else"
        )
    weights = cell_weights(held)
    errors = {"original": original_errors(original, evidence)}
    errors |= {name: track_errors(prediction, held) for name, prediction in candidates.items()}
    means = {name: float((each * weights).sum()) for name, each in errors.items()}
    signals |= {f"held_back_{name}": value for name, value in means.items()}
    choice, reason = "original", "original kept: no other prediction is clearly nearer to the held-back tracks"
    signals["beyond"] = unseen = beyond(original, evidence.used)
    lost = losses_elsewhere(original, candidates, evidence)
    signals |= {f"lost_elsewhere_{name}": value for name, value in lost.items()}
    for name in candidates:
        better = lower_bound(errors[choice] - errors[name], weights, generator) > 0
        gain = means["original"] - means[name]
        outweighs = (1 - unseen) * gain > RISK * unseen
        if not (better and outweighs and means[name] < WORTHWHILE * means["original"]):
            continue
        if lost[name] < AFFORDABLE * gain:
            choice, reason = name, ""
        elif choice == "original":
            reason = "original kept: with another focal length that is possible it would be nearer to the tracks"
    return Judgement(choice, signals, reason)
