"""One small interface over geometry models: load, predict, run with gradients, choose what trains, undo.

MoGe-1 and MoGe-2 come through `moge`; the bundled small model is MoGe-2 with another encoder (`tiny.py`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import pickle
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttt_lib.errors import UserError

ASSETS = Path(__file__).parent / "assets"
PARTS = ("encoder", "neck", "heads", "norms")
HUB_NAMES = (
    "Ruicheng/moge-vitl",
    "Ruicheng/moge-2-vitl",
    "Ruicheng/moge-2-vitl-normal",
    "Ruicheng/moge-2-vitb-normal",
    "Ruicheng/moge-2-vits-normal",
)
Kind = Literal["metric", "scale_invariant", "affine_invariant", "disparity"]


def hide_broken_torchvision() -> None:
    """Make a torchvision that cannot be imported count as absent.

    PyPI's torchvision is built for CUDA; beside a CPU build of torch its import fails. MoGe never imports it, but
    transformers does when it finds it. `None` in `sys.modules` makes every later import fail as for a missing
    package, and `find_spec` raise, which transformers reads as "not installed".
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]


hide_broken_torchvision()


@dataclass
class Prediction:
    """What a model says of an image (or of B images: all fields with a leading B).

    points (H,W,3) in the camera's frame and depth (H,W), not masked: also where `mask` (H,W) bool says that there is
    no surface; intrinsics (3,3) normalised; normal (H,W,3) or None; disparity (H,W) for models that predict it up to
    scale and shift, else None. kind: `metric` (metres), `scale_invariant`, `affine_invariant` or `disparity`. note:
    assumptions made, e.g. an assumed field of view.
    """

    points: Tensor | None
    depth: Tensor | None
    mask: Tensor | None
    intrinsics: Tensor | None
    kind: Kind
    normal: Tensor | None = None
    disparity: Tensor | None = None
    note: str = ""


