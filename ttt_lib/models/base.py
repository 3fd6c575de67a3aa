"""One small interface over geometry models: load, predict, run with gradients, choose what trains, undo.

MoGe-1 and MoGe-2 come through `moge`; the bundled small model is MoGe-2 with another encoder (`tiny.py`); Depth
Anything, ZoeDepth and DPT/MiDaS come through transformers (`transformers_models.py`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from moge.utils.geometry_torch import recover_focal_shift
from torch import Tensor, nn
from torch.nn import functional as F

from ttt_lib.core.errors import NotSupported, UserError
from ttt_lib.core.types import Kind, Prediction

PARTS = ("encoder", "neck", "heads", "norms")
NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation of every dimension
    nn.RMSNorm,
)


class GeometryModel:
    """A MoGe network with the interface the loop needs; other families derive from it.

    network: the `nn.Module`, in evaluation mode; name: as it was loaded; kind: what `predict` gives; output: what
    `forward` gives, `points`, `depth` or `disparity`; num_tokens: base tokens a forward pass (None: the most of the
    network's range, MoGe's default); autocast: `none`, or `bfloat16` for mixed precision of the network in `forward`.
    """

    output: Literal["points", "depth", "disparity"] = "points"

    def __init__(
        self, network: nn.Module, name: str, kind: Kind, num_tokens: int | None = None, autocast: str = "none"
    ) -> None:
        self.network, self.name, self.kind, self.autocast = network.eval(), name, kind, autocast
        token_range = getattr(network, "num_tokens_range", None)
        self.num_tokens = num_tokens or (int(token_range[1]) if token_range else None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def _mixed(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast == "bfloat16")

    def forward(self, images: Tensor, intrinsics: Tensor | None = None) -> dict[str, Tensor]:
        """Raw outputs with gradients, float32.

        images (B,3,H,W) in [0,1] -> `points` (B,H,W,3) up to scale and z-shift, and where the network has them `mask`
        (B,H,W) in [0,1], `normal` (B,H,W,3), `metric_scale` (B,). intrinsics (B,3,3) of the images: for models that
        predict no camera; MoGe has no use for them.
        """
        with self._mixed():
            output = self.network(images, num_tokens=self.num_tokens)
        return {key: value.float() for key, value in output.items() if isinstance(value, Tensor)}

    @contextmanager
    def without(self, outputs: tuple[str, ...]) -> Iterator[None]:
        """Inside, `forward` does not compute these outputs, where the network has a head of their own for them.

        MoGe-2 runs the heads it finds, so those of `normal` and `mask` are hidden from it. Everything else is the same
        to the last bit.
        """
        modules = self.network._modules
        held = dict(modules)
        try:
            for output in outputs:
                modules.pop(f"{output}_head", None)
            yield
        finally:
            modules.clear()
            modules.update(held)  # in their order, which is that of the parameters

    def predict(self, images: Tensor, intrinsics: Tensor | None = None) -> Prediction:
        """Camera-space prediction without gradients, as `network.infer(..., apply_mask=False, use_fp16=False)`.

        images (3,H,W) or (B,3,H,W) in [0,1]; the fields of the result have the same leading dimensions. For metric
        models depth is in metres. The network runs in float32 here, whatever `autocast` is: targets and results are
        not rounded. intrinsics (3,3) or (B,3,3): for models that predict no camera; MoGe has no use for them. Raises
        `FloatingPointError` when the network's output is not finite.
        """
        with warnings.catch_warnings():
            # MoGe asks for a float32 autocast, which a CPU does not have and does not need.
            warnings.filterwarnings("ignore", message="In CPU autocast")
            try:
                output = self.network.infer(images, num_tokens=self.num_tokens, apply_mask=False, use_fp16=False)
            except ValueError as error:  # of scipy, which fits the camera
                if "not finite" not in str(error):
                    raise
                raise FloatingPointError("the network's prediction is not finite") from error
        # Clones leave inference mode, so that a target can take part in training.
        output = {key: value.clone() for key, value in output.items()}
        mask = output.get("mask")
        return Prediction(
            points=output["points"].float(),
            depth=output["depth"].float(),
            mask=mask if mask is not None else torch.isfinite(output["depth"]),
            intrinsics=output["intrinsics"].float(),
            kind=self.kind,
            normal=output.get("normal"),
        )

    def metric_depth(self, output: dict[str, Tensor], images: Tensor) -> Tensor:
        """Depth in metres with gradients, (B,H,W), from what `forward` gave for `images` (B,3,H,W).

        MoGe's z-shift is recovered as `infer` does it, and taken as given. Raises `UserError` for models without metric
        scale.
        """
        if "depth" in output:
            return output["depth"]
        if output.get("metric_scale") is None:
            raise NotSupported(f"{self.name} predicts no metric depth, which the loss metric_reference needs.")
        points, mask = output["points"], output.get("mask")
        _, shift = recover_focal_shift(points.detach(), None if mask is None else mask > 0.5)
        return (points[..., 2] + shift[:, None, None]) * output["metric_scale"].reshape(-1, 1, 1)

    def features(self, images: Tensor) -> Tensor:
        """What the encoder hands on for images (B,3,H,W), with gradients: one vector a patch, (B,N,C) float32.

        Raises `NotSupported` for a network without an encoder that is known here.
        """
        known = {"encoder", "backbone"} & self.network._modules.keys()
        if self.num_tokens is None or not known:
            raise NotSupported(f"{self.name}: this model gives no features; leave out the loss feature.")
        height, width = images.shape[-2:]
        rows = max(1, round((self.num_tokens * height / width) ** 0.5))
        columns = max(1, round((self.num_tokens * width / height) ** 0.5))
        with self._mixed():
            if hasattr(self.network, "encoder") and not isinstance(self.network.encoder, str):
                found = self.network.encoder(images, rows, columns)
            else:  # MoGe-1 keeps its encoder in `backbone`
                sized = F.interpolate(images, (rows * 14, columns * 14), mode="bilinear", antialias=True)
                sized = (sized - self.network.image_mean) / self.network.image_std
                return self.network.backbone.get_intermediate_layers(sized, n=1)[0].float()
        return found.flatten(2).mT.float()

    def save_memory(self) -> None:
        """Keep fewer activations for the backward pass and compute them again (gradient checkpointing).

        Raises `UserError` for models of transformers, whose checkpointing works in training mode only.
        """
        if hasattr(self.network, "gradient_checkpointing_enable"):
            raise NotSupported(f"model.checkpointing: not for {self.name}; lower train.micro_batch instead.")
        if hasattr(self.network, "enable_gradient_checkpointing") and hasattr(self.network, "neck"):
            self.network.enable_gradient_checkpointing()  # MoGe-1 always does so in its head

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters of each part. `norms` (affine parameters of all normalisations) overlaps the others.

        Every parameter is in exactly one of encoder, neck and heads. MoGe-1 has no neck: that part is empty there.
        """
        norms = {
            f"{path}.{name}" if path else name
            for path, module in self.network.named_modules()
            if isinstance(module, NORMS)
            for name, _ in module.named_parameters(recurse=False)
        }
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
        for name, parameter in self.network.named_parameters():
            top = name.split(".")[0]
            part = "encoder" if top in ("encoder", "backbone", "dpt") else "neck" if top == "neck" else "heads"
            groups[part].append((name, parameter))
            if name in norms:
                groups["norms"].append((name, parameter))
        return groups


