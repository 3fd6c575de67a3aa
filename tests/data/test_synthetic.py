"""Procedural scenes: exact geometry, from any camera, the same from the same seed; domain shifts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt_lib.core.errors import UserError
from ttt_lib.core.registry import SHIFTS
from ttt_lib.data.catalog import open_dataset
from ttt_lib.data.scenes.generate import KINDS, make_pictures, make_scenes, place_cameras
from ttt_lib.data.scenes.raycast import draw
from ttt_lib.data.scenes.solids import FAR, Solids, intersect
from ttt_lib.data.shifts import apply_shift
from ttt_lib.geometry.cameras import fov_from_intrinsics, project, transform_points


def one_solid(kind: int, half) -> Solids:
    counts = [0, 0, 0, 0]
    counts[kind] = 1
    # A square prism: four of the six half-planes coincide with the sides of the unit square.
    angles = torch.tensor([0, 0.5, 1, 1.5, 0, 0.5]) * torch.pi
    sides = torch.stack([angles.cos(), angles.sin(), torch.ones(6)], -1)[None, None]
    return Solids(
        torch.tensor([[[0.0, 0.0, 5.0]]]), torch.eye(3)[None, None], torch.tensor([[half]]), sides,
        torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), torch.ones(1, 1, 3), tuple(counts),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "expected"), [(0, 4.0), (1, 5 - np.sqrt(1 - 0.25)), (2, 5 - np.sqrt(1 - 0.25)), (3, 4.0)]
)
def test_each_solid_is_hit_where_it_should_be(kind, expected):
    """Parallel rays at x = 0.5 towards a solid of half size 1 at z = 5."""
    solids = one_solid(kind, [1.0, 1.0, 1.0])
    origin = torch.tensor([[[0.5, 0.0, 0.0], [1.5, 0.0, 0.0], [0.5, 0.0, 5.0]]])
    distance, index = intersect(solids, origin, torch.tensor([0.0, 0.0, 1.0]).expand(1, 3, 3))
    assert distance[0, 0].item() == pytest.approx(expected, rel=1e-5) and index[0, 0] == 0
    assert distance[0, 1] == FAR and index[0, 1] == -1  # beside it
    assert distance[0, 2].item() == pytest.approx(10 - expected - 5, rel=1e-4)  # from inside: the far wall


@pytest.mark.parametrize("kind", KINDS)
def test_points_lie_on_their_pixels_rays_and_normals_face_the_camera(kind):
    picture = make_pictures([kind], 3, (48, 64))
    uv = project(picture.points, picture.intrinsics[:, None, None])[picture.mask]
    v, u = np.mgrid[0:48, 0:64]
    expected = torch.from_numpy(np.stack([(u + 0.5) / 64, (v + 0.5) / 48], -1))[None].float()[picture.mask]
    assert torch.allclose(uv, expected, atol=1e-5)
    facing = (picture.normal * picture.points).sum(-1)[picture.mask]
    assert (facing <= 1e-4).all()
    assert torch.isnan(picture.points[~picture.mask]).all()
    assert picture.image.min() >= 0 and picture.image.max() <= 1
    assert 0.3 < picture.points[..., 2][picture.mask].median() < 60  # metres


def test_two_cameras_see_the_same_world():
    """Points seen by one camera, moved into the other, lie on or behind what that one sees; most of them on it."""
    scenes, places = make_scenes(["room"], 11)
    transform, intrinsics = place_cameras(["room"], places, 11, 4 / 3)
    moved = transform.clone()
    moved[:, 0, 3] += 0.1
    first, second = (draw(scenes, t, intrinsics, (96, 128)) for t in (transform, moved))
    points = transform_points(first.points, (moved @ torch.linalg.inv(transform))[:, None, None])
    uv = project(points, intrinsics[:, None, None])
    seen = torch.nn.functional.grid_sample(
        second.points[..., 2][:, None], 2 * uv - 1, mode="nearest", align_corners=False
    )[:, 0]
    inside = (uv > 0).all(-1) & (uv < 1).all(-1)
    ratio = (points[..., 2] / seen)[inside]
    # A point may be in front of its pixel's centre by the slope of a surface, but not by more.
    assert (ratio > 0.9).float().mean() > 0.98
    assert ((ratio - 1).abs() < 0.03).float().mean() > 0.9


def test_the_same_from_the_same_seed_and_not_from_another():
    first, second, other = (make_pictures(["street", "table"], seed, (24, 32)) for seed in (4, 4, 5))
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.points.nan_to_num(0), second.points.nan_to_num(0))
    assert not torch.equal(first.image, other.image)


def test_cameras_have_fields_of_view_from_30_to_100_degrees_and_tilt():
    _, places = make_scenes(list(KINDS) * 10, 0)
    transform, intrinsics = place_cameras(list(KINDS) * 10, places, 0, 4 / 3)
    fov = fov_from_intrinsics(intrinsics)[0]
    assert fov.min() >= 30 - 1e-3 and fov.max() <= 100 + 1e-3 and fov.std() > 5
    rotation = transform[:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3), atol=1e-5)
    assert torch.linalg.det(rotation).min() > 0.99


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="unknown scene kind"):
        make_scenes(["moon"], 0)


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_are_deterministic_and_grow_with_severity(name, picture):
    image = picture.image[0]
    depth = torch.where(picture.mask[0], picture.points[0, ..., 2], torch.inf)
    shifted = [apply_shift(name, image, depth, severity, seed=3) for severity in range(6)]
    assert (shifted[0] - image).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(shifted[3], apply_shift(name, image, depth, 3, seed=3))
    change = [float((s - image).abs().mean()) for s in shifted]
    assert change[1] > change[0] and change[5] > change[1] and change[4] > change[2] * 0.9
    assert all(s.min() >= 0 and s.max() <= 1 and s.shape == image.shape for s in shifted)


def test_mistakes_with_shifts_are_named():
    image, depth = torch.zeros(3, 8, 8), torch.ones(8, 8)
    with pytest.raises(UserError, match="'rain'.*low_light"):
        apply_shift("rain", image, depth, 1)
    with pytest.raises(UserError, match="severity"):
        apply_shift("fog", image, depth, 6)
    with pytest.raises(UserError, match="rain"):
        open_dataset(kind="shifted", shifts=["rain"])


def test_the_bundled_sets():
    shifted = open_dataset(kind="shifted")
    assert len(shifted) == 40 and len(set(shifted.names)) == 40
    pairs = {tuple(name.split("_", 1)[1].rsplit("_", 1)) for name in shifted.names}
    assert len(pairs) == 40  # every shift at every severity, once
    clean = open_dataset(kind="synthetic", count=3, width=64, height=48)
    sample, again = clean[1], clean[1]
    assert torch.equal(sample.image, again.image) and sample.is_metric and sample.mask.any()
    small = open_dataset(kind="shifted", count=3, width=64, height=48)
    assert torch.equal(small[1].points.nan_to_num(0), sample.points.nan_to_num(0))  # a shift leaves the truth alone
    assert not torch.equal(small[1].image, sample.image)
    assert small.data_hash() != clean.data_hash()
