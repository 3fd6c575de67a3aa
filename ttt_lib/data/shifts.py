"""Named domain shifts at five severities.

A shift takes a clean picture to what a camera delivers on a bad day: the world's geometry stays the same, so the truth
does too. Severities follow the idea of ImageNet-C (Hendrycks & Dietterich 2019): 1 is mild, 5 is strong; the numbers
are in the table of each function. All randomness comes from the given generator.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ttt_lib.core.errors import UserError
from ttt_lib.core.registry import SHIFTS


def _pick(values: tuple, severity: int) -> float:
    return values[severity - 1]


def _noise(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    return image + sigma * torch.randn(image.shape, generator=generator).to(image)


@SHIFTS.register("low_light")
def low_light(image: Tensor, depth: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Less light, more gain: brightness times 0.6 to 0.12, noise 0.02 to 0.12 (shot noise grows as it darkens)."""
    dark = image * _pick((0.6, 0.42, 0.3, 0.2, 0.12), severity)
    return _noise(dark, _pick((0.015, 0.025, 0.04, 0.055, 0.075), severity), generator)


@SHIFTS.register("fog")
def fog(image: Tensor, depth: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Koschmieder's law with the true depth: half of the light of the median depth is lost at severity 3."""
    finite = torch.where(torch.isfinite(depth), depth, torch.nan)
    median = finite.nanmedian().nan_to_num(10.0)
    rate = _pick((0.2, 0.4, 0.7, 1.1, 1.7), severity) / median
    seen = torch.exp(-rate * depth.nan_to_num(float("inf"), posinf=float("inf")))
    air = 0.75 + 0.1 * torch.rand(3, 1, 1, generator=generator).to(image)
    return image * seen + air * (1 - seen)


@SHIFTS.register("motion_blur")
def motion_blur(image: Tensor, depth: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The camera moved along a line: 1.5 % to 7 % of the image width, in a random direction."""
    length = _pick((0.015, 0.025, 0.037, 0.052, 0.07), severity) * image.shape[-1]
    angle = float(torch.rand((), generator=generator)) * np.pi
    size = max(3, int(length) // 2 * 2 + 1)
    kernel = torch.zeros(size, size)
    for t in np.linspace(-1, 1, 4 * size):
        x, y = (round((size - 1) / 2 * (1 + t * f)) for f in (np.cos(angle), np.sin(angle)))
        kernel[y, x] += 1
    return _filter(image, kernel / kernel.sum())


@SHIFTS.register("defocus_blur")
def defocus_blur(image: Tensor, depth: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Out of focus: a disc with a radius of 0.4 % to 2 % of the image width."""
    radius = _pick((0.004, 0.007, 0.011, 0.015, 0.02), severity) * image.shape[-1]
    reach = int(np.ceil(radius))
    y, x = torch.meshgrid(torch.arange(-reach, reach + 1.0), torch.arange(-reach, reach + 1.0), indexing="ij")
    kernel = (radius + 0.5 - (x**2 + y**2).sqrt()).clamp(0, 1)
    return _filter(image, kernel / kernel.sum())


def _filter(image: Tensor, kernel: Tensor) -> Tensor:
    pad = kernel.shape[0] // 2
    # A reflection needs more pixels than it adds; on narrow views the border is repeated.
    mode = "reflect" if pad < min(image.shape[-2:]) else "replicate"
    padded = F.pad(image[None], (pad, pad, pad, pad), mode=mode)[0]
    return F.conv2d(padded[:, None], kernel.to(image)[None, None])[:, 0]


@SHIFTS.register("jpeg")
def jpeg(image: Tensor, depth: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """JPEG at quality 40 down to 5."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=int(_pick((40, 25, 16, 10, 5), severity)))
    decoded = np.asarray(Image.open(buffer), dtype=np.float32) / 255
    return torch.from_numpy(decoded).permute(2, 0, 1).to(image)


@SHIFTS.register("colour_cast")
def colour_cast(image: Tensor, depth: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A wrong white balance: channel gains 1 +- 0.15 to 0.7 around a random hue."""
    phase = float(torch.rand((), generator=generator)) * 2 * np.pi
    strength = _pick((0.15, 0.28, 0.42, 0.55, 0.7), severity)
    gains = 1 + strength * torch.tensor([np.cos(phase + k * 2 * np.pi / 3) for k in range(3)])
    return image * gains.to(image)[:, None, None]


@SHIFTS.register("night")
def night(image: Tensor, depth: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Dark and blue, with one or more street lamps' pools of warm light, and noise."""
    strength = _pick((0.35, 0.55, 0.7, 0.8, 0.88), severity)
    gray = image.mean(0, keepdim=True)
    cool = (0.4 * image + 0.6 * gray) * torch.tensor([0.75, 0.85, 1.15]).to(image)[:, None, None]
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    pools = torch.zeros(height, width)
    for _ in range(2):
        cx, cy, r = torch.rand(3, generator=generator).tolist()
        pools = pools + torch.exp(-((x - cx) ** 2 + (y - 0.3 - 0.5 * cy) ** 2) / (0.05 + 0.1 * r) ** 2 / 2)
    warm = pools.to(image) * torch.tensor([1.0, 0.8, 0.5]).to(image)[:, None, None]
    return _noise(cool * (1 - strength) + 0.5 * strength * warm * image, 0.03 * strength, generator)


@SHIFTS.register("reflection")
def reflection(image: Tensor, depth: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Seen through glass: a blurred mirror image of the picture itself, turned, lies over it (12 % to 50 %)."""
    share = _pick((0.12, 0.2, 0.3, 0.4, 0.5), severity)
    ghost = image.flip(-1).roll(int(torch.randint(image.shape[-1] // 4, (), generator=generator)), -1)
    if float(torch.rand((), generator=generator)) < 0.5:
        ghost = ghost.flip(-2)
    ghost = _filter(ghost, torch.full((5, 5), 1 / 25))
    return (1 - 0.5 * share) * image + share * ghost


BUILT_IN = tuple(SHIFTS)  # the set `shifted` stays the same when others add theirs


def check_shifts(names: Iterable[str]) -> None:
    """Raises `UserError` for a shift that there is not."""
    for name in names:
        if name not in SHIFTS:
            raise UserError(f"shift {name!r}: there is no such shift; there are {', '.join(SHIFTS)}.")


def apply_shift(name: str, image: Tensor, depth: Tensor, severity: int, seed: int = 0) -> Tensor:
    """The picture under a named shift. image (3,H,W) in [0,1]; depth (H,W), inf or NaN at the sky; severity 0 to 5.

    Deterministic in (name, severity, seed). Returns (3,H,W) in [0,1], rounded to 8 bits as a file would hold it.
    Raises `UserError` for an unknown name or severity.
    """
    check_shifts([name])
    if severity not in range(6):
        raise UserError(f"shift {name!r}: severity must be a whole number from 0 to 5, not {severity!r}.")
    if severity:
        place = BUILT_IN.index(name) if name in BUILT_IN else zlib.crc32(name.encode())
        generator = torch.Generator().manual_seed(seed * 1000 + place * 10 + severity)
        image = SHIFTS[name](image, depth, severity, generator)
    return (image.clamp(0, 1) * 255).round() / 255
