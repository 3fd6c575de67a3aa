"""Sets of procedural scenes: held-out ones, and the same under domain shifts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ttt_lib.core.types import Sample
from ttt_lib.data.samples import SampleSet
from ttt_lib.data.scenes.generate import KINDS, as_sample, make_pictures
from ttt_lib.data.shifts import BUILT_IN, apply_shift

HELD_OUT_SEED = 900_000  # far from the seeds that training chunks use
SIZE = (240, 320)
SEVERITIES = (1, 2, 3, 4, 5)


def check_shifts(shifts: Sequence[str]) -> None:
    """Raises `UserError` for an unknown shift."""
    for shift in shifts:
        apply_shift(shift, torch.zeros(3, 2, 2), torch.ones(2, 2), 0)


def open_synthetic(
    kind: str, count: int = 40, seed: int = 0, shifts: list[str] | None = None, severities: list[int] | None = None,
    width: int = SIZE[1], height: int = SIZE[0], name: str | None = None,
) -> SampleSet:  # fmt: skip
    """The sets `synthetic` (clean) and `shifted`, of `count` scenes, as a `data.SampleSet`.

    `shifted` gives each scene one shift and one severity, so that all names and severities take turns; `shifts` and
    `severities` restrict them. Raises `UserError` for an unknown shift.
    """
    shifts, severities = shifts or list(BUILT_IN), severities or SEVERITIES
    check_shifts(shifts)
    plan: dict[str, tuple] = {}
    for number in range(count):
        choice = (None, 0)
        if kind == "shifted":
            turn = number // len(shifts)  # each turn pairs shifts with other kinds of scene and other severities
            which = (number + turn) % len(shifts)
            choice = (shifts[which], severities[(which + turn) % len(severities)])
        plan["_".join([f"{number:03d}", *(map(str, choice) if choice[0] else ())])] = (number, *choice)

    def load(key: str) -> Sample:
        number, shift, severity = plan[key]
        scene_seed = HELD_OUT_SEED + 10_000 * seed + number
        picture = make_pictures([KINDS[number % len(KINDS)]], scene_seed, (height, width))
        return as_sample(picture, key, name or kind, shift=shift, severity=severity, seed=seed * 1000 + number)

    return SampleSet(name or kind, list(plan), load, f"{kind}/{seed}/{width}x{height}/{sorted(plan.items())}")
