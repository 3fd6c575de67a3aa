"""Averages of predictions: of the same image seen differently, and of its augmented views."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ttt_lib.alignment import align_affine_lstsq
from ttt_lib.geometry import unproject
from ttt_lib.models import GeometryModel, Prediction

FINER, COARSER = 4 / 3, 3 / 4  # of the tokens


@contextmanager
def _tokens(model: GeometryModel, factor: float) -> Iterator[None]:
    own = model.num_tokens
    model.num_tokens = round(own * factor) if own else own
    try:
        yield
    finally:
        model.num_tokens = own


def predict_mirrored(model: GeometryModel, image: Tensor, intrinsics: Tensor | None = None) -> Prediction:
    """The prediction on the mirrored image (3,H,W), mirrored back: columns flipped, x negated. `intrinsics` (3,3)."""
    flipped = intrinsics
    if intrinsics is not None:
        flipped = intrinsics.clone()
        flipped[0, 2] = 1 - flipped[0, 2]
    found = model.predict(image.flip(-1), flipped)

    def back(map_: Tensor | None, axis: int) -> Tensor | None:
        return None if map_ is None else map_.flip(axis)

    x_sign = torch.tensor([-1.0, 1.0, 1.0], device=image.device)
    camera = None if found.intrinsics is None else found.intrinsics.clone()
    if camera is not None:
        camera[0, 2] = 1 - camera[0, 2]
    return replace(
        found,
        points=None if found.points is None else found.points.flip(-2) * x_sign,
        depth=back(found.depth, -1),
        mask=back(found.mask, -1),
        normal=None if found.normal is None else found.normal.flip(-2) * x_sign,
        disparity=back(found.disparity, -1),
        intrinsics=camera,
    )


def _stretched(image: Tensor) -> Tensor:
    """Contrast stretched so that 1 and 99 % of the values are black and white, (3,H,W)."""
    low, high = torch.quantile(
        image.flatten()[:: max(1, image.numel() // 100_000)], torch.tensor([0.01, 0.99]).to(image)
    )
    return ((image - low) / (high - low).clamp_min(0.05)).clamp(0, 1)


def fitted_disparity(disparity: Tensor, reference: Tensor) -> Tensor:
    """a * disparity + b nearest to `reference` in least squares; maps (H,W)."""
    scale, shift = align_affine_lstsq(disparity.flatten().double(), reference.flatten().double())
    return (scale * disparity + shift).to(disparity)


def mean_prediction(first: Prediction, others: list[Prediction]) -> Prediction:
    """Mean of log depth, each after its median ratio to `first`, with the camera, mask and scale of `first`.

    For models of disparity the mean of the disparities, each fitted to the first by least squares. Fields have no
    batch dimension.
    """
    depth = first.depth
    if others:
        logs = [first.depth.clamp_min(1e-6).log()]
        for other in others:
            difference = other.depth.clamp_min(1e-6).log() - logs[0]
            usable = torch.isfinite(difference) & first.mask
            offset = difference[usable].median() if bool(usable.any()) else torch.zeros((), device=depth.device)
            logs.append(torch.where(torch.isfinite(difference), logs[0] + difference - offset, logs[0]))
        depth = torch.stack(logs).mean(0).exp()
    disparity = first.disparity
    if disparity is not None and others:
        disparity = torch.stack([disparity, *(fitted_disparity(other.disparity, disparity) for other in others)]).mean(
            0
        )
    return replace(first, depth=depth, points=unproject(depth, first.intrinsics), disparity=disparity)


def predict_ensemble(model: GeometryModel, image: Tensor, members: list[str]) -> Prediction:
    """The mean of the plain prediction on `image` (3,H,W) and those that `members` names (`config.EnsembleConfig`)."""
    first = model.predict(image)
    found = []
    for member in members:
        if member == "mirror":
            found.append(predict_mirrored(model, image))
        elif member == "autocontrast":
            found.append(model.predict(_stretched(image)))
        else:
            predict = predict_mirrored if member == "finer_mirror" else type(model).predict
            with _tokens(model, COARSER if member == "coarser" else FINER):
                found.append(predict(model, image))
    return mean_prediction(first, found) if found else first
