"""Drawing through OpenGL: the process's context, and one scene of pyrender."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_lib.core.errors import UserError
from ttt_lib.views.mesh import BEYOND, NEAR, Mesh

INSTALL_GL = (
    "install a GL library (Debian: `apt-get install libegl1 libgl1-mesa-dri` or `libosmesa6`), or use backend 'torch'"
)
_drawing = threading.RLock()  # a context is bound to one thread at a time
_context: dict[str, Any] = {}  # pid, platform, renderer
ASSETS = Path(__file__).parents[1] / "assets"  # with flat.vert and flat.frag, the shaders that draw


def _view_renderer(width: int, height: int) -> Any:
    """pyrender's renderer with shaders of our own, one sample a pixel (four mix colours and depths at silhouettes), and
    the depth buffer as it is, (h,w) in [0,1], so that one read of each buffer does."""
    import pyrender.renderer as base
    from OpenGL import GL
    from pyrender.shader_program import ShaderProgramCache

    class ViewRenderer(base.Renderer):
        def _read_main_framebuffer(self, scene: Any, flags: int) -> tuple[np.ndarray, np.ndarray]:
            width, height = self._main_fb_dims
            GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, self._main_fb_ms)
            colour = GL.glReadPixels(0, 0, width, height, GL.GL_RGBA, GL.GL_UNSIGNED_BYTE)
            depth = GL.glReadPixels(0, 0, width, height, GL.GL_DEPTH_COMPONENT, GL.GL_FLOAT)
            colour = np.frombuffer(colour, np.uint8).reshape(height, width, 4)
            return colour[::-1], np.frombuffer(depth, np.float32).reshape(height, width)[::-1]

    original = base.glRenderbufferStorageMultisample

    def single_sample(target: int, samples: int, form: int, width: int, height: int) -> None:
        original(target, 0, form, width, height)

    base.glRenderbufferStorageMultisample = single_sample
    renderer = ViewRenderer(width, height)
    renderer._program_cache = ShaderProgramCache(ASSETS)
    return renderer


def _import_pyrender() -> ModuleType:
    """pyrender, without its window where that cannot be had: its toolkit wants X libraries, which GPU servers lack."""
    try:
        import pyrender
    except Exception:  # of many kinds: what a missing library looks like is pyglet's affair
        sys.modules["pyrender.viewer"] = viewer = ModuleType("pyrender.viewer")
        viewer.Viewer = None
        import pyrender
    return pyrender


def _make_context() -> Any:
    """An `OffscreenRenderer` on the platform that `PYOPENGL_PLATFORM` names; with EGL, on the device `EGL_DEVICE_ID` (0)."""
    renderer = _import_pyrender().OffscreenRenderer(64, 64)
    renderer._renderer = _view_renderer(64, 64)
    _let_go(renderer)
    return renderer


def _let_go(renderer: Any) -> None:
    """Unbind the context from this thread, so that another may draw (JupyterLab calls widgets from a thread of its own).

    pyrender binds it before drawing and leaves it bound.
    """
    display = getattr(renderer._platform, "_egl_display", None)
    if display is not None:
        from OpenGL.EGL import EGL_NO_CONTEXT, EGL_NO_SURFACE, eglMakeCurrent

        eglMakeCurrent(display, EGL_NO_SURFACE, EGL_NO_SURFACE, EGL_NO_CONTEXT)


def gl_renderer() -> Any:
    """The `pyrender.OffscreenRenderer` of this process, made on first use.

    EGL is tried first, then OSMesa, unless `PYOPENGL_PLATFORM` chooses. Raises `UserError` when neither works, and in a
    child forked from a process that had a context: GL drivers do not survive a fork.
    """
    with _drawing:
        if _context and _context["pid"] != os.getpid():
            raise UserError(
                "backend 'pyrender': this process was forked from one that draws; start it by spawn, or use 'torch'."
            )
        if not _context:
            _context.update(_first_that_works())
        return _context["renderer"]


def _first_that_works() -> dict[str, Any]:
    """The process's context: pid, platform and renderer. Raises `UserError` where no platform makes one."""
    asked, loaded, problems = os.environ.get("PYOPENGL_PLATFORM"), "OpenGL" in sys.modules, []
    for platform in [asked] if asked else ["egl", "osmesa"]:
        os.environ["PYOPENGL_PLATFORM"] = platform
        try:
            return {"pid": os.getpid(), "platform": platform, "renderer": _make_context()}
        except Exception as error:
            problems.append(f"{platform}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            if not loaded:
                for name in [n for n in sys.modules if n.split(".")[0] in ("OpenGL", "pyrender")]:
                    del sys.modules[name]  # PyOpenGL binds to a platform at import
            if asked is None:
                os.environ.pop("PYOPENGL_PLATFORM", None)
    raise UserError(f"backend 'pyrender': no GL context could be made ({'; '.join(problems)}); {INSTALL_GL}.")


def platform() -> str:
    """What the process's context draws through, e.g. `egl`; only after `gl_renderer`."""
    return _context["platform"]


# -------------------------------------------------------------------------------------------------- pyrender scene


class GLScene:
    """One mesh on the GPU and a camera that moves."""

    def __init__(self, mesh: Mesh) -> None:
        import pyrender

        self.renderer, self.pid = gl_renderer(), os.getpid()
        vertices = mesh.vertices.cpu().numpy() * np.array([1, -1, -1], dtype=np.float32)  # OpenGL: y up, z backwards
        colours = np.concatenate([mesh.colours.cpu().numpy(), np.ones((len(vertices), 1), np.float32)], 1)
        faces, solid = mesh.faces.cpu().numpy()[:, ::-1], mesh.solid.cpu().numpy()  # counter-clockwise from the front
        front = faces[solid]
        # Both triangles of a pixel together: a vertex that was just used need not be transformed again.
        front = front[np.argsort(front.min(1), kind="stable")]
        used, curtains = np.unique(faces[~solid], return_inverse=True)
        hidden = np.zeros((len(used), 4), np.float32)  # alpha 0: drawn, hides what is behind, and is unknown
        parts = (vertices, colours, front), (vertices[used], hidden, curtains.reshape(-1, 3))
        material = pyrender.MetallicRoughnessMaterial(alphaMode="OPAQUE", baseColorFactor=[1.0] * 4, doubleSided=True)
        primitives = [
            pyrender.Primitive(positions=place, color_0=colour, indices=np.ascontiguousarray(faces), material=material)
            for place, colour, faces in parts
            if len(faces)
        ]
        self.near, self.far = NEAR * mesh.nearest, 2 * BEYOND * mesh.farthest
        self.scene = pyrender.Scene(bg_color=[0.0] * 4, ambient_light=[1.0] * 3)
        if primitives:
            self.scene.add(pyrender.Mesh(primitives))
        self.camera = pyrender.IntrinsicsCamera(1, 1, 0, 0, znear=self.near, zfar=self.far)
        self.node = self.scene.add(self.camera)

    def draw(self, transform: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """As `torch_backend.rasterise`: one view after the other, on the tensors' device."""
        gl_renderer()  # refuses where this process was forked from the one that made the scene
        views = zip(transform.double().cpu().numpy(), intrinsics.double().cpu().numpy())
        drawn = [self._draw(t, k, size) for t, k in views]
        colour, buffer = (torch.from_numpy(np.stack(maps)).to(transform.device) for maps in zip(*drawn))
        left = 1 - buffer  # exact, and no cancellation below: far things keep their digits
        depth = torch.where(left > 0, self.near / (left + buffer * (self.near / self.far)), 0.0)
        mask = (colour[..., 3] > 127) & (depth > 0)
        return colour.permute(0, 3, 1, 2)[:, :3].contiguous().to(transform).div_(255), depth, mask

    def _draw(
        self, transform: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Colour uint8 (h,w,4) and depth buffer (h,w), float32 in [0,1], from one camera, OpenCV transform (4,4)."""
        import pyrender

        height, width = size
        flip = np.diag([1.0, -1.0, -1.0, 1.0])
        self.scene.set_pose(self.node, flip @ np.linalg.inv(transform) @ flip)
        self.camera.fx, self.camera.fy = intrinsics[0, 0] * width, intrinsics[1, 1] * height
        self.camera.cx, self.camera.cy = intrinsics[0, 2] * width, intrinsics[1, 2] * height
        with _drawing:
            self.renderer.viewport_width, self.renderer.viewport_height = width, height
            try:
                return self.renderer.render(self.scene, flags=pyrender.RenderFlags.FLAT | pyrender.RenderFlags.RGBA)
            finally:
                _let_go(self.renderer)

    def free(self) -> None:
        """Delete the mesh's buffers, unless this is a forked child, where they are the parent's."""
        if self.pid != os.getpid() or _context.get("pid") != self.pid:
            return
        with _drawing:
            self.renderer._platform.make_current()
            for mesh in list(self.scene.meshes):
                for primitive in mesh.primitives:
                    primitive.delete()
                self.renderer._renderer._meshes.discard(mesh)  # other scenes' meshes stay
            _let_go(self.renderer)
        self.scene.clear()
