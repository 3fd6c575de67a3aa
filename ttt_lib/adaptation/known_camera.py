"""Adapting to one photograph whose camera is known, with or without known distances."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt_lib.adaptation.adapter import Adapter
from ttt_lib.adaptation.known_distances import KnownDistances, unit_doubt
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.data.known_camera import KnownCamera, centre_photograph, known_camera
from ttt_lib.data.known_distances import References
from ttt_lib.models.base import GeometryModel

log = logging.getLogger(__name__)


def camera_of(
    model: GeometryModel, image: Tensor, photograph: str | Path | None, exif: bool = True, **given: Any
) -> KnownCamera | None:
    """The known camera of a photograph (3,H,W): what is given of it, as `data.known_camera.known_camera` takes it.

    Where neither that nor the model has one, EXIF of its file `photograph` counts, unless `exif` is False.
    """
    file = photograph if exif and model.fov_x is None else None
    return known_camera(tuple(image.shape[-2:]), **given, photograph=file)


def adapt_photograph(
    model: GeometryModel, config: ExperimentConfig, image: Tensor, name: str, references: References | None = None,
    camera: KnownCamera | None = None, progress: bool = False,
) -> AdaptResult:  # fmt: skip
    """`Adapter.adapt` of a photograph (3,H,W) in [0,1] by its camera, where that is known; predictions are of the photograph.

    The model predicts, and its views are drawn, with the known camera, centred (`data.known_camera`).

    Raises:
        UserError: as `Adapter` does, and for a camera of which hardly any picture is left.
    """
    seen = centre_photograph(image, camera) if camera is not None else None
    if references is not None and seen is not None:
        references = seen.carried(references)
    supervision = [KnownDistances(references, config)] if references is not None else []
    with model.knowing(fov_x=seen.fov_x if seen is not None else None):
        result = Adapter(model, config).adapt(
            image if seen is None else seen.image, name, supervision, progress=progress
        )
    if references is not None and (doubt := unit_doubt(result.original, references)):
        log.warning("%s; it was taken for %.4g m", doubt, references.unit)
        result.add_reason(doubt)
    if seen is None:
        return result
    parts = {key: getattr(result, key) for key in ("original", "adapted", "final", "blended")}
    placed = {id(part): seen.back(part) for part in parts.values() if part is not None}  # one may be several parts
    carried = {key: placed.get(id(part)) for key, part in parts.items()}
    return replace(result, image=image.to(model.device), **carried)
