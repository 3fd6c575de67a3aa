"""Preprocessing of Depth Anything, ZoeDepth and DPT/MiDaS by their own rules, in torch, batched and with gradients.

The rules come from `preprocessor_config.json`; results must agree with the processors `DPTImageProcessor(Pil)` (also
Depth Anything's) and `ZoeDepthImageProcessor(Pil)` of transformers, in `models/dpt/image_processing*.py` and
`models/zoedepth/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ttt_lib.core.errors import UserError

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers, which the files use
# What the library's processors take for keys that a file leaves out ...
DPT_PROCESSOR: dict[str, Any] = {
    "size": {"height": 384, "width": 384}, "do_resize": True, "resample": BICUBIC, "keep_aspect_ratio": False,
    "ensure_multiple_of": 1, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_pad": False, "size_divisor": None,
}  # fmt: skip
PROCESSORS = {
    "depth_anything": DPT_PROCESSOR,
    "dpt": DPT_PROCESSOR,
    "zoedepth": DPT_PROCESSOR
    | {"size": {"height": 384, "width": 512}, "resample": BILINEAR, "keep_aspect_ratio": True, "do_pad": True}
    | {"ensure_multiple_of": 1 / 32},
}
# ... and what the published files of each family say, for a folder without such a file.
PUBLISHED = {
    "depth_anything": {"size": {"height": 518, "width": 518}, "keep_aspect_ratio": True, "ensure_multiple_of": 14}
    | IMAGENET,
    "dpt": {},
    "zoedepth": {"ensure_multiple_of": 32},
}


@dataclass(frozen=True)
class Rules:
    """How pictures become a network's input. size (height, width) asked for before `keep_aspect_ratio` and `multiple`.

    scale: what values in [0, 255] are multiplied by; divisor: padding to a multiple of it (0: none); pad: ZoeDepth's
    reflected border; square: the network takes square pictures only; fixed: it takes exactly `size`; patch: pixels.
    """

    size: tuple[int, int]
    resize: bool
    resample: int
    keep_aspect_ratio: bool
    multiple: float
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: bool
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
        scale_y, scale_x = self.size[0] / height, self.size[1] / width
        if self.keep_aspect_ratio:
            scale_y = scale_x = scale_x if abs(1 - scale_x) < abs(1 - scale_y) else scale_y
        rows, columns = (
            # A picture so long that its other side rounds to nothing gets one step, where the library fails.
            int(round(side / self.multiple) * self.multiple) or max(1, int(self.multiple))
            for side in (scale_y * height, scale_x * width)
        )
        return rows, columns


def read_rules(given: dict[str, Any] | None, family: str, network: nn.Module, name: str) -> Rules:
    """Rules from the contents of preprocessor_config.json (None: the published ones of the family)."""
    # DPT's first version and its hybrid, whose tokens the library puts on a square grid.
    own_encoder = getattr(network, "backbone", None) is None
    values = PROCESSORS[family] | (PUBLISHED[family] if given is None else given)
    try:
        size = values["size"]
        size = (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))
        normalise = values["do_normalize"]
        mean, std = (tuple(float(v) for v in values[key]) for key in ("image_mean", "image_std"))
        scale = float(values["rescale_factor"]) if values["do_rescale"] else 1.0
        multiple = float(values["ensure_multiple_of"] or 1)
        resample = int(values["resample"])
        divisor = int(values["size_divisor"] or 0) if values["do_pad"] and family != "zoedepth" else 0
        if min(size) < 1 or not multiple > 0 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError("a size, multiple, mean or std that cannot be")
        if own_encoder and size[0] != size[1]:
            raise ValueError("the network takes square pictures only")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"model {name!r}: preprocessor_config.json is not one of {family} ({error!r}).") from error
    if resample not in (BILINEAR, BICUBIC):
        raise UserError(
            f"model {name!r}: preprocessor_config.json asks for resample {resample}; known are 2 (bilinear) and 3 (bicubic)."
        )
    fixed = own_encoder and bool(network.config.is_hybrid)
    patch = network.config.patch_size if own_encoder else network.backbone.config.patch_size
    if fixed:
        side = network.config.image_size
        size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    return Rules(
        size=size,
        resize=bool(values["do_resize"]) or fixed,
        resample=resample,
        keep_aspect_ratio=bool(values["keep_aspect_ratio"]) and not own_encoder,
        multiple=1.0 if fixed else multiple,
        scale=scale,
        mean=mean if normalise else (0.0,) * 3,
        std=std if normalise else (1.0,) * 3,
        pad=family == "zoedepth" and bool(values["do_pad"]),
        divisor=divisor,
        patch=int(patch if isinstance(patch, int) else patch[0]),
        square=own_encoder,
        fixed=fixed,
    )


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is cached must serve training too
def _pillow_matrix(old: int, new: int, resample: int, device: torch.device) -> Tensor:
    """Pillow's resampling from `old` to `new` pixels as a sparse matrix (new, old), float64.

    `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's `src/libImaging/Resample.c`, with its rounding of the
    weights to multiples of 2**-22.
    """
    stretch = max(old / new, 1.0)
    support = stretch * (1.0 if resample == BILINEAR else 2.0)
    centre = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new))[:, None]
    first = (centre - support + 0.5).trunc().clamp(min=0)
    last = (centre + support + 0.5).trunc().clamp(max=old)
    pixel = first + torch.arange(math.ceil(support) * 2 + 1)
    x = ((pixel - centre + 0.5) * (1.0 / stretch)).abs()
    if resample == BILINEAR:
        weight = (1.0 - x).clamp(min=0)
    else:  # the cubic with a = -0.5
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = torch.where(pixel < last, weight, 0.0)
    weight = weight / weight.sum(1, keepdim=True) * 2**22
    weight = (weight + weight.sign() / 2).trunc() / 2**22
    places = torch.stack([torch.arange(new)[:, None].expand_as(weight), pixel.clamp(max=old - 1).long()]).flatten(1)
    return torch.sparse_coo_tensor(places, weight.flatten(), (new, old), check_invariants=True).coalesce().to(device)


def resize_as_pillow(images: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """Resize (B,C,H,W) with values in [0, 255] to `size`, float64, bit-identical to Pillow for 8-bit pictures.

    Columns first, then rows, with 8-bit rounding after each, which is what the processors do without torchvision. With
    it they round once: of the values up to 1% (bicubic; bilinear up to 4%) then differ, by one or two levels of 255.
    Gradients pass the rounding unchanged.
    """
    values = images.double().permute(3, 0, 1, 2)
    for new in (size[1], size[0]):
        old, *others = values.shape
        # Sums of whole numbers over 2**22 are exact in float64, in any order.
        total = torch.sparse.mm(_pillow_matrix(old, new, resample, values.device), values.reshape(old, -1))
        total = total + ((total + 0.5).floor().clamp(0, 255) - total).detach()
        values = total.reshape(new, *others).permute(3, 1, 2, 0)  # (H,B,C,W'), then (W',B,C,H')
    return values.permute(1, 2, 3, 0)


def zoedepth_border(height: int, width: int) -> tuple[int, int]:
    """ZoeDepth's border in pixels of the picture, (above and below, left and right)."""
    return int(math.sqrt(height / 2) * 3), int(math.sqrt(width / 2) * 3)
