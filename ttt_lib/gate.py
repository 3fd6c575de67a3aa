"""Label-free acceptance: is the adapted prediction better than the original, and what to do about it.

Everything here is computed from the image and the two sets of weights alone. *Held-back* views, drawn from another seed
than the training's, show how well the predictions of either network agree with each other across views; the cross terms
between the networks keep a collapsed (constant) prediction, which agrees with itself perfectly, from winning.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.augment import View, carry_back, make_views, sample_cameras
from ttt_lib.config import ExperimentConfig
from ttt_lib.config_sections import GateConfig
from ttt_lib.ensemble import fitted_disparity, predict_mirrored
from ttt_lib.errors import UserError
from ttt_lib.geometry import project, transform_points, unproject
from ttt_lib.gradients import Student
from ttt_lib.models import GeometryModel, Prediction
from ttt_lib.rasterise import build_mesh, rasterise

BUNDLED = Path(__file__).parent / "assets" / "gate.json"
PAIRS = 4000  # pixel pairs that are voted on
EQUAL = 0.02  # relative depth within which two pixels count as equally far
DISAGREEMENT = 0.1  # of log depth between experts, at which a pixel of a blend is half original, half adapted
FIELDS_OF_VIEW = (15.0, 130.0)  # degrees, horizontal: outside no camera of the data sets lies
LARGEST_ERROR = 1.0  # of log depth; what is farther off counts so much


@dataclass
class HeldBack:
    """Held-back views, and what the original weights say of them: depth carried back (B,H,W) and where it is known."""

    image: Tensor
    view: View
    original: Prediction
    depth: Tensor
    seen: Tensor


def held_back_views(
    model: GeometryModel, image: Tensor, original: Prediction, config: ExperimentConfig, generator: torch.Generator
) -> HeldBack:
    """Draw the views from `generator` and predict on them with the model's present (original) weights.

    image (3,H,W); original: the prediction on this very image. Mirrors, recentred crops and colours of
    `gate.severity`; cameras stay in place, so that no rendering enters.
    """
    views = config.views.model_copy(
        update={
            "crop": config.views.crop.model_copy(update={"kind": "recentred", "probability": 1.0, "scale": (0.7, 1.0)}),
            "mirror": 0.5,
            "cutmix": 0.0,
            "photometric": config.views.photometric.model_copy(
                update={"probability": 1.0, "severity": config.gate.severity}
            ),
            "novel_view": config.views.novel_view.model_copy(update={"probability": 0.0}),
        }
    )
    view = make_views(image, original.points, original.mask, original.intrinsics, views, config.gate.views, generator)
    depth, seen = _on_views(model, view, original)
    return HeldBack(image, view, original, depth, seen)


def _on_views(model: GeometryModel, view: View, original: Prediction) -> tuple[Tensor, Tensor]:
    predicted = model.predict(view.image, view.intrinsics)
    points, seen = carry_back(view, predicted.points, original.points, original.intrinsics)
    return points[..., 2], seen & (points[..., 2] > 0) & torch.isfinite(points).all(-1)


def log_error(depth: Tensor, reference: Tensor, known: Tensor) -> Tensor:
    """Mean |log d - log r - median| over the known pixels of each map, (B,H,W) x 3 -> (B,); NaN where none is known."""
    difference = depth.clamp_min(1e-6).log() - reference.clamp_min(1e-6).log()
    difference = torch.where(known & torch.isfinite(difference), difference, torch.nan).flatten(1)
    centred = difference - difference.nanmedian(dim=1, keepdim=True).values
    return centred.abs().clamp_max(LARGEST_ERROR).nanmean(1)


def consistency(
    held: HeldBack, depth: Tensor | None = None, seen: Tensor | None = None, clean: Prediction | None = None
) -> dict[str, float]:
    """Errors between the predictions on the views and the clean ones, of original (o) and adapted (a) weights.

    depth, seen (B,H,W): the adapted network's on the views, carried back; clean: its prediction on the image. Without
    them only `oo` is given. `xy` compares x's views with y's clean prediction. `score`: mean of aa, ao and oa.
    """
    known = held.original.mask

    def error(depth: Tensor, seen: Tensor, clean: Prediction) -> float:
        value = log_error(depth, clean.depth.expand_as(depth), seen & known)
        return float(value[~value.isnan()].mean()) if bool((~value.isnan()).any()) else math.nan

    values = {"oo": error(held.depth, held.seen, held.original)}
    if depth is None or seen is None or clean is None:
        return values
    values["aa"] = error(depth, seen, clean)
    values["ao"] = error(depth, seen, held.original)
    values["oa"] = error(held.depth, held.seen, clean)
    values["score"] = (values["aa"] + values["ao"] + values["oa"]) / 3
    return values


def consistency_now(model: GeometryModel, held: HeldBack) -> dict[str, float]:
    """`consistency` with the model's present weights as the adapted ones; an infinite score if they give no numbers."""
    try:
        return consistency(held, *_on_views(model, held.view, held.original), model.predict(held.image))
    except FloatingPointError:
        return {"score": math.inf}


