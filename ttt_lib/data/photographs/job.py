"""pycolmap in a process of its own: what travels there and back, and the call of a function there.

Its seeds and logs stay there, a crash of it ends one job, and the libraries inside it do not meet those of Pillow (loaded
together, the PNG encoder of one writes over the other's memory). The modules that are called there know neither Pillow nor
torch: it must start at once. Fixed seeds, and one thread for each thing that is computed: the same job gives the same result,
however many of them are computed side by side.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from ttt_lib.core.errors import printable

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
T = TypeVar("T")

CELLS = 4  # a picture has CELLS x CELLS cells, in which its tracks are counted
LONGEST_SIDE = 1200  # pixels of the pictures that are matched
FARTHEST = 1e8  # units, of given cameras and points: a coordinate beyond is no measurement
LEAST_FOCAL = 0.02  # of the picture's side, of given cameras: 175 degrees
MIN_MATCHES = 40  # verified matches with some other photograph
USUAL_FOCAL, UNKNOWN = 0.85, 0.3  # of the width, where nothing is known: a phone, a small camera; deviation of its log


class Needed(NamedTuple):
    """The parallax that photographs must have, in pixels of what is matched between two rays to a point.

    mapped: of a point that takes part in a reconstruction; median: of all its points; track: of what becomes a track, as a
    share of that; least: degrees that the median must have, however many pixels they are.
    """

    mapped: float
    median: float
    track: float
    least: float


AMPLE = Needed(mapped=4.0, median=8.0, track=0.75, least=1.0)  # with less, noise bends the scene a little
SCANT = Needed(mapped=0.5, median=3.0, track=0.5, least=0.0)  # the second chance: a street, a small stereo rig


class Refusal(Exception):
    """Ends a reconstruction inside this sub-package; its text becomes `Scene.refused`. sure: of a cause that points with
    less parallax would not take away."""

    def __init__(self, text: str, sure: bool = False) -> None:
        super().__init__(text)
        self.sure = sure


@dataclass
class Picture:
    """A photograph before anything is known of it.

    source: the image (3,H,W) in [0,1] or a function that reads it; focal: over its width, or None; exact: whether EXIF or
    the user says it, rather than a model that guesses; camera: pictures of one size with the same word share one camera.
    """

    name: str
    source: Tensor | Callable[[], Tensor]
    focal: float | None = None
    exact: bool = False
    camera: str = ""

    def read(self) -> Tensor:
        """The image, (3,H,W) in [0,1]."""
        return self.source() if callable(self.source) else self.source


class Lens(NamedTuple):
    """A camera: model, one of COLMAP's; width, height in pixels; params as COLMAP orders them, in pixels."""

    model: str
    width: int
    height: int
    params: tuple[float, ...]

    @property
    def pinhole(self) -> Lens:
        """The same lens without its distortion: its focal lengths and its centre."""
        focal, *rest = self.params[: self._pinhole_params]
        fx, fy, cx, cy = (focal, focal, *rest) if len(rest) == 2 else (focal, *rest)
        return Lens("PINHOLE", self.width, self.height, (fx, fy, cx, cy))

    @property
    def distortion(self) -> tuple[float, ...]:
        """The parameters that bend straight lines, as COLMAP orders them; none where it has none, or all are zero."""
        bending = self.params[self._pinhole_params :]
        return bending if any(bending) else ()

    @property
    def _pinhole_params(self) -> int:
        return 3 if self.model.startswith("SIMPLE_") or self.model == "RADIAL" else 4


@dataclass
class SparseModel:
    """A reconstruction as arrays: I registered images, P points, M observations of them.

    image (I,) long: its place among the photographs, or its id; pose (I,4,4) world -> camera; size (I,2) width and
    height; intrinsics (I,4) fx, fy, cx, cy in pixels, NaN of a fisheye; xyz (P,3). Of an observation: seen_by (M,) row of
    the image, feature (M,) number of the picture's feature, point (M,) row of xyz, uv (M,2) in pixels with the first
    pixel's centre at 0.5, of the picture without distortion, NaN where that does not reach, depth (M,), error (M,) of
    reprojection in pixels of the picture as it was taken, NaN where the camera cannot project it.
    explained (I,): of each image the share of its verified matches that its cameras explain; None where none are known.
    bent (M,2): see `Tracks`; None where the focal length is no question. made: what pycolmap made of the matches; it
    stays in the process.
    """

    image: np.ndarray
    pose: np.ndarray
    size: np.ndarray
    intrinsics: np.ndarray
    xyz: np.ndarray
    seen_by: np.ndarray
    feature: np.ndarray
    point: np.ndarray
    uv: np.ndarray
    depth: np.ndarray
    error: np.ndarray
    explained: np.ndarray | None = None
    bent: np.ndarray | None = None
    made: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "made": None}


