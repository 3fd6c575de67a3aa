"""The photometric signal of the gate: what the predicted geometry says of a view from another camera."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.core.types import Prediction
from ttt_lib.geometry.cameras import project, transform_points, unproject
from ttt_lib.models.base import GeometryModel
from ttt_lib.views.draw import sample_cameras
from ttt_lib.views.mesh import build_mesh
from ttt_lib.views.torch_backend import rasterise


def reprojection_errors(
    model: GeometryModel, image: Tensor, original: Prediction, weights: list, severity: int, generator: torch.Generator
) -> list[float]:
    """Photometric error through the geometry that each set of weights predicts in a view from another camera.

    `original` is the prediction on `image` (3,H,W); its scene is drawn from a moved camera. Each network (a context of
    `weights`) predicts that picture's depth, brought to the drawn one by its median ratio; its points, moved to the first
    camera, say where in the image each pixel's colour should be found. Mean absolute difference over the pixels that the
    mask calls known.
    """
    surface = original.mask & torch.isfinite(original.points).all(-1) & (original.depth > 0)
    if not bool(surface.any()):
        return [math.nan] * len(weights)
    mesh = build_mesh(image, original.points, surface, original.intrinsics)
    transform = sample_cameras(original.depth[surface].median(), severity, 1, generator).to(image.device)
    lens = original.intrinsics[None]
    colours, drawn, mask = rasterise(mesh, transform, lens, tuple(image.shape[-2:]))
    errors = []
    for context in weights:
        with context():
            depth = model.predict(colours, lens).depth[0]
        known = mask[0] & (depth > 0) & torch.isfinite(depth)
        if not bool(known.any()):
            errors.append(math.nan)
            continue
        depth = depth * (drawn[0] / depth)[known].median()
        back = transform_points(unproject(depth, original.intrinsics), torch.linalg.inv(transform[0])[None])
        grid = 2 * project(back, original.intrinsics) - 1
        found = F.grid_sample(image[None], grid[None], align_corners=False)[0]
        known &= (grid.abs() < 1).all(-1) & (back[..., 2] > 0)
        errors.append(float((found - colours[0]).abs().mean(0)[known].mean()))
    return errors
