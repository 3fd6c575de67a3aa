"""Novel views against exact scenes seen by a second camera, with both backends."""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from ttt_lib.core.errors import UserError
from ttt_lib.data.scenes.generate import KINDS, make_scenes, place_cameras
from ttt_lib.data.scenes.raycast import Picture, draw
from ttt_lib.geometry.cameras import (
    MIRROR,
    mirror_intrinsics,
    mirror_points,
    project,
    transform_points,
    unproject,
    uv_map,
)
from ttt_lib.views import pyrender_backend as gl_module
from ttt_lib.views import renderer as renderer_module
from ttt_lib.views.draw import sample_cameras
from ttt_lib.views.mesh import build_mesh
from ttt_lib.views.pyrender_backend import gl_renderer
from ttt_lib.views.renderer import NovelViewRenderer

SIZE = (240, 320)


def gl_works() -> bool:
    try:
        gl_renderer()
        return True
    except UserError:
        return False


GL = gl_works()
BACKENDS = ["torch", "pyrender"] if GL else ["torch"]


# Every kind at every severity, each with another seed; at severity 3 with principal points off the centre.
CASES = [(kind, seed, severity) for seed, severity in ((7, 1), (8, 3), (9, 5)) for kind in KINDS]


@dataclass
class Case:
    """A picture of a scene, two cameras beside it (the second mirrored), and what they see of it, exactly."""

    picture: Picture
    moves: torch.Tensor
    lens: torch.Tensor
    truths: torch.Tensor


@functools.cache
def make_case(kind, seed, severity) -> Case:
    scenes, places = make_scenes([kind], seed)
    transform, intrinsics = place_cameras([kind], places, seed, SIZE[1] / SIZE[0])
    lens = intrinsics.repeat(2, 1, 1)
    if severity == 3:
        intrinsics[:, 0, 2], intrinsics[:, 1, 2] = 0.43, 0.55
        lens[:, 0, 2], lens[:, 1, 2] = 0.58, 0.46
    picture = draw(scenes, transform, intrinsics, SIZE, shadows=False)
    median = picture.points[0, ..., 2].nanmedian()
    moves = sample_cameras(median, severity, 2, torch.Generator().manual_seed(seed))
    truths = [
        draw(scenes, (moves[0] @ transform[0])[None], lens[:1], SIZE, shadows=False).points[0],
        mirror_points(
            draw(scenes, (moves[1] @ transform[0])[None], mirror_intrinsics(lens[1:]), SIZE, shadows=False).points[0]
        ),
    ]
    moves[1] = MIRROR @ moves[1]
    return Case(picture, moves, lens, torch.stack(truths))


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def case(request) -> Case:
    return make_case(*request.param)


@functools.cache
def render_case(parameters, backend):
    return render(make_case(*parameters), backend)


def render(case, backend, moves=None):
    picture, moves = case.picture, case.moves if moves is None else moves
    renderer = NovelViewRenderer(backend)
    renderer.set_scene(picture.image[0], picture.points[0], picture.mask[0], picture.intrinsics[0])
    return renderer.render(moves, case.lens[: len(moves)], SIZE)