@dataclass
class Selection:
    """which (M,) bool: the observations that become tracks; error (M,) in pixels of a picture of at most LONGEST_SIDE;
    angle (P,) degrees, the parallax of each point; weak: image -> why its tracks are too few."""

    which: np.ndarray
    error: np.ndarray
    angle: np.ndarray
    weak: dict[int, str]


@dataclass
class Job:
    """What is known so far of photographs that are compared in a folder, where each lies as gray_0.npy, gray_1.npy, ...

    pictures: without their sources; of the gray ones sizes (width, height) and digests. kept: those that take part;
    left_out: place -> why of the others; camera_of: of each the number of its lens; of pairs of photographs inliers
    (verified matches), moved (pixels that three quarters of them stay below), flat (the share of them that one
    homography explains). needed: the parallax. straight: whether the pictures are said to be those of pinhole
    cameras; looked, settled: whether another distortion of their lenses has been looked for, and fitted to the focal
    lengths that are believed. threads: how many things may be computed side by side. In the end about (see `Scene`), model
    and picked, or refused.
    """

    folder: Path
    pictures: list[Picture]
    sizes: list[tuple[int, int]]
    digests: list[str]
    seed: int
    in_order: bool = False
    threads: int = 1
    kept: list[int] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    lenses: list[Lens] = field(default_factory=list)
    camera_of: list[int] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    inliers: np.ndarray | None = None
    moved: np.ndarray | None = None
    flat: np.ndarray | None = None
    needed: Needed = AMPLE
    straight: bool = False
    looked: bool = False
    settled: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    model: SparseModel | None = None
    picked: Selection | None = None
    refused: str = ""

    def __post_init__(self) -> None:
        self.kept = list(range(len(self.pictures)))

    @property
    def longest(self) -> int:
        """Pixels of the longest side."""
        return max(map(max, self.sizes))

    def side_by_side(self, *calls: Callable[[], T]) -> list[T]:
        """What some calls give. pycolmap computes without Python's lock, and its random numbers are those of a thread."""
        with ThreadPoolExecutor(self.threads) as pool:
            return [each.result() for each in [pool.submit(call) for call in calls]]

    def leave_out(self, index: int, why: str) -> None:
        """From here on without this photograph."""
        self.kept.remove(index)
        self.left_out[index] = why

    def widest(self) -> tuple[int, int] | None:
        """Of the pairs with many matches the one whose matches moved furthest; None of two photographs."""
        many = max(MIN_MATCHES, float(self.inliers.max(initial=0)) / 4)
        good = [k for k, p in enumerate(self.pairs) if self.inliers[k] >= many and set(p) <= set(self.kept)]
        return self.pairs[max(good, key=lambda k: self.moved[k])] if len(self.kept) > 2 and good else None

    def focals(self) -> tuple[list[float | None], list[bool]]:
        """Of each camera the median of what is known of its focal length over the width, what is exact before any guess,
        and whether it is exact."""
        focals: list[float | None] = []
        exact = []
        for camera in range(max(self.camera_of) + 1):
            known = [p for p, c in zip(self.pictures, self.camera_of) if c == camera and p.focal]
            exact.append(any(p.exact for p in known))
            focals.append(float(np.median([p.focal for p in known if p.exact or not exact[-1]])) if known else None)
        return focals, exact


class Failed(Exception):
    """The process ended without a result; says in words how."""


def apart(task: str, patience: float, *arguments: Any) -> Any:
    """What a function gives in another process. Raises `Failed`.

    Args:
        task: `module.function` of this sub-package.
        patience: seconds that it may take.
        arguments: of the function.
    """
    program = f"import sys; sys.path[:] = {list(map(str, sys.path))!a}; from {__name__} import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    content = pickle.dumps((*task.split("."), arguments))
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], input=content, env=environment, capture_output=True, timeout=patience
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"it took longer than {patience:.0f} s") from error
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if said:
        log.log(logging.WARNING if done.returncode else logging.DEBUG, "%s: %s", task, "\n".join(said[-20:]))
    if done.returncode < 0:
        raise Failed(f"the reconstruction program was ended by signal {-done.returncode}")
    if done.returncode:
        raise Failed(printable(said[-1] if said else f"exit status {done.returncode}", 200))
    return pickle.loads(done.stdout)


def main() -> None:
    """Call what the standard input names. The result goes to the standard output, and nothing else may."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import pycolmap

    pycolmap.logging.minloglevel = 2  # errors
    module, function, arguments = pickle.load(sys.stdin.buffer)
    result = getattr(import_module(f"{__package__}.{module}"), function)(*arguments)
    with answer:
        pickle.dump(result, answer)
