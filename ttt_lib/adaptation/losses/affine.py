"""MoGe's affine-invariant terms at a small part of their cost, and without a word from the device.

As `moge.train.losses` has them: `sum_i 1/z_i |s p_i + t - q_i|` with the best scale s and shift t, over a whole picture and
over patches of it. What it does not share is how that is computed. The alignments are those of `fast_alignment`. A large
patch is looked at in as many places as its alignment needs, spread evenly and begun at random, so that each of its pixels
counts equally often: for a patch of a quarter of 640 x 480, 1,024 places of 40,401. Nothing asks a GPU for a number or a size;
random numbers are the CPU's and those of each row its own, so that they do not hang on the device or the batch.

Values and gradients have MoGe's mean to two hundredths (a patch is fitted to a quarter of the places that it is judged by), and
no more noise, but for the smallest patches: a quarter of them is looked at, with as much noise as the larger ones have.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from moge.utils.geometry_torch import harmonic_mean, weighted_mean
from torch import Tensor

from ttt_lib.geometry.fast_alignment import QUICK, align_points_scale_xyz_shift, align_points_scale_z_shift, quantile

MINIMUM_PIXELS = 32  # of a patch, MoGe's
PATCHES = 1024  # at most; they stand for more: those of a 64th, 4096, lie over each other three deep
TRIES, MOST_TRIES = 8, 2048  # places tried for each patch, of which importance sampling chooses
LOOKS = 64  # places of its window that a try looks at, as many as MoGe's
FINER = 2  # a patch is looked at in twice as many rows and columns as its alignment has,
SMALL = 16  # or in all of a window that has no more
# Steps of sequences that spread evenly: of one number the golden ratio, of two the plastic one. For tries, the start of their
# looks, patches, and the start of their places.
STEPS = (0.618034, 0.754878, 0.569840, 0.618034, 0.754878, 0.569840)


@lru_cache(maxsize=64)
def _windows(length: int, side: int) -> tuple[Tensor, Tensor]:
    """Which pixels of a row may stand for each of `side` cells, (side,K), and their squared distance, infinite outside."""
    wide = max(1, length / side)
    centre = torch.linspace(0.5 / side, 1 - 0.5 / side, side) * length  # rounded as utils3d does: ties are common
    pixel = torch.round(centre - wide / 2).long()[:, None] + torch.arange(math.ceil(wide))
    distance = (pixel + 0.5 - centre[:, None]).square()
    return pixel.clamp(0, length - 1), distance.masked_fill((pixel < 0) | (pixel >= length), torch.inf)


def nearest_known(known: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Of each cell of a `side` x `side` grid the known pixel nearest to its middle, if the cell has any.

    known (B,H,W) -> index into H * W, and whether there is one, (B, side^2) each. As `utils3d.torch.masked_nearest_resize`
    chooses, which sends numbers to a GPU one by one.
    """
    height, width = known.shape[-2:]
    ways = (*_windows(height, side), *_windows(width, side))
    row, down, column, across = (each.to(known.device, non_blocking=True) for each in ways)
    index = (row[:, None, :, None] * width + column[None, :, None, :]).flatten(2).flatten(0, 1)
    distance = (across[None, :, None, :] + down[:, None, :, None]).flatten(2).flatten(0, 1)
    distance, nearest = torch.where(known.flatten(1)[:, index], distance, torch.inf).min(-1, keepdim=True)
    chosen = index.expand(len(known), -1, -1).gather(-1, nearest)
    return chosen[..., 0], torch.isfinite(distance[..., 0])


def _smooth(error: Tensor, beta: float) -> Tensor:
    return torch.where(error < beta, 0.5 * error.square() / beta, error - 0.5 * beta) if beta else error


def best_scale_z_shift(points: Tensor, target: Tensor, known: Tensor, side: int, trunc: float) -> tuple[Tensor, Tensor]:
    """Scale (B,) and shift (B,3), along z alone, that bring points (B,H,W,3) nearest to the target, relative to its depth, as a
    `side` x `side` grid of the known pixels (B,H,W) sees them. 0 where none is known."""
    index, there = nearest_known(known, side)
    at = index[..., None].expand(-1, -1, 3)
    source, wanted = (maps.flatten(1, 2).gather(1, at) for maps in (points, target))
    wanted = torch.where(there[..., None], wanted, 1.0)
    return align_points_scale_z_shift(source, wanted, there / wanted[..., 2].clamp_min(1e-2), trunc)


