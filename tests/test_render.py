"""Novel views against exact scenes seen by a second camera, with both backends."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ttt_lib.augment import sample_cameras
from ttt_lib.errors import UserError
from ttt_lib.geometry import MIRROR, mirror_points, project, transform_points
from ttt_lib.rasterise import build_mesh
from ttt_lib.raycast import draw
from ttt_lib.render import NovelViewRenderer, gl_renderer
from ttt_lib.synthetic import KINDS, make_scenes
from ttt_lib.synthetic import sample_cameras as scene_cameras

SIZE = (240, 320)
SEVERITY = 2


def gl_works() -> bool:
    try:
        gl_renderer()
        return True
    except UserError:
        return False


GL = gl_works()
BACKENDS = ["torch", "pyrender"] if GL else ["torch"]


@pytest.fixture(scope="module", params=KINDS)
def scene(request):
    """A scene, the picture of its camera, and two cameras beside it, one of them mirrored."""
    kind = [request.param]
    scenes, places = make_scenes(kind, 7)
    transform, intrinsics = scene_cameras(kind, places, 7, SIZE[1] / SIZE[0])
    picture = draw(scenes, transform, intrinsics, SIZE, shadows=False)
    median = picture.points[0, ..., 2].nanmedian()
    moves = sample_cameras(median, SEVERITY, 2, torch.Generator().manual_seed(3))
    moves[1] = MIRROR @ moves[1]
    truths = []
    for i, move in enumerate(moves):
        proper = MIRROR @ move if i == 1 else move
        truth = draw(scenes, (proper @ transform[0])[None], intrinsics, SIZE, shadows=False)
        truths.append(mirror_points(truth.points[0]) if i == 1 else truth.points[0])
    return picture, moves, torch.stack(truths)


def render(picture, moves, backend):
    renderer = NovelViewRenderer(backend)
    renderer.set_scene(picture.image[0], picture.points[0], picture.mask[0], picture.intrinsics[0])
    return renderer.render(moves, picture.intrinsics.expand(len(moves), 3, 3), SIZE)


def visibility(picture, moves, truth):
    """Which pixels of the second cameras show what the first one saw, and which show what it certainly did not see.

    A point was seen if the first camera's depth there is its own to 1 %. It was certainly not seen if it lies behind
    all of the nine pixels around its place, or outside the frame by more than a pixel.
    """
    height, width = SIZE
    back = transform_points(truth.nan_to_num(1e4), torch.linalg.inv(moves)[:, None, None])
    uv = project(back, picture.intrinsics[:, None, None])
    grid = 2 * uv - 1
    there = torch.isfinite(truth).all(-1) & (back[..., 2] > 0)
    depth = picture.points[..., 2].nan_to_num(1e4)[:, None].expand(len(moves), -1, -1, -1)
    own = F.grid_sample(depth, grid, mode="nearest", align_corners=False)[:, 0]
    farthest = F.grid_sample(F.max_pool2d(depth, 3, 1, 1), grid, mode="nearest", align_corners=False)[:, 0]
    inside = (grid.abs() < 1).all(-1)
    margin = torch.tensor([1 + 2 / width, 1 + 2 / height])
    seen = there & inside & ((back[..., 2] / own - 1).abs() < 0.01)
    hidden = there & ((inside & (back[..., 2] > farthest * 1.01)) | (grid.abs() > margin).any(-1))
    return seen, hidden


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_exact_truth_from_the_second_camera(scene, backend):
    picture, moves, truth = scene
    view = render(picture, moves, backend)
    seen, hidden = visibility(picture, moves, truth)
    there = view.mask & torch.isfinite(truth).all(-1)
    error = (view.points[..., 2] / truth[..., 2] - 1).abs()
    assert (error[there] < 0.01).float().mean() > 0.95
    assert (view.mask & seen).sum() / seen.sum() > 0.97
    hidden = ~(F.max_pool2d((~hidden).float()[:, None], 3, 1, 1)[:, 0] > 0)  # edges dilated by one pixel
    assert (view.mask & hidden).sum() <= 0.005 * max(int(hidden.sum()), 2000)
    assert torch.isnan(view.points[~view.mask]).all() and torch.isfinite(view.points[view.mask]).all()
    # The colours are those of the points: what the first picture shows where each point comes from.
    back = transform_points(view.points.nan_to_num(1.0), torch.linalg.inv(moves)[:, None, None])
    grid = 2 * project(back, picture.intrinsics[:, None, None]) - 1
    own = F.grid_sample(picture.image.expand(len(moves), -1, -1, -1), grid, align_corners=False, padding_mode="border")
    assert ((own - view.image).abs().amax(1)[view.mask] < 0.03).float().mean() > 0.97


@pytest.mark.skipif(not GL, reason="compares pyrender with torch; without any GL library there is nothing to compare")
def test_both_backends_agree(scene):
    picture, moves, _ = scene
    first, second = (render(picture, moves, backend) for backend in ("torch", "pyrender"))
    union = (first.mask | second.mask).sum()
    assert (first.mask & second.mask).sum() / union >= 0.98
    both = first.mask & second.mask
    ratio = (first.points[..., 2] / second.points[..., 2] - 1).abs()[both]
    assert (ratio < 0.01).float().mean() >= 0.99
    assert ((first.image - second.image).abs().amax(1)[both] < 0.02).float().mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_original_camera_sees_the_original(scene, backend):
    picture, _, _ = scene
    view = render(picture, torch.eye(4)[None], backend)
    known = view.mask[0] & picture.mask[0]
    # Streets lose most: far ground, seen at a grazing angle, steps by more than an edge's worth a pixel.
    assert known.sum() / picture.mask[0].sum() > 0.93
    ratio = (view.points[0, ..., 2] / picture.points[0, ..., 2])[known]
    assert ((ratio - 1).abs() < 1e-3).float().mean() > 0.995
    assert ((view.image[0] - picture.image[0]).abs().amax(0)[known] < 0.02).float().mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cube_before_a_wall_leaves_a_shadow_and_no_rubber_sheet(backend):
    """A square at depth 2 before a wall at depth 4; the camera moves right by 0.4."""
    size, intrinsics = (60, 80), torch.tensor([[1.0, 0, 0.5], [0, 4 / 3, 0.5], [0, 0, 1]])
    from ttt_lib.geometry import unproject

    depth = torch.full(size, 4.0)
    depth[20:40, 30:50] = 2.0
    renderer = NovelViewRenderer(backend)
    renderer.set_scene(
        torch.rand(3, *size), unproject(depth, intrinsics), torch.ones(size, dtype=torch.bool), intrinsics
    )
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


def test_one_thing_twice_is_the_same(scene):
    picture, moves, _ = scene
    first, second = (render(picture, moves, "torch") for _ in range(2))
    assert torch.equal(first.image, second.image) and torch.equal(first.mask, second.mask)


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
        "from ttt_lib.render import NovelViewRenderer\n"
        "from ttt_lib.errors import UserError\n"
        "r = NovelViewRenderer('auto'); assert r.backend == 'torch', r.reason; print(r.reason)\n"
        "try: NovelViewRenderer('pyrender')\n"
        "except UserError as e: assert 'install' in str(e); print('named')\n"
    )
    environment = {**os.environ, "PYOPENGL_PLATFORM": "nothing"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "named" in done.stdout, done.stderr


def _in_child(queue):
    torch.set_num_threads(1)
    queue.put(_draw_something("auto"))


def _draw_something(backend) -> int:
    points = torch.nn.functional.pad(torch.zeros(8, 8, 2), (0, 1), value=2.0)
    points[..., :2] = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="xy"), -1)
    renderer = NovelViewRenderer(backend)
    renderer.set_scene(torch.rand(3, 8, 8), points, torch.ones(8, 8, dtype=torch.bool))
    return int(renderer.render(torch.eye(4)[None], torch.eye(3)[None], (8, 8)).mask.sum())


def test_a_forked_child_draws_without_its_parents_context():
    """GL does not survive a fork: the child's `auto` is the torch backend, and the picture is the same."""
    expected = _draw_something("auto")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(60)
    assert child.exitcode == 0 and _draw_something("auto") == expected


def _memory_growth(count: int, scenes: int, backend: str) -> float:
    """Growth of the resident memory in MiB over `count` views of `scenes` scenes, after a warm-up."""
    generator = torch.Generator().manual_seed(0)
    intrinsics = torch.tensor([[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]])
    from ttt_lib.geometry import unproject

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_hundred_views_do_not_leak(backend):
    assert _memory_growth(200, 20, backend) < 30


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_thousand_views_do_not_leak(backend):
    assert _memory_growth(2000, 200, backend) < 60
    if backend == "pyrender":
        assert len(gl_renderer()._renderer._meshes) <= 1


def test_curtains_stand_only_at_edges(scene):
    picture, _, _ = scene
    mesh = build_mesh(picture.image[0], picture.points[0], picture.mask[0], picture.intrinsics[0])
    assert mesh.solid.float().mean() > 0.9
    corners = mesh.vertices[mesh.faces[mesh.solid]][..., 2]
    stretched = corners.amax(-1) / corners.amin(-1) > 1.3
    assert stretched.float().mean() < 0.01
