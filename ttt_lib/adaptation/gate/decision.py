"""Label-free acceptance: what becomes of an adapted prediction, by the signals of `signals.py`.

A calibration turns them into a decision, and a blend takes each region from where the predictions can be trusted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.adaptation.ensemble import fitted_disparity, log_difference, with_depth
from ttt_lib.core.errors import UserError, reason
from ttt_lib.core.files import absolute, read_json, write_json
from ttt_lib.core.types import Prediction

BUNDLED = Path(__file__).parents[2] / "assets" / "gate.json"
DISAGREEMENT = 0.1  # of log depth between experts, at which a pixel of a blend is half original, half adapted


@dataclass
class Calibration:
    """How signals become a decision: a linear estimate, and two thresholds on it.

    estimate = bias + sum of weights * clip((signal - mean) / deviation, -3, 3); a missing signal counts as its mean. It
    is the gain in delta1, or an order in which adapting is safer (`about["order"]`).
    At or above `accept` the adapted prediction is taken, at or above `blend` a mixture, else the original. `about`:
    model, settings, samples, date and what the thresholds gave on the calibration set.
    """

    signals: list[str]
    mean: list[float]
    deviation: list[float]
    weights: list[float]
    bias: float
    accept: float
    blend: float
    about: dict = field(default_factory=dict)

    def estimate(self, signals: dict[str, float]) -> float:
        """By the signals of one image: the higher, the sooner it is adapted."""
        found = np.array([signals.get(name, math.nan) for name in self.signals], dtype=float)
        z = (found - np.array(self.mean)) / np.array(self.deviation)
        return float(self.bias + np.clip(np.nan_to_num(z), -3, 3) @ np.array(self.weights))

    def highest(self, signals: dict[str, float]) -> float:
        """The highest estimate that these signals leave possible, whatever those become that are not there yet."""
        open_ = sum(3 * abs(weight) for name, weight in zip(self.signals, self.weights) if name not in signals)
        known = {name: signals.get(name, mean) for name, mean in zip(self.signals, self.mean)}
        return self.estimate(known) + open_

    def decide(self, signals: dict[str, float]) -> str:
        """`accept`, `blend` or `reject`.

        Whatever the estimate, rejected is what has an implausible camera or none of the signals that the estimate uses.
        """
        value = self.estimate(signals)
        decision = "accept" if value >= self.accept else "blend" if value >= self.blend else "reject"
        used = [name for name, weight in zip(self.signals, self.weights) if weight]
        blind = bool(used) and not any(math.isfinite(signals.get(name, math.nan)) for name in used)
        return "reject" if blind or signals.get("camera_implausible", 0.0) > 0 else decision

    def write(self, path: Path) -> None:
        """As JSON; a threshold that nothing reaches (infinity) is null there."""
        write_json(path, self)


def read_calibration(path: str | Path | None = None) -> Calibration:
    """The calibration in a JSON file, or the bundled one. Raises `UserError` for a file that is not one."""
    path = Path(absolute(path)) if path else BUNDLED
    try:
        content = read_json(path)
        never = {key: math.inf for key in ("accept", "blend") if content.get(key, 0.0) is None}
        calibration = Calibration(**{**content, **never})
        calibration.decide({})  # lengths and types fit
        return calibration
    except (UserError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"gate.calibration: {path} is no calibration file ({reason(error)}); write one with 04_reliability."
        ) from error


def blend_predictions(original: Prediction, adapted: Prediction, disagreement: Tensor) -> Prediction:
    """By region: adapted where the experts agree, original where they do not, half and half at `DISAGREEMENT`.

    disagreement (h,w) of any size. Depths are mixed as logarithms, the adapted one after its median ratio to the
    original; camera, mask and scale are the original's.
    """
    size = original.depth.shape
    spread = F.interpolate(disagreement[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    share = 1 / (1 + (spread / DISAGREEMENT).square())
    difference, offset = log_difference(adapted.depth, original.depth, original.mask)
    change = torch.where(torch.isfinite(difference), share * (difference - offset), 0.0)
    depth = original.depth * change.exp()
    disparity = None
    if original.disparity is not None:
        disparity = torch.lerp(original.disparity, fitted_disparity(adapted.disparity, original.disparity), share)
    return with_depth(original, depth, disparity)
