"""The same samples seen a second time: what a score owes to the one picture that was taken.

Samples that are chosen because a model fails on them score better when they are seen again, without any training
(regression to the mean). What is measured on the second look was not chosen by it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ttt_lib.core.seeds import sample_generator
from ttt_lib.core.types import Sample
from ttt_lib.data.samples import SampleSet
from ttt_lib.geometry.cameras import mirror_intrinsics, mirror_points

AGAIN = ".again"  # behind the name of the set
NOISE = 0.01  # standard deviation of a value in [0, 1]


def _mirrored(sample: Sample) -> Sample:
    """The sample in a mirror: columns flipped, x negated."""
    maps = {key: getattr(sample, key) for key in ("image", "depth", "mask", "segmentation")}
    flipped = {key: None if map_ is None else map_.flip(-1) for key, map_ in maps.items()}
    points = None if sample.points is None else mirror_points(sample.points)
    intrinsics = None if sample.intrinsics is None else mirror_intrinsics(sample.intrinsics)
    return replace(sample, **flipped, points=points, intrinsics=intrinsics)


def seen_again(samples: SampleSet, draw: int) -> SampleSet:
    """The set under the name `NAME.again`: each picture mirrored, as if the world were, and with new noise of a sensor.

    A mirrored scene is as hard as the scene, so this look is no easier; the noise (`NOISE`, rounded to 8 bits) is that of
    `draw`. A set that draws something itself, as `shifted` does, draws that anew too.

    Example:
        >>> from ttt_lib.data.catalog import open_dataset
        >>> again = seen_again(open_dataset("motorcycle", width=96, height=64), draw=1)
        >>> again.name, again[0].dataset, again[0].name
        ('motorcycle.again', 'motorcycle.again', 'motorcycle_left')
    """
    title = f"{samples.name}{AGAIN}"

    def load(name: str) -> Sample:
        sample = _mirrored(samples.load(name))
        generator = sample_generator(draw, f"{title}/{name}")
        noisy = sample.image + NOISE * torch.randn(sample.image.shape, generator=generator).to(sample.image)
        return replace(sample, dataset=title, image=(noisy.clamp(0, 1) * 255).round() / 255)

    return replace(samples, name=title, load=load, fingerprint=f"{samples.fingerprint} again {draw}", left_out=[])
