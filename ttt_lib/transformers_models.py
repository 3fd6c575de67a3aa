"""Depth Anything, ZoeDepth and DPT/MiDaS from transformers behind the interface of `models.GeometryModel`.

The networks are the library's own; what they are fed is made by `preprocessing.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_lib.errors import UserError
from ttt_lib.geometry import intrinsics_from_fov, unproject
from ttt_lib.hub import NotInRepository, download, hub_answers
from ttt_lib.models import GeometryModel, Prediction
from ttt_lib.preprocessing import BICUBIC, BILINEAR, Rules, read_rules, resize_as_pillow, zoedepth_border

ASSUMED_FOV = 60.0  # degrees, horizontal
DEPTH_RATIO = 10.0  # of the farthest to the nearest depth that is made of a disparity
DISPARITY_QUANTILES = (0.02, 0.98)  # what counts as farthest and nearest
FAMILIES = {
    "depth_anything": "DepthAnythingForDepthEstimation",
    "zoedepth": "ZoeDepthForDepthEstimation",
    "dpt": "DPTForDepthEstimation",
}


# ----------------------------------------------------------------------------------------------------- adapters


def depth_from_disparity(disparity: Tensor) -> Tensor:
    """A depth (B,H,W) for making views from a disparity (B,H,W) that is known up to scale and shift only.

    The 2% and 98% quantiles of a picture's disparity become 1 / `DEPTH_RATIO` and 1, values outside are clamped, and
    depth is the inverse: 1 for the nearest, `DEPTH_RATIO` for the farthest; 1 everywhere for a constant disparity.
    """
    flat = disparity.flatten(1)
    if flat.shape[1] > 2**20:  # torch.quantile takes 16 million values at most, and sorts them
        flat = flat[:, :: flat.shape[1] // 2**20]
    far, near = torch.quantile(flat, torch.tensor(DISPARITY_QUANTILES, device=flat.device), dim=1)[..., None, None]
    span = near - far
    nearness = torch.where(span > 0, (disparity - far) / torch.where(span > 0, span, 1.0), 1.0).clamp(0, 1)
    return 1 / (1 / DEPTH_RATIO + (1 - 1 / DEPTH_RATIO) * nearness)


class TransformersModel(GeometryModel):
    """Depth Anything or DPT/MiDaS: disparity up to scale and shift, or metric depth; no camera.

    fov_x: horizontal field of view in degrees, used where no intrinsics are given (None: `ASSUMED_FOV`). notes:
    assumptions that hold for every picture. The parts are the library's: `backbone` (or `dpt`) is the encoder, `neck`,
    and `head`, `relative_head` and `metric_head` are the heads. average_flipped: `predict` averages the network's maps
    of the picture and of its mirror image, which ZoeDepth's post-processing offers and its paper's numbers use.
    """

    average_flipped = False

    def __init__(
        self,
        network: nn.Module,
        name: str,
        metric: bool,
        rules: Rules,
        num_tokens: int | None = None,
        autocast: str = "none",
        fov_x: float | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(network, name, "metric" if metric else "disparity", num_tokens, autocast)
        self.output: Literal["points", "depth", "disparity"] = "depth" if metric else "disparity"
        self.rules, self.fov_x, self.notes = rules, fov_x, notes

    def pixel_values(self, images: Tensor) -> Tensor:
        """The network's input (B,3,H',W') of images (B,3,H,W) in [0,1], by the model's own rules, with gradients."""
        rules = self.rules
        size = rules.processed_size(*images.shape[-2:], self.num_tokens)
        values = images * 255
        if rules.resize or self.num_tokens is not None:
            values = resize_as_pillow(values, size, rules.resample)
        values = self._normalised((values * rules.scale).float())
        if rules.divisor:
            above, left = (-side % rules.divisor // 2 for side in size)
            below, right = (-side % rules.divisor - -side % rules.divisor // 2 for side in size)
            values = F.pad(values, (left, right, above, below))
        return values

    def _normalised(self, values: Tensor) -> Tensor:
        mean, std = (values.new_tensor(v)[:, None, None] for v in (self.rules.mean, self.rules.std))
        return (values - mean) / std

    def _at_size(self, output: Tensor, height: int, width: int) -> Tensor:
        """The network's map (B,h,w) at the picture's size, as `post_process_depth_estimation`."""
        return F.interpolate(output[:, None], (height, width), mode="bicubic", align_corners=False)[:, 0]

    def _run(self, pixels: Tensor) -> tuple[Tensor, list[str] | None]:
        """The network's map (B,h,w), and each picture's domain for networks that choose one."""
        return self.network(pixels).predicted_depth, None

    def _cameras(self, images: Tensor, intrinsics: Tensor | None) -> Tensor:
        """Intrinsics (B,3,3), given or from the field of view."""
        if intrinsics is None:
            intrinsics = intrinsics_from_fov(self.fov_x or ASSUMED_FOV, images.shape[-1] / images.shape[-2])
        return intrinsics.to(images).expand(images.shape[0], 3, 3)

    def forward(self, images: Tensor, intrinsics: Tensor | None = None) -> dict[str, Tensor]:
        """Maps with gradients, float32, at the size of images (B,3,H,W) in [0,1].

        `disparity` (B,H,W) up to scale and shift; or `depth` (B,H,W) in metres and `points` (B,H,W,3), unprojected
        with intrinsics (B,3,3) or the assumed field of view.
        """
        pixels = self.pixel_values(images)
        with self._mixed():
            output, _ = self._run(pixels)
        output = self._at_size(output.float(), *images.shape[-2:])
        if self.output == "disparity":
            return {"disparity": output}
        return {"depth": output, "points": unproject(output, self._cameras(images, intrinsics))}

    def features(self, images: Tensor) -> Tensor:
        """The encoder's last patch features (B,N,C) of images (B,3,H,W) in [0,1], without class token, with gradients.

        float32; after the encoder's last normalisation where it has one; rows of patches one after the other.
        """
        pixels = self.pixel_values(images)
        with self._mixed():
            if getattr(self.network, "backbone", None) is not None:
                tokens = self.network.backbone(pixels).feature_maps[-1]
            else:
                tokens = self.network.dpt(pixels).last_hidden_state
        if tokens.ndim == 4:  # (B,C,h,w) of encoders that reshape
            return tokens.flatten(2).mT.float()
        patches = (pixels.shape[-2] // self.rules.patch) * (pixels.shape[-1] // self.rules.patch)
        return tokens[:, -patches:].float()

    @torch.no_grad()
    def predict(self, images: Tensor, intrinsics: Tensor | None = None) -> Prediction:
        """Prediction without gradients for images (3,H,W) or (B,3,H,W) in [0,1]; intrinsics (3,3) or (B,3,3).

        Metric models: depth in metres, points from the camera that was given or assumed. Disparity models: the
        disparity, and depth and points in an arbitrary unit by `depth_from_disparity`. `note` says what was assumed.
        The network runs in float32, whatever `autocast` is.
        """
        batch = images if images.ndim == 4 else images[None]
        pixels = self.pixel_values(batch)
        output, domain = self._run(pixels)
        if self.average_flipped:
            output = (output + self._run(pixels.flip(-1))[0].flip(-1)) / 2
        output = self._at_size(output, *batch.shape[-2:])
        cameras, notes, extra = self._cameras(batch, intrinsics), list(self.notes), {}
        if intrinsics is None:
            extra["assumed_fov"] = self.fov_x or ASSUMED_FOV
            notes.append(f"a field of view of {extra['assumed_fov']:g} degrees across and square pixels are assumed")
        if domain is not None:
            extra["domain"] = domain if images.ndim == 4 else domain[0]
        disparity, depth = None, output
        if self.output == "disparity":
            disparity, depth = output, depth_from_disparity(output)
            notes.append(
                "the model predicts disparity up to scale and shift; for views its 2% and 98% quantiles are taken as"
                f" the farthest and the nearest point, {DEPTH_RATIO:g} times as far as each other"
            )
        known = torch.isfinite(output) & (depth > 0)
        fields = [unproject(depth, cameras), depth, known, cameras.clone(), disparity]
        if images.ndim == 3:
            fields = [field[0] if field is not None else None for field in fields]
        points, depth, known, cameras, disparity = fields
        return Prediction(
            points, depth, known, cameras, self.kind, disparity=disparity, note="; ".join(notes), extra=extra
        )


class ZoeDepthModel(TransformersModel):
    """ZoeDepth: metric depth.

    A network with several heads (NK) chooses one by the picture; `Prediction.extra["domain"]` is the name that its
    configuration gives the head (`nyu` indoors, `kitti` outdoors).
    """

    def pixel_values(self, images: Tensor) -> Tensor:
        """The network's input (B,3,H',W'): a reflected border, resizing with aligned corners, normalisation."""
        rules, values = self.rules, images * (255 * self.rules.scale)
        if rules.pad:
            above, beside = zoedepth_border(*images.shape[-2:])
            if above >= images.shape[-2] or beside >= images.shape[-1]:
                raise UserError(f"model {self.name!r}: a picture of {tuple(images.shape[-2:])} pixels is too small.")
            values = F.pad(values, (beside, beside, above, above), mode="reflect")
        if rules.resize or self.num_tokens is not None:
            size = rules.processed_size(*values.shape[-2:], self.num_tokens)
            mode = {BILINEAR: "bilinear", BICUBIC: "bicubic"}[rules.resample]
            values = F.interpolate(values, size, mode=mode, align_corners=True)
        return self._normalised(values)

    def _at_size(self, output: Tensor, height: int, width: int) -> Tensor:
        above, beside = zoedepth_border(height, width) if self.rules.pad else (0, 0)
        bordered = super()._at_size(output, height + 2 * above, width + 2 * beside)
        return bordered[:, above : above + height, beside : beside + width]

    def _run(self, pixels: Tensor) -> tuple[Tensor, list[str] | None]:
        output = self.network(pixels)
        depth, logits = output.predicted_depth, output.domain_logits
        if logits is None:
            return depth, None
        # The library lets a batch vote for one head; a picture that was outvoted goes through the one of its own.
        domain, voted = logits.argmax(-1), int(logits.sum(0).argmax())
        for other in set(domain.tolist()) - {voted}:
            chosen = (domain == other).nonzero()[:, 0]
            depth = depth.index_copy(0, chosen, self.network(pixels[chosen]).predicted_depth)
        names = [head["name"] for head in self.network.config.bin_configurations]
        return depth, [names[index] for index in domain.tolist()]


