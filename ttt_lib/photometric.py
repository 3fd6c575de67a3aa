"""Colour changes of severity 0 (none) to 5: kornia's operations, each view with its own strengths.

All strengths come from the given generator; kornia's random classes are not used, because they draw from the global
random state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kornia import enhance
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from torch import Tensor


@dataclass(frozen=True)
class Strength:
    """One row of the severity table.

    brightness, contrast, saturation: factors drawn from 1 +- this; hue: +- this share of the colour circle; gamma:
    exponent from 1/(1+g) to 1+g; the rest are chances of an operation, with its parameter beside it.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    gamma: float
    gray: float
    autocontrast: float
    sharpness: float
    posterize: float
    posterize_bits: int
    solarize: float
    solarize_above: float
    equalize: float
    channel_shuffle: float


#                bright contr  satur  hue   gamma gray  auto  sharp post bits sol  above  equal shuffle
SEVERITIES = {
    1: Strength(0.08, 0.08, 0.10, 0.010, 0.10, 0.00, 0.02, 0.05, 0.00, 7, 0.00, 1.00, 0.00, 0.00),
    2: Strength(0.15, 0.15, 0.20, 0.020, 0.20, 0.03, 0.05, 0.10, 0.00, 6, 0.00, 1.00, 0.00, 0.00),
    3: Strength(0.25, 0.25, 0.35, 0.040, 0.30, 0.06, 0.10, 0.20, 0.05, 5, 0.02, 0.90, 0.03, 0.00),
    4: Strength(0.35, 0.35, 0.50, 0.070, 0.45, 0.10, 0.15, 0.25, 0.10, 4, 0.05, 0.80, 0.06, 0.05),
    5: Strength(0.45, 0.45, 0.70, 0.100, 0.60, 0.20, 0.20, 0.30, 0.15, 3, 0.10, 0.70, 0.10, 0.10),
}
DRAWS = 17  # uniform numbers a view takes from the generator, whatever its severity


def photometric(
    images: Tensor, severity: int, generator: torch.Generator, probability: float = 1.0, blur: float = 0.0
) -> Tensor:
    """Change the colours of each image on its own.

    images (B,3,h,w) float in [0,1]; severity 0 to 5 (`SEVERITIES`); `probability` that an image is changed at all;
    `blur`: chance of a Gaussian blur with a sigma of 0.1 % to 0.4 % of the width a severity. Order: brightness,
    contrast, saturation, hue, gamma, autocontrast, sharpness, posterize, solarize, equalize, channel shuffle, gray,
    blur. Returns the same shape and range, on the same device. Severity 0 returns the images as they are. The global
    random state is neither used nor changed.
    """
    batch = images.shape[0]
    draws = torch.rand(batch, DRAWS, generator=generator)
    orders = torch.rand(batch, 3, generator=generator).argsort(-1).to(images.device)
    if severity == 0:
        return images
    s = SEVERITIES[severity]
    signed = (2 * draws - 1).to(images)
    draws = draws.to(images)
    active = draws[:, 0] < probability

    def chosen(column: int, chance: float) -> Tensor:
        return (active & (draws[:, column] < chance))[:, None, None, None]

    x = images
    x = enhance.adjust_brightness(x, 1 + s.brightness * signed[:, 1]) if s.brightness else x
    x = enhance.adjust_contrast_with_mean_subtraction(x, 1 + s.contrast * signed[:, 2])
    x = enhance.adjust_saturation(x.clamp(0, 1), 1 + s.saturation * signed[:, 3])
    x = enhance.adjust_hue(x.clamp(0, 1), 2 * torch.pi * s.hue * signed[:, 4])
    x = enhance.adjust_gamma(x.clamp(1e-5, 1), (1 + s.gamma) ** signed[:, 5])
    x = torch.where(chosen(6, s.autocontrast), enhance.normalize_min_max(x), x).clamp(0, 1)
    x = torch.where(chosen(7, s.sharpness), enhance.sharpness(x, 1 + draws[:, 8]), x)
    if s.posterize:
        x = torch.where(chosen(9, s.posterize), enhance.posterize(x, s.posterize_bits), x)
    if s.solarize:
        x = torch.where(chosen(10, s.solarize), enhance.solarize(x, s.solarize_above), x)
    equalized = torch.nonzero(chosen(11, s.equalize)[:, 0, 0, 0])[:, 0]
    if equalized.numel():
        x = x.index_copy(0, equalized, enhance.equalize(x[equalized].clamp(0, 1)))
    shuffled = x.gather(1, orders[:, :, None, None].expand_as(x))
    x = torch.where(chosen(12, s.channel_shuffle), shuffled, x)
    x = torch.where(chosen(13, s.gray), rgb_to_grayscale(x).expand_as(x), x)
    if blur > 0:
        width = images.shape[-1]
        sigma = (width * severity * (0.001 + 0.003 * draws[:, 14])).clamp_min(0.3)
        size = int(2 * round(0.012 * severity * width) + 1)
        blurred = gaussian_blur2d(x, (size, size), torch.stack([sigma, sigma], -1))
        x = torch.where((draws[:, 15] < blur)[:, None, None, None], blurred, x)
        active = active | (draws[:, 15] < blur)
    return torch.where(active[:, None, None, None], x.clamp(0, 1), images)
