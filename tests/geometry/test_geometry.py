"""Cameras and point maps: known answers and invariants."""

from __future__ import annotations

import math

import pytest
import torch
import utils3d
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lib.geometry import cameras as g
from ttt_lib.geometry import warp as w

unit = st.floats(0.2, 0.8)
quick = settings(max_examples=30, deadline=None)


def lens(fx=0.9, fy=1.2, cx=0.5, cy=0.5):
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def plane(intrinsics, size, normal=(0.2, -0.3, 1.0), distance=4.0):
    """Point map of a plane `normal . p = distance` as the camera sees it."""
    rays = g.unproject(torch.ones(*size), intrinsics)
    depth = distance / (rays * torch.tensor(normal)).sum(-1)
    return rays * depth[..., None]


def test_pixel_centres():
    uv = g.uv_map(2, 4)
    assert uv.shape == (2, 4, 2)
    assert uv[0, 0].tolist() == [0.125, 0.25] and uv[1, 3].tolist() == [0.875, 0.75]


@quick
@given(unit, unit, st.floats(0.3, 3), st.floats(0.3, 3))
def test_project_undoes_unproject(cx, cy, fx, fy):
    intrinsics = lens(fx, fy, cx, cy)
    depth = 1 + torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) * 9
    points = g.unproject(depth, intrinsics)
    assert torch.allclose(points[..., 2], depth)
    assert torch.allclose(g.project(points, intrinsics), g.uv_map(5, 7), atol=1e-5)


def test_field_of_view():
    intrinsics = g.intrinsics_from_fov(90.0, 2.0)
    assert intrinsics[0, 0].item() == pytest.approx(0.5) and intrinsics[1, 1].item() == pytest.approx(1.0)
    fov_x, fov_y = g.fov_from_intrinsics(intrinsics)
    assert fov_x.item() == pytest.approx(90, abs=1e-3) and fov_y.item() == pytest.approx(53.13, abs=1e-2)


