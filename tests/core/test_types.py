"""What a sample says of itself."""

from __future__ import annotations

import torch

from ttt_lib.core.types import Sample
from ttt_lib.geometry.cameras import fov_from_intrinsics


def test_the_field_of_view_counts_both_sides_of_the_principal_point():
    lens = torch.tensor([[0.5, 0, 0.0], [0, 0.5, 0.5], [0, 0, 1]])  # the axis at the left edge: all of it to one side
    sample = Sample("a", "b", torch.zeros(3, 20, 20), intrinsics=lens)
    across, down = fov_from_intrinsics(lens)
    assert abs(float(across) - 63.4349) < 1e-3 and abs(float(down) - 90) < 1e-3  # atan(2), and 2 atan(1)
    assert "field of view 63 x 90 degrees" in repr(sample)
