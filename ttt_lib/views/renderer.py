"""Novel views: the predicted scene seen from another camera, with the pixels nobody has seen masked out.

Two backends draw the same mesh (`mesh.build_mesh`): pyrender, offscreen through EGL or OSMesa, and a z-buffer in
torch that needs no GL and stays on the tensors' device.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ttt_lib.core.errors import UserError
from ttt_lib.geometry.cameras import MIRROR, mirror_intrinsics, mirror_points, uv_map
from ttt_lib.geometry.warp import EDGE_RTOL
from ttt_lib.views.mesh import Mesh, build_mesh
from ttt_lib.views.pyrender_backend import GLScene, gl_renderer, platform
from ttt_lib.views.torch_backend import rasterise


class RenderedView(NamedTuple):
    """B views: image (B,3,h,w) in [0,1] (0 where nothing is drawn), points (B,h,w,3) in each view's camera, NaN where
    unknown, mask (B,h,w) True where known."""

    image: Tensor
    points: Tensor
    mask: Tensor


def _place(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Depth (B,h,w) to points (B,h,w,3) in cameras (B,3,3) without skew, which `unproject` would allow for."""
    u, v = uv_map(*depth.shape[-2:], device=depth.device, dtype=depth.dtype).unbind(-1)
    focal, centre = intrinsics.diagonal(dim1=1, dim2=2)[:, :2, None], intrinsics[:, :2, 2, None]
    x = (u[0] - centre[:, 0]) / focal[:, 0]  # (B, w)
    y = (v[:, 0] - centre[:, 1]) / focal[:, 1]  # (B, h)
    points = torch.empty(*depth.shape, 3, device=depth.device, dtype=depth.dtype)
    points[..., 0], points[..., 1], points[..., 2] = depth * x[:, None], depth * y[..., None], depth
    return points


class NovelViewRenderer:
    """Draws the scene of one target from other cameras.

    backend: `pyrender`, `torch`, or `auto`: torch where `device` is CUDA (the views stay there) and where no GL context
    can be made, else pyrender. Then `backend` is the one that draws, and `reason` says in one line why. edge_rtol:
    relative depth step that cuts the mesh. Raises `UserError` when `pyrender` is asked for and no GL is to be had.
    """

    def __init__(
        self,
        backend: Literal["auto", "pyrender", "torch"] = "auto",
        device: torch.device | str | None = None,
        edge_rtol: float = EDGE_RTOL,
    ) -> None:
        self.edge_rtol = edge_rtol
        self.backend, self.reason = backend, f"{backend}: as asked for"
        if backend == "pyrender":
            gl_renderer()
        elif backend == "auto" and torch.device(device or "cpu").type == "cuda":
            self.backend, self.reason = "torch", "torch: the tensors are on a GPU and the views stay there"
        elif backend == "auto":
            try:
                gl_renderer()
                self.backend, self.reason = "pyrender", f"pyrender: drawing through {platform()}"
            except UserError as error:
                self.backend, self.reason = "torch", f"torch: {error}"
        elif backend != "torch":
            raise UserError(f"novel_view.backend {backend!r}: use 'auto', 'pyrender' or 'torch'.")
        self.mesh: Mesh | None = None
        self._made_from: tuple[Tensor, Tensor] | None = None
        self._scene: GLScene | None = None

    def set_scene(self, image: Tensor, points: Tensor, mask: Tensor, intrinsics: Tensor | None = None) -> None:
        """Make the mesh of a target (it is uploaded once, at the first view): image (3,H,W), points (H,W,3) in the
        original camera, mask (H,W) bool, intrinsics (3,3); without these, silhouettes against the sky stay open."""
        self.free()
        self.mesh = build_mesh(image, points, mask, intrinsics, self.edge_rtol)
        self._made_from = image, points

    def holds(self, image: Tensor, points: Tensor) -> bool:
        """Whether the scene was made from these very tensors."""
        return self._made_from is not None and self._made_from[0] is image and self._made_from[1] is points

    def render(self, transform: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> RenderedView:
        """The scene from B cameras: transform (B,4,4) rigid, possibly with a mirror; intrinsics (B,3,3); size (h,w).

        Known are pixels whose centre sees the front of a surface that the original camera saw. The points are the
        rendered depth unprojected in the new camera. Raises `ValueError` before `set_scene`.
        """
        if self.mesh is None:
            raise ValueError("set_scene comes before render")
        # A mirrored camera is drawn unmirrored, with mirrored intrinsics, and its picture flipped.
        mirrored = torch.linalg.det(transform[:, :3, :3]) < 0
        proper = torch.where(mirrored[:, None, None], MIRROR.to(transform, non_blocking=True) @ transform, transform)
        lens = torch.where(mirrored[:, None, None], mirror_intrinsics(intrinsics), intrinsics)
        if self.backend == "torch":
            image, depth, mask = rasterise(self.mesh, proper, lens, size)
        else:
            self._scene = self._scene or GLScene(self.mesh)
            image, depth, mask = self._scene.draw(proper, lens, size)
        points = _place(torch.where(mask, depth, torch.nan), lens)
        flipped = mirrored[:, None, None]  # all are flipped, and some are taken: a GPU is not asked which
        image = torch.where(flipped[..., None], image.flip(-1), image)
        mask = torch.where(flipped, mask.flip(-1), mask)
        points = torch.where(flipped[..., None], mirror_points(points), points)
        return RenderedView(image, points, mask)

    def free(self) -> None:
        """Forget the scene and free its buffers."""
        if self._scene is not None:
            self._scene.free()
        self.mesh, self._scene, self._made_from = None, None, None

    def __del__(self) -> None:
        try:
            self.free()
        except Exception:  # the interpreter may be going down, and GL with it
            pass