@quick
@given(unit, unit)
def test_a_mirrored_plane(cx, cy):
    """The mirrored image of a plane is the plane with its normal's x negated, seen by the mirrored camera."""
    intrinsics = lens(cx=cx, cy=cy)
    mirrored = g.mirror_points(plane(intrinsics, (6, 8)))
    expected = plane(g.mirror_intrinsics(intrinsics), (6, 8), normal=(-0.2, -0.3, 1.0))
    assert torch.allclose(mirrored, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(g.mirror_points(g.mirror_points(mirrored)), mirrored)
    assert torch.allclose(g.mirror_intrinsics(g.mirror_intrinsics(intrinsics)), intrinsics)


@quick
@given(st.floats(0.3, 0.7), st.floats(0.3, 0.7), st.floats(0.3, 1.0), unit, unit)
def test_recentred_crop_looks_at_its_centre_and_stays_inside(u, v, scale, cx, cy):
    intrinsics, centre = lens(cx=cx, cy=cy), torch.tensor([u, v])
    rotation, cropped = g.recentred_crop(intrinsics, centre, torch.tensor(scale))
    assert torch.allclose(rotation @ rotation.T, torch.eye(3), atol=1e-5) and torch.linalg.det(rotation) > 0
    axis = g.project(rotation.T @ torch.tensor([0, 0, 1.0]), intrinsics)
    assert torch.allclose(axis, centre, atol=1e-4)
    assert cropped[0, 2] == 0.5 and cropped[1, 2] == 0.5
    assert cropped[0, 0] / cropped[1, 1] == pytest.approx(float(intrinsics[0, 0] / intrinsics[1, 1]), rel=1e-4)
    assert cropped[0, 0] >= intrinsics[0, 0] / scale * 0.999  # never more than what was asked for
    corners = g.unproject(torch.ones(2, 2), cropped)  # pixel centres at a quarter: corners are twice as far out
    corners = torch.cat([corners[..., :2] * 2, corners[..., 2:]], -1) @ rotation
    uv = g.project(corners, intrinsics)
    assert uv.min() > -1e-3 and uv.max() < 1 + 1e-3


@quick
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.3, 1.0))
def test_plain_crop_is_a_window_of_the_image(u, v, scale):
    cropped = g.plain_crop(lens(), torch.tensor([u, v]), torch.tensor(scale))
    points = plane(lens(), (4, 4))
    before, after = g.project(points, lens()), g.project(points, cropped)
    start = torch.tensor([u, v]).sub(scale / 2).clamp(min=0).clamp(max=1 - scale)
    assert torch.allclose(after, (before - start) / scale, atol=1e-4)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_plane_is_carried_exactly_into_a_crop(mirrored):
    intrinsics, size = lens(cx=0.45, cy=0.55), (48, 64)
    rotation, cropped = g.recentred_crop(intrinsics, torch.tensor([0.4, 0.6]), torch.tensor(0.6))
    transform = torch.eye(4)
    transform[:3, :3] = rotation
    if mirrored:
        transform, cropped = g.MIRROR @ transform, g.mirror_intrinsics(cropped)
    points = plane(intrinsics, size)
    image = g.uv_map(*size).permute(2, 0, 1)
    image = torch.cat([image, torch.zeros_like(image[:1])])
    warped, found, mask = w.warp_view(
        image[None], points[None], torch.ones(1, *size, dtype=torch.bool), intrinsics[None], transform[None],
        cropped[None], (40, 56),
    )  # fmt: skip
    normal = transform[:3, :3] @ torch.tensor([0.2, -0.3, 1.0])
    expected = plane(cropped, (40, 56), normal=tuple(normal.tolist()))
    assert mask.float().mean() > 0.97
    error = (found[0] - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error[mask[0]].max() < 1e-4
    # The image carries its own coordinates: each view pixel shows the place where its point came from.
    came_from = g.project(g.transform_points(found[0], torch.linalg.inv(transform)), intrinsics)
    assert (warped[0, :2].permute(1, 2, 0) - came_from)[mask[0]].abs().max() < 2e-3


def test_a_warp_knows_neither_unknown_pixels_nor_edges_nor_outside():
    intrinsics, size = lens(), (32, 32)
    depth = torch.full(size, 2.0)
    depth[:, 16:] = 4.0
    mask = torch.ones(1, *size, dtype=torch.bool)
    mask[:, :8] = False
    points = g.unproject(depth, intrinsics)[None]
    shift = g.plain_crop(intrinsics, torch.tensor([0.5, 0.5]), torch.tensor(1.0))
    shift[0, 2] += 0.1  # the window slides out of the image
    _, found, known = w.warp_view(
        torch.zeros(1, 3, *size), points, mask, intrinsics[None], torch.eye(4)[None], shift[None], size
    )
    assert not known[0, :7].any() and not known[0, :, :3].any()
    z = found[0, ..., 2][known[0]]
    assert (((z - 2).abs() < 1e-4) | ((z - 4).abs() < 1e-4)).all()  # nothing in between


def test_depth_edges_agree_with_utils3d():
    depth = 1 + torch.rand(20, 30, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(1)) > 0.2
    assert torch.equal(w.depth_edges(depth, mask, 0.3), utils3d.pt.depth_map_edge(depth, mask=mask, rtol=0.3))


@quick
@given(st.tuples(*[st.floats(-0.5, 0.5)] * 3), st.floats(-1, 1))
def test_look_at_keeps_the_target_in_its_direction(offset, roll):
    offset, target = torch.tensor(offset), torch.tensor([0.3, -0.2, 3.0])
    transform = g.look_at_transform(offset, target)
    seen = g.transform_points(target, transform)
    assert torch.allclose(seen / seen.norm(), target / target.norm(), atol=1e-5)
    assert torch.allclose(g.transform_points(offset, transform), torch.zeros(3), atol=1e-5)
    rolled = g.look_at_transform(offset, torch.tensor([0.0, 0.0, 3.0]), roll)
    assert torch.allclose(rolled[:3, :3] @ rolled[:3, :3].T, torch.eye(3), atol=1e-5)


@quick
@given(st.integers(0, 10**6))
def test_rotation_between(seed):
    a, b = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) + torch.tensor([0, 0, 3.0])
    rotation = g.rotation_between(a, b)
    assert torch.allclose(rotation @ a / a.norm(), b / b.norm(), atol=1e-5)


