"""The gate's calibration, and how reliable it is: what its signals predict, what it keeps and what it avoids.

Everything works on a table with a row a sample: the signals (`signal_*`), `gain_adapted` and `gain_blended` (mean change
of delta1 of affine-invariant depth and points) and `loss_adapted`, `loss_blended` (the worse of these two changes).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from ttt_lib.adaptation.gate.decision import Calibration
from ttt_lib.core.errors import UserError
from ttt_lib.core.types import IDENTITY
from ttt_lib.evaluation.paired import bootstrap_interval

MEASURES = ("depth_affine_invariant", "points_affine_invariant")
RELATIVE = "disparity_affine_invariant"  # of models that predict neither
TOLERANCE, FORBIDDEN = 0.01, 0.03  # losses in delta1: that only few samples may have, that none may have
RIDGE = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
FOLDS = 10
CALM = "ensemble_spread"  # of `signals.measure`


def gain_table(metrics: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """One row a sample from the tables of runs with `gate.mode: measure` or `decide` (`experiment.RunSummary`).

    Columns experiment, dataset, sample, gain_* and loss_* for the predictions adapted, blended and final, and the
    signals. Raises `UserError` when no sample has signals and truth.
    """
    measures = MEASURES if metrics.metric.isin(MEASURES).any() else (RELATIVE,)
    wanted = metrics[metrics.metric.isin(measures) & (metrics.score == "delta1")]
    wide = wanted.pivot_table(index=IDENTITY, columns=["prediction", "metric"], values="value")
    signals = [name for name in samples.columns if name.startswith("signal_")]
    told = samples.set_index(IDENTITY)[[*signals, "decision", "seconds"]].dropna(how="all", subset=signals)
    wide, decision = wide.reindex(wide.index.intersection(told.index)), told.decision
    final = wide["final"] - wide["original"]
    changes = {"final": final}
    for prediction, decisions in {"adapted": ["accept", "adapted"], "blended": ["blend"]}.items():
        own = wide.get(prediction, pd.DataFrame(np.nan, wide.index, final.columns)) - wide["original"]
        # What a decision made the final prediction is not listed twice.
        changes[prediction] = own.where(~decision.reindex(wide.index).isin(decisions), final)
    table = pd.DataFrame(index=wide.index)
    for prediction, change in changes.items():
        table[f"gain_{prediction}"], table[f"loss_{prediction}"] = change.mean(axis=1), change.min(axis=1)
    joined = table.join(told, how="inner").reset_index().dropna(subset=["gain_adapted", "gain_blended"])
    if joined.empty or not signals:
        raise UserError("gate: no sample has both signals and truth; run with gate.mode measure on a set with truth.")
    return joined


def _signals(table: pd.DataFrame) -> pd.DataFrame:
    """The signals of a table under their own names, as numbers."""
    names = {column: column.removeprefix("signal_") for column in table.columns if column.startswith("signal_")}
    return table[list(names)].rename(columns=names).astype(float)


def _ridge(z: np.ndarray, y: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    centre, bias = z.mean(0), y.mean()
    squares = (z - centre).T @ (z - centre) + strength * np.eye(z.shape[1])
    weights = np.linalg.solve(squares, (z - centre).T @ (y - bias))
    return weights, float(bias - centre @ weights)


def calibrate(table: pd.DataFrame, allowed: float = 0.02) -> Calibration:
    """Which samples first, and thresholds on that order: the safe choice with the largest mean gain.

    Two orders compete: the gain as a ridge regression on the signals estimates it (its strength the one with the smallest
    10-fold error, its estimates out of fold), and the calmest first, where the original model's own predictions lie close
    together (`CALM`). Of all pairs of thresholds those that are safe (`is_safe`) take part; rejecting everything always
    qualifies. Every signal that varies takes part, but those that decide for themselves or are an estimate already.
    """
    signals = _signals(table).drop(columns=["estimate", "camera_implausible"], errors="ignore")
    names = [name for name in signals if signals[name].std(ddof=0) > 1e-9]
    values = signals[names].to_numpy()
    mean, deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    z, y = np.clip(np.nan_to_num((values - mean) / deviation), -3, 3), table.gain_adapted.to_numpy(float)
    folds = np.random.default_rng(0).permutation(len(y)) % min(FOLDS, len(y))

    def out_of_fold(strength: float) -> np.ndarray:
        estimate = np.empty_like(y)
        for fold in np.unique(folds):
            weights, bias = _ridge(z[folds != fold], y[folds != fold], strength)
            estimate[folds == fold] = z[folds == fold] @ weights + bias
        return estimate

    strength = min(RIDGE, key=lambda s: float(np.square(out_of_fold(s) - y).mean()))
    estimates = {"estimated gain": (out_of_fold(strength), *_ridge(z, y, strength))}
    if CALM in names:  # nothing is fitted to this one, so it is its own out-of-fold estimate
        alone = -np.eye(len(names))[names.index(CALM)]
        estimates[f"small {CALM}"] = (z @ alone, alone, 0.0)
    candidates, correlation = [], float(np.corrcoef(estimates["estimated gain"][0], y)[0, 1])
    for order, (estimate, weights, bias) in estimates.items():
        found, accept, blend = _thresholds(table, estimate, allowed)
        about = {"samples": len(table), "order": order, "ridge": strength, "allowed": allowed}
        about |= {"correlation_out_of_fold": correlation, **found}
        scale = mean.tolist(), deviation.tolist()
        candidates.append(Calibration(names, *scale, weights.tolist(), bias, float(accept), float(blend), about))
    return max(candidates, key=lambda each: each.about["gain"])


def is_safe(found: dict[str, float], count: int, allowed: float) -> bool:
    """Whether an `outcome` on `count` samples lets expect at most `allowed` of new ones to lose more than `TOLERANCE`.

    One more such loss than was seen is counted among one more sample (Angelopoulos et al., Conformal Risk Control, 2022,
    eq. 4), and no sample may lose more than `FORBIDDEN`. Fewer than 1 / `allowed` - 1 samples can show this of nothing.
    """
    return found["worst"] >= -FORBIDDEN and (found["worse"] * count + 1) / (count + 1) <= allowed


def _thresholds(table: pd.DataFrame, estimate: np.ndarray, allowed: float) -> tuple[dict[str, float], float, float]:
    """Outcome, accept and blend with the largest mean gain of those that are safe; what nothing reaches, where none is."""
    above = float(estimate.max()) + 1.0
    levels = [*np.unique(np.quantile(estimate, np.linspace(0, 1, 41))), above]
    pairs = [(accept, blend) for blend in levels for accept in levels if accept >= blend]
    nothing, *found = [
        (outcome(_by_decision(table, estimate >= accept, estimate >= blend)), accept, blend)
        for accept, blend in [(above, above), *pairs]
    ]
    safe = [each for each in found if is_safe(each[0], len(table), allowed)]
    return max([nothing, *safe], key=lambda each: each[0]["gain"])


def _by_decision(table: pd.DataFrame, accepted: np.ndarray, mixed: np.ndarray) -> pd.DataFrame:
    """Columns gain, loss: of the adapted prediction where accepted, else of the blended where mixed, else 0."""
    return pd.DataFrame({
        kind: np.where(accepted, table[f"{kind}_adapted"], np.where(mixed, table[f"{kind}_blended"], 0.0))
        for kind in ("gain", "loss")
    }, index=table.index)  # fmt: skip


def decide(table: pd.DataFrame, calibration: Calibration) -> pd.DataFrame:
    """The table of a run that measured (`gate.mode: measure`) as if this calibration had decided.

    Sets decision, signal_estimate, gain_final and loss_final.
    """
    signals = _signals(table).to_dict("records")
    decision = np.array([calibration.decide(row) for row in signals])
    final = _by_decision(table, decision == "accept", decision == "blend").add_suffix("_final")
    estimates = [calibration.estimate(row) for row in signals]
    return table.assign(decision=decision, signal_estimate=estimates, **final)


def outcome(decided: pd.DataFrame) -> dict[str, float]:
    """Mean gain, share of samples that lose more than `TOLERANCE` in depth or points, and the worst loss."""
    worse, worst = (decided.loss < -TOLERANCE).mean(), decided.loss.min()
    return {"gain": float(decided.gain.mean()), "worse": float(worse), "worst": float(worst)}


def compare_policies(table: pd.DataFrame) -> pd.DataFrame:
    """Never, always, blend always, the gate as it decided (`final`), and the oracle that knows the truth.

    Rows: policy, samples, gain with its 95 % bootstrap interval (low, high), worse, worst, and `kept`, the share of the
    oracle's mean gain.
    """
    none, every = np.zeros(len(table), bool), np.ones(len(table), bool)
    choices = {
        "never": _by_decision(table, none, none),
        "always": _by_decision(table, every, none),
        "blend always": _by_decision(table, none, every),
        "gate": table[["gain_final", "loss_final"]].set_axis(["gain", "loss"], axis=1),
        "oracle": _by_decision(table, table.gain_adapted > 0, none),
    }
    rng = np.random.default_rng(0)
    rows = []
    for policy, chosen in choices.items():
        low, high = bootstrap_interval(chosen.gain.to_numpy(), seed=rng)
        rows.append({"policy": policy, "samples": len(chosen), **outcome(chosen), "low": low, "high": high})
    result = pd.DataFrame(rows)
    best = float(result.gain[result.policy == "oracle"].iloc[0])
    result["kept"] = result.gain / best if best > 0 else np.nan
    return result[["policy", "samples", "gain", "low", "high", "worse", "worst", "kept"]]


def area_under_roc(score: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive has the higher score (ties count half); NaN without both kinds."""
    if positive.all() or not positive.any():
        return float("nan")
    wins = stats.mannwhitneyu(score[positive], score[~positive], method="asymptotic").statistic
    return float(wins / (positive.sum() * (~positive).sum()))


