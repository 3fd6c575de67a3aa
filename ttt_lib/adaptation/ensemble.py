"""Predictions of the same image, seen differently, and their averages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.types import Prediction
from ttt_lib.geometry.cameras import mirror_intrinsics, mirror_points, unproject
from ttt_lib.geometry.exact_alignment import align_affine_lstsq
from ttt_lib.geometry.warp import in_front
from ttt_lib.models.base import GeometryModel
from ttt_lib.views.carry import View, carry_back

RESOLUTIONS = {"finer": 4 / 3, "coarser": 3 / 4}  # of the tokens


def predict_mirrored(model: GeometryModel, image: Tensor) -> Prediction:
    """The prediction on the mirrored image (3,H,W), mirrored back: columns flipped, x negated."""
    known = model.known_references
    with model.knowing(references=None if known is None else known.mirrored()):
        found = model.predict(image.flip(-1))
    return replace(
        found,
        points=mirror_points(found.points),
        depth=found.depth.flip(-1),
        mask=found.mask.flip(-1),
        normal=None if found.normal is None else mirror_points(found.normal),
        disparity=None if found.disparity is None else found.disparity.flip(-1),
        intrinsics=mirror_intrinsics(found.intrinsics),
    )


def with_depth(prediction: Prediction, depth: Tensor, disparity: Tensor | None) -> Prediction:
    """The prediction with this depth (H,W), and the points behind it in its camera."""
    return replace(prediction, depth=depth, points=unproject(depth, prediction.intrinsics), disparity=disparity)


def fitted_disparity(disparity: Tensor, reference: Tensor) -> Tensor:
    """a * disparity + b nearest to `reference` in least squares; maps (H,W)."""
    scale, shift = align_affine_lstsq(disparity.flatten().double(), reference.flatten().double())
    return (scale * disparity + shift).to(disparity)


def log_difference(depth: Tensor, reference: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """log depth - log reference (...,H,W), and its median over the known finite pixels (...), 0 where none is.

    The median is the offset by which the logarithm of one map is brought to that of the other: a scale of the depth.
    """
    difference = depth.clamp_min(1e-6).log() - reference.clamp_min(1e-6).log()
    usable = torch.where(known & torch.isfinite(difference), difference, torch.nan)
    return difference, usable.flatten(-2).nanmedian(-1).values.nan_to_num(0.0)


def mean_prediction(first: Prediction, others: list[Prediction]) -> Prediction:
    """Mean of log depth, each after its median ratio to `first`, with the camera, mask and scale of `first`.

    For models of disparity the mean of the disparities, each fitted to the first by least squares. Fields have no
    batch dimension. Without others it is the first.
    """
    if not others:
        return first
    logs = [first.depth.clamp_min(1e-6).log()]
    for other in others:
        difference, offset = log_difference(other.depth, first.depth, first.mask)
        logs.append(torch.where(torch.isfinite(difference), logs[0] + difference - offset, logs[0]))
    depth, disparity = torch.stack(logs).mean(0).exp(), first.disparity
    if disparity is not None:
        fitted = [fitted_disparity(other.disparity, disparity) for other in others]
        disparity = torch.stack([disparity, *fitted]).mean(0)
    return with_depth(first, depth, disparity)


def predict_on_views(model: GeometryModel, view: View, target: Prediction) -> tuple[Tensor, Tensor]:
    """Predict on views of the image that `target` is of, and carry the points back: (B,H,W,3), and where a view shows
    them in front of the camera, (B,H,W) bool."""
    predicted = model.predict(view.image, view.intrinsics)
    points, seen = carry_back(view, predicted.points, target.points, target.intrinsics)
    return points, seen & in_front(points)


def predict_member(model: GeometryModel, image: Tensor, member: str) -> Prediction:
    """One of the predictions that `core.schema.EnsembleConfig` names, on `image` (3,H,W), as a prediction of that image."""
    predict = predict_mirrored if member.endswith("mirror") else type(model).predict
    own, factor = model.num_tokens, RESOLUTIONS.get(member.removesuffix("_mirror"), 1.0)
    model.num_tokens = round(own * factor) if own else own  # of a model that counts tokens
    try:
        return predict(model, image)
    finally:
        model.num_tokens = own


def predict_ensemble(model: GeometryModel, image: Tensor, members: Sequence[str]) -> Prediction:
    """The mean of the plain prediction on `image` (3,H,W) and those that `members` names (`core.schema.EnsembleConfig`)."""
    first = model.predict(image)
    return mean_prediction(first, [predict_member(model, image, member) for member in members])


def predict_adapted(model: GeometryModel, image: Tensor, config: ExperimentConfig) -> Prediction:
    """The adapted prediction on `image` (3,H,W): the mean over the members, where the experiment asks for one in the end."""
    return predict_ensemble(model, image, config.ensemble.members if config.ensemble.final else [])
