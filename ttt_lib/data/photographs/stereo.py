"""Matches between two photographs: rectified stereo, believed where both ways agree.

Tracks are some hundred points; with the cameras known, matching along lines gives most of the picture. OpenCV's
semi-global matching does it in a tenth of a second a pair. Nothing here looks at a network's prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from ttt_lib.data.images import shrink
from ttt_lib.data.photographs.scene import Photograph, Tracks

LONGEST_SIDE = 640  # pixels of the pictures that are compared
NEIGHBOURS = 4  # photographs that one is compared with
# Degrees between two rays to a track: with less the far half is not measured, with more it looks too different.
NARROW, WIDE = 1.5, 25.0
SHARED = 20  # tracks in common
AHEAD = 0.7  # cosine between the step and the axes: from there on rectified pictures are stretched too far
BLOCK = 5  # pixels of SGM's windows, and of its penalties
LEAST = 4.0  # pixels of disparity, of each pixel and of the median track: half a pixel is then an eighth of the depth
MOST = 256  # disparities that are searched
NEAR = 0.6  # of the nearest tracks' depth: nothing nearer is looked for


@dataclass
class GrayPhotograph:
    """A photograph as stereo sees it: luma (h,w) uint8 and seen (h,w) uint8, 255 where the camera saw it, else 0; matrix
    (3,3) intrinsics in its pixels; rotation (3,3) and centre (3,) of the camera in the world, float64."""

    luma: np.ndarray
    seen: np.ndarray
    matrix: np.ndarray
    rotation: np.ndarray
    centre: np.ndarray
    tracks: Tracks


def to_gray(photograph: Photograph) -> GrayPhotograph:
    """Read the photograph and shrink its luma to at most LONGEST_SIDE."""
    image = photograph.image
    array = (image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
    luma = shrink(cv2.cvtColor(np.ascontiguousarray(array), cv2.COLOR_RGB2GRAY), LONGEST_SIDE)
    height, width = luma.shape
    matrix = photograph.intrinsics.double().numpy() * np.array([[width], [height], [1.0]])
    pose = photograph.pose.double().numpy()
    rotation = pose[:3, :3]
    seen = np.full_like(luma, 255)
    if photograph.seen is not None:
        seen = photograph.seen(luma.shape).numpy().astype(np.uint8) * 255
    return GrayPhotograph(luma, seen, matrix, rotation, -rotation.T @ pose[:3, 3], photograph.tracks)


def neighbours(grays: list[GrayPhotograph], index: int) -> list[int]:
    """Which photographs measure the depth of one: those with many common tracks, seen at a useful angle.

    A narrow angle is useful where there is no other: where it measures nothing, it would not agree with what others do.
    """
    own = grays[index]
    wide, narrow = {}, {}
    for number, other in enumerate(grays):
        mine, _ = own.tracks.common(other.tracks)
        step = np.linalg.norm(other.centre - own.centre)
        if number == index or len(mine) < SHARED or step == 0:
            continue
        depth = float(own.tracks.depth[mine].median())
        angle = math.degrees(math.atan2(step, depth))
        score = len(mine) * min(1.0, angle / 6)  # at some 6 degrees a pixel is a per cent or two
        if NARROW <= angle <= WIDE:
            wide[number] = score
        elif angle < NARROW and own.matrix[0, 0] * step >= LEAST * depth:
            narrow[number] = score
    useful = wide or narrow
    return sorted(useful, key=lambda number: (-useful[number], number))[:NEIGHBOURS]


class _Rectified(NamedTuple):
    """A photograph in the common plane: luma and where it covers that, (h,w'); the homography to it (pixel centres at
    whole numbers), and its left edge there in pixels."""

    luma: np.ndarray
    covered: np.ndarray
    warp: np.ndarray
    left: float


def _rectified(gray: GrayPhotograph, turn: np.ndarray, focal: float, top: float, height: int) -> _Rectified:
    """turn (3,3): from the world to the plane's axes; focal, top, height: of the plane, in pixels."""
    place = _corners(gray, turn) * focal
    left = place[:, 0].min()
    width = math.ceil(place[:, 0].max() - left)
    camera = np.array([[focal, 0, -left], [0, focal, -top], [0, 0, 1]])
    half = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    warp = half @ camera @ turn @ gray.rotation.T @ np.linalg.inv(gray.matrix) @ np.linalg.inv(half)
    luma = cv2.warpPerspective(gray.luma, warp, (width, height), flags=cv2.INTER_LINEAR)
    covered = cv2.warpPerspective(gray.seen, warp, (width, height), flags=cv2.INTER_NEAREST) > 0
    return _Rectified(luma, covered, warp, left)


def _corners(gray: GrayPhotograph, turn: np.ndarray) -> np.ndarray:
    """Where the corners of a picture lie in the common plane at distance 1, (4,2); infinite where it is behind."""
    height, width = gray.luma.shape
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]], dtype=float)
    rays = corners @ np.linalg.inv(gray.matrix).T @ (turn @ gray.rotation.T).T
    if rays[:, 2].min() < 0.2:
        return np.full((4, 2), np.inf)
    return rays[:, :2] / rays[:, 2:]


