"""Cameras and point maps: mirror, crops, rigid motion, projection, depth edges. Pure functions on tensors.

Camera frame as OpenCV: x right, y down, z forward. Intrinsics are (..., 3, 3), normalised by image width and height,
so `u = fx * x / z + cx` lies in [0, 1] and pixel i has its centre at (i + 0.5) / width. Small matrices broadcast over
points: a function of points (..., 3) takes matrices (..., n, n) whose leading dimensions broadcast with theirs (for a
batch of maps (B,H,W,3), pass `matrix[:, None, None]`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MIRROR = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))


def uv_map(
    height: int, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normalised coordinates of the pixel centres, (H, W, 2) with (u, v) in (0, 1)."""
    v = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
    u = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)


def shrunk(size: Sequence[int], longest: int) -> tuple[int, ...]:
    """The size (H, W) of a picture whose longer side has at most so many pixels; never larger, and no side is 0."""
    factor = min(1.0, longest / max(size))
    return tuple(max(1, round(side * factor)) for side in size)


def unproject(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Depth map to point map: depth (..., H, W) and intrinsics (..., 3, 3) -> (..., H, W, 3), units of the depth."""
    uv = uv_map(*depth.shape[-2:], device=depth.device, dtype=depth.dtype)
    rays = torch.cat([uv, torch.ones_like(uv[..., :1])], -1) @ inverse(intrinsics)[..., None, :, :].mT
    return rays * depth[..., None]


def unproject_far(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """`unproject` of a depth that may be infinite: a ray's zero coordinate times infinity is no number."""
    return torch.where(torch.isinf(depth)[..., None], torch.inf, unproject(depth, intrinsics))


def inverse(matrix: Tensor) -> Tensor:
    """As `torch.linalg.inv`, without waiting for a GPU to say whether there is one (not finite where there is none)."""
    return torch.linalg.inv_ex(matrix).inverse


def _apply(matrix: Tensor, points: Tensor) -> Tensor:
    """(..., 3, 3) times (..., 3), broadcast. Three multiply-adds: a small matrix product a point is far slower."""
    x, y, z = points[..., :1], points[..., 1:2], points[..., 2:]
    return matrix[..., 0] * x + matrix[..., 1] * y + matrix[..., 2] * z


def project(points: Tensor, intrinsics: Tensor) -> Tensor:
    """Points (..., 3) to normalised image coordinates (..., 2). Behind the camera the result has no meaning."""
    homogeneous = _apply(intrinsics, points)
    return homogeneous[..., :2] / homogeneous[..., 2:]


def camera_matrix(focal: Tensor, centre: Tensor | float) -> Tensor:
    """Intrinsics (..., 3, 3) without skew: focal lengths (..., 2) and principal point (..., 2), one number for both of it."""
    matrix = torch.diag_embed(F.pad(focal, (0, 1), value=1.0))
    matrix[..., :2, 2] = centre
    return matrix


def intrinsics_from_fov(fov_x: float | Tensor, aspect_ratio: float) -> Tensor:
    """Intrinsics (..., 3, 3) of a centred camera with square pixels; fov_x in degrees, aspect_ratio width / height."""
    fov_x = torch.as_tensor(fov_x, dtype=torch.float32)
    focal = 0.5 / torch.tan(torch.deg2rad(fov_x) / 2)
    return camera_matrix(torch.stack([focal, focal * aspect_ratio], -1), 0.5)


def fov_from_intrinsics(intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical field of view in degrees, exact also for an off-centre principal point."""

    def angle(focal: Tensor, centre: Tensor) -> Tensor:
        return torch.rad2deg(torch.atan(centre / focal) + torch.atan((1 - centre) / focal))

    return (
        angle(intrinsics[..., 0, 0], intrinsics[..., 0, 2]),
        angle(intrinsics[..., 1, 1], intrinsics[..., 1, 2]),
    )


def mirror_points(points: Tensor) -> Tensor:
    """The point map (..., H, W, 3) of the mirrored image: columns flipped and x negated."""
    flipped = points.flip(-2)
    return torch.cat([-flipped[..., :1], flipped[..., 1:]], -1)


def mirror_intrinsics(intrinsics: Tensor) -> Tensor:
    """Intrinsics of the mirrored image: cx becomes 1 - cx."""
    mirrored = intrinsics.clone()
    mirrored[..., 0, 2] = 1 - intrinsics[..., 0, 2]
    return mirrored


def transform_points(points: Tensor, transform: Tensor) -> Tensor:
    """Rigid motion (or reflection) of points (..., 3) by matrices (..., 4, 4)."""
    return _apply(transform[..., :3, :3], points) + transform[..., :3, 3]


def rotation_between(source: Tensor, target: Tensor) -> Tensor:
    """The smallest rotation (..., 3, 3) that takes direction `source` (..., 3) to `target` (not for opposite ones)."""
    a, b = F.normalize(source, dim=-1), F.normalize(target, dim=-1)
    axis = torch.linalg.cross(a, b)
    zero = torch.zeros_like(axis[..., 0])
    x, y, z = axis.unbind(-1)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    cosine = (a * b).sum(-1)[..., None, None]
    return torch.eye(3, device=a.device, dtype=a.dtype) + skew + skew @ skew / (1 + cosine)


def recentred_crop(intrinsics: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A crop as a turned camera, so that the principal point of the crop is its centre.

    intrinsics (..., 3, 3); centre (..., 2) of the crop in normalised coordinates; scale (...) of its field of view
    (ratio of tangents). The camera turns until `centre` is on its axis; the field of view shrinks further where the
    crop would leave the image. Returns the rotation (..., 3, 3), original camera -> crop camera, and the crop's
    intrinsics (..., 3, 3), principal point (0.5, 0.5), aspect ratio as the original's.
    """
    back = inverse(intrinsics)
    one = torch.ones_like(centre[..., :1])
    ray = (back @ torch.cat([centre, one], -1)[..., None])[..., 0]
    axis = torch.zeros_like(ray)
    axis[..., 2] = 1.0
    rotation = rotation_between(ray, axis)

    # The image's frame seen by the turned camera is a quadrilateral; the crop is the largest rectangle of the wanted
    # shape around the axis inside it: the intersection of its diagonals' directions with the four sides.
    corners = torch.tensor([[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=centre.dtype)
    corners = corners.to(centre.device, non_blocking=True)
    seen = (rotation @ back)[..., None, :, :] @ corners[..., None]
    seen = seen[..., :2, 0] / seen[..., 2:, 0].clamp_min(1e-6)  # (..., 4, 2)
    following = seen.roll(-1, dims=-2)
    along = following - seen
    inner = torch.stack([-along[..., 1], along[..., 0]], -1)  # points inwards for this order of corners
    distance = -(inner * seen).sum(-1)  # of the axis from each side, times the norm of `inner`
    half = scale[..., None] * 0.5 / torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], -1)
    reach = (inner.abs() * half[..., None, :]).sum(-1)  # how far the rectangle extends towards each side
    shrink = (distance / reach.clamp_min(1e-12)).amin(-1).clamp(1e-3, 1.0)
    return rotation, camera_matrix(0.5 / (half * shrink[..., None]), 0.5)


def plain_crop(intrinsics: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """Intrinsics (..., 3, 3) of a crop that is only cut out: its principal point is off its centre.

    centre (..., 2) and scale (...) in units of the image; the window is moved inside the image where it overlaps the
    border.
    """
    side = scale[..., None].expand_as(centre)
    start = torch.minimum(torch.maximum(centre - side / 2, torch.zeros_like(centre)), 1 - side)
    return camera_matrix(1 / side, -start / side) @ intrinsics


def look_at_transform(offset: Tensor, target: Tensor, roll: Tensor | float = 0.0) -> Tensor:
    """Camera at `offset` turned so that `target` lies in the direction in which the original camera saw it.

    offset and target (..., 3) in the original camera's frame; roll (...) radians about the new axis. Returns
    (..., 4, 4), original camera -> new camera. Raises nothing: a target at the offset gives no turn.
    """
    rotation = rotation_between(target - offset, target.expand_as(offset))
    roll = torch.as_tensor(roll, dtype=offset.dtype, device=offset.device).expand(offset.shape[:-1])
    cosine, sine, zero, one = roll.cos(), roll.sin(), torch.zeros_like(roll), torch.ones_like(roll)
    about_axis = torch.stack([cosine, -sine, zero, sine, cosine, zero, zero, zero, one], -1).unflatten(-1, (3, 3))
    rotation = about_axis @ rotation
    transform = torch.zeros(*offset.shape[:-1], 4, 4, device=offset.device, dtype=offset.dtype)
    transform[..., :3, :3] = rotation
    transform[..., :3, 3] = -(rotation @ offset[..., None])[..., 0]
    transform[..., 3, 3] = 1.0
    return transform
