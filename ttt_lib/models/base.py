"""One small interface over geometry models: predict, run with gradients, choose what trains, undo.

`moge.py` and `transformers_models.py` are its families, and a user's own is another one; this file knows none of them.
"""

from __future__ import annotations

import fnmatch
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ttt_lib.core.errors import NotSupported, UserError
from ttt_lib.core.types import Kind, Prediction
from ttt_lib.data.known_distances import References

PARTS = ("encoder", "neck", "heads", "norms")
NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation of every dimension
    nn.RMSNorm,
)


class GeometryModel(ABC):
    """A network as the loop needs it. A family says `forward` and `predict`, and what else it can do.

    network: the `nn.Module`, in evaluation mode; name: as it was loaded; kind: what `predict` gives; output: what
    `forward` gives, `points`, `depth` or `disparity`; num_tokens: base tokens a forward pass (None: the family's own
    rule); autocast: `none`, or `bfloat16` for mixed precision of the network in `forward`; part_of: which part the
    network's modules are, by the first name or the first two, those that it does not name being heads; losses: the set
    of terms that is its own (`adaptation/losses/presets.py`); fov_x: the horizontal field of view in degrees where it is
    known; known_references: known distances of the picture at hand (both: `knowing`); focal_deviation: of the logarithm
    of the focal length that it predicts for photographs, where that is known to be poor; canonical_focal: see
    `load.load_model`, for families whose metric depth is right for one camera only (`of_one_camera`).
    """

    output: Literal["points", "depth", "disparity"] = "points"
    losses: str = "study"
    part_of: ClassVar[dict[str, str]] = {"encoder": "encoder", "backbone": "encoder", "neck": "neck"}
    fov_x: float | None = None
    focal_deviation: float = 0.0
    known_references: References | None = None
    canonical_focal: float | None = None
    of_one_camera: ClassVar[bool] = False

    def __init__(
        self, network: nn.Module, name: str, kind: Kind, num_tokens: int | None = None, autocast: str = "none"
    ) -> None:
        self.network, self.name, self.kind, self.autocast = network.eval(), name, kind, autocast
        self.num_tokens = num_tokens

    @abstractmethod
    def forward(self, images: Tensor, intrinsics: Tensor | None = None) -> dict[str, Tensor]:
        """Raw outputs with gradients, float32, at the size of images (B,3,H,W) in [0,1].

        Args:
            images: (B,3,H,W) in [0,1].
            intrinsics: (B,3,3) normalised, of the images; for models that predict no camera.

        Returns:
            What `output` names: `points` (B,H,W,3) up to scale and z-shift, `depth` (B,H,W) in metres with `points`, or
            `disparity` (B,H,W) up to scale and shift; where the network has them also `mask` (B,H,W) in [0,1], `normal`
            (B,H,W,3), `metric_scale` (B,).
        """

    @abstractmethod
    def predict(self, images: Tensor, intrinsics: Tensor | None = None) -> Prediction:
        """Prediction without gradients, float32 whatever `autocast` is: targets and results are not rounded.

        Args:
            images: (3,H,W) or (B,3,H,W) in [0,1]; the fields of the result have the same leading dimensions.
            intrinsics: (3,3) or (B,3,3); for models that predict no camera.

        Raises:
            FloatingPointError: the network's output is not finite.
        """

    def metric_depth(self, output: dict[str, Tensor], images: Tensor) -> Tensor:
        """Depth in metres with gradients, (B,H,W), from what `forward` gave for `images` (B,3,H,W).

        Raises `NotSupported` for models without metric scale.
        """
        if "depth" in output:
            return output["depth"]
        raise NotSupported(f"{self.name} predicts no metric depth, which the loss metric_reference needs.")

    def features(self, images: Tensor) -> Tensor:
        """What the encoder hands on for images (B,3,H,W), with gradients: one vector a patch, (B,N,C) float32.

        Raises `NotSupported` for a family that does not say; signals of the gate that need it are then left out.
        """
        raise NotSupported(f"{self.name}: this model gives no features; leave out the loss feature.")

    def as_published(self) -> GeometryModel:
        """Itself, from now on computing as the authors' code does, where the family else computes the same with less."""
        return self

    def save_memory(self) -> None:
        """Keep fewer activations for the backward pass and compute them again (gradient checkpointing).

        Raises `NotSupported` for a family that cannot.
        """
        raise NotSupported(f"model.checkpointing: not for {self.name}; lower train.micro_batch instead.")

    @contextmanager
    def without(self, outputs: tuple[str, ...]) -> Iterator[None]:
        """Inside, `forward` need not compute these outputs. Nothing else may change by it, to the last bit."""
        yield

    @contextmanager
    def knowing(self, fov_x: float | None = None, references: References | None = None) -> Iterator[None]:
        """Inside, what is said here counts as known of the picture; None leaves what was known before."""
        before = self.fov_x, self.known_references
        try:
            self.fov_x = fov_x if fov_x is not None else self.fov_x
            self.known_references = references if references is not None else self.known_references
            yield
        finally:
            self.fov_x, self.known_references = before

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def mixed(self) -> torch.autocast:
        """The precision of `forward`, as `autocast` says."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast == "bfloat16")

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters of each part. `norms` (affine parameters of all normalisations, and the
        scales of a ViT's residual branches, LayerScale) overlaps the others.

        Every parameter is in exactly one of encoder, neck and heads; a part that a network lacks is empty.
        """
        norms = {
            f"{path}.{name}" if path else name
            for path, module in self.network.named_modules()
            if isinstance(module, NORMS) or type(module).__name__.endswith("LayerScale")
            for name, _ in module.named_parameters(recurse=False)
        }
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
        for name, parameter in self.network.named_parameters():
            first, second = [*name.split("."), ""][:2]
            part = self.part_of.get(f"{first}.{second}") or self.part_of.get(first, "heads")
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
    named = list(model.network.named_parameters())
    every = [name for name, _ in named]
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
    for name, parameter in named:
        parameter.requires_grad_(name in wanted)
    return [(name, parameter) for name, parameter in named if name in wanted]


def snapshot(model: GeometryModel, parameters: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Copies of the given parameters and of all buffers, by name."""
    return {name: tensor.detach().clone() for name, tensor in [*parameters, *model.network.named_buffers()]}


def restore(model: GeometryModel, before: dict[str, Tensor]) -> None:
    """Put every tensor of a `snapshot` back bit by bit, drop gradients, and freeze everything."""
    current = dict(model.network.named_parameters()) | dict(model.network.named_buffers())
    with torch.no_grad():
        for name, value in before.items():
            current[name].copy_(value)
    for parameter in model.network.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)


@contextmanager
def training(model: GeometryModel, parts: list[str]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Inside, the parameters that `parts` name (`select_parameters`) may be trained; then every weight, buffer and
    `requires_grad` is as before, whatever happened."""
    required = {name: parameter.requires_grad for name, parameter in model.network.named_parameters()}
    named = select_parameters(model, parts)
    before = snapshot(model, named)
    try:
        yield named
    finally:
        restore(model, before)
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad_(required[name])


@contextmanager
def holding(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Inside, the parameters hold these values, without gradients to them; then their own."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own):
            parameter.data = value


def weights_checksum(model: GeometryModel) -> str:
    """SHA-256 over names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    # Buffers are named on top, since those that are not stored in checkpoints are missing from the state.
    tensors = {**model.network.state_dict(), **dict(model.network.named_buffers())}
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