def whole_difference(
    points: Tensor, target: Tensor, known: Tensor, align_resolution: int, beta: float, trunc: float
) -> tuple[Tensor, Tensor]:
    """`affine_invariant_global_loss`: over whole pictures.

    Args:
        points: (B,H,W,3) of the student, up to scale and z-shift.
        target: (B,H,W,3), anything where it is not known.
        known: (B,H,W) bool.
        align_resolution: side of the grid that the alignment sees.
        beta: errors below it count by their square; 0: none do.
        trunc: what a point's error can cost the alignment at most.

    Returns:
        The value, with gradients, and the alignment's scale, without, (B,) each. 0 for both where nothing is known.
    """
    scale, shift = best_scale_z_shift(points, target, known, align_resolution, trunc)
    target = torch.where(known[..., None], target, 1.0)
    valid = scale > 0
    scale, shift = torch.where(valid, scale, 0.0), torch.where(valid[:, None], shift, 0.0)
    aligned = scale[:, None, None, None] * points + shift[:, None, None]
    weight = (valid[:, None, None] & known).float() / target[..., 2].clamp_min(1e-5)
    weight = weight.clamp_max(10.0 * weighted_mean(weight, known, dim=(-2, -1), keepdim=True))
    return _smooth((aligned - target).abs() * weight[..., None], beta).mean((1, 2, 3)), scale.detach()


class _Pixels(NamedTuple):
    """All pixels of B pictures in a row: target (3,N), infinite where unknown; the radius of a patch around each, reach (N,)."""

    target: Tensor
    reach: Tensor
    size: tuple[int, int]


def _taken(planes: Tensor, index: Tensor) -> Tensor:
    """Points (3,N), coordinate by coordinate, at an index (...) into N: (3,...). Several times as fast as of (N,3)."""
    return planes.gather(1, index.flatten().expand(3, -1)).view(3, *index.shape)


