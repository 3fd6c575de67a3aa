"""The loss of a batch, and its gradients, in parts that fit the memory."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ttt_lib.adaptation.batches import LossBatch, at
from ttt_lib.adaptation.losses.terms import LossInputs, compute_loss, needs_features, unused_outputs
from ttt_lib.adaptation.student import Student
from ttt_lib.adaptation.supervision import Gradients, TrainingLog, accumulate, add_terms
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.memory import is_out_of_memory
from ttt_lib.models.base import GeometryModel


def forward(model: GeometryModel, images: Tensor, intrinsics: Tensor, config: ExperimentConfig) -> dict[str, Tensor]:
    """The network's outputs for images (B,3,h,w), without heads that no term reads."""
    with model.without(() if config.released.all_heads else unused_outputs(config.losses)):
        return model.forward(images, intrinsics)


def loss_of(
    output: dict[str, Tensor], batch: LossBatch, config: ExperimentConfig, pictures: Tensor | None = None,
    features: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Loss and terms of the rows of some pictures, means over these rows.

    Args:
        output: of `forward` for these pictures, gradients attached.
        batch: the whole of it.
        config: for the terms, their settings, and what of the public release is on.
        pictures: which of the batch's, sorted (None: all).
        features: the student's and the frozen encoder's for the pictures, where a term needs them.
    """
    pictures = torch.arange(len(batch.images)) if pictures is None else pictures
    rows = torch.nonzero(torch.isin(batch.of, pictures))[:, 0]
    chosen, place = at(rows, batch.points), at(torch.searchsorted(pictures, batch.of[rows]), batch.points)
    target = batch.points[chosen]
    return compute_loss(LossInputs(
        output={key: value[place] for key, value in output.items() if isinstance(value, Tensor)},
        target=target,
        known=torch.isfinite(target).all(-1),
        negative=batch.negative[chosen],
        intrinsics=batch.intrinsics[chosen],
        terms=config.losses,
        seeds=batch.seeds[rows].tolist(),
        share=batch.share[chosen],
        features=None if features is None else (features[0][place], features[1][place]),
        cheap=not config.released.full_cost_alignment,
        mask_on_both_sides=config.released.mask_positive_and_negative,
    ))  # fmt: skip


def view_loss(model: GeometryModel, batch: LossBatch, config: ExperimentConfig) -> float:
    """Loss of a pass as training computes it, without gradients and without the features of a frozen encoder; infinite where
    nothing is compared."""
    if not batch.compared:
        return math.inf
    with torch.no_grad():
        pictures = torch.arange(len(batch.images))
        output = forward(model, batch.images, batch.cameras(pictures), config)
        features = (model.features(batch.images),) * 2 if needs_features(config.losses) else None
        loss, _ = loss_of(output, batch, config, features=features)
    return float(loss * len(batch.of) / batch.compared)


def _part_gradients(
    student: Student, batch: LossBatch, pictures: Tensor, config: ExperimentConfig, share: float
) -> tuple[Gradients, dict[str, Tensor]]:
    """Gradients of the loss of some pictures, and its terms, both times their share of the batch."""
    model, images = student.model, batch.images[at(pictures, batch.images)]
    compares = needs_features(config.losses)
    if compares:
        with torch.no_grad(), student.weights(student.original):
            frozen = model.features(images)
    # The backward pass stays inside: with checkpointing it computes forward passes again.
    with student.attached():
        output = forward(model, images, batch.cameras(pictures), config)
        if config.released.write_files:
            write_debug_files(images, output, batch.points)
        features = (model.features(images), frozen) if compares else None
        loss, terms = loss_of(output, batch, config, pictures, features)
        gradients = torch.autograd.grad(loss * share, student.leaves, allow_unused=True)
    terms = {"loss": loss.detach(), **terms}
    return list(gradients), {key: value * share for key, value in terms.items()}


def write_debug_files(images: Tensor, output: dict[str, Tensor], points: Tensor) -> None:
    """What the public release writes in every iteration, into a folder that is gone at once: it costs the same time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "target.npy", points.cpu().numpy())
        for key in {"points", "depth", "disparity"} & output.keys():
            np.save(folder / f"{key}.npy", output[key].detach().float().cpu().numpy())
        for i, image in enumerate(images):
            array = (image.permute(1, 2, 0).cpu().numpy() * 255).astype(np.uint8)
            Image.fromarray(array).save(folder / f"{i}.png")


def pass_gradients(
    student: Student, batch: LossBatch, config: ExperimentConfig, log: TrainingLog
) -> tuple[Gradients, dict[str, Tensor]]:
    """Gradients of the loss of a pass with respect to `student.leaves`, and the terms of the loss (detached).

    For several passes that were joined: of the sum of their losses. The views go through the network in parts of
    `log.micro_batch`, with the result of the whole: every term is a mean over rows. When memory runs out, the part is
    halved and done again. Raises the error when a single view does not fit.
    """
    total: Gradients = [None] * len(student.leaves)
    terms: dict[str, Tensor] = {}
    pictures = batch.of.unique()
    if config.released.first_sample_only and batch.compared:  # the release runs the whole batch, and uses one of it
        pictures = torch.arange(len(batch.images))
    done = 0
    while done < len(pictures):
        part = pictures[done : done + log.micro_batch]
        count = int(torch.isin(batch.of, part).sum())
        # A mean over pictures: the regions of a CutMix, each weighted by its area, add up to one.
        share = count / batch.compared
        gradients, values = [None] * len(student.leaves), {}
        try:
            if count:
                gradients, values = _part_gradients(student, batch, part, config, share)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or log.micro_batch == 1:
                raise
            gradients = None
        if gradients is None:  # here, where the error no longer holds the tensors of the failed part
            log.micro_batch = max(1, min(log.micro_batch, len(part)) // 2)
            torch.cuda.empty_cache()
            continue
        done += len(part)
        accumulate(total, gradients)
        add_terms(terms, values)
    return total, terms
