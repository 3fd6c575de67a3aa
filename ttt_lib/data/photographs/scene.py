"""What travels: photographs of one scene with their cameras, and tracks whose depth is known up to the scene's scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_lib.core.errors import DataError
from ttt_lib.data.photographs.signals import cells_of
from ttt_lib.geometry.cameras import transform_points


@dataclass
class Tracks:
    """Points of the scene as one photograph sees them. N may be 0.

    uv (N,2) float32 in [0,1], pixel centres at (i + 0.5) / size; depth (N,) float32 along the optical axis, in the
    scene's one unit; track_id (N,) long, the same for a point in all photographs; weight (N,) float32 in [0,1],
    `exp(-e^2)` with the reprojection error e in pixels of the picture that was matched (longest side at most
    `job.LONGEST_SIDE`); bent (N,2) float32, what would be added to the log of the depth were the focal length as much
    longer, or shorter, as may be (`focal.POSSIBLE`), up to one factor for all; None where it is known.
    """

    uv: Tensor
    depth: Tensor
    track_id: Tensor
    weight: Tensor
    bent: Tensor | None = None

    def __len__(self) -> int:
        return len(self.depth)

    def __getitem__(self, which: Tensor) -> Tracks:
        """The tracks that a mask (N,) or indices name."""
        parts = (self.uv, self.depth, self.track_id, self.weight, self.bent)
        return Tracks(*(None if part is None else part[which] for part in parts))

    def otherwise(self) -> list[Tracks]:
        """The tracks as they would be with the other focal lengths that are possible; none where it is known."""
        bent = [] if self.bent is None else self.bent.unbind(-1)
        return [replace(self, depth=self.depth * change.exp()) for change in bent]

    def common(self, other: Tracks) -> tuple[Tensor, Tensor]:
        """Where in these and in the other's tracks the points lie that both photographs see, 2 x (K,) long."""
        found = np.intersect1d(self.track_id, other.track_id, return_indices=True)
        return torch.from_numpy(found[1]), torch.from_numpy(found[2])

    @property
    def cells(self) -> Tensor:
        """The cell of each track, (N,) long: see `signals.cells_of`."""
        return torch.from_numpy(cells_of(self.uv.numpy()))

    def filled_cells(self) -> int:
        """How many of the picture's cells hold a track."""
        return len(self.cells.unique())

    @staticmethod
    def none() -> Tracks:
        """No tracks."""
        return Tracks(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0))


@dataclass
class Photograph:
    """One picture of the scene.

    source: the image (3,H,W) float32 in [0,1], or a function that reads it, so that a scene of many photographs needs
    the memory of one. intrinsics (3,3) float32, normalised. pose (4,4) float32, world -> camera (OpenCV: x right, y
    down, z forward); None where the scene was not reconstructed. Image, intrinsics and tracks are those of one pinhole
    camera: where a lens has distortion, the image is read without it (`undistort`) and the tracks lie in that.
    Without a camera (left out, or of a refused scene) the image is as it was taken. seen: where the image shows what the
    camera saw, as a function of a size (height, width) that gives (H,W) bool; None: everywhere.
    """

    name: str
    source: Tensor | Callable[[], Tensor]
    intrinsics: Tensor | None = None
    tracks: Tracks = field(default_factory=Tracks.none)
    pose: Tensor | None = None
    seen: Callable[[tuple[int, int]], Tensor] | None = None

    @property
    def image(self) -> Tensor:
        """(3,H,W) float32 in [0,1], read again each time where it comes from a file."""
        return self.source if isinstance(self.source, Tensor) else self.source()

    def __repr__(self) -> str:
        return f"Photograph({self.name}: {len(self.tracks)} tracks in {self.tracks.filled_cells()} cells)"


@dataclass
class Scene:
    """Photographs of one scene in one scale, which is unknown unless the poses that were given have one.

    photographs: those with cameras and tracks; of a refused scene all that can be read, without either. left_out:
    (name, reason) of the others; rest: those of them that can be read. refused: "" or the one sentence that says why
    these photographs tell nothing. about: the signals as far as they were reached:

        focal            focal length over width, of each camera
        focal_deviation  standard deviation of the log of the one that is known least
        focal_doubt      what that does to the depth, a median |log ratio|
        forward          whether the cameras moved along their axis
        explained        share of the matches that the cameras explain; where cameras were given, that became points
        seen_parallax    median over all points of the largest angle between two rays to it, degrees
        flat             share of the points that lie on one plane
        agreement        largest median |log depth ratio| between reconstructions, up to scale
        second_try       where points with little parallax had to help
        points           tracks in all photographs together
        parallax         median over tracks of the largest angle between two rays to it, degrees
        cells            the fewest cells with tracks of a photograph
        error            median reprojection error, pixels
        scale            where the cameras were given: that theirs is kept
        origin           (3,) to be added for the coordinates of given cameras that stood far from their origin
        undistorted      photographs that are read without the distortion of their lenses, if there are any
        distortion       COLMAP's k of SIMPLE_RADIAL, of each camera of which it was found
    """

    photographs: list[Photograph]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    rest: list[Photograph] = field(default_factory=list)

    def __repr__(self) -> str:
        facts = [f"{len(self.photographs)} photographs"]
        facts += [f"{key} {value:.3g}" for key, value in self.about.items() if isinstance(value, int | float)]
        facts += [f"left out {', '.join(name for name, _ in self.left_out)}"] if self.left_out else []
        facts += [f"refused: {self.refused}"] if self.refused else []
        return f"Scene({'; '.join(facts)})"

    def track_ids(self) -> Tensor:
        """Ids of all tracks, (T,) long, sorted."""
        return torch.cat([p.tracks.track_id for p in self.photographs] or [torch.zeros(0, dtype=torch.long)]).unique()


def split(scene: Scene, share: float, generator: torch.Generator) -> tuple[Scene, Scene]:
    """The scene with the tracks to use and with those to hold back; a track is on one side in all photographs.

    Args:
        share: of the tracks that are held back, from 0 to 1 (rounded to whole tracks).
        generator: decides which.

    Returns:
        (used, held_back), scenes with the same photographs.
    """
    ids = scene.track_ids()
    order = ids[torch.randperm(len(ids), generator=generator)]
    count = round(share * len(ids))

    def only(kept: Tensor) -> Scene:
        photographs = [replace(p, tracks=p.tracks[torch.isin(p.tracks.track_id, kept)]) for p in scene.photographs]
        return replace(scene, photographs=photographs)

    return only(order[count:]), only(order[:count])


def track_points(photograph: Photograph) -> Tensor:
    """The photograph's tracks in the world, (N,3) float64, in the scene's unit. It must have a camera."""
    tracks, intrinsics, pose = photograph.tracks, photograph.intrinsics, photograph.pose
    if intrinsics is None or pose is None:
        raise DataError(f"{photograph.name}: has no camera; the scene was not reconstructed.")
    rays = torch.cat([tracks.uv, torch.ones_like(tracks.depth)[:, None]], -1).double()
    seen = rays @ torch.linalg.inv(intrinsics.double()).mT * tracks.depth.double()[:, None]
    return transform_points(seen, torch.linalg.inv(pose.double()))
