"""Sets of procedural scenes: held-out ones, and the same under domain shifts."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from ttt_lib.core.types import Sample
from ttt_lib.data.samples import SampleSet
from ttt_lib.data.scenes.generate import KINDS, make_pictures
from ttt_lib.data.shifts import BUILT_IN, apply_shift

HELD_OUT_SEED = 900_000  # far from the seeds that training chunks use


SIZE = (240, 320)


@lru_cache(maxsize=16)  # the jobs of an ablation see the same few, one experiment after the other in one process
def held_out_sample(
    number: int, seed: int = 0, shift: str | None = None, severity: int = 0, size: tuple[int, int] = SIZE,
    draw: int = 0,
) -> Sample:  # fmt: skip
    """Scene `number` of the held-out set of `seed`, as a `data.Sample`, clean or under a shift, whose randomness is that of
    `draw`."""
    kind = KINDS[number % len(KINDS)]
    picture = make_pictures([kind], HELD_OUT_SEED + 10_000 * seed + number, size)
    mask = picture.mask[0]
    depth = torch.where(mask, picture.points[0, ..., 2], torch.inf)
    image = (picture.image[0].clamp(0, 1) * 255).round() / 255
    name = f"{kind}_{number:03d}"
    if shift:
        image = apply_shift(shift, image, depth, severity, seed=seed * 1000 + number + 10**9 * draw)
        name = f"{name}_{shift}_{severity}"
    return Sample(
        name=name,
        dataset="shifted" if shift else "synthetic",
        image=image,
        depth=torch.where(mask, depth, torch.nan),
        points=picture.points[0],
        mask=mask,
        intrinsics=picture.intrinsics[0],
        is_metric=True,
        has_sharp_boundary=True,
    )


def open_synthetic(
    kind: str,
    count: int = 40,
    seed: int = 0,
    shifts: list[str] | None = None,
    severities: list[int] | None = None,
    width: int = SIZE[1],
    height: int = SIZE[0],
    name: str | None = None,
    draw: int = 0,
) -> SampleSet:
    """The sets `synthetic` (clean) and `shifted`, of `count` scenes, as a `data.SampleSet`.

    `shifted` gives each scene one shift and one severity, so that all names and severities take turns; `shifts` and
    `severities` restrict them; `draw` numbers the draws of what is random in a shift. Raises `UserError` for an unknown shift.
    """
    shifts, severities = shifts or list(BUILT_IN), severities or [1, 2, 3, 4, 5]
    for shift in shifts:
        apply_shift(shift, torch.zeros(3, 2, 2), torch.ones(2, 2), 0)
    plan: dict[str, tuple] = {}
    for number in range(count):
        if kind == "shifted":
            turn = number // len(shifts)  # each turn pairs shifts with other kinds of scene and other severities
            which = (number + turn) % len(shifts)
            choice = (shifts[which], severities[(which + turn) % len(severities)])
            plan[f"{number:03d}_{choice[0]}_{choice[1]}"] = (number, *choice)
        else:
            plan[f"{number:03d}"] = (number, None, 0)

    def load(key: str):
        number, shift, severity = plan[key]
        sample = held_out_sample(number, seed, shift, severity, (height, width), draw)
        return replace(sample, name=key, dataset=name or kind)

    return SampleSet(name or kind, list(plan), load, f"{kind}/{seed}/{width}x{height}/{sorted(plan.items())}")
