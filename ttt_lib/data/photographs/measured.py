"""What a photograph's neighbours together measure of its depth: for sure, or between which bounds it lies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.data.photographs.scene import Tracks
from ttt_lib.data.photographs.stereo import BLOCK, LEAST, SHARED, GrayPhotograph, neighbours, pair_disparity

AGREE = 0.04  # relative depth by which two neighbours may differ, where there are two
BESIDE, FILLED = 1.15, 0.75  # largest ratio of depths in a window, and the least share of it that is known
SLACK = 0.5  # pixels by which a matched disparity may be off and still bound the depth,
BOUNDED = 32  # if it is smaller than so many pixels: wrong matches beside a foreground are larger
BEHIND = 2.0  # times the farthest tracks' depth: nothing is said to be farther for the sake of a match alone
INLIERS = 0.8  # of the tracks that the measured map has to meet within `MEETS`, or the map is dropped
MEETS = 0.1
ISLAND = 0.01  # of the picture: a smaller region has to meet a track
STEPS, UNKNOWN = 16, 30000  # of a pixel, as OpenCV filters disparities in 16 bits, and what stands there for none


@dataclass
class Measured:
    """What stereo says of the depth of one photograph, in the scene's unit.

    depth (h,w) float32: NaN where it is not known for sure. nearest, farthest (h,w): between what it lies there as far
    as matches say (`bounds`), 0 and infinity where they say nothing.
    """

    depth: Tensor
    nearest: Tensor
    farthest: Tensor


def without_patches(disparity: Tensor) -> Tensor:
    """Disparity (h,w) without its islands below ISLAND, in which it changes by less than a pixel between neighbours.

    On plain surfaces both ways agree in patches here and there, mostly on far too little.
    """
    known = torch.isfinite(disparity) & (disparity.abs() < UNKNOWN / STEPS)
    stored = torch.where(known, disparity * STEPS, -UNKNOWN).round().to(torch.int16).numpy()
    cv2.filterSpeckles(stored, -UNKNOWN, int(ISLAND * stored.size), STEPS)
    return torch.where(torch.from_numpy(stored > -UNKNOWN), disparity, torch.nan)


def bounds(matches: list[tuple[Tensor, Tensor]], tracks: Tracks) -> tuple[Tensor, Tensor]:
    """Between which depths (h,w) each pixel lies as far as its matches say: 0 and infinity where they say nothing.

    A disparity of two pixels does not measure a depth, but what is predicted at a tenth of the depth is wrong. Each
    neighbour bounds the depth by its disparity and SLACK, where nearly all windows of the matching around a pixel were
    matched: the picture's edge is not. A small patch says nothing (`without_patches`). Where there are several neighbours,
    what two of them allow counts.

    Args:
        matches: of `pair_disparity`, of one photograph with its neighbours.
        tracks: of the photograph; nothing is bounded to lie farther than BEHIND times the farthest of them.
    """
    low, high = [], []
    for found, pixel in matches:
        disparity = without_patches(found)
        small = disparity < BOUNDED  # False where there is no match
        small &= F.avg_pool2d(small[None, None].float(), 2 * BLOCK - 1, 1, BLOCK - 1)[0, 0] > FILLED  # outside is none
        low.append(torch.where(small, pixel / (disparity.clamp_min(0) + SLACK), 0.0))
        high.append(torch.where(small & (disparity > SLACK), pixel / (disparity - SLACK), torch.inf))
    second = min(2, len(matches)) - 1
    nearest = torch.stack(low).sort(0, descending=True).values[second]
    farthest = torch.stack(high).sort(0).values[second]
    agree = nearest < farthest
    nearest = nearest.clamp_max(BEHIND * float(tracks.depth.quantile(0.99)))
    return torch.where(agree, nearest, 0.0), torch.where(agree, farthest, torch.inf)


def certain(depth: Tensor) -> Tensor:
    """Depth (h,w) without what lies beside a step or beside a hole: there a window of the matching saw two surfaces.

    On rendered tours this keeps 91 to 97 % of the pixels and takes nearly all of those that are wrong by a quarter.
    """
    known = torch.isfinite(depth)[None, None]
    far = F.max_pool2d(torch.where(known, depth, 0.0), BLOCK, 1, BLOCK // 2)
    near = -F.max_pool2d(torch.where(known, -depth, -torch.inf), BLOCK, 1, BLOCK // 2)
    share = F.avg_pool2d(known.float(), BLOCK, 1, BLOCK // 2, count_include_pad=False)
    return torch.where((far < BESIDE * near) & (share >= FILLED), depth, torch.nan)[0, 0]


def confirmed(depth: Tensor, tracks: Tracks) -> Tensor:
    """Depth (h,w) without its islands that meet no track: wrong matches beside a foreground are such.

    Needs `certain` depth, whose steps are holes, so that a region is one surface.
    """
    _, region, about, _ = cv2.connectedComponentsWithStats(
        torch.isfinite(depth).to(torch.uint8).numpy(), connectivity=4
    )
    keep = about[:, cv2.CC_STAT_AREA] > ISLAND * depth.numel()
    meeting = _meets(_at_tracks(depth, tracks), tracks)
    keep[_at_tracks(torch.from_numpy(region), tracks)[meeting].numpy()] = True
    return torch.where(torch.from_numpy(keep[region]), depth, torch.nan)


def _at_tracks(map_: Tensor, tracks: Tracks) -> Tensor:
    """The values (N,) of a map (h,w) in the pixels in which the tracks lie."""
    height, width = map_.shape
    column, row = (tracks.uv * torch.tensor([width, height])).long().unbind(-1)
    return map_[row.clamp(0, height - 1), column.clamp(0, width - 1)]


def _meets(found: Tensor, tracks: Tracks) -> Tensor:
    """Whether the depth (N,) that was found at tracks is within `MEETS` of theirs; False where it is not known."""
    return (found / tracks.depth).log().abs() < MEETS


def measure_depth(grays: list[GrayPhotograph], index: int) -> tuple[Measured | None, float]:
    """What one photograph's neighbours say of its depth.

    Args:
        grays: the photographs of a scene (`to_gray`), with cameras and the tracks that may be used.
        index: which of them.

    Returns:
        The depth, the median over the neighbours where two of them agree within `AGREE` (where there is one alone: its
        own), as far as it is `confirmed`, with the bounds; and the share of the photograph's tracks that it meets. None
        where no neighbour can measure anything (the share is then NaN), or where it does not meet the tracks: a lens
        whose distortion is not known, something that moves, or tracks of something else.
    """
    own = grays[index]
    matches = [pair_disparity(own, grays[number]) for number in neighbours(grays, index)]
    matches = [each for each in matches if each is not None]
    if not matches:
        return None, math.nan
    stack = torch.stack([torch.where(disparity >= LEAST, pixel / disparity, torch.nan) for disparity, pixel in matches])
    middle = stack.nanmedian(0).values
    agree = ((stack / middle).log().abs() < AGREE).sum(0)
    depth = certain(torch.where(agree >= min(2, len(matches)), middle, torch.nan))
    found = _at_tracks(depth, own.tracks)
    known = torch.isfinite(found)
    if known.sum() < SHARED:
        return None, math.nan
    meets = float(_meets(found, own.tracks)[known].float().mean())
    return Measured(confirmed(depth, own.tracks), *bounds(matches, own.tracks)) if meets >= INLIERS else None, meets