def visibility(case):
    """Which pixels of the second cameras show what the first one saw, and which show what it certainly did not see.

    A point was seen if the first camera's depth there is its own to 1 %. It was certainly not seen if it lies behind
    all of the nine pixels around its place, or outside the frame by more than a pixel.
    """
    (height, width), picture, truth = SIZE, case.picture, case.truths
    back = transform_points(truth.nan_to_num(1e4), torch.linalg.inv(case.moves)[:, None, None])
    uv = project(back, picture.intrinsics[:, None, None])
    grid = 2 * uv - 1
    there = torch.isfinite(truth).all(-1) & (back[..., 2] > 0)
    depth = picture.points[..., 2].nan_to_num(1e4)[:, None].expand(len(truth), -1, -1, -1)
    own = F.grid_sample(depth, grid, mode="nearest", align_corners=False)[:, 0]
    farthest = F.grid_sample(F.max_pool2d(depth, 3, 1, 1), grid, mode="nearest", align_corners=False)[:, 0]
    inside = (grid.abs() < 1).all(-1)
    margin = torch.tensor([1 + 2 / width, 1 + 2 / height])
    seen = there & inside & ((back[..., 2] / own - 1).abs() < 0.01)
    hidden = there & ((inside & (back[..., 2] > farthest * 1.01)) | (grid.abs() > margin).any(-1))
    hidden = ~(F.max_pool2d((~hidden).float()[:, None], 3, 1, 1)[:, 0] > 0)  # edges dilated by one pixel
    return seen, hidden


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_exact_truth_from_the_second_camera(case, backend, request):
    picture, truth = case.picture, case.truths
    view = render_case(request.node.callspec.params["case"], backend)
    there = view.mask & torch.isfinite(truth).all(-1)
    error = (view.points[..., 2] / truth[..., 2] - 1).abs()
    assert (error[there] < 0.01).float().mean() > 0.95
    assert torch.isnan(view.points[~view.mask]).all() and torch.isfinite(view.points[view.mask]).all()
    # The points lie on the rays of the view's pixels.
    placed = project(view.points, case.lens[:, None, None])[view.mask]
    assert (placed - uv_map(*SIZE).expand(2, -1, -1, -1)[view.mask]).abs().max() < 1e-4
    # The colours are those of the points: what the first picture shows where each point comes from.
    back = transform_points(view.points.nan_to_num(1.0), torch.linalg.inv(case.moves)[:, None, None])
    grid = 2 * project(back, picture.intrinsics[:, None, None]) - 1
    own = F.grid_sample(picture.image.expand(2, -1, -1, -1), grid, align_corners=False, padding_mode="border")
    assert ((own - view.image).abs().amax(1)[view.mask] < 0.03).float().mean() > 0.97


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_seen_is_known_and_almost_nothing_disoccluded_is(backend):
    """97 % of what both cameras see, at each severity, and at most 0.5 % of what the first one did not see, in all.

    A single scene may keep less at severity 5: a camera that walks into the space behind a pole, which nobody saw,
    sees what lies around it through curtains only.
    """
    wrong = hidden_count = 0
    for severity in {case[2] for case in CASES}:
        known = seen_count = 0
        for parameters in (case for case in CASES if case[2] == severity):
            mask = render_case(parameters, backend).mask
            seen, hidden = visibility(make_case(*parameters))
            assert (mask & seen).sum() >= (0.97 if severity < 5 else 0.9) * seen.sum(), parameters
            known, seen_count = known + int((mask & seen).sum()), seen_count + int(seen.sum())
            wrong, hidden_count = wrong + int((mask & hidden).sum()), hidden_count + int(hidden.sum())
        assert known >= 0.97 * seen_count, f"severity {severity}: {known} of {seen_count}"
    assert hidden_count > 100_000, "these scenes hide too little to tell"
    assert wrong <= 0.005 * hidden_count, f"{wrong} of {hidden_count}"


@pytest.mark.skipif(not GL, reason="compares pyrender with torch; without any GL library there is nothing to compare")
def test_both_backends_agree(case, request):
    first, second = (render_case(request.node.callspec.params["case"], backend) for backend in ("torch", "pyrender"))
    union = (first.mask | second.mask).sum()
    assert (first.mask & second.mask).sum() / union >= 0.98
    both = first.mask & second.mask
    ratio = (first.points[..., 2] / second.points[..., 2] - 1).abs()[both]
    assert (ratio < 0.01).float().mean() >= 0.99
    assert ((first.image - second.image).abs().amax(1)[both] < 0.02).float().mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_original_camera_sees_the_original(kind, backend):
    case = make_case(kind, 7, 1)
    picture, view = case.picture, render(case, backend, torch.eye(4)[None])
    known = view.mask[0] & picture.mask[0]
    # Streets lose most: far ground, seen at a grazing angle, steps by more than an edge's worth a pixel.
    assert known.sum() / picture.mask[0].sum() > 0.93
    ratio = (view.points[0, ..., 2] / picture.points[0, ..., 2])[known]
    assert ((ratio - 1).abs() < 1e-3).float().mean() > 0.995
    assert ((view.image[0] - picture.image[0]).abs().amax(0)[known] < 0.02).float().mean() > 0.99


