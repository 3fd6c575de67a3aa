"""MoGe-2's ViT-S network without its weights, for measuring time and memory at the published size offline.

The shape is that of the published ViT-S, float for float (35,103,662). Its weights are random but for a short fit to one
slanted plane, so that masks, alignments and losses have something to work on. What it predicts means nothing; what it
costs is what the real network costs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from moge.model.v2 import MoGeModel

from ttt_lib.models.pretraining.train import save_tensors

WIDTHS = [384, 256, 128, 64, 32]
FIT_SIZE, FIT_TOKENS, FIT_RATE = (96, 144), 160, 3e-4


def vits_config() -> dict[str, Any]:
    """Keyword arguments of `moge.model.v2.MoGeModel`: ViT-S encoder, neck, heads of points, normals and mask, scale."""

    def stack(dim_in: list[int], outputs: int | None) -> dict[str, Any]:
        return {
            "dim_in": dim_in, "dim_out": [None, None, None, None, outputs], "dim_res_blocks": WIDTHS,
            "num_res_blocks": [0, 1, 1, 1, 0], "res_block_in_norm": "none", "res_block_hidden_norm": "none",
            "resamplers": ["conv_transpose", "conv_transpose", "conv_transpose", "bilinear"],
        }  # fmt: skip

    return {
        "encoder": {"backbone": "dinov2_vits14", "intermediate_layers": [5, 11], "dim_out": WIDTHS[0]},
        "neck": stack([WIDTHS[0] + 2, 2, 2, 2, 2], None),
        "points_head": stack(WIDTHS, 3),
        "normal_head": stack(WIDTHS, 3),
        "mask_head": stack(WIDTHS, 1),
        "scale_head": {"dims": [384, 384, 384, 1]},
        "remap_output": "exp",
        "num_tokens_range": [1200, 3600],
    }


def write_stand_in(path: Path, steps: int = 120, device: str = "cpu") -> None:
    """Write a checkpoint as MoGe's are, which `load_model` takes; about a minute on two CPU cores.

    steps: of the fit to the plane, on a picture of noise.
    device: where it is fitted; the weights depend on it, what they cost does not.
    """
    torch.manual_seed(0)
    config = vits_config()
    network = MoGeModel(**config).to(device)
    height, width = FIT_SIZE
    v, u = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    depth = 3 + 0.8 * u - v
    plane = torch.stack([0.8 * u * depth, 0.8 * height / width * v * depth, depth], -1).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=FIT_RATE)
    for _ in range(steps):
        output = network(torch.rand(1, 3, height, width, device=device), num_tokens=FIT_TOKENS)
        loss = (output["points"] - plane).abs().mean() - 0.2 * output["mask"].clamp_min(1e-6).log().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    save_tensors(Path(path), {"model_config": config, "model": network.state_dict()})
