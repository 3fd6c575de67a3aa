"""What is known of one photograph of a scene, and a prediction corrected by it, without any training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.correction import at_references, correct
from ttt_lib.core.types import Prediction
from ttt_lib.data.known_distances import References
from ttt_lib.data.photographs.measured import Measured, measure_depth
from ttt_lib.data.photographs.scene import Photograph, Scene, Tracks, split, track_points
from ttt_lib.data.photographs.stereo import to_gray
from ttt_lib.geometry.cameras import project, transform_points, unproject, unproject_far, uv_map
from ttt_lib.geometry.exact_alignment import align_depth_affine

FROM_STEREO = 1500  # places of an even grid over the picture where measured depth joins the tracks in the correction
WILD = 0.35  # of |log ratio| between what is measured and the corrected prediction around it: a wrong match
AROUND = 16  # pixels of the coarse map that says what is around
LANDS = 0.02  # of the picture: a track that lands farther from itself is another's
REACH = (0.01, 0.99)  # quantiles of the predicted depth at the tracks: as far as a correction is believed, and
EDGE = 0.3  # in log depth before that, where the factor is read that holds outside
WEAK = 0.5  # weight of the coarser level, and of no residual, where residuals are spread: few pixels speak for few


@dataclass
class Evidence:
    """A photograph with its camera, and what is known of it: the tracks to use, those held back, and what was measured.

    All in the scene's unit. meets: share of the tracks that the measured depth and the other photographs confirm, NaN
    where nothing says anything. seen: share of the picture that could be measured, also where `measured` is not to be used.
    """

    photograph: Photograph
    used: Tracks
    held: Tracks
    measured: Measured | None = None
    meets: float = math.nan
    seen: float = 0.0


def gather(scene: Scene, share: float, generator: torch.Generator, stereo: bool) -> list[Evidence]:
    """The evidence of every photograph of a scene that was not refused; share: of the tracks, held back."""
    used, held = split(scene, share, generator)
    grays = [to_gray(photograph) for photograph in used.photographs]
    evidence = []
    for number, (photograph, own, other) in enumerate(zip(scene.photographs, used.photographs, held.photographs)):
        measured, meets = measure_depth(grays, number)  # without stereo too, as a check of the tracks
        confirmed = float(np.fmin(meets, landing(scene, number)))  # of a NaN and a number the number
        seen = 0.0 if measured is None else float(torch.isfinite(measured.depth).sum() / (grays[number].seen > 0).sum())
        evidence.append(Evidence(photograph, own.tracks, other.tracks, measured if stereo else None, confirmed, seen))
    return evidence


def landing(scene: Scene, number: int) -> float:
    """Share of a photograph's tracks that land, by its depth and the cameras, where other photographs see them; or NaN."""
    own, hits = scene.photographs[number], []
    world = track_points(own)
    for other in scene.photographs[:number] + scene.photographs[number + 1 :]:
        mine, theirs = own.tracks.common(other.tracks)
        uv = project(transform_points(world[mine], other.pose.double()), other.intrinsics.double())
        hits.append((uv - other.tracks.uv[theirs]).norm(dim=-1) < LANDS)
    found = torch.cat(hits) if hits else torch.zeros(0)
    return float(found.double().mean()) if len(found) else math.nan


def at_tracks(prediction: Prediction, tracks: Tracks) -> Tensor:
    """Predicted depth (N,) at the tracks, bilinear; a disparity's own reading where there is no depth."""
    depth = prediction.depth
    return at_references(depth[None], References(tracks.uv.to(depth.device), tracks.depth))[0]


def scaled(prediction: Prediction, tracks: Tracks) -> Prediction:
    """The prediction times the one factor that brings it to the tracks' scale (the median of their ratios)."""
    found, true = at_tracks(prediction, tracks), tracks.depth.to(prediction.depth)
    good = torch.isfinite(found) & (found > 0)
    factor = (true / found)[good].median() if bool(good.any()) else 1.0
    points = None if prediction.points is None else prediction.points * factor
    return replace(prediction, depth=prediction.depth * factor, points=points)


def shifted(prediction: Prediction, tracks: Tracks) -> Prediction:
    """Factor and shift of the depth by least absolute relative error; the factor alone where nearer would be farther."""
    found, true = at_tracks(prediction, tracks).double(), tracks.depth.to(prediction.depth).double()
    good = torch.isfinite(found) & (found > 0)
    if not bool(good.any()):
        return scaled(prediction, tracks)
    a, b = align_depth_affine(found[good], true[good], 1 / true[good])
    lowest = prediction.depth[torch.isfinite(prediction.depth)].min().double()
    if not (float(a) > 0 and float(a * lowest + b) > 0):
        return scaled(prediction, tracks)
    depth = (a * prediction.depth.double() + b).to(prediction.depth)
    return replace(prediction, depth=depth, points=unproject(depth, prediction.intrinsics))


def spread(residual: Tensor) -> Tensor:
    """Residuals (h,w), NaN where unknown, carried to all pixels: as they are where known, coarser with the distance.

    Far from all that is known they fade to nothing.
    """
    known = torch.isfinite(residual)
    levels = [(torch.where(known, residual, 0.0)[None, None], known.to(residual)[None, None])]
    while min(levels[-1][0].shape[-2:]) > 2:
        levels.append(tuple(F.avg_pool2d(each, 2, ceil_mode=True, count_include_pad=False) for each in levels[-1]))
    value, weight = levels[-1]
    result = value / (weight + WEAK)
    for value, weight in reversed(levels[:-1]):
        coarse = F.interpolate(result, value.shape[-2:], mode="bilinear", align_corners=False)
        result = (value + WEAK * coarse) / (weight + WEAK)
    return torch.where(known, residual, result[0, 0])


