"""The one real scene that comes along: both views of Middlebury's motorcycle, with their depth in metres."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ttt_lib.core.types import Sample
from ttt_lib.data import moge_layout
from ttt_lib.data.samples import SampleSet, to_sample

FOCAL = 994.978  # pixels, of the images scikit-image ships (a quarter of the original's)
PRINCIPAL_POINT = (311.193, 254.877)  # left camera, pixels with the centre of the first pixel at 0
OFFSET = 31.086  # the right camera's principal point lies this much further right
BASELINE = 0.193001  # metres


@lru_cache(maxsize=1)
def _motorcycle_frames() -> dict[str, moge_layout.Raw]:
    """Both views with their depth in metres.

    Depth = focal * baseline / (disparity + offset). A left pixel (x, y) is the right pixel (x - disparity, y): the
    reverse of the example in scikit-image's docstring, whose unknown pixels are inf rather than NaN. The right view
    has no disparity of its own: its depth is the left geometry moved over, nearest surface first, unknown elsewhere.
    Both principal points follow the convention of this package, pixel centres at i + 0.5.
    """
    import skimage.data

    left, right, disparity = skimage.data.stereo_motorcycle()
    known = np.isfinite(disparity)
    depth = np.where(known, FOCAL * BASELINE / (np.where(known, disparity, 1) + OFFSET), np.nan).astype(np.float32)
    height, width = disparity.shape

    rows, columns = np.nonzero(known)
    shifted = columns - disparity[rows, columns]
    right_depth = np.full((height, width), np.inf, dtype=np.float32)
    for column in (np.floor(shifted).astype(int), np.ceil(shifted).astype(int)):  # both neighbours: no comb of holes
        inside = (column >= 0) & (column < width)
        np.minimum.at(right_depth, (rows[inside], column[inside]), depth[rows, columns][inside])
    right_depth[~np.isfinite(right_depth)] = np.nan

    def intrinsics(offset: float) -> np.ndarray:
        cx, cy = (PRINCIPAL_POINT[0] + offset + 0.5) / width, (PRINCIPAL_POINT[1] + 0.5) / height
        return np.array([[FOCAL / width, 0, cx], [0, FOCAL / height, cy], [0, 0, 1]], dtype=np.float32)

    return {
        "motorcycle_left": moge_layout.Raw(left[..., :3].copy(), depth, intrinsics(0.0)),
        "motorcycle_right": moge_layout.Raw(right[..., :3].copy(), right_depth, intrinsics(OFFSET)),
    }


def open_motorcycle(
    width: int = 384, height: int = 256, name: str | None = None, count: int | None = None
) -> SampleSet:
    """Both views of the Middlebury 2014 motorcycle that scikit-image ships: real photographs, real metric depth.

    Seen as MoGe's evaluation sees a set (centred camera). Source: Scharstein et al., GCPR 2014.
    """
    names = ["motorcycle_left", "motorcycle_right"][:count]

    def load(sample: str) -> Sample:
        view = moge_layout.target_view(_motorcycle_frames()[sample], width, height, 1.0)
        return to_sample(sample, name or "motorcycle", view, True, False)

    scenes = {"motorcycle": ["motorcycle_left", "motorcycle_right"]}
    return SampleSet(name or "motorcycle", names, load, f"motorcycle {width}x{height}", scenes=scenes)
