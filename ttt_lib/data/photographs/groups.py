"""Photographs of one scene from a set of samples, so that an ablation can ask what a second photograph is worth."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from torch import Tensor

from ttt_lib.core.errors import DataError
from ttt_lib.data.photographs.features import Picture
from ttt_lib.data.samples import SampleSet


def scene_of_samples(samples: SampleSet, name: str, true_focal: bool = False) -> list[Picture]:
    """The pictures of the scene that a sample belongs to, in the set's order: the same for each sample of the scene.

    They are read when they are asked for, and know nothing of the truth. Pictures of one size share a camera.

    Args:
        samples: the set.
        name: of the sample.
        true_focal: give each picture the focal length of its sample's truth, as a user would who knows the camera; each
            sample is then read once here.

    Returns:
        One picture for a sample that stands alone, two or more for others.

    Raises:
        DataError: the set has no such sample.

    Example:
        >>> from ttt_lib.data.scenes.tours import open_tours
        >>> tours = open_tours(count=1, views=[2], width=64, height=48)
        >>> pictures = scene_of_samples(tours, "tour_000/view_1")
        >>> [picture.name for picture in pictures], pictures[0].focal, pictures[0].read().shape
        (['tour_000/view_0', 'tour_000/view_1'], None, torch.Size([3, 48, 64]))
    """
    members = samples.scene_of(name)[1]
    if name not in samples.names and members == [name]:  # those of a scene may be in other shards
        raise DataError(f"{samples.name}: has no sample {name!r}; its first is {next(iter(samples.names), None)!r}.")
    pictures = []
    for member in members:
        picture = Picture(member, _image_of(samples, member))
        if true_focal and (intrinsics := samples.load(member).intrinsics) is not None:
            picture.focal, picture.exact = float(intrinsics[0, 0]), True
        pictures.append(picture)
    return pictures


def _image_of(samples: SampleSet, name: str) -> Callable[[], Tensor]:
    return lru_cache(maxsize=1)(lambda: samples.load(name).image)
