"""What of the drawn views reaches the loss: rows with their targets, and several passes joined into one batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ttt_lib.adaptation.losses.terms import draw_seeds
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.views.carry import CUTMIX_DRAWS, View, cutmix

MINIMUM_KNOWN_PIXELS = 64  # a view with fewer says nothing about scale and shift


def at(index: Tensor, other: Tensor) -> Tensor:
    """An index on the device of what it picks from; a GPU is not waited for."""
    return index.to(other.device, non_blocking=True)


@dataclass
class LossBatch:
    """What reaches the loss: row i compares the output of picture `of[i]` with points[i] (NaN: not compared).

    of and seeds are on the CPU, whatever device the rest is on: what is done with them needs no word from a GPU.

    images (B,3,h,w); points (R,h,w,3), intrinsics (R,3,3), negative (R,h,w) bool: of the rows. share (R,): of the
    picture's compared pixels that are this row's; 1 where a picture is one row. seeds (R,3): of `draw_seeds`. compared:
    pictures of a pass that reach the loss, which is their mean.
    """

    images: Tensor
    of: Tensor
    points: Tensor
    intrinsics: Tensor
    negative: Tensor
    share: Tensor
    seeds: Tensor
    compared: int

    def cameras(self, pictures: Tensor) -> Tensor:
        """Intrinsics of the pictures; one that reaches no loss takes those of the first row."""
        if not len(self.of):
            return self.intrinsics
        first = torch.searchsorted(self.of, pictures).clamp_max(len(self.of) - 1)  # rows go picture by picture
        return self.intrinsics[at(torch.where(self.of[first] == pictures, first, 0), self.intrinsics)]


def loss_draws(config: ExperimentConfig, count: int, generator: torch.Generator) -> tuple[Tensor | None, Tensor]:
    """All that the loss of a pass of `count` views takes at random: CutMix's numbers, and seeds for every row there may be."""
    mixes = config.views.cutmix > 0 and count > 1
    numbers = torch.rand(count, CUTMIX_DRAWS, generator=generator) if mixes else None
    rows = 1 if config.released.first_sample_only else 2 * count if mixes else count
    return numbers, draw_seeds(rows, generator)


def loss_batch(view: View, config: ExperimentConfig, generator: torch.Generator) -> LossBatch:
    """`batch_of` the views with the `loss_draws` of `generator`."""
    return batch_of(view, config, loss_draws(config, len(view.image), generator))


def batch_of(view: View, config: ExperimentConfig, draws: tuple[Tensor | None, Tensor]) -> LossBatch:
    """One row a view, or with CutMix one row a region; rows with hardly any known pixel are left out.

    draws: of `loss_draws`, every random number that the loss of this pass needs, so it may be computed at any later time.
    """
    mixing, seeds = draws
    images, points, negative = view.image, view.points, view.negative
    of = torch.arange(len(images))
    intrinsics = view.intrinsics
    if mixing is not None:
        # The other view of a row is the next one. Each region is a row of its own, so that it is aligned alone.
        other = View(*(x.roll(-1, 0) if isinstance(x, Tensor) else x for x in vars(view).values()))
        images, region = cutmix(view, other, mixing, config.views.cutmix)
        own = torch.where(region[..., None], torch.nan, points)
        points = torch.cat([own, torch.where(region[..., None], other.points, torch.nan)])
        negative = torch.cat([negative & ~region, other.negative & region])
        of, intrinsics = of.repeat(2), torch.cat([intrinsics, other.intrinsics])
    known = torch.isfinite(points).all(-1).flatten(1).sum(1)
    kept = torch.nonzero((known >= MINIMUM_KNOWN_PIXELS).cpu())[:, 0]  # the one thing of a pass that the host waits for
    kept = kept[of[kept].argsort(stable=True)]  # picture by picture
    kept = kept[:1] if config.released.first_sample_only else kept
    of, there = of[kept], at(kept, points)
    known, pictures = known[there].float(), at(of, points)
    share = known / torch.zeros(len(images), device=known.device).scatter_add_(0, pictures, known)[pictures]
    seeds, compared = seeds[: len(of)], len(of.unique())
    return LossBatch(images, of, points[there], intrinsics[there], negative[there], share, seeds, compared)


def plain_batch(images: Tensor, points: Tensor, intrinsics: Tensor, generator: torch.Generator) -> LossBatch:
    """Targets (R,H,W,3) of one and the same picture (1,3,H,W), each a row; cameras (3,3) of the picture."""
    rows, nothing = len(points), torch.zeros(points.shape[:-1], dtype=torch.bool, device=points.device)
    of, share = torch.zeros(rows, dtype=torch.long), torch.ones(rows, device=points.device)
    return LossBatch(images, of, points, intrinsics.expand(rows, 3, 3), nothing, share, draw_seeds(rows, generator), 1)


def join_batches(batches: list[LossBatch]) -> list[LossBatch]:
    """Neighbouring passes as one, where their pictures count the same: with as many of them compared in each.

    The sum of the losses stays what it was; `compared` is still that of one pass.
    """
    joined = []
    for compared, found in groupby(batches, key=lambda batch: batch.compared):
        group = list(found)
        if len(group) == 1:
            joined += group
            continue
        size = len(group[0].images)  # of a pass: the same in all of one experiment
        of = torch.cat([batch.of + i * size for i, batch in enumerate(group)])
        names = ("images", "points", "intrinsics", "negative", "share", "seeds")
        tensors = {name: torch.cat([getattr(batch, name) for batch in group]) for name in names}
        joined.append(LossBatch(of=of, compared=compared, **tensors))
    return joined