def plausible(measured: Tensor, around: Tensor) -> Tensor:
    """Measured depth (h,w) without what is far from the residuals around it: wrong matches come in small islands.

    around (h,w): the corrected prediction, in the same unit.
    """
    residual = (measured / around).log()
    known = torch.isfinite(residual)
    size = [max(1, round(side / AROUND)) for side in residual.shape]
    count = F.adaptive_avg_pool2d(known.to(residual)[None, None], size)
    total = F.adaptive_avg_pool2d(torch.where(known, residual, 0.0)[None, None], size)
    coarse = F.interpolate(total / count.clamp_min(1e-3), residual.shape, mode="bilinear", align_corners=False)[0, 0]
    return torch.where((residual - coarse).abs() < WILD, measured, torch.nan)


def corrected(prediction: Prediction, evidence: Evidence, how: str, generator: torch.Generator) -> Prediction:
    """The prediction as the photograph's tracks, and where it was measured the measured depth, would have it.

    Args:
        prediction: of the photograph, any size; the measured depth is brought to it.
        evidence: its held-back tracks take no part.
        how: `scale`, `affine` (factor and shift), or `full`: the best correction by left-out tracks with a smooth field
            of factors (`correction.correct`), and the measured depth where there is any.
        generator: shuffles tracks and measured pixels, whose folds choose the correction.

    Returns:
        Depth and points in the scene's unit; points follow the scene's camera. kind stays `metric` for a metric model,
        whose unit the scene has been brought to, and is `scale_invariant` for all others.
    """
    kind = "metric" if prediction.kind == "metric" else "scale_invariant"
    intrinsics = evidence.photograph.intrinsics.to(prediction.depth)
    if how != "full":
        depth = {"scale": scaled, "affine": shifted}[how](prediction, evidence.used).depth
    else:
        depth = _fully(prediction, evidence, generator)
    points = unproject_far(depth, intrinsics)
    return replace(prediction, depth=depth, points=points, intrinsics=intrinsics, kind=kind, disparity=None)


def _fully(prediction: Prediction, evidence: Evidence, generator: torch.Generator) -> Tensor:
    """Depth (H,W) of `corrected` with `full`."""
    uv, known, measured = evidence.used.uv, evidence.used.depth, evidence.measured
    if measured is not None:
        step = math.ceil(math.sqrt(measured.depth.numel() / FROM_STEREO))
        some = slice(step // 2, None, step)
        grid = measured.depth[some, some]  # a small part that was measured counts as a small part
        place = torch.isfinite(grid)
        uv = torch.cat([uv, uv_map(*measured.depth.shape)[some, some][place]])
        known = torch.cat([known, grid[place]])
        order = torch.randperm(len(known), generator=generator)  # folds of the correction take every fifth
        uv, known = uv[order], known[order]
    device = prediction.depth.device
    references = References(uv.to(device), known.to(device))
    depth = correct(prediction, references)[0].depth
    if prediction.disparity is None:
        depth = held_outside(depth, prediction.depth, at_tracks(prediction, evidence.used))
    return depth if measured is None else filled_in(depth, measured)


def filled_in(depth: Tensor, measured: Measured) -> Tensor:
    """Corrected depth (H,W) with the measured one where that is plausible; elsewhere its residuals are carried on, as far
    as the measured bounds allow."""
    small = F.interpolate(depth[None, None], measured.depth.shape, mode="nearest")[0, 0]
    residual = (plausible(measured.depth.to(depth), small) / small).log()
    around = small * spread(residual).exp()
    bounded = around.clamp(measured.nearest.to(depth), measured.farthest.to(depth))
    field = (torch.where(torch.isfinite(residual), around, bounded) / small).log()
    field = F.interpolate(field[None, None], depth.shape, mode="bilinear", align_corners=False)[0, 0]
    return depth * field.exp()


def reach(found: Tensor, least: int = 1) -> tuple[float, float] | None:
    """Between which log depths the depth `found` at tracks (N,) lies, but for what REACH leaves out; None where fewer
    than `least` are depths."""
    at = found[torch.isfinite(found) & (found > 0)].log()
    return tuple(at.quantile(at.new_tensor(REACH)).tolist()) if len(at) >= least else None


def held_outside(corrected: Tensor, depth: Tensor, found: Tensor) -> Tensor:
    """Corrected depth (H,W) whose factor does not change any more outside of what the tracks reach.

    A curve that fits them all can be anything beyond them: twenty times too far, for a hill behind the last track. What is
    measured between photographs reaches further, to where half a pixel of noise is an eighth of the depth and more.

    Args:
        corrected, depth: after and before, (H,W).
        found: the depth before at the tracks, (N,).
    """
    span = reach(found, 20)
    if span is None:
        return corrected
    (low, high), factor = span, (corrected / depth).log()
    x = depth.clamp_min(1e-6).log()
    for outside, edge in ((x > high, (x > high - EDGE) & (x <= high)), (x < low, (x < low + EDGE) & (x >= low))):
        there = factor[edge & torch.isfinite(factor)]
        if len(there):
            factor = torch.where(outside, there.median(), factor)
    return depth * factor.exp()


def in_scale(scene: Scene, factor: float) -> Scene:
    """The scene with lengths `factor` times as long: tracks and places of cameras."""

    def larger(photograph: Photograph) -> Photograph:
        pose = photograph.pose.clone()
        pose[:3, 3] *= factor
        return replace(photograph, pose=pose, tracks=replace(photograph.tracks, depth=photograph.tracks.depth * factor))

    return replace(scene, photographs=[larger(photograph) for photograph in scene.photographs])
