"""Colour changes of severity 0 (none) to 5: kornia's operations, each image with its own strengths.

All strengths come from the given generator; kornia's random classes are not used, because they draw from the global
random state. An image takes the same `DRAWS` numbers whatever the severity, so with one seed a higher severity means
more of the same changes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

# What severities 1 to 5 do. Severity 5 reaches the colour distortion of Depth Anything (0.5, 0.5, 0.5, 0.25 and gray 0.2)
# on every column.
SEVERITIES = {
    "brightness": (0.08, 0.15, 0.25, 0.35, 0.50),  # a factor drawn from 1 +- this, as of the next two
    "contrast": (0.08, 0.15, 0.25, 0.35, 0.50),
    "saturation": (0.10, 0.20, 0.35, 0.50, 0.70),
    "hue": (0.010, 0.020, 0.050, 0.120, 0.250),  # +- this share of the colour circle
    "gamma": (0.10, 0.20, 0.30, 0.45, 0.60),  # an exponent from 1 / (1 + gamma) to 1 + gamma
    "gray": (0.00, 0.03, 0.06, 0.12, 0.20),  # chance
    "autocontrast": (0.02, 0.05, 0.10, 0.15, 0.20),  # chance
    "sharpness": (0.05, 0.10, 0.20, 0.25, 0.30),  # chance
    "sharpen_by": (0.4, 0.6, 1.0, 1.5, 2.0),  # by a factor up to 1 + this
    "posterize": (0.00, 0.00, 0.05, 0.10, 0.15),  # chance
    "posterize_bits": (7, 6, 5, 4, 3),
    "solarize": (0.00, 0.00, 0.02, 0.05, 0.10),  # chance
    "solarize_above": (1.00, 1.00, 0.90, 0.80, 0.70),  # of what is brighter
    "equalize": (0.00, 0.00, 0.03, 0.06, 0.10),  # chance
    "channel_shuffle": (0.00, 0.00, 0.00, 0.05, 0.10),  # chance
    "blur_sigma": (0.001, 0.002, 0.004, 0.006, 0.010),  # largest deviation of the Gaussian, as a share of the width
}
DRAWS = 19  # uniform numbers an image takes


def photometric(
    images: Tensor, severity: int, generator: torch.Generator, probability: float = 1.0, blur: float = 0.0
) -> Tensor:
    """Change the colours of each image on its own.

    images (B,3,h,w) float in [0,1]; severity 0 to 5 (`SEVERITIES`); generator on the CPU; `probability` that an image
    is changed at all; `blur`: chance of a Gaussian blur on top. Returns the same shape, range and device; severity 0
    returns the images as they are. The global random state is neither used nor changed.
    """
    draws = torch.rand(len(images), DRAWS, generator=generator)
    return recolour(images, severity, draws, probability, blur)


def recolour(images: Tensor, severity: int, draws: Tensor, probability: float = 1.0, blur: float = 0.0) -> Tensor:
    """`photometric` with the random numbers given: draws (B, DRAWS), uniform in [0, 1).

    Order: brightness, contrast, saturation, hue, gamma, autocontrast, sharpness, posterize, solarize, equalize,
    channel shuffle, gray, blur.
    """
    if severity == 0:
        return images
    from kornia import enhance  # here: who only predicts need not wait for it
    from kornia.color import rgb_to_grayscale
    from kornia.filters import gaussian_blur2d

    s = SimpleNamespace(**{name: row[severity - 1] for name, row in SEVERITIES.items()})
    chance, draws = draws, draws.to(images, non_blocking=True)
    signed = 2 * draws - 1
    active = chance[:, 0] < probability

    def some(x: Tensor, column: int, share: float, changed: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x, with that share of its images changed, each by its own numbers. Which, the CPU knows: others cost nothing."""
        which = torch.nonzero(active & (chance[:, column] < share))[:, 0].to(x.device, non_blocking=True)
        return x.index_copy(0, which, changed(x[which], draws[which])) if which.numel() else x

    def alike(value: float, x: Tensor) -> Tensor:
        """A number for each image, made where they are: kornia would send it there, and wait."""
        return torch.full((len(x),), value, device=x.device, dtype=x.dtype)

    def shuffle(x: Tensor, own: Tensor) -> Tensor:
        return x.gather(1, own[:, 12:15].argsort(-1)[:, :, None, None].expand_as(x))

    def blurred(x: Tensor, own: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        reach = min(round(3 * width * s.blur_sigma) + 1, height - 1, width - 1)
        sigma = (width * s.blur_sigma * own[:, 17, None]).clamp_min(0.1).expand(-1, 2)
        return gaussian_blur2d(x, (2 * reach + 1, 2 * reach + 1), sigma)

    x = enhance.adjust_brightness_accumulative(images, 1 + s.brightness * signed[:, 1])
    x = enhance.adjust_contrast_with_mean_subtraction(x, 1 + s.contrast * signed[:, 2])
    x = enhance.adjust_saturation(x, 1 + s.saturation * signed[:, 3])
    x = enhance.adjust_hue(x.clamp(0, 1), 2 * torch.pi * s.hue * signed[:, 4])
    x = enhance.adjust_gamma(x.clamp(0, 1), (1 + s.gamma) ** signed[:, 5], alike(1.0, x))
    x = some(x, 6, s.autocontrast, lambda x, own: enhance.normalize_min_max(x)).clamp(0, 1)
    x = some(x, 7, s.sharpness, lambda x, own: enhance.sharpness(x, 1 + s.sharpen_by * own[:, 8]))
    x = some(x, 9, s.posterize, lambda x, own: enhance.posterize(x, alike(s.posterize_bits, x).int()))
    x = some(x, 10, s.solarize, lambda x, own: enhance.solarize(x, alike(s.solarize_above, x)))
    x = some(x, 11, s.equalize, lambda x, own: enhance.equalize(x.clamp(0, 1)))
    x = some(x, 15, s.channel_shuffle, shuffle)
    x = some(x, 16, s.gray, lambda x, own: rgb_to_grayscale(x).expand_as(x))
    x = some(x, 18, blur, blurred)
    active = active.to(images.device, non_blocking=True)
    return torch.where(active[:, None, None, None], x.clamp(0, 1), images)