# ------------------------------------------------------------------------------------------------- other signals


def vote(experts: list[Tensor], mask: Tensor, generator: torch.Generator) -> list[float]:
    """Share of pixel pairs on which each expert agrees with the majority of the others.

    experts: depth maps (H,W) of one picture; mask (H,W): pixels that may be drawn. A pair is ordered nearer, equal
    (within `EQUAL`) or farther; an expert without a majority among the others has no say on that pair. After the
    annotation scheme of Depth Anything V2, where experts vote on relative depth.
    """
    places = torch.nonzero(mask.flatten())[:, 0].cpu()
    if len(places) < 2:
        return [math.nan] * len(experts)
    first, second = places[torch.randint(len(places), (2, PAIRS), generator=generator)]
    logs = torch.stack([e.flatten().cpu().clamp_min(1e-6).log() for e in experts])
    difference = logs[:, first] - logs[:, second]
    order = torch.where(difference.abs() < EQUAL, 0, difference.sign()).long()  # (E, P) of -1, 0, 1
    counts = torch.stack([(order == value).sum(0) for value in (-1, 0, 1)])  # (3, P)
    shares = []
    for own in order:
        others = counts.clone()
        others.scatter_add_(0, (own + 1)[None], torch.full_like(own, -1)[None])
        most, value = others.max(0)
        decided = (others == most).sum(0) == 1
        shares.append(float((value[decided] == own[decided] + 1).float().mean()) if bool(decided.any()) else math.nan)
    return shares


def disagreement_map(experts: list[Tensor], mask: Tensor) -> Tensor:
    """Standard deviation over the experts of log depth, each after its median offset to the first: (H,W)."""
    logs = [e.clamp_min(1e-6).log() for e in experts]
    aligned = [logs[0]] + [x - (x - logs[0])[mask].median() if bool(mask.any()) else x for x in logs[1:]]
    return torch.stack(aligned).std(0, unbiased=False)


def edge_agreement(depth: Tensor, image: Tensor, mask: Tensor) -> float:
    """Correlation of the magnitudes of the gradients of log depth and of the gray image; depth (H,W), image (3,H,W)."""

    def magnitude(map_: Tensor) -> Tensor:
        across, down = map_[1:, 1:] - map_[1:, :-1], map_[1:, 1:] - map_[:-1, 1:]
        return F.avg_pool2d((across.square() + down.square()).sqrt()[None, None], 5, 1, 2)[0, 0].sqrt()

    both = torch.stack([magnitude(depth.clamp_min(1e-6).log()), magnitude(image.mean(0))])[:, mask[1:, 1:]]
    if both.shape[1] < 2 or float(both.std(1).min()) < 1e-9:
        return math.nan
    return float(torch.corrcoef(both)[0, 1])


def reprojection_errors(
    model: GeometryModel, held: HeldBack, weights: list, severity: int, generator: torch.Generator
) -> list[float]:
    """Photometric error through the geometry that each set of weights predicts in a view from another camera.

    The scene of the original prediction is drawn from a moved camera; each network (a context of `weights`) predicts
    that picture's depth, brought to the drawn one by its median ratio; its points, moved to the first camera, say where
    in the image each pixel's colour should be found. Mean absolute difference over the pixels that the mask calls known.
    """
    image, original = held.image, held.original
    surface = original.mask & torch.isfinite(original.points).all(-1) & (original.depth > 0)
    if not bool(surface.any()):
        return [math.nan] * len(weights)
    mesh = build_mesh(image, original.points, surface, original.intrinsics)
    transform = sample_cameras(original.depth[surface].median(), severity, 1, generator).to(image.device)
    lens = original.intrinsics[None]
    colours, drawn, mask = rasterise(mesh, transform, lens, tuple(image.shape[-2:]))
    errors = []
    for context in weights:
        with context():
            depth = model.predict(colours, lens).depth[0]
        known = mask[0] & (depth > 0) & torch.isfinite(depth)
        if not bool(known.any()):
            errors.append(math.nan)
            continue
        depth = depth * (drawn[0] / depth)[known].median()
        back = transform_points(unproject(depth, original.intrinsics), torch.linalg.inv(transform[0])[None])
        grid = 2 * project(back, original.intrinsics) - 1
        found = F.grid_sample(image[None], grid[None], align_corners=False)[0]
        known &= (grid.abs() < 1).all(-1) & (back[..., 2] > 0)
        errors.append(float((found - colours[0]).abs().mean(0)[known].mean()))
    return errors