def _places(pixels: _Pixels, centres: Tensor, down: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places `down` and `right` of some pixels, (P,) and offsets (P,K), which are written over.

    Returns their index (P,K), their targets (3,P,K), and whether they belong to the patch, (P,K): known pixels, in space within
    reach of the centre.
    """
    height, width = pixels.size
    place = centres % (height * width)
    row, column = down.add_((place // width)[:, None]), right.add_((place % width)[:, None])
    across, along = row.clamp(0, height - 1), column.clamp(0, width - 1)
    inside = (across == row).logical_and_(along == column)
    index = along.add_(across, alpha=width).add_((centres - place)[:, None])
    found = _taken(pixels.target, index)
    x, y, z = found - _taken(pixels.target, centres)[..., None]
    away = (x * x).addcmul_(y, y).addcmul_(z, z)  # never near where one of them is infinite
    return index, found, inside.logical_and_(away <= pixels.reach[centres].square()[:, None])


def _offsets(part: Tensor, radius: int) -> Tensor:
    """Pixels from the centre of a window of `radius`, where `part` says how far across it, in [0, 1)."""
    return (part * (2 * radius + 1)).long().clamp_max_(2 * radius).sub_(radius)


def _lattice(start: Tensor, radius: int, side: int) -> tuple[Tensor, Tensor]:
    """Offsets of `side` x `side` places spread evenly over a window from a start, (P,2) in [0,1): down and right, (P, side^2)."""
    part = (torch.arange(side, device=start.device) + start[..., None]) / side
    down, right = _offsets(part, radius).unbind(1)
    return down.repeat_interleave(side, 1), right.repeat(1, side)


def _centres(pixels: _Pixels, known: Tensor, seeds: list[int], radius: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` known pixels of each picture as patch centres, (B * count,), and a start for the places of each, (B * count, 2).

    A pixel is chosen as often as one over how many of 64 places of its window belong to its patch, so that thin things are not
    overlooked: `moge.train.losses.compute_anchor_sampling_weight`, by sampling importance resampling. Each picture draws few
    numbers by its seed; those of its patches follow from them by steps that spread evenly.
    """
    tries, size = min(TRIES * count, MOST_TRIES), known[0].numel()
    drawn = [torch.rand(len(STEPS) + 2 * LOOKS, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    starts, table = torch.stack(drawn).to(known.device, non_blocking=True).split([len(STEPS), 2 * LOOKS], 1)

    def numbers(which: int, many: int) -> Tensor:  # (B, many) in [0, 1)
        return (starts[:, which, None] + STEPS[which] * torch.arange(many, device=starts.device)) % 1

    def spread(which: int, many: int) -> Tensor:  # (B, many) in (0, 1], one in each of as many parts
        return (torch.arange(1, many + 1, device=starts.device) - numbers(which, many)) / many

    begin = torch.arange(len(seeds), device=known.device)[:, None] * size
    tried = begin + quantile(known.flatten(1).float(), spread(0, tries))
    down, right = (  # the same places of every window, but for where they begin
        _offsets((numbers(1 + i, tries)[..., None] + part[:, None]).frac_(), radius).flatten(0, 1)
        for i, part in enumerate(table.chunk(2, 1))
    )
    _, _, inside = _places(pixels, tried.flatten(), down, right)
    weight = 1 / inside.sum(1).clamp_min(1)
    chosen = tried.gather(1, quantile(weight.view_as(tried), spread(3, count)))
    return chosen.flatten(), torch.stack([numbers(4, count), numbers(5, count)], -1).flatten(0, 1)


def _tells(device: torch.device) -> bool:
    """Whether a device says at no cost how many there are of something."""
    return device.type == "cpu"


def patch_difference(
    points: Tensor, target: Tensor, known: Tensor, focal: Tensor, scale: Tensor, seeds: list[int], level: int,
    align_resolution: int, num_patches: int, beta: float, trunc: float,
) -> Tensor:  # fmt: skip
    """`affine_invariant_local_loss`: over patches, each with a scale and shift of its own.

    Args:
        points: (B,H,W,3) of the student.
        target: (B,H,W,3), anything where it is not known.
        known: (B,H,W) bool.
        focal: (B,) of `focal_of`, relative to the image's diagonal.
        scale: (B,) of the whole pictures; a patch whose own is ten times smaller or larger is left out.
        seeds: of each picture's patches.
        level: a patch reaches over a diagonal divided by it.
        align_resolution: side of the grid that a patch's alignment sees.
        num_patches: of a picture; at most `PATCHES` are looked at, and stand for all.
        beta, trunc: as for `whole_difference`.

    Returns:
        The mean over the patches of each picture, (B,), with gradients. Patches with few pixels count as zero.
    """
    batch, height, width = known.shape
    radius, count = math.ceil(0.5 / level * math.hypot(height, width)), min(num_patches, PATCHES)
    depth = torch.where(known, target[..., 2], 1.0)
    reach = (0.5 / level / focal[:, None, None] * depth).clamp_min(0.0).flatten()
    planes = torch.where(known[..., None], target, torch.inf).reshape(-1, 3).T.contiguous()
    pixels = _Pixels(planes, reach, (height, width))
    centres, jitter = _centres(pixels, known, seeds, radius, count)
    side = min(2 * radius + 1, max(FINER * align_resolution, SMALL))
    index, wanted, inside = _places(pixels, centres, *_lattice(jitter, radius, side))
    enough = inside.float().mean(1) * (2 * radius + 1) ** 2 > MINIMUM_PIXELS - 0.5
    if _tells(enough.device):  # a GPU takes the empty ones along: it would have to be asked which they are
        wanted = wanted[:, enough]
        centres, index, inside, enough = (each[enough] for each in (centres, index, inside, enough))
    of, wanted = centres // (height * width), torch.where(inside, wanted, 1.0)
    found = _taken(points.reshape(-1, 3).T.contiguous(), index)

    nearest, there = nearest_known(inside.unflatten(1, (side, side)), align_resolution)
    source, fixed = (
        maps.gather(2, nearest.expand(3, -1, -1)).permute(1, 2, 0).contiguous() for maps in (found, wanted)
    )
    own, shift = align_points_scale_xyz_shift(source, fixed, there / (reach[centres, None] + 1e-7), trunc, QUICK)
    ratio = own / scale[of]
    valid = enough & (ratio > 0.1) & (ratio < 10.0) & (scale[of] > 0)
    own, shift = torch.where(valid, own, 0.0), torch.where(valid[:, None], shift, 0.0)

    usual = harmonic_mean(depth, known, dim=(-2, -1))
    weight = (inside & valid[:, None]) / torch.maximum(wanted[2], 0.1 * usual[of][:, None])
    error = (own[:, None] * found + shift.T[..., None] - wanted).abs() * weight
    each = _smooth(error, beta).mean((0, 2)) / count
    return torch.zeros(batch, dtype=each.dtype, device=each.device).index_add(0, of, each)