def two_walls(near, size=(60, 80)):
    """A square at depth `near` before a wall at depth 4: image, points, mask, intrinsics."""
    intrinsics = torch.tensor([[1.0, 0, 0.5], [0, 4 / 3, 0.5], [0, 0, 1]])
    depth = torch.full(size, 4.0)
    depth[20:40, 30:50] = near
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    return image, unproject(depth, intrinsics), torch.ones(size, dtype=torch.bool), intrinsics


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cube_before_a_wall_leaves_a_shadow_and_no_rubber_sheet(backend):
    """A square at depth 2 before a wall at depth 4; the camera moves right by 0.4."""
    size, scene = (60, 80), two_walls(2.0)
    intrinsics = scene[-1]
    renderer = NovelViewRenderer(backend)
    renderer.set_scene(*scene)
    move = torch.eye(4)
    move[0, 3] = -0.4
    view = renderer.render(move[None], intrinsics[None], size)
    z = view.points[0, ..., 2][view.mask[0]]
    assert (((z - 2).abs() < 1e-3) | ((z - 4).abs() < 1e-3)).all()
    # The square moves left by 0.4 / 2 * 80 = 16 pixels, the wall by 8: eight columns right of it are unknown.
    row = view.mask[0, 30]
    assert row[16:32].all() and not row[35:41].any() and row[43:60].all()
    assert not view.mask[0, :, 73:].any()  # the wall beyond the old frame
    behind = torch.eye(4)
    behind[0, 0], behind[2, 2], behind[2, 3] = -1, -1, 8.0  # from behind: only back faces
    assert not renderer.render(behind[None], intrinsics[None], size).mask.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_camera_that_moves_past_things_sees_their_curtains(backend):
    """The camera goes forward past the square (0.5): the square's curtains reach the wall and cross its near plane."""
    scene, size, move = two_walls(0.5), (60, 80), torch.eye(4)
    renderer = NovelViewRenderer(backend)
    renderer.set_scene(*scene)
    move[2, 3] = -0.6  # right behind the square, in space that was hidden: all around are curtains
    assert not renderer.render(move[None], scene[-1][None], size).mask.any()
    # Beside it: the right curtain hides what is left of the wall's outline, which is at column
    # 39.5 + (50.5 / 80 - 0.5 - 0.3 / 4) * 80 * 4 / 3.4.
    move[0, 3] = -0.3
    mask = renderer.render(move[None], scene[-1][None], size).mask[0, 30]
    assert not mask[:44].any() and mask[46:68].all()


@pytest.mark.skipif(not GL, reason="compares pyrender with torch; without any GL library there is nothing to compare")
@pytest.mark.parametrize("x", [0.0, 0.02, -0.3, 0.3])
@pytest.mark.parametrize("z", [-0.3, -0.495, -0.505, -0.6, -2.0])
def test_both_backends_cut_at_the_same_near_plane(x, z):
    scene, move = two_walls(0.5), torch.eye(4)
    move[0, 3], move[2, 3] = x, z
    views = []
    for backend in ("torch", "pyrender"):
        renderer = NovelViewRenderer(backend)
        renderer.set_scene(*scene)
        views.append(renderer.render(move[None], scene[-1][None], (60, 80)))
    first, second = views
    assert (first.mask ^ second.mask).sum() <= 4  # pixels, of 4800
    both = first.mask & second.mask
    assert ((first.points - second.points)[both].abs() < 4e-3).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_thing_twice_is_the_same_and_a_view_does_not_depend_on_its_batch(backend):
    case = make_case("room", 9, 5)
    first, second, alone = render(case, backend), render(case, backend), render(case, backend, case.moves[:1])
    for name in ("image", "points", "mask"):
        one, two, single = (getattr(view, name).nan_to_num(-1) for view in (first, second, alone))
        assert torch.equal(one, two) and torch.equal(one[:1], single)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nothing_is_known_nothing_is_drawn(backend):
    image, points, mask, intrinsics = two_walls(2.0)
    renderer = NovelViewRenderer(backend)
    renderer.set_scene(image, points, mask & False, intrinsics)
    view = renderer.render(torch.eye(4).repeat(2, 1, 1), intrinsics.repeat(2, 1, 1), (60, 80))
    assert not view.mask.any() and not view.image.any() and torch.isnan(view.points).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_renderers_take_turns(backend):
    """They share a context; the one that is freed takes nothing of the other's along."""
    near, far = (NovelViewRenderer(backend) for _ in range(2))
    for renderer, depth in ((near, 1.0), (far, 3.0)):
        renderer.set_scene(*two_walls(depth))
    lens = two_walls(1.0)[-1][None]
    for _ in range(2):
        for renderer, depth in ((near, 1.0), (far, 3.0)):
            view = renderer.render(torch.eye(4)[None], lens, (60, 80))
            assert abs(float(view.points[0, 30, 40, 2]) - depth) < 1e-3
    near.free()
    again = far.render(torch.eye(4)[None], lens, (60, 80))
    assert torch.equal(again.image, view.image)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_take_turns(backend):
    """JupyterLab calls widgets from a thread of its own."""
    picture = make_case("room", 3, 2).picture
    renderer = NovelViewRenderer(backend)
    renderer.set_scene(picture.image[0], picture.points[0], picture.mask[0], picture.intrinsics[0])
    place = torch.eye(4)[None], picture.intrinsics[:1], (60, 80)
    first = renderer.render(*place).image
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: renderer.render(*place).image, range(6)))
    assert all(torch.equal(image, first) for image in [*found, renderer.render(*place).image])


