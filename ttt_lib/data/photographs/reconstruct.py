"""From photographs alone to a scene: features, matches, several reconstructions that must agree, and the tracks.

Whatever cannot be reconstructed ends in one sentence in `Scene.refused`; nothing here raises for it.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from ttt_lib.core.errors import DataError
from ttt_lib.data.photographs.features import Picture
from ttt_lib.data.photographs.job import Job, Refusal
from ttt_lib.data.photographs.mapping import agreed
from ttt_lib.data.photographs.matching import match
from ttt_lib.data.photographs.scene import Photograph, Scene
from ttt_lib.data.photographs.tracks import to_photographs

log = logging.getLogger(__name__)


def reconstruct(pictures: list[Picture], seed: int = 0, in_order: bool = False) -> Scene:
    """Cameras and tracks of photographs of one scene, or a sentence that says why they tell nothing.

    Args:
        pictures: two or more, of one scene that stood still; they are read one at a time.
        seed: the same seed gives the same scene.
        in_order: whether neighbors in the list are neighbors in space (frames of a clip).

    Returns:
        The scene. `about` holds the signals as far as they were reached; see `Scene`.

    Raises:
        DataError: for fewer than two pictures, or one that cannot be read.

    Example:
        >>> import torch
        >>> plain = [Picture(name, torch.full((3, 64, 64), 0.5)) for name in "ab"]
        >>> reconstruct(plain).refused
        'b is a copy of a, or taken from the same place: take a second photograph a step to the side.'
    """
    if len(pictures) < 2:
        raise DataError("several photographs of one scene are needed, at least two; this is one photograph alone.")
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ttt-scene-") as folder:
        job = Job(Path(folder), pictures, seed, kept=list(range(len(pictures))))
        try:
            match(job, in_order)
            model, picked = agreed(job, about)
        except Refusal as refusal:
            log.info("refused: %s", refusal)
            return _refused(job, str(refusal), about)
    images = [pictures[i].source for i in model.image]
    return Scene(to_photographs(model, picked, [pictures[i].name for i in model.image], images), *_rest(job, about))


def _rest(job: Job, about: dict[str, Any]) -> tuple[list[tuple[str, str]], dict, str, list[Photograph]]:
    """The fields of a scene after its photographs."""
    out = sorted(job.left_out.items())
    names = [(job.pictures[i].name, why) for i, why in out]
    return names, about, "", [Photograph(job.pictures[i].name, job.pictures[i].source) for i, _ in out]


def _refused(job: Job, why: str, about: dict[str, Any]) -> Scene:
    photographs = [Photograph(picture.name, picture.source) for picture in job.pictures]
    left_out = [(job.pictures[i].name, reason) for i, reason in sorted(job.left_out.items())]
    return Scene(photographs, left_out, about, why)