def select_parameters(model: GeometryModel, parts: list[str]) -> list[tuple[str, nn.Parameter]]:
    """The parameters that `parts` name, in the network's order; exactly these get `requires_grad`.

    An entry is a part (`encoder`, `neck`, `heads`, `norms`) or a pattern over parameter names (`encoder.*.bias`).
    Raises `UserError` for an entry that matches nothing.
    """
    groups = model.parameter_groups()
    every = [name for name, _ in model.network.named_parameters()]
    wanted: set[str] = set()
    for part in parts:
        matched = [name for name, _ in groups[part]] if part in groups else fnmatch.filter(every, part)
        if not matched:
            lacks = f"{model.name} has no {part}" if part in groups else f"{part!r} names no parameter of {model.name}"
            raise UserError(
                f"train.parts: {lacks}; use {', '.join(p for p in PARTS if groups[p])}, or a pattern over names such "
                f"as {every[0]!r} (they begin with {', '.join(sorted({name.split('.')[0] for name in every}))})."
            )
        wanted.update(matched)
    selected = []
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            selected.append((name, parameter))
    return selected


@dataclass
class Snapshot:
    """Copies of the tensors that training may change, by name."""

    tensors: dict[str, Tensor]


def snapshot(model: GeometryModel, parameters: list[tuple[str, nn.Parameter]]) -> Snapshot:
    """Copy the given parameters and all buffers."""
    tensors = {name: parameter.detach().clone() for name, parameter in parameters}
    tensors.update({name: buffer.detach().clone() for name, buffer in model.network.named_buffers()})
    return Snapshot(tensors)


def restore(model: GeometryModel, before: Snapshot) -> None:
    """Put every tensor of the snapshot back bit by bit, drop gradients, and freeze everything."""
    current = dict(model.network.named_parameters()) | dict(model.network.named_buffers())
    with torch.no_grad():
        for name, value in before.tensors.items():
            current[name].copy_(value)
    for parameter in model.network.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)


def weights_checksum(model: GeometryModel) -> str:
    """SHA-256 over names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    # Buffers are named on top, since those that are not stored in checkpoints are missing from the state.
    tensors = {**model.network.state_dict(), **dict(model.network.named_buffers())}
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