def signal_quality(table: pd.DataFrame) -> pd.DataFrame:
    """How well each signal, and their estimate, predicts the true gain of adapting: columns signal, samples, spearman, auc.

    samples: those that have the signal.
    spearman: rank correlation with the gain; auc: area under the ROC curve for "the adapted prediction is better". A
    signal that is smaller where adapting helps has a negative correlation and an area below one half.
    """
    rows = []
    for name, signal in _signals(table).items():
        usable = signal.notna() & table.gain_adapted.notna()
        score, gain = signal[usable].to_numpy(), table.gain_adapted[usable].to_numpy(float)
        if len(score) > 2 and score.std() > 0:
            spearman = stats.spearmanr(score, gain).statistic if np.ptp(gain) > 0 else np.nan
            auc = area_under_roc(score, gain > 0)
            rows.append({"signal": name, "samples": len(score), "spearman": spearman, "auc": auc})
    result = pd.DataFrame(rows, columns=["signal", "samples", "spearman", "auc"])
    return result.reindex(result.spearman.abs().sort_values(ascending=False).index).reset_index(drop=True)


def risk_coverage(table: pd.DataFrame, score: str = "signal_estimate") -> pd.DataFrame:
    """Adapt only the samples with the highest scores: columns coverage, gain (mean over all samples) and worse (share of
    all samples that lose more than `TOLERANCE`), for every coverage from 0 to 1."""
    ordered = table.sort_values(score, ascending=False)
    count = len(ordered)
    gain = np.concatenate([[0.0], ordered.gain_adapted.cumsum().to_numpy() / count])
    worse = np.concatenate([[0.0], (ordered.loss_adapted < -TOLERANCE).cumsum().to_numpy() / count])
    return pd.DataFrame({"coverage": np.arange(count + 1) / count, "gain": gain, "worse": worse})
