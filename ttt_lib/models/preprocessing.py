"""How the models of transformers prepare pictures: the rules of their image processors, in torch and batched.

The values come from the model's own `preprocessor_config.json`, read by transformers; the size rule is that of
`get_resize_output_image_size` in its `models/dpt/image_processing*.py` and `models/zoedepth/`. The processors themselves
take one 8-bit picture at a time, through NumPy and Pillow.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ttt_lib.core.errors import ModelError, reason
from ttt_lib.models.bounds import LARGEST_SIDE, check_numbers

ALWAYS = {"zoedepth": ("do_resize", "do_pad"), "depth_anything": ("do_resize",)}  # done to every picture
MODES = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers, which the files use


class Rules(NamedTuple):
    """How pictures become a network's input. size (height, width) asked for before `keep_aspect_ratio` and `multiple`;
    None: a picture's own, rounded down to the multiple (GLPN; DPT on DINOv2, where that is 1).

    mode: `bilinear` or `bicubic`; scale: what values in [0, 255] are multiplied by; divisor: padding to a multiple of it;
    patch: side of what becomes one token, in pixels of the network's input.
    """

    size: tuple[int, int] | None
    mode: str
    keep_aspect_ratio: bool
    multiple: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    divisor: int
    patch: int

    def processed_size(self, height: int, width: int, num_tokens: int | None) -> tuple[int, int]:
        """Height and width of the resized picture; `get_resize_output_image_size` of the library, or by `num_tokens`.

        With num_tokens about as many patches result, aspect kept (except by networks of square pictures), in steps of
        the patch and of the model's own multiple.
        """
        multiple = self.multiple
        if num_tokens is not None:
            multiple = math.lcm(self.patch, self.multiple)
            aspect = width / height if self.keep_aspect_ratio or self.size is None else self.size[1] / self.size[0]
            sides = math.sqrt(num_tokens / aspect) * self.patch, math.sqrt(num_tokens * aspect) * self.patch
        elif self.size is None:
            sides = height // multiple * multiple, width // multiple * multiple
        else:
            scale_y, scale_x = self.size[0] / height, self.size[1] / width
            if self.keep_aspect_ratio:
                scale_y = scale_x = scale_x if abs(1 - scale_x) < abs(1 - scale_y) else scale_y
            sides = scale_y * height, scale_x * width
        # A picture so long that its other side rounds to nothing gets one step, where the library fails.
        rows, columns = (max(1, round(side / multiple)) * multiple for side in sides)
        return rows, columns


def read_rules(folder: Path, family: str, network: nn.Module, name: str) -> Rules:
    """Rules from the `preprocessor_config.json` of a folder for a network of this family. Raises `ModelError`."""
    import transformers

    # Depth Pro's own processor needs torchvision; DPT's reads the same values.
    kind = transformers.DPTImageProcessor if family == "depth_pro" else transformers.AutoImageProcessor
    seen_by = getattr(network.config, "backbone_config", None) or network.config
    try:
        processor = kind.from_pretrained(folder, local_files_only=True)
        check_numbers(processor.to_dict(), LARGEST_SIDE, LARGEST_SIDE, "preprocessor_config.json")
        if int(processor.resample) not in MODES:
            raise ValueError(f"resample {int(processor.resample)}; known are 2 (bilinear) and 3 (bicubic)")
        if ignored := [key for key in ALWAYS.get(family, ()) if not getattr(processor, key)]:
            raise ValueError(f"{ignored[0]} is false, and pictures are never left so here")
        # DPT's first version and its hybrid, whose tokens the library puts on a square grid.
        square = family == "dpt" and getattr(network, "backbone", None) is None
        if square and network.config.is_hybrid and processor.size["height"] != network.config.image_size:
            raise ValueError(f"size {processor.size}; the network takes pictures of {network.config.image_size} pixels")
        glpn, normalised = family == "glpn", processor.do_normalize
        own = glpn or not processor.do_resize
        return Rules(
            size=None if own else (int(processor.size["height"]), int(processor.size["width"])),
            mode=MODES[int(processor.resample)],
            keep_aspect_ratio=bool(getattr(processor, "keep_aspect_ratio", False)) and not square,
            multiple=max(1, int(processor.size_divisor if glpn else processor.ensure_multiple_of)),
            scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
            mean=tuple(processor.image_mean) if normalised else (0.0,) * 3,
            std=tuple(processor.image_std) if normalised else (1.0,) * 3,
            divisor=int(processor.size_divisor) if family == "dpt" and processor.do_pad else 1,
            patch=getattr(seen_by, "patch_size", 32),  # 32: GLPN's last stage
        )
    except Exception as error:  # transformers raises what the damage of the file leads to
        raise ModelError(
            f"model {name!r}: preprocessor_config.json is not one of {family} ({reason(error)})."
        ) from error


def resize_rounded(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Images (B,C,H,W) with values in [0, 255] at `size`, anti-aliased, whole numbers again.

    As the processors do with torchvision. Those without it go through Pillow, which also rounds between columns and rows:
    values differ by one level of 255 in some per cent, and by two in few. No gradient passes the rounding.
    """
    return F.interpolate(images, size, mode=mode, antialias=True).round().clamp(0, 255)
