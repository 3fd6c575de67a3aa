"""Test-time augmentation: the mean of predictions on views, without any training."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.ensemble import predict_on_views
from ttt_lib.adaptation.teacher import draw_views, make_renderer
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.types import Prediction
from ttt_lib.geometry.cameras import unproject
from ttt_lib.models.base import GeometryModel


def average_views(
    model: GeometryModel, image: Tensor, original: Prediction, config: ExperimentConfig, generator: torch.Generator
) -> Prediction:
    """Test-time augmentation: the mean of the predictions on the views, carried back to the image.

    As many views as training would see. Each view's prediction is scaled to the original by its median ratio, since
    a view's own scale is the least certain part; pixels a view does not show do not count. No weights change.
    """
    target = model.predict(image)
    renderer = make_renderer(config, image.device)
    total = target.points.clone()
    count = torch.ones(image.shape[-2:], device=image.device)
    for _ in range(config.train.passes):
        view = draw_views(image, target, config, generator, renderer)
        points, seen = predict_on_views(model, view, target)
        ratio = torch.where(seen, target.points[..., 2] / points[..., 2], torch.nan)
        scale = ratio.flatten(1).nanmedian(dim=1).values.nan_to_num(1.0)
        total += torch.where(seen[..., None], points * scale[:, None, None, None], 0.0).sum(0)
        count += seen.sum(0)
    depth = (total / count[..., None])[..., 2]
    # Where there is no surface there is no mean of it either.
    ratio = torch.where(target.depth > 0, depth / target.depth, 1.0)
    if ratio.shape != original.depth.shape:
        ratio = F.interpolate(ratio[None, None], original.depth.shape, mode="bilinear")[0, 0]
    depth = original.depth * ratio
    disparity = None if original.disparity is None else 1 / depth.clamp_min(1e-6)
    return replace(original, depth=depth, points=unproject(depth, original.intrinsics), disparity=disparity)
