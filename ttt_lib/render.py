"""Novel views: the predicted scene seen from another camera, with the pixels nobody has seen masked out.

Two backends draw the same mesh (`rasterise.build_mesh`): pyrender, offscreen through EGL or OSMesa, and a z-buffer in
torch that needs no GL and stays on the tensors' device.
"""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ttt_lib.errors import UserError
from ttt_lib.geometry import EDGE_RTOL, MIRROR, mirror_intrinsics, mirror_points, unproject
from ttt_lib.rasterise import BEYOND, Mesh, build_mesh, rasterise

INSTALL_GL = (
    "install a GL library (Debian: `apt-get install libegl1 libgl1-mesa-dri` or `libosmesa6`), or use backend 'torch'"
)


@dataclass
class RenderedView:
    """B views: image (B,3,h,w) in [0,1] (0 where nothing is drawn), points (B,h,w,3) in each view's camera, NaN where
    unknown, mask (B,h,w) True where known, intrinsics (B,3,3), transform (B,4,4) original camera -> view camera."""

    image: Tensor
    points: Tensor
    mask: Tensor
    intrinsics: Tensor
    transform: Tensor


# --------------------------------------------------------------------------------------- the process's GL context

_context: dict[str, Any] = {}  # pid, platform, renderer; at most one a process


def _single_sample(renderer_module: Any) -> None:
    """pyrender asks for four samples a pixel, which mixes colours and depths at silhouettes; a mask wants one."""
    original = renderer_module.glRenderbufferStorageMultisample
    if not getattr(original, "single_sample", False):

        def storage(target: int, samples: int, form: int, width: int, height: int) -> None:
            original(target, 0, form, width, height)

        storage.single_sample = True
        renderer_module.glRenderbufferStorageMultisample = storage


def _gl_device() -> int | None:
    """EGL device to draw on: `EGL_DEVICE_ID` if set, else that of the current CUDA device, else the first."""
    if "EGL_DEVICE_ID" in os.environ:
        return None
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def gl_renderer() -> Any:
    """The `pyrender.OffscreenRenderer` of this process, made on first use.

    EGL is tried first, then OSMesa, unless `PYOPENGL_PLATFORM` chooses. Raises `UserError` when neither works, and in
    a child forked from a process that had a context: GL drivers do not survive a fork.
    """
    if _context.get("pid") == os.getpid():
        return _context["renderer"]
    if _context:
        raise UserError(
            "backend 'pyrender': this process was forked from one that draws; start it by spawn, or use 'torch'."
        )
    wanted = os.environ.get("PYOPENGL_PLATFORM")
    loaded = "OpenGL" in sys.modules
    problems = []
    for platform in [wanted] if wanted else ["egl", "osmesa"]:
        os.environ["PYOPENGL_PLATFORM"] = platform
        device = _gl_device() if platform == "egl" else None
        if device is not None:
            os.environ["EGL_DEVICE_ID"] = str(device)
        try:
            import pyrender
            import pyrender.renderer

            _single_sample(pyrender.renderer)
            try:
                renderer = pyrender.OffscreenRenderer(64, 64)
            except ValueError:  # fewer EGL devices than CUDA devices: the first one draws too
                os.environ["EGL_DEVICE_ID"] = "0"
                renderer = pyrender.OffscreenRenderer(64, 64)
            _context.update(pid=os.getpid(), platform=platform, renderer=renderer)
            return renderer
        except Exception as error:
            problems.append(f"{platform}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            if not loaded:
                for name in [n for n in sys.modules if n.split(".")[0] in ("OpenGL", "pyrender")]:
                    del sys.modules[name]  # PyOpenGL binds to a platform at import
        finally:
            if device is not None:
                os.environ.pop("EGL_DEVICE_ID", None)
            if wanted is None and not _context:
                os.environ.pop("PYOPENGL_PLATFORM", None)
    raise UserError(f"backend 'pyrender': no GL context could be made ({'; '.join(problems)}); {INSTALL_GL}.")


@atexit.register
def free_gl() -> None:
    """Free this process's GL context, if it has one."""
    if _context.get("pid") == os.getpid():
        _context.pop("renderer").delete()
        _context.clear()


# -------------------------------------------------------------------------------------------------- pyrender scene


class _GLScene:
    """One mesh on the GPU and a camera that moves."""

    def __init__(self, mesh: Mesh) -> None:
        import pyrender

        self.renderer, self.pid = gl_renderer(), os.getpid()
        vertices = mesh.vertices.cpu().numpy() * np.array([1, -1, -1], dtype=np.float32)  # OpenGL: y up, z backwards
        colours = np.concatenate([mesh.colours.cpu().numpy(), np.ones((len(vertices), 1), np.float32)], 1)
        hidden = np.zeros_like(colours)  # alpha 0: drawn, hides what is behind, and is unknown
        faces, solid = mesh.faces.cpu().numpy(), mesh.solid.cpu().numpy()
        front = faces[solid][:, ::-1]  # counter-clockwise from the front
        unknown = np.concatenate([faces[solid], faces[~solid], faces[~solid][:, ::-1]])
        material = pyrender.MetallicRoughnessMaterial(alphaMode="OPAQUE", baseColorFactor=[1.0] * 4, doubleSided=False)
        primitives = [
            pyrender.Primitive(
                positions=vertices, color_0=colour, indices=np.ascontiguousarray(indices), material=material
            )
            for colour, indices in ((colours, front), (hidden, unknown))
            if len(indices)
        ]
        self.near, self.far = 0.02 * mesh.nearest, 2 * BEYOND * mesh.farthest
        self.scene = pyrender.Scene(bg_color=[0.0] * 4, ambient_light=[1.0] * 3)
        if primitives:
            self.scene.add(pyrender.Mesh(primitives))
        self.camera = pyrender.IntrinsicsCamera(1, 1, 0, 0, znear=self.near, zfar=self.far)
        self.node = self.scene.add(self.camera)

    def draw(self, transform: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int]) -> tuple:
        """Colour uint8 (h,w,4) and depth (h,w) from one camera, OpenCV transform (4,4)."""
        import pyrender

        height, width = size
        flip = np.diag([1.0, -1.0, -1.0, 1.0])
        self.scene.set_pose(self.node, flip @ np.linalg.inv(transform) @ flip)
        self.camera.fx, self.camera.fy = intrinsics[0, 0] * width, intrinsics[1, 1] * height
        self.camera.cx, self.camera.cy = intrinsics[0, 2] * width, intrinsics[1, 2] * height
        self.renderer.viewport_width, self.renderer.viewport_height = width, height
        return self.renderer.render(self.scene, flags=pyrender.RenderFlags.FLAT | pyrender.RenderFlags.RGBA)

    def free(self) -> None:
        """Delete the mesh's buffers, unless this is a forked child, where they are the parent's."""
        if self.pid != os.getpid() or _context.get("pid") != self.pid:
            return
        self.renderer._platform.make_current()
        for mesh in list(self.scene.meshes):
            for primitive in mesh.primitives:
                primitive.delete()
        self.renderer._renderer._meshes.clear()
        self.scene.clear()


