"""What a sample says of itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt_lib.core.errors import DataError
from ttt_lib.core.types import Sample, are_normalised_intrinsics
from ttt_lib.data.moge_layout import read_raw, write_frame
from ttt_lib.geometry.cameras import fov_from_intrinsics


def test_the_field_of_view_counts_both_sides_of_the_principal_point():
    lens = torch.tensor([[0.5, 0, 0.0], [0, 0.5, 0.5], [0, 0, 1]])  # the axis at the left edge: all of it to one side
    sample = Sample("a", "b", torch.zeros(3, 20, 20), intrinsics=lens)
    across, down = fov_from_intrinsics(lens)
    assert abs(float(across) - 63.4349) < 1e-3 and abs(float(down) - 90) < 1e-3  # atan(2), and 2 atan(1)
    assert "field of view 63 x 90 degrees" in repr(sample)


def camera(fx, fy, cx, cy):
    return [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]


@pytest.mark.parametrize(
    ("lens", "right"),
    [
        (camera(1.0, 1.3, 0.5, 0.5), True),
        (camera(28.0, 37.0, 0.5, 0.5), True),  # a long lens: 2 degrees
        (camera(1.0, 1.3, 0.0, 1.2), True),  # a part of a picture
        (camera(500.0, 500.0, 0.5, 0.5), False),  # focal length in pixels
        (camera(1.0, 500.0, 0.5, 0.5), False),
        (camera(1.0, 1.3, 320.0, 240.0), False),  # centre in pixels
        (camera(500.0, 500.0, 320.0, 240.0), False),
        (camera(60.0, 60.0, 0.5, 0.5), False),  # 0.95 degrees
        (camera(0.0, 1.3, 0.5, 0.5), False),
        (camera(1.0, -1.3, 0.5, 0.5), False),
        (camera(float("nan"), 1.3, 0.5, 0.5), False),
        (camera(1.0, float("nan"), 0.5, 0.5), False),
        (camera(1.0, 1.3, 0.5, 0.5)[:2], False),
    ],
)
def test_a_camera_in_pixels_or_half_of_it_enters_nowhere(tmp_path, lens, right):
    frame = np.zeros((32, 40, 3), np.uint8), np.full((32, 40), 2.0, np.float32)
    write_frame(tmp_path / "frame", *frame, np.array(camera(1.0, 1.3, 0.5, 0.5)))
    text = str(lens).replace("nan", "NaN")
    (tmp_path / "frame" / "meta.json").write_text(f'{{"intrinsics": {text}}}')
    enter = {
        "read": lambda: read_raw(tmp_path / "frame").intrinsics,
        "written": lambda: write_frame(tmp_path / "new", *frame, np.array(lens)),
        "a sample": lambda: Sample("a", "b", torch.zeros(3, 20, 20), intrinsics=torch.tensor(lens)),
    }
    assert are_normalised_intrinsics(torch.tensor(lens)) == right
    for function in enter.values():
        if right:
            function()
            continue
        with pytest.raises(DataError, match="must be a 3x3 camera matrix divided by the image's width and height"):
            function()