class GeometryModel:
    """A MoGe network with the interface the loop needs.

    network: the `nn.Module`, in evaluation mode; name: as it was loaded; kind: what `predict` gives; num_tokens: base
    tokens a forward pass (None: the most of the network's range).
    """

    def __init__(
        self, network: nn.Module, name: str, kind: Kind, num_tokens: int | None = None, autocast: str = "none"
    ) -> None:
        self.network, self.name, self.kind, self.autocast = network.eval(), name, kind, autocast
        low, high = network.num_tokens_range
        self.num_tokens = num_tokens or int(high)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def _mixed(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast == "bfloat16")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs with gradients, float32.

        images (B,3,H,W) in [0,1] -> `points` (B,H,W,3) up to scale and z-shift, and where the network has them `mask`
        (B,H,W) in [0,1], `normal` (B,H,W,3), `metric_scale` (B,).
        """
        with self._mixed():
            output = self.network(images, num_tokens=self.num_tokens)
        return {key: value.float() for key, value in output.items() if isinstance(value, Tensor)}

    def predict(self, images: Tensor) -> Prediction:
        """Camera-space prediction without gradients, as `network.infer(..., apply_mask=False, use_fp16=False)`.

        images (3,H,W) or (B,3,H,W) in [0,1]; the fields of the result have the same leading dimensions. For metric
        models depth is in metres. The network runs in float32 here: MoGe's `infer` switches an outer autocast off.
        """
        with self._mixed(), warnings.catch_warnings():
            # MoGe asks for a float32 autocast, which a CPU does not have and does not need.
            warnings.filterwarnings("ignore", message="In CPU autocast")
            output = self.network.infer(images, num_tokens=self.num_tokens, apply_mask=False, use_fp16=False)
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

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters of each part. `norms` (affine parameters of all normalisations) overlaps the others.

        MoGe-1 has no neck: that part is empty there.
        """
        norm_types = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.InstanceNorm2d)
        norms = {
            f"{path}.{name}" if path else name
            for path, module in self.network.named_modules()
            if isinstance(module, norm_types)
            for name, _ in module.named_parameters(recurse=False)
        }
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
        for name, parameter in self.network.named_parameters():
            top = name.split(".")[0]
            groups["encoder" if top in ("encoder", "backbone") else "neck" if top == "neck" else "heads"].append(
                (name, parameter)
            )
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
            raise UserError(
                f"train.parts: {part!r} names no parameter of {model.name}; use "
                f"{', '.join(p for p in PARTS if groups[p])}, or a pattern over names such as {every[0]!r}."
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
    for name, value in sorted(model.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ loading


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
        return chosen
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device: {device!r} cannot be used here ({str(error).splitlines()[0]}).") from error


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    elsewhere = (
        f"download `model.pt` of https://huggingface.co/{name} on a machine with access and pass its path as the model"
    )
    try:
        return Path(hf_hub_download(repo_id=name, repo_type="model", filename="model.pt", etag_timeout=10))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model {name!r}: the hub has no such repository; known names: {', '.join(HUB_NAMES)}."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"model {name!r}: the hub cannot be reached and no copy is cached; {elsewhere}.") from error
    except Exception as error:  # the hub client's other failures all mean: not to be had from here
        raise UserError(f"model {name!r}: the download failed ({type(error).__name__}); {elsewhere}.") from error


def _read_checkpoint(path: Path, name: str) -> dict[str, Any]:
    advice = "a model is the `model.pt` of a MoGe repository, or a file written by this package"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"model {name!r}: {path} is not a readable checkpoint (truncated, or another kind of file); {advice}."
        ) from error
    if not isinstance(checkpoint, dict) or not {"model", "model_config"} <= checkpoint.keys():
        raise UserError(f"model {name!r}: {path} holds no `model_config` and `model`; {advice}.")
    return checkpoint


def _build(checkpoint: dict[str, Any], path: Path, name: str) -> tuple[nn.Module, Kind]:
    config, weights = checkpoint["model_config"], checkpoint["model"]
    try:
        if config.get("architecture") == "tiny":
            from ttt_lib.tiny import TinyMoGe as Network
        elif "neck" in config:
            from moge.model.v2 import MoGeModel as Network
        else:
            from moge.model.v1 import MoGeModel as Network
        network = Network(**config)
        missing = network.load_state_dict(weights, strict=False).missing_keys
    except (TypeError, KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"model {name!r}: {path} is not a MoGe checkpoint ({str(error).splitlines()[0]}).") from error
    if missing:
        raise UserError(f"model {name!r}: {path} lacks {len(missing)} of its weights, first {missing[0]!r}.")
    return network, "metric" if hasattr(network, "scale_head") else "scale_invariant"


def load_model(
    name: str = "tiny", device: str = "auto", num_tokens: int | None = None, autocast: str = "none"
) -> GeometryModel:
    """Load a geometry model.

    name: `tiny` (bundled, offline), a MoGe hub name (`HUB_NAMES`), or the path of a local checkpoint file. device:
    `auto`, `cpu`, `cuda`, `cuda:1`. num_tokens: base tokens (None: the most of the network's range). autocast:
    `bfloat16` for mixed precision in the network.

    Raises `UserError`, one sentence, for a hub that cannot be reached, an unknown name, a wrong or truncated file.
    """
    target = _choose_device(device)
    if name == "tiny":
        path = ASSETS / "tiny.pt"
        if not path.exists():
            raise UserError(f"model 'tiny': {path} is missing; install the package again.")
    elif Path(name).is_file():
        path = Path(name)
    elif name.count("/") == 1 and not Path(name).suffix and not name.startswith((".", "/", "~")):
        path = _download(name)
    else:
        raise UserError(
            f"model {name!r}: neither 'tiny', nor a file that exists, nor a hub name such as {HUB_NAMES[-1]!r}."
        )
    network, kind = _build(_read_checkpoint(path, name), path, name)
    network = network.to(target)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return GeometryModel(network, name, kind, num_tokens, autocast)