def field_of_view(intrinsics: Tensor) -> float:
    """Horizontal field of view in degrees of normalised intrinsics (3,3)."""
    return math.degrees(2 * math.atan(0.5 / float(intrinsics[0, 0])))


def measure(
    student: Student, values: list[Tensor], held: HeldBack, adapted: Prediction, history: list[dict[str, float]],
    config: GateConfig, generator: torch.Generator,
) -> tuple[dict[str, float], list[Tensor]]:  # fmt: skip
    """All chosen signals of one adapted image, and the depth maps (H,W) of the experts.

    values: the adapted weights; adapted: the prediction with them on `held.image`. Names ending in `_gain` are positive
    where the adapted prediction looks better.
    """
    model, original, first = student.model, held.original, student.original
    signals: dict[str, float] = {}
    experts = [original.depth, adapted.depth]
    if "consistency" in config.signals:
        with student.weights(values):
            found = consistency(held, *_on_views(model, held.view, original), adapted)
        signals |= {f"consistency_{key}": value for key, value in found.items()}
        signals["consistency_self_gain"] = _log_ratio(found["oo"], found["aa"])
        signals["consistency_cross_gain"] = _log_ratio(found["oo"], (found["ao"] + found["oa"]) / 2)
    if "votes" in config.signals:
        with student.weights(first):
            experts.append(predict_mirrored(model, held.image).depth)
        with student.weights(values):
            experts.append(predict_mirrored(model, held.image).depth)
        shares = vote(experts, original.mask, generator)
        signals |= {"votes_original": shares[0], "votes_adapted": shares[1], "votes_gain": shares[1] - shares[0]}
        signals["votes_disagreement"] = float(disagreement_map(experts, original.mask)[original.mask].mean())
    if "reprojection" in config.signals:
        contexts = [lambda: student.weights(first), lambda: student.weights(values)]
        before, after = reprojection_errors(model, held, contexts, config.severity, generator)
        signals |= {"reprojection_original": before, "reprojection_adapted": after}
        signals["reprojection_gain"] = _log_ratio(before, after)
    if "edges" in config.signals:
        before, after = (edge_agreement(p.depth, held.image, original.mask) for p in (original, adapted))
        signals |= {"edges_original": before, "edges_adapted": after, "edges_gain": after - before}
    if "drift" in config.signals:
        moved = sum(float((a - b).square().sum()) for a, b in zip(values, first))
        signals["drift_weights"] = math.sqrt(moved / max(sum(float(b.square().sum()) for b in first), 1e-30))
        change = log_error(adapted.depth[None], original.depth[None], original.mask[None])
        signals["drift_prediction"] = float(change[0])
        with torch.no_grad():
            with student.weights(first):
                before = model.features(held.image[None])
            with student.weights(values):
                after = model.features(held.image[None])
        signals["drift_features"] = float(1 - F.cosine_similarity(before, after, dim=-1).mean())
    if "loss" in config.signals:
        losses = [entry["loss"] for entry in history if "loss" in entry]
        third = max(1, len(losses) // 3)
        signals["loss_drop"] = _log_ratio(np.mean(losses[:third]), np.mean(losses[-third:])) if losses else math.nan
        signals["loss_rise"] = _log_ratio(losses[-1], min(losses)) if losses else math.nan
    if "camera" in config.signals:
        before, after = field_of_view(original.intrinsics), field_of_view(adapted.intrinsics)
        signals |= {"camera_fov_change": abs(after - before)}
        signals["camera_implausible"] = float(not FIELDS_OF_VIEW[0] < after < FIELDS_OF_VIEW[1])
        ratio = (adapted.depth / original.depth)[original.mask]
        signals["camera_scale_change"] = abs(_log_ratio(float(ratio.median()), 1.0)) if len(ratio) else math.nan
    return signals, experts


def _log_ratio(a: float, b: float) -> float:
    return math.log(max(float(a), 1e-9) / max(float(b), 1e-9)) if np.isfinite(a) and np.isfinite(b) else math.nan


# ------------------------------------------------------------------------------------------------------ decisions


@dataclass
class Calibration:
    """How signals become a decision: a linear estimate of the gain in delta1, and two thresholds on it.

    estimate = bias + sum of weights * clip((signal - mean) / deviation, -3, 3); a missing signal counts as its mean.
    At or above `accept` the adapted prediction is taken, at or above `blend` a mixture, else the original. `about`:
    model, settings, samples, date and what the thresholds gave on the calibration set.
    """

    signals: list[str]
    mean: list[float]
    deviation: list[float]
    weights: list[float]
    bias: float
    accept: float
    blend: float
    about: dict = field(default_factory=dict)

    def estimate(self, signals: dict[str, float]) -> float:
        """Expected gain in delta1 by the signals of one image."""
        found = np.array([signals.get(name, math.nan) for name in self.signals], dtype=float)
        z = (found - np.array(self.mean)) / np.array(self.deviation)
        return float(self.bias + np.clip(np.nan_to_num(z), -3, 3) @ np.array(self.weights))

    def decide(self, signals: dict[str, float]) -> str:
        """`accept`, `blend` or `reject`. An implausible camera is rejected whatever the estimate."""
        if signals.get("camera_implausible", 0.0) > 0:
            return "reject"
        value = self.estimate(signals)
        return "accept" if value >= self.accept else "blend" if value >= self.blend else "reject"

    def write(self, path: Path) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_calibration(path: str | Path | None = None) -> Calibration:
    """The calibration in a JSON file, or the bundled one. Raises `UserError` for a file that is not one."""
    path = Path(path) if path else BUNDLED
    try:
        return Calibration(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"gate.calibration: {path} is no calibration file ({error}); write one with 04_reliability."
        ) from error


def blend_predictions(original: Prediction, adapted: Prediction, disagreement: Tensor) -> Prediction:
    """By region: adapted where the experts agree, original where they do not, half and half at `DISAGREEMENT`.

    disagreement (h,w) of any size. Depths are mixed as logarithms, the adapted one after its median ratio to the
    original; camera, mask and scale are the original's.
    """
    size = original.depth.shape
    spread = F.interpolate(disagreement[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    share = 1 / (1 + (spread / DISAGREEMENT).square())
    difference = adapted.depth.clamp_min(1e-6).log() - original.depth.clamp_min(1e-6).log()
    usable = original.mask & torch.isfinite(difference)
    offset = difference[usable].median() if bool(usable.any()) else torch.zeros((), device=difference.device)
    change = torch.where(torch.isfinite(difference), share * (difference - offset), 0.0)
    depth = original.depth * change.exp()
    disparity = None
    if original.disparity is not None:
        disparity = torch.lerp(original.disparity, fitted_disparity(adapted.disparity, original.disparity), share)
    return replace(original, depth=depth, points=unproject(depth, original.intrinsics), disparity=disparity)


class Watcher:
    """Looks at the held-back views during training, keeps the best weights, and says when to stop.

    The measure is `consistency`'s score; the original weights, whose score is their own inconsistency, take part: when
    no step beats them, they are the best.
    """

    def __init__(self, student: Student, held: HeldBack, config: GateConfig) -> None:
        self.student, self.held, self.config = student, held, config
        self.best, self.best_step = consistency(held)["oo"], 0
        self.weights = [value.clone() for value in student.values()]
        self.scores = [(0, self.best)]

    def __call__(self, step: int, last: bool = False) -> bool:
        """Called after each step, and looks at every `check_every`-th and at the last; True: training should stop."""
        if step % self.config.check_every and not last:
            return False
        with self.student.weights():
            score = consistency_now(self.student.model, self.held)["score"]
        self.scores.append((step, score))
        if score < self.best:
            self.best, self.best_step = score, step
            self.weights = [value.clone() for value in self.student.values()]
        return step - self.best_step >= self.config.patience * self.config.check_every


def best_on_the_line(
    student: Student, held: HeldBack, values: list[Tensor], shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
) -> tuple[list[Tensor], float]:
    """Weights original + share * (values - original) with the smallest consistency score, and the share.

    The original itself (0) takes part with its own inconsistency.
    """
    best, chosen = consistency(held)["oo"], 0.0
    for share in shares:
        between = [torch.lerp(a, b, share) for a, b in zip(student.original, values)]
        with student.weights(between):
            score = consistency_now(student.model, held)["score"]
        if score < best:
            best, chosen = score, share
    return [torch.lerp(a, b, chosen) for a, b in zip(student.original, values)], chosen
