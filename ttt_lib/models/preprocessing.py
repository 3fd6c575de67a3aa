"""How the models of transformers prepare pictures: the rules of their image processors, in torch and batched.

The values come from the model's own `preprocessor_config.json`, read by transformers; the size rule is that of
`get_resize_output_image_size` in its `models/dpt/image_processing*.py` and `models/zoedepth/`. The processors themselves
take one 8-bit picture at a time, through NumPy and Pillow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ttt_lib.core.errors import ModelError, reason
from ttt_lib.core.files import read_json

MODES = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers, which the files use
ON_DINOV2 = {"keep_aspect_ratio": True, "ensure_multiple_of": 14,
             "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # fmt: skip
# The library's processor of Depth Pro needs torchvision, so its few values are read here; these are its own defaults.
DEPTH_PRO = {"size": {"height": 1536, "width": 1536}, "do_resize": True, "resample": 2, "do_rescale": True,
             "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
# What the published files of each family say beside the processor's own defaults, for a folder without such a file.
PUBLISHED: dict[str, dict[str, Any]] = {
    "depth_anything": {"type": "DPTImageProcessor", "size": {"height": 518, "width": 518}, **ON_DINOV2},
    "dpt": {"type": "DPTImageProcessor"},
    "zoedepth": {"type": "ZoeDepthImageProcessor", "ensure_multiple_of": 32},
    "prompt_depth_anything": {"type": "PromptDepthAnythingImageProcessor", "size": {"height": 756, "width": 756}, **ON_DINOV2},
    "glpn": {"type": "GLPNImageProcessor"},
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """How pictures become a network's input. size (height, width) asked for before `keep_aspect_ratio` and `multiple`;
    None: a picture's own, rounded down to the multiple (GLPN).

    mode: `bilinear` or `bicubic`; scale: what values in [0, 255] are multiplied by; divisor: padding to a multiple of it
    (0: none); border: ZoeDepth's, reflected; square: the network takes square pictures only; fixed: exactly `size`.
    """

    size: tuple[int, int] | None
    resize: bool
    mode: str
    keep_aspect_ratio: bool
    multiple: float
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    border: bool
    divisor: int
    patch: int
    square: bool = False
    fixed: bool = False

    def processed_size(self, height: int, width: int, num_tokens: int | None) -> tuple[int, int]:
        """Height and width of the resized picture; `get_resize_output_image_size` of the library, or by `num_tokens`.

        With num_tokens about as many patches result, aspect kept (except by networks of square pictures), in steps of
        the patch and of the model's own multiple.
        """
        if num_tokens is not None:
            step = math.lcm(self.patch, max(1, int(self.multiple)))
            aspect = 1.0 if self.square else width / height
            sides = math.sqrt(num_tokens / aspect) * self.patch, math.sqrt(num_tokens * aspect) * self.patch
            rows, columns = (max(1, round(side / step)) * step for side in sides)
            return rows, columns
        if not self.resize:
            return height, width
        if self.size is None:
            return tuple(max(1, int(side // self.multiple)) * int(self.multiple) for side in (height, width))
        scale_y, scale_x = self.size[0] / height, self.size[1] / width
        if self.keep_aspect_ratio:
            scale_y = scale_x = scale_x if abs(1 - scale_x) < abs(1 - scale_y) else scale_y
        rows, columns = (
            # A picture so long that its other side rounds to nothing gets one step, where the library fails.
            int(round(side / self.multiple) * self.multiple) or max(1, int(self.multiple))
            for side in (scale_y * height, scale_x * width)
        )
        return rows, columns


def read_rules(folder: Path, family: str, network: nn.Module, name: str) -> Rules:
    """Rules from the `preprocessor_config.json` of a folder for a network of this family, or where it has no such file from
    the published ones. Raises `ModelError`."""
    try:
        return _rules(_processor(folder, family), family, network)
    except Exception as error:  # transformers raises what the damage of the file leads to
        raise ModelError(
            f"model {name!r}: preprocessor_config.json is not one of {family} ({reason(error)})."
        ) from error


def _processor(folder: Path, family: str) -> Any:
    """transformers' image processor of a folder; that of the published files where it has no such file."""
    import transformers

    path = folder / "preprocessor_config.json"
    if family == "depth_pro":
        return SimpleNamespace(**DEPTH_PRO | (read_json(path) if path.is_file() else {}))
    if path.is_file():
        return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    settings = dict(PUBLISHED[family])
    return getattr(transformers, settings.pop("type"))(**settings)


def _patch(network: nn.Module, family: str) -> int:
    """Side of what becomes one token, in pixels of the network's input."""
    config = network.config
    if family == "glpn":  # of its last stage
        return math.prod(config.strides)
    if family == "depth_pro":
        return config.image_model_config.patch_size
    patch = config.patch_size if getattr(network, "backbone", None) is None else network.backbone.config.patch_size
    return int(patch if isinstance(patch, int) else patch[0])


def _rules(processor: Any, family: str, network: nn.Module) -> Rules:
    """Rules from transformers' image processor. Raises what a wrong one leads to."""
    # DPT's first version and its hybrid, whose tokens the library puts on a square grid; Depth Pro, which stretches.
    square = family == "depth_pro" or family == "dpt" and getattr(network, "backbone", None) is None
    fixed = family == "depth_pro" or square and bool(network.config.is_hybrid)
    sized, zoe = family != "glpn", family == "zoedepth"
    size = (int(processor.size["height"]), int(processor.size["width"])) if sized else None
    means = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    mean, std = (tuple(float(v) for v in values) for values in means)
    multiple = float(getattr(processor, "ensure_multiple_of" if sized else "size_divisor", None) or 1)
    padded = bool(getattr(processor, "do_pad", False))
    if min(size or (1,)) < 1 or not multiple > 0 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError("a size, multiple, mean or std that cannot be")
    if square and size[0] != size[1]:
        raise ValueError("the network takes square pictures only")
    if int(processor.resample) not in MODES:
        raise ValueError(f"resample {int(processor.resample)}; known are 2 (bilinear) and 3 (bicubic)")
    if fixed and family == "dpt":
        side = network.config.image_size
        size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    return Rules(
        size=size,
        resize=bool(processor.do_resize) or fixed,
        mode=MODES[int(processor.resample)],
        keep_aspect_ratio=bool(getattr(processor, "keep_aspect_ratio", False)) and not square,
        multiple=1.0 if fixed else multiple,
        scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        mean=mean,
        std=std,
        border=zoe and padded,
        divisor=int(processor.size_divisor or 0) if padded and not zoe else 0,
        patch=_patch(network, family),
        square=square,
        fixed=fixed,
    )


def resize_rounded(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Images (B,C,H,W) with values in [0, 255] at `size`, anti-aliased, whole numbers again.

    As the processors do with torchvision. Those without it go through Pillow, which also rounds between columns and rows:
    values differ by one level of 255 in some per cent, and by two in few. No gradient passes the rounding.
    """
    return F.interpolate(images, size, mode=mode, antialias=True).round().clamp(0, 255)


def zoedepth_border(height: int, width: int) -> tuple[int, int]:
    """ZoeDepth's border in pixels of the picture, (above and below, left and right)."""
    return int(math.sqrt(height / 2) * 3), int(math.sqrt(width / 2) * 3)