@pytest.mark.skipif(not GL, reason="there is no GL library")
def test_one_context_is_for_every_device():
    before = gl_renderer()
    assert NovelViewRenderer("pyrender", "cuda:6").backend == "pyrender" and gl_renderer() is before


@pytest.mark.parametrize("works", ["egl", "osmesa", ""])
def test_osmesa_is_what_is_left_when_egl_fails(monkeypatch, works):
    def make():
        if os.environ["PYOPENGL_PLATFORM"] != works:
            raise OSError(f"no {os.environ['PYOPENGL_PLATFORM']} here")
        return works

    monkeypatch.setattr(gl_module, "_make_context", make)
    monkeypatch.setattr(gl_module, "_context", {})
    monkeypatch.setenv("PYOPENGL_PLATFORM", "restored afterwards")
    monkeypatch.delenv("PYOPENGL_PLATFORM")
    if works:
        assert gl_renderer() == works and gl_module._context["platform"] == works
        assert works in NovelViewRenderer("auto").reason
    else:
        with pytest.raises(UserError, match="no egl here.*no osmesa here.*libosmesa"):
            gl_renderer()
        assert NovelViewRenderer("auto").backend == "torch" and "PYOPENGL_PLATFORM" not in os.environ
    gl_module._context.clear()


def test_auto_says_what_it_chose_and_mistakes_are_named():
    renderer = NovelViewRenderer("auto")
    assert renderer.backend == ("pyrender" if GL else "torch") and renderer.reason.startswith(renderer.backend)
    assert "\n" not in renderer.reason
    with pytest.raises(UserError, match="'opengl'.*pyrender"):
        NovelViewRenderer("opengl")
    with pytest.raises(ValueError, match="set_scene"):
        NovelViewRenderer("torch").render(torch.eye(4)[None], torch.eye(3)[None], (4, 4))


def test_without_gl_auto_falls_back_and_pyrender_says_what_to_install():
    code = (
        "from ttt_lib.views.renderer import NovelViewRenderer\n"
        "from ttt_lib.core.errors import UserError\n"
        "r = NovelViewRenderer('auto'); assert r.backend == 'torch', r.reason; print(r.reason)\n"
        "try: NovelViewRenderer('pyrender')\n"
        "except UserError as e: assert 'install' in str(e); print('named')\n"
    )
    environment = {**os.environ, "PYOPENGL_PLATFORM": "nothing"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "named" in done.stdout, done.stderr


@pytest.mark.skipif(not GL, reason="there is no GL library")
def test_no_window_toolkit_is_needed(tmp_path):
    # What a GPU server without X libraries shows: pyrender's viewer cannot be imported.
    (tmp_path / "pyglet.py").write_text("raise AttributeError(\"'NoneType' object has no attribute 'XRenderFind'\")")
    code = "from ttt_lib.views.renderer import NovelViewRenderer; print(NovelViewRenderer('pyrender').reason)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("pyrender"), done.stderr


def _in_child(queue, inherited):
    torch.set_num_threads(1)
    said = []
    for prepare in (lambda: None, lambda: inherited.set_scene(*two_walls(2.0))):
        try:
            prepare()
            said.append(int(inherited.render(torch.eye(4)[None], two_walls(2.0)[-1][None], (60, 80)).mask.sum()))
        except UserError as error:
            said.append(str(error))
    queue.put((_draw_something("auto"), NovelViewRenderer("auto").reason, said))


def _draw_something(backend) -> int:
    points = torch.nn.functional.pad(torch.zeros(8, 8, 2), (0, 1), value=2.0)
    points[..., :2] = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="xy"), -1)
    renderer = NovelViewRenderer(backend)
    renderer.set_scene(torch.rand(3, 8, 8), points, torch.ones(8, 8, dtype=torch.bool))
    return int(renderer.render(torch.eye(4)[None], torch.eye(3)[None], (8, 8)).mask.sum())