# ------------------------------------------------------------------------------------------------------ loading


def _fetch(name: str) -> Path:
    """The folder, in the hub's cache, with the files of the repository `name`. Raises `UserError`."""
    online = hub_answers()
    advice = f"download the files of https://huggingface.co/{name} on a machine with access and pass their folder"
    try:
        download(name, "config.json", online, advice)
    except NotInRepository as error:
        raise UserError(
            f"model {name!r}: the repository holds no `config.json`, so it is no transformers model (the names of those"
            " of Depth Anything end in `-hf`)."
        ) from error
    try:
        download(name, "preprocessor_config.json", online, advice)
    except NotInRepository:
        pass  # `read_rules` has the published values
    except UserError:
        if online:
            raise
    try:
        return download(name, "model.safetensors", online, advice).parent
    except NotInRepository as error:
        return _older_weights(name, online, advice, error)
    except UserError as error:
        if online:
            raise
        return _older_weights(name, online, advice, error)


def _older_weights(name: str, online: bool, advice: str, failure: Exception) -> Path:
    """The folder with `pytorch_model.bin`, after `failure` to find the newer file."""
    try:
        return download(name, "pytorch_model.bin", online, advice).parent
    except NotInRepository as error:
        raise UserError(f"model {name!r}: the repository holds no weights (model.safetensors).") from error
    except UserError as error:
        raise (failure if isinstance(failure, UserError) else error) from error


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r}: {path} is not readable JSON.") from error
    if not isinstance(content, dict):
        raise UserError(f"model {name!r}: {path} holds no dictionary.")
    return content


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bar and no report of transformers; what matters in it is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _network(folder: Path, family: str, name: str) -> nn.Module:
    """The network of a folder, float32, with every weight that it uses. Raises `UserError`."""
    import transformers

    try:
        with _quietly():
            network, report = getattr(transformers, FAMILIES[family]).from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # damaged weights and wrong configurations end in nearly any exception
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise UserError(f"model {name!r}: its files in {folder} cannot be loaded as {family} ({reason}).") from error
    # The first fusion layer has nothing to add: its weights are never used, and published files leave them out.
    unused = [key for key in report["missing_keys"] if "fusion_stage.layers.0.residual_layer1." in key]
    missing = sorted(set(report["missing_keys"]) - set(unused))
    if missing:
        raise UserError(
            f"model {name!r}: the weights in {folder} lack {len(missing)} of those a depth model needs, first {missing[0]!r}."
        )
    for key in unused:  # not left to chance, so that a checksum of the weights is the same each time
        nn.init.zeros_(network.get_parameter(key))
    return network.float()