# ---------------------------------------------------------------------------------------------------- the renderer


class NovelViewRenderer:
    """Draws the scene of one target from other cameras.

    backend: `pyrender`, `torch`, or `auto`: torch on a CUDA device (the views stay there) and where no GL context can
    be made, else pyrender. `reason` says in one line what was chosen and why. edge_rtol: relative depth step that cuts
    the mesh. Raises `UserError` when `pyrender` is asked for and no GL is to be had.
    """

    def __init__(
        self,
        backend: Literal["auto", "pyrender", "torch"] = "auto",
        device: torch.device | str | None = None,
        edge_rtol: float = EDGE_RTOL,
    ) -> None:
        self.device, self.edge_rtol = torch.device(device or "cpu"), edge_rtol
        self.backend, self.reason = backend, f"{backend}: as asked for"
        if backend == "auto":
            if self.device.type == "cuda":
                self.backend, self.reason = "torch", "torch: the tensors are on a GPU and the views stay there"
            else:
                try:
                    gl_renderer()
                    self.backend, self.reason = "pyrender", f"pyrender: drawing through {_context['platform']}"
                except UserError as error:
                    self.backend, self.reason = "torch", f"torch: {error}"
        elif backend == "pyrender":
            gl_renderer()
        elif backend != "torch":
            raise UserError(f"novel_view.backend {backend!r}: use 'auto', 'pyrender' or 'torch'.")
        self.pid = os.getpid()
        self.mesh: Mesh | None = None
        self._scene: _GLScene | None = None

    def set_scene(self, image: Tensor, points: Tensor, mask: Tensor, intrinsics: Tensor | None = None) -> None:
        """Make the mesh of a target (it is uploaded once, at the first view): image (3,H,W), points (H,W,3) in the
        original camera, mask (H,W) bool, intrinsics (3,3); without these, silhouettes against the sky stay open."""
        self.free()
        self.mesh = build_mesh(image, points, mask, intrinsics, self.edge_rtol)

    def render(self, transform: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> RenderedView:
        """The scene from B cameras: transform (B,4,4) rigid, possibly with a mirror; intrinsics (B,3,3); size (h,w).

        Known are pixels whose centre sees the front of a surface that the original camera saw. The points are the
        rendered depth unprojected in the new camera. Raises `ValueError` before `set_scene`.
        """
        if self.mesh is None:
            raise ValueError("set_scene comes before render")
        # A mirrored camera is drawn unmirrored, with mirrored intrinsics, and its picture flipped.
        mirrored = torch.linalg.det(transform[:, :3, :3]) < 0
        proper = torch.where(mirrored[:, None, None], MIRROR.to(transform) @ transform, transform)
        lens = torch.where(mirrored[:, None, None], mirror_intrinsics(intrinsics), intrinsics)
        if self.backend == "torch" or self.pid != os.getpid():  # a forked child cannot use its parent's context
            image, depth, mask = rasterise(self.mesh, proper, lens, size)
        else:
            image, depth, mask = self._render_gl(proper, lens, size)
        points = torch.where(mask[..., None], unproject(depth, lens), torch.nan)
        if bool(mirrored.any()):
            image[mirrored] = image[mirrored].flip(-1)
            mask[mirrored] = mask[mirrored].flip(-1)
            points[mirrored] = mirror_points(points[mirrored])
        return RenderedView(image, points, mask, intrinsics, transform)

    def _render_gl(self, transform: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        if self._scene is None:
            self._scene = _GLScene(self.mesh)
        drawn = [
            self._scene.draw(t, k, size)
            for t, k in zip(transform.double().cpu().numpy(), intrinsics.double().cpu().numpy())
        ]
        colour = torch.from_numpy(np.stack([c for c, _ in drawn])).to(transform.device)
        depth = torch.from_numpy(np.stack([d for _, d in drawn])).to(transform)
        mask = (colour[..., 3] > 127) & (depth > 0)
        return colour[..., :3].permute(0, 3, 1, 2).float().div(255).contiguous(), depth, mask

    def free(self) -> None:
        """Forget the scene and free its buffers."""
        if self._scene is not None:
            self._scene.free()
        self.mesh, self._scene = None, None

    def __del__(self) -> None:
        try:
            self.free()
        except Exception:  # the interpreter may be going down, and GL with it
            pass