def test_a_scene_that_failed_is_made_again_and_another_mask_counts(monkeypatch):
    image, points, mask, intrinsics = two_walls(2.0)
    renderer, make = NovelViewRenderer("torch"), renderer_module.build_mesh
    monkeypatch.setattr(
        renderer_module, "build_mesh", lambda *given: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    with pytest.raises(RuntimeError):
        renderer.set_scene(image, points, mask, intrinsics)
    assert not renderer.holds(image, points)
    monkeypatch.setattr(renderer_module, "build_mesh", make)
    known = []
    for part in (mask, mask & (torch.arange(mask.shape[1]) < mask.shape[1] // 2)):
        renderer.set_scene(image, points, part, intrinsics)
        assert renderer.holds(image, points)
        known.append(int(renderer.render(torch.eye(4)[None], intrinsics[None], mask.shape).mask.sum()))
    assert 0 < known[1] < 0.7 * known[0]


def test_a_forked_child_draws_without_its_parents_context():
    """GL does not survive a fork: the child draws with the torch backend, says so, and the picture is the same; a renderer
    that it got from its parent is refused."""
    expected = _draw_something("auto")
    renderer = NovelViewRenderer("auto")
    renderer.set_scene(*two_walls(2.0))
    known = int(renderer.render(torch.eye(4)[None], two_walls(2.0)[-1][None], (60, 80)).mask.sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, renderer))
    child.start()
    drawn, reason, inherited = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0 and drawn == expected
    assert reason.startswith("torch: ") and ("forked" in reason) == GL
    assert all("forked" in each if GL else each == known for each in inherited)
    assert _draw_something("auto") == expected


def _memory_growth(count: int, scenes: int, backend: str) -> float:
    """Growth of the resident memory in MiB over `count` views of `scenes` scenes, after a warm-up."""
    generator = torch.Generator().manual_seed(0)
    intrinsics = torch.tensor([[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]])
    renderer = NovelViewRenderer(backend)
    moves = sample_cameras(2.0, 2, count // scenes, generator)

    def some(times: int) -> None:
        for _ in range(times):
            depth = 2 + torch.rand(60, 60, generator=generator)
            renderer.set_scene(
                torch.rand(3, 60, 60), unproject(depth, intrinsics), torch.ones(60, 60, dtype=torch.bool)
            )
            for move in moves:
                renderer.render(move[None], intrinsics[None], (60, 60))

    some(max(2, scenes // 10))
    pages = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20  # noqa: E731
    before = pages()
    some(scenes)
    return pages() - before


def _gl_objects() -> int:
    """Buffers, vertex arrays, renderbuffers, framebuffers and programs alive in the context, by their small names."""
    from OpenGL import GL

    gl_renderer()._platform.make_current()
    kinds = GL.glIsBuffer, GL.glIsVertexArray, GL.glIsRenderbuffer, GL.glIsFramebuffer, GL.glIsProgram
    return sum(bool(alive(name)) for alive in kinds for name in range(1, 3000))


def _check_leaks(views, scenes, backend, megabytes):
    _draw_something(backend)
    before = _gl_objects() if backend == "pyrender" else 0
    grown = _memory_growth(views, scenes, backend)
    if backend == "pyrender":
        # A last mesh may be left: two primitives of a vertex array and three buffers each.
        assert _gl_objects() <= before + 8 and len(gl_renderer()._renderer._meshes) <= 1
    assert grown < megabytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_hundred_views_do_not_leak(backend):
    _check_leaks(200, 20, backend, 30)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_thousand_views_do_not_leak(backend):
    _check_leaks(2000, 200, backend, 60)


@pytest.mark.parametrize("kind", KINDS)
def test_curtains_stand_only_at_edges(kind):
    picture = make_case(kind, 7, 1).picture
    mesh = build_mesh(picture.image[0], picture.points[0], picture.mask[0], picture.intrinsics[0])
    assert mesh.solid.float().mean() > 0.9
    corners = mesh.vertices[mesh.faces[mesh.solid]][..., 2]
    stretched = corners.amax(-1) / corners.amin(-1) > 1.3
    assert stretched.float().mean() < 0.01