def test_a_step_is_broken_at_a_cliff_and_not_on_a_slanted_plane():
    """By hand: depths 2 2 2 | 3 3 3, a plane whose steps exceed the tolerance, and a gap in what is known."""
    cliff = 1 / torch.tensor([2.0, 2, 2, 3, 3, 3])
    everywhere = torch.ones(6, dtype=torch.bool)
    assert w.broken_steps(cliff, everywhere).tolist() == [False, False, True, False, False]
    # Inverse depth falls evenly: a plane, each step 6 to 10 % in depth. The two steps at each end have no two
    # neighbours on both sides to tell them from a cliff, and are cut.
    plane = torch.linspace(1.0, 0.5, 8)
    assert w.broken_steps(plane, torch.ones(8, dtype=torch.bool)).tolist() == [True] * 2 + [False] * 3 + [True] * 2
    # A small step is none, however uneven; a tolerance that the cliff does not reach lets it pass.
    assert not w.broken_steps(1 / torch.tensor([2.0, 2, 2, 2.07, 2, 2]), everywhere).any()
    assert not w.broken_steps(cliff, everywhere, rtol=0.6).any()
    # Steps to and from an unknown pixel are broken, and along columns the same as along rows.
    gap = everywhere.clone()
    gap[1] = False
    assert w.broken_steps(torch.ones(6), gap).tolist() == [True, True, False, False, False]
    both = torch.stack([cliff, torch.ones(6)]), torch.stack([everywhere, gap])
    assert w.broken_steps(*both)[0].tolist() == w.broken_steps(cliff, everywhere).tolist()


def test_a_view_does_not_depend_on_the_others_of_its_batch():
    torch.manual_seed(0)
    image, near, nearer = torch.rand(3, 24, 32), lens(0.9, 1.2), lens(1.3, 1.7)
    points = plane(near, (24, 32))
    maps = [part.expand(2, *part.shape) for part in (image, points, torch.ones(24, 32, dtype=torch.bool), near)]
    new = torch.stack([near, nearer])
    together = w.warp_view(*maps, torch.eye(4).expand(2, 4, 4), new, (24, 32))
    for i in range(2):
        alone = w.warp_view(*(m[i : i + 1] for m in maps), torch.eye(4)[None], new[i : i + 1], (24, 32))
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together))
    once = w.warp_view(maps[0], *(m[:1] for m in maps[1:3]), maps[3], torch.eye(4).expand(2, 4, 4), new, (24, 32))
    assert all(torch.equal(a, b) for a, b in zip(once, together))  # one target for all
    assert (together[0][0] - image).abs().max() < 1e-4  # the one that stays as it is


@given(st.floats(10, 170), st.floats(0.3, 3), st.floats(0.05, 1), unit, unit)
@settings(max_examples=100, deadline=None)
def test_a_pixel_of_a_crop_spans_no_more_than_one_of_the_image(fov, aspect, scale, cx, cy):
    fx = 0.5 / math.tan(math.radians(fov / 2))
    original, centre, side = lens(fx, fx * aspect)[None], torch.tensor([[cx, cy]]), torch.tensor([scale])
    crops = g.recentred_crop(original, centre, side)[1], g.plain_crop(original, centre, side)
    for crop in crops:
        assert (crop.diagonal(dim1=1, dim2=2)[0, :2] > original.diagonal(dim1=1, dim2=2)[0, :2] * (1 - 1e-4)).all()
