"""What the base model is trained on: a loss against exact geometry."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FAR_LIMIT = 200.0  # metres; what is farther trains the mask but not the depth
EDGE = math.log(1.05)  # a step of log depth from one pixel to the next that is an edge


def geometry_loss(
    output: dict[str, Tensor], depth: Tensor, rays: Tensor, edges: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss on log depth up to a factor, its gradients at four scales, ray directions, mask and metric scale; with `edges`,
    so much of the steps across depth edges.

    The factor is the median ratio (a least-squares one diverges on exponential outputs: one far pixel dominates it).
    depth (B,H,W) metres with inf at the sky; rays (B,H,W,2). Returns the loss and its terms, detached.
    """
    points = output["points"].float()
    known = torch.isfinite(depth) & (depth < FAR_LIMIT)
    weight = known.float() / known.float().mean().clamp_min(1e-3)
    predicted = points[..., 2].clamp_min(1e-6).log()
    truth = torch.where(known, depth, 1.0).log()
    difference = predicted - truth
    with torch.no_grad():
        offset = torch.where(known, difference, torch.nan).flatten(1).nanmedian(dim=1).values.nan_to_num(0.0)
    centred = difference - offset[:, None, None]
    depth_term = (weight * centred.abs()).mean()

    gradient_term = torch.zeros((), device=points.device)
    for scale in (1, 2, 4, 8):
        d, k = centred[:, ::scale, ::scale], known[:, ::scale, ::scale]
        for a, b, ka, kb in (
            (d[:, 1:], d[:, :-1], k[:, 1:], k[:, :-1]),
            (d[:, :, 1:], d[:, :, :-1], k[:, :, 1:], k[:, :, :-1]),
        ):
            gradient_term = gradient_term + ((a - b).abs() * (ka & kb)).sum() / (ka & kb).sum().clamp_min(1)

    edge_term = torch.zeros((), device=points.device)
    for axis in (1, 2) if edges else ():
        step, found = truth.diff(dim=axis), predicted.diff(dim=axis)
        both = known.narrow(axis, 1, step.shape[axis]) & known.narrow(axis, 0, step.shape[axis])
        edge = both & (step.abs() > EDGE)
        edge_term = edge_term + ((found - step).abs() * edge).sum() / edge.sum().clamp_min(1)

    ray_term = (points[..., :2] / points[..., 2:].clamp_min(1e-6) - rays).abs().sum(-1).mean()
    mask_term = F.binary_cross_entropy(output["mask"].float().clamp(1e-5, 1 - 1e-5), torch.isfinite(depth).float())
    has_truth = known.flatten(1).any(1)
    scale_term = ((output["metric_scale"].float().log() + offset).abs() * has_truth).mean()
    terms = {"depth": depth_term, "gradient": gradient_term, "ray": ray_term, "mask": mask_term, "scale": scale_term}
    total = depth_term + 0.5 * gradient_term + ray_term + 0.3 * mask_term + 0.2 * scale_term
    if edges:
        total, terms["edges"] = total + edges * edge_term, edge_term
    return total, {name: term.detach() for name, term in terms.items()}
