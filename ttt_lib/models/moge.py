"""MoGe-1 and MoGe-2 behind the interface of `base.py`, and the bundled small model, which is MoGe-2 with another encoder."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from moge.utils.geometry_torch import recover_focal_shift
from torch import Tensor, nn
from torch.nn import functional as F

from ttt_lib.core.errors import ModelError
from ttt_lib.core.registry import MODELS
from ttt_lib.core.types import Kind, Prediction
from ttt_lib.models.base import GeometryModel
from ttt_lib.models.moge_checkpoint import HUB_NAMES, download_checkpoint, load_network
from ttt_lib.models.moge_layers import as_published, lighten
from ttt_lib.models.tiny import TinyMoGe

# The bundled model was trained with neither; what is measured of it, and its gate, is with the study's.
OWN_LOSSES = {"moge.model.v1": "moge1", "moge.model.v2": "moge2"}
ASSETS = Path(__file__).parents[1] / "assets"
TINY_TOKENS = 192  # the bundled model was trained at no more, and is far worse at the most of its range


class MoGe(GeometryModel):
    """A MoGe network. num_tokens: None for the most of the network's range, MoGe's default.

    It predicts the camera itself, unless `fov_x` is known: then by that, and on views by their intrinsics, the shift of
    the points is recovered, and depth follows.
    """

    def __init__(
        self, network: nn.Module, name: str, kind: Kind, num_tokens: int | None = None, autocast: str = "none"
    ) -> None:
        super().__init__(network, name, kind, num_tokens or int(network.num_tokens_range[1]), autocast)
        self.losses = OWN_LOSSES.get(type(network).__module__, self.losses)

    def forward(self, images: Tensor, intrinsics: Tensor | None = None) -> dict[str, Tensor]:
        """See `GeometryModel.forward`: `points`, and `mask`, `normal`, `metric_scale` where the network has them."""
        with self.mixed():
            output = self.network(images, num_tokens=self.num_tokens)
        return {key: value.float() for key, value in output.items() if isinstance(value, Tensor)}

    @contextmanager
    def without(self, outputs: tuple[str, ...]) -> Iterator[None]:
        """Inside, `forward` does not compute these outputs, where the network has a head of their own for them.

        MoGe-2 runs the heads it finds, so those of `normal` and `mask` are hidden from it.
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
        """As `network.infer(..., apply_mask=False, use_fp16=False)`; depth of metric models in metres."""
        with warnings.catch_warnings():
            # MoGe asks for a float32 autocast, which a CPU does not have and does not need.
            warnings.filterwarnings("ignore", message="In CPU autocast")
            try:
                fov_x = self._known_fov(intrinsics)
                output = self.network.infer(
                    images, num_tokens=self.num_tokens, apply_mask=False, use_fp16=False, fov_x=fov_x
                )
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

    def _known_fov(self, intrinsics: Tensor | None) -> float | Tensor | None:
        """In degrees, of the pictures or (B,) of views with these intrinsics; None where the camera is not known."""
        if self.fov_x is None or intrinsics is None:
            return self.fov_x
        return 2 * torch.rad2deg(torch.atan(0.5 / intrinsics[..., 0, 0]))

    def metric_depth(self, output: dict[str, Tensor], images: Tensor) -> Tensor:
        """The z-shift is recovered as `infer` does it, and taken as given."""
        if output.get("metric_scale") is None:
            return super().metric_depth(output, images)
        points, mask = output["points"], output.get("mask")
        focal = None
        if self.fov_x is not None:  # MoGe's unit is half the diagonal
            aspect = images.shape[-1] / images.shape[-2]
            focal = aspect / (1 + aspect**2) ** 0.5 / math.tan(math.radians(self.fov_x / 2))
            focal = torch.full((len(points),), focal, device=points.device)
        _, shift = recover_focal_shift(points.detach(), None if mask is None else mask > 0.5, focal=focal)
        return (points[..., 2] + shift[:, None, None]) * output["metric_scale"].reshape(-1, 1, 1)

    def features(self, images: Tensor) -> Tensor:
        """The encoder's patches on the token grid that `num_tokens` gives an image of this shape."""
        height, width = images.shape[-2:]
        rows = max(1, round((self.num_tokens * height / width) ** 0.5))
        columns = max(1, round((self.num_tokens * width / height) ** 0.5))
        with self.mixed():
            if isinstance(getattr(self.network, "encoder", None), nn.Module):
                found = self.network.encoder(images, rows, columns)
            else:  # MoGe-1 keeps its encoder in `backbone`
                sized = F.interpolate(images, (rows * 14, columns * 14), mode="bilinear", antialias=True)
                sized = (sized - self.network.image_mean) / self.network.image_std
                return self.network.backbone.get_intermediate_layers(sized, n=1)[0].float()
        return found.flatten(2).mT.float()

    def as_published(self) -> MoGe:
        """With MoGe's own layers. Before `save_memory`."""
        as_published(self.network)
        return self

    def save_memory(self) -> None:
        """MoGe-2 recomputes its encoder; MoGe-1 always does so in its head, and nothing is left to do."""
        if hasattr(self.network, "neck"):
            self.network.enable_gradient_checkpointing()


def _build(path: Path, name: str, device: torch.device, num_tokens: int | None, autocast: str) -> MoGe:
    network = load_network(path, name).to(device).requires_grad_(False)
    if isinstance(network, TinyMoGe) and device.type == "cpu":
        # Its convolutions take a third less time so. Lighter layers gain it nothing more (whole adaptations in turns), and
        # would change the last bits of everything that was measured with it.
        network.to(memory_format=torch.channels_last)
    else:
        lighten(network)
    kind: Kind = "metric" if hasattr(network, "scale_head") else "scale_invariant"
    return MoGe(network, name, kind, num_tokens, autocast)


def _is_checkpoint(name: str) -> bool:
    """A file or folder that is there, or what looks like a hub's `owner/name`."""
    hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and Path(name).suffix not in (".pt", ".pth")
    return hub or os.path.exists(os.path.expanduser(name))  # `os.path` also answers for names that no file system takes


@MODELS.register("moge", matches=_is_checkpoint, listed=HUB_NAMES)
def load_moge(name: str, device: torch.device, num_tokens: int | None, autocast: str, fov_x: float | None) -> MoGe:
    """A checkpoint of MoGe: a file, a folder that holds `model.pt`, or a name of the hub."""
    if "moge-3" in name.lower():
        raise ModelError(f"model {name!r}: the installed moge has no MoGe-3; use a MoGe-2 such as {HUB_NAMES[-1]!r}.")
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        path = path / "model.pt"
        if not path.is_file():
            raise ModelError(
                f"model {name!r}: the folder holds neither config.json (transformers) nor model.pt (MoGe)."
            )
    elif not os.path.isfile(path):
        path = download_checkpoint(name)
    return _build(path, name, device, num_tokens, autocast)


@MODELS.register("tiny", matches=lambda name: name == "tiny", listed=("tiny",))
def load_tiny(name: str, device: torch.device, num_tokens: int | None, autocast: str, fov_x: float | None) -> MoGe:
    """The bundled small model, which needs no network."""
    model = _build(ASSETS / "tiny.pt", name, device, num_tokens or TINY_TOKENS, autocast)
    model.focal_deviation = 0.44  # of the logarithm, of 28 stereo pairs: `assets/tiny.md`; 0.17 of tours
    return model