def load_transformers_model(
    name: str, device: torch.device, num_tokens: int | None, autocast: str, fov_x: float | None
) -> TransformersModel:
    """Load Depth Anything V1/V2, ZoeDepth or DPT/MiDaS, frozen, by hub name or local folder.

    Arguments as `models.load_model`. Raises `UserError`, one sentence: transformers is missing, the hub cannot be
    reached, the folder holds another kind of model, or damaged or incomplete files.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"model {name!r}: transformers is not installed; run `pip install -e '.[hf]'`.") from error
    if fov_x is not None and not 0 < fov_x < 180:
        raise UserError(f"model.fov_x: {fov_x:g} is not a field of view in degrees; it lies between 0 and 180.")
    if num_tokens is not None and num_tokens < 1:
        raise UserError(f"model.num_tokens: {num_tokens} is less than one token.")
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        folder = _fetch(name)
    family = _read_json(folder / "config.json", name).get("model_type")
    if family not in FAMILIES:
        raise UserError(f"model {name!r}: its config.json says model type {family!r}; known are {', '.join(FAMILIES)}.")
    network = _network(folder, family, name)
    path, notes = folder / "preprocessor_config.json", ()
    given = _read_json(path, name) if path.is_file() else None
    if given is None:
        notes = (f"preprocessor_config.json is missing, so pictures are prepared as the published {family} models do",)
    rules = read_rules(given, family, network, name)
    if rules.fixed and num_tokens is not None:
        raise UserError(f"model {name!r}: a DPT hybrid takes pictures of one size; leave model.num_tokens out.")
    backbone = getattr(network.config.backbone_config, "model_type", None)
    # The DPT models on DINOv2 (facebook/dpt-dinov2-*) are the only ones of their family with depth in metres.
    metric = (
        family == "zoedepth"
        or (family == "depth_anything" and getattr(network.config, "depth_estimation_type", "") == "metric")
        or (family == "dpt" and backbone == "dinov2")
    )
    adapter = ZoeDepthModel if family == "zoedepth" else TransformersModel
    network = network.to(device).requires_grad_(False)
    return adapter(network, name, metric, rules, num_tokens, autocast, fov_x, notes)