def _search(left: np.ndarray, right: np.ndarray, least: int, count: int) -> np.ndarray:
    """Disparity (h,w) of the left picture by semi-global matching, NaN where it is not sure."""
    matcher = cv2.StereoSGBM_create(
        minDisparity=least, numDisparities=count, blockSize=BLOCK, P1=8 * BLOCK**2, P2=32 * BLOCK**2, disp12MaxDiff=1,
        uniquenessRatio=10, speckleWindowSize=50, speckleRange=2, mode=cv2.STEREO_SGBM_MODE_SGBM_3WAY,
    )  # fmt: skip
    edge = count + abs(least)  # the matcher leaves out what could lie outside of the other picture
    wide = [np.pad(picture, ((0, 0), (edge, edge))) for picture in (left, right)]
    found = matcher.compute(*wide)[:, edge:-edge].astype(np.float32) / 16
    return np.where(found >= least, found, np.nan)


def _both_ways(one: _Rectified, other: _Rectified, least: int, count: int) -> np.ndarray:
    """Disparity of the first picture where the second one gives the same back."""
    width = max(one.luma.shape[1], other.luma.shape[1])

    def padded(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, width - array.shape[1])))

    left, right = padded(one.luma), padded(other.luma)
    there = _search(left, right, least, count)
    back = _search(right[:, ::-1], left[:, ::-1], least, count)[:, ::-1]
    row, column = np.indices(there.shape)
    target = np.round(column - np.nan_to_num(there)).astype(int)
    inside = (target >= 0) & (target < width)
    target = target.clip(0, width - 1)
    same = np.abs(back[row, target] - there) <= 1  # False where either is NaN
    return np.where(inside & same & padded(one.covered) & padded(other.covered)[row, target], there, np.nan)


def _common_plane(
    own: GrayPhotograph, other: GrayPhotograph, across: np.ndarray
) -> tuple[np.ndarray, float, float, int] | None:
    """A plane in which each point lies in one row of both photographs; across (3,): the way from the first to the second.

    Its axes in the world (3,3), focal length, first row and number of rows (pixels); None where there is none: the step
    goes along the optical axes, or the pictures hardly overlap.
    """
    if max(abs(own.rotation[2] @ across), abs(other.rotation[2] @ across)) > AHEAD:
        return None
    ahead = own.rotation[2] + other.rotation[2]
    ahead -= across * (ahead @ across)
    ahead /= np.linalg.norm(ahead)
    turn = np.stack([across, np.cross(ahead, across), ahead])
    focal = (own.matrix[0, 0] + own.matrix[1, 1] + other.matrix[0, 0] + other.matrix[1, 1]) / 4
    corners = np.stack([_corners(own, turn), _corners(other, turn)]) * focal
    if not np.isfinite(corners).all():
        return None
    top = max(corners[0, :, 1].min(), corners[1, :, 1].min())
    height = math.floor(min(corners[0, :, 1].max(), corners[1, :, 1].max()) - top)
    if height < 32 or np.ptp(corners[..., 0], axis=1).max() > 4 * own.luma.shape[1]:
        return None
    return turn, focal, top, height


def pair_disparity(own: GrayPhotograph, other: GrayPhotograph) -> tuple[Tensor, Tensor] | None:
    """Matches of the first photograph's pixels in the second, or None where the two have no common plane.

    Returns:
        Disparity (h,w) in pixels of the common plane, NaN where the two ways do not agree; and the depth (h,w), in the
        scene's unit, at which it would be one pixel: depth is this over the disparity.
    """
    step = other.centre - own.centre
    distance = np.linalg.norm(step)
    plane = _common_plane(own, other, step / distance)
    if plane is None:
        return None
    turn, focal, _, _ = plane
    first, second = (_rectified(gray, *plane) for gray in (own, other))
    offset = first.left - second.left  # of the disparity as searched
    nearest = NEAR * float(own.tracks.depth.quantile(0.01))
    least = math.floor(-1 - offset)  # what is too far to measure has to be found there, or it is found elsewhere
    count = 16 * max(1, math.ceil((focal * distance / nearest - offset - least) / 16))
    disparity = (_both_ways(first, second, least, min(count, MOST)) + offset).astype(np.float32)
    v, u = np.indices(own.luma.shape)
    place = np.stack([u, v, np.ones_like(u)], -1) @ first.warp.T
    x, y = (place[..., k] / place[..., 2] for k in (0, 1))
    found = cv2.remap(
        disparity, x.astype(np.float32), y.astype(np.float32), cv2.INTER_NEAREST, borderValue=float("nan")
    )
    rays = np.stack([u + 0.5, v + 0.5, np.ones_like(u)], -1) @ np.linalg.inv(own.matrix).T
    pixel = focal * distance / (rays @ (turn @ own.rotation.T)[2])
    return torch.from_numpy(found), torch.from_numpy(pixel.astype(np.float32))
