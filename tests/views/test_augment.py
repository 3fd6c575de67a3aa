"""Views against exact truth: what the pixels of a crop, a mirror image or a moved camera really show."""

import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ttt_lib.core.schema import ViewConfig
from ttt_lib.data.scenes.generate import make_scenes, place_cameras
from ttt_lib.data.scenes.raycast import draw, make_atlas
from ttt_lib.geometry.cameras import (
    MIRROR,
    intrinsics_from_fov,
    mirror_intrinsics,
    mirror_points,
    project,
    unproject,
    uv_map,
)
from ttt_lib.views.carry import CUTMIX_DRAWS, carry_back, cutmix
from ttt_lib.views.color import DRAWS, SEVERITIES, photometric, recolour
from ttt_lib.views.draw import CAMERA_SEVERITIES, fill_unknown, make_views, sample_cameras
from ttt_lib.views.renderer import NovelViewRenderer

SIZE = (96, 128)
PLAIN_COLOURS = {"photometric": {"severity": 0}}
STILL = {
    "whole": {"mirror": 0.0, "crop": {"probability": 0.0}},
    "mirror": {"mirror": 1.0, "crop": {"probability": 0.0}},
    "recentred crop": {"mirror": 0.0},
    "plain crop": {"mirror": 0.0, "crop": {"kind": "plain"}},
    "recentred crop, mirrored": {"mirror": 1.0},
    "plain crop, mirrored": {"mirror": 1.0, "crop": {"kind": "plain"}},
    "large crop, mirrored": {"mirror": 1.0, "crop": {"scale": (0.8, 1.0)}},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@lru_cache
def atlas():
    return make_atlas(torch.rand(80, 3, 128, 128, generator=seeded()))


@lru_cache
def scene(kind="room", seed=1, flat=True):
    """A scene of boxes (all surfaces are planes, if flat), its camera and its exact picture."""
    scenes, places = make_scenes([kind], seed, atlas())
    if flat:
        scenes.solids.half[:, scenes.solids.counts[0] :] = 0
    world, intrinsics = place_cameras([kind], places, seed, SIZE[1] / SIZE[0])
    return scenes, world, draw(scenes, world, intrinsics, SIZE, shadows=False)


def views_of(kind, config, count=4, seed=0, renderer=None, **options):
    picture = scene(kind)[2]
    target = picture.image[0], picture.points[0], picture.mask[0], picture.intrinsics[0]
    return make_views(*target, ViewConfig(**{**PLAIN_COLOURS, **config}), count, seeded(seed), renderer, **options)


def truth_of(kind, view, of="points"):
    """What the views' cameras see, drawn anew: points (B,h,w,3), or a map of the planes, (B,h,w,4)."""
    scenes, world, _ = scene(kind)
    result = []
    for transform, intrinsics in zip(view.transform, view.intrinsics):
        mirrored = torch.linalg.det(transform[:3, :3]) < 0
        if mirrored:
            transform, intrinsics = MIRROR @ transform, mirror_intrinsics(intrinsics)
        picture = draw(scenes, (transform @ world[0])[None], intrinsics[None], view.image.shape[-2:], shadows=False)
        points, normal = picture.points[0], picture.normal[0]
        plane = torch.cat([normal, (points * normal).sum(-1, keepdim=True)], -1)
        wanted = {"points": points, "plane": plane, "image": picture.image[0].permute(1, 2, 0)}[of]
        result.append((mirror_points(wanted) if of == "points" else wanted.flip(1)) if mirrored else wanted)
    return torch.stack(result)


def in_one_plane(kind, view):
    """View pixels around which, five by five, both the view and the image see a single plane: (B,h,w) bool."""
    picture = scene(kind)[2]
    rays = unproject(torch.ones(view.mask.shape), view.intrinsics)
    uv = project(rays @ view.transform[:, None, :3, :3], picture.intrinsics[:, None, None])
    offset = (picture.points * picture.normal).sum(-1, keepdim=True)
    there = one_plane(torch.cat([picture.normal, offset], -1)).float()[None].expand(len(uv), -1, -1, -1)
    there = F.grid_sample(there, 2 * uv - 1, mode="nearest", align_corners=False)[:, 0] > 0.5
    return one_plane(truth_of(kind, view, "plane")) & there


def one_plane(planes):
    maps = F.pad(planes.nan_to_num(1e4).permute(0, 3, 1, 2), (2, 2, 2, 2), mode="replicate")
    spread = F.max_pool2d(maps, 5, 1) + F.max_pool2d(-maps, 5, 1)
    return spread.amax(1) < 1e-3


def relative_error(points, truth):
    return (points - truth).norm(dim=-1) / truth.norm(dim=-1)


# ------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("kind", ["room", "table", "street"])
@pytest.mark.parametrize("name", STILL)
def test_targets_are_the_truth_of_the_view(kind, name):
    view = views_of(kind, STILL[name])
    truth = truth_of(kind, view)
    flat = in_one_plane(kind, view) & torch.isfinite(truth).all(-1)
    assert (view.mask & flat).sum() > (0.6 if kind == "street" else 0.9) * flat.sum()  # far ground is all edges
    assert relative_error(view.points, truth)[view.mask & flat].max() < 1e-4
    # At creases the target is interpolated between planes; these are few, and near.
    error = relative_error(view.points, truth)[view.mask]
    assert (error < 1e-4).float().mean() > 0.9
    assert (error < 0.05).float().mean() > 0.999
    assert torch.equal(torch.isfinite(view.points).all(-1), view.mask)


@settings(max_examples=25, deadline=None)
@given(
    tilt=st.tuples(st.floats(-0.6, 0.6), st.floats(-0.6, 0.6)),
    fov=st.floats(30, 100),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["recentred", "plain"]),
    mirror=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_plane_stays_a_plane_on_the_rays_of_the_view(tilt, fov, seed, kind, mirror):
    height, width = 24, 40
    intrinsics = intrinsics_from_fov(fov, width / height)
    normal = torch.tensor([*tilt, -1.0])
    rays = unproject(torch.ones(height, width), intrinsics)
    inverse = -(rays @ normal) / 2.0  # the plane through (0, 0, 2)
    points = rays / inverse[..., None]
    mask = inverse > 0.05
    config = ViewConfig(mirror=mirror, crop={"kind": kind, "scale": (0.3, 1.0)}, **PLAIN_COLOURS)
    view = make_views(torch.rand(3, height, width), points, mask, intrinsics, config, 3, seeded(seed))
    for i in range(3):
        known = view.points[i][view.mask[i]]
        turned = view.transform[i, :3, :3] @ normal
        torch.testing.assert_close(known @ turned, torch.full((len(known),), -2.0), rtol=1e-4, atol=0)
        uv = uv_map(height, width)[view.mask[i]]
        torch.testing.assert_close(project(known, view.intrinsics[i]), uv, rtol=0, atol=1e-5)


def test_plain_crops_move_the_principal_point_and_recentred_ones_do_not():
    recentred, plain = (views_of("room", STILL[name]) for name in ("recentred crop", "plain crop"))
    assert (recentred.intrinsics[:, :2, 2] - 0.5).abs().max() < 1e-6
    assert (plain.intrinsics[:, :2, 2] - 0.5).abs().max() > 0.05
    assert torch.equal(plain.transform, torch.eye(4).expand(4, 4, 4))
    assert (recentred.transform[:, 2, 2] < 1).all()


@pytest.mark.parametrize("name", STILL)
def test_pixels_stay_square(name):
    view = views_of("room", STILL[name])
    height, width = view.image.shape[-2:]
    torch.testing.assert_close(view.intrinsics[:, 0, 0] * width, view.intrinsics[:, 1, 1] * height)


def test_the_whole_view_is_the_image_and_its_mirror_is_flipped():
    picture = scene("street")[2]
    whole = views_of("street", STILL["whole"], 1)
    mirror = views_of("street", STILL["mirror"], 1)
    torch.testing.assert_close(whole.image, picture.image)
    torch.testing.assert_close(mirror.image, picture.image.flip(-1), atol=1e-5, rtol=0)
    assert torch.equal(mirror.negative, ~picture.mask.flip(-1))
    assert not (mirror.negative & mirror.mask).any()


def test_the_release_keeps_the_sign_of_x():
    right = views_of("room", {"mirror": 0.5}, 8)
    wrong = views_of("room", {"mirror": 0.5}, 8, mirror_keeps_x=True)
    mirrored = torch.tensor(["mirror" in kind for kind in right.kind])
    assert 0 < mirrored.sum() < 8
    sign = torch.where(mirrored, -1.0, 1.0)[:, None, None]
    torch.testing.assert_close(wrong.points[..., 0], right.points[..., 0] * sign, equal_nan=True)
    torch.testing.assert_close(wrong.points[..., 1:], right.points[..., 1:], equal_nan=True)


# --------------------------------------------------------------------------------------------------- moved cameras


@settings(max_examples=30, deadline=None)
@given(severity=st.integers(0, 5), depth=st.floats(0.1, 100), seed=st.integers(0, 2**31))
def test_cameras_stay_within_their_severity_and_look_at_the_scene(severity, depth, seed):
    transform = sample_cameras(depth, severity, 16, seeded(seed))
    rotation = transform[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(16, 3, 3), atol=1e-5, rtol=0)
    offset = -(rotation.mT @ transform[:, :3, 3:])[..., 0] / depth
    assert (offset.abs() <= torch.tensor(CAMERA_SEVERITIES[severity][:3]) + 1e-5).all()
    seen = transform @ torch.tensor([0.0, 0.0, depth, 1.0])
    assert (seen[:, :2].abs() < 1e-4 * depth).all() and (seen[:, 2] > 0).all()
    roll = torch.atan2(rotation[:, 0, 1], rotation[:, 1, 1]).abs().rad2deg()
    assert (roll <= CAMERA_SEVERITIES[severity][3] + 1.5).all()  # turning aside rolls a little too


def test_severities_grow():
    table = torch.tensor([CAMERA_SEVERITIES[k] for k in range(6)])
    assert (table.diff(dim=0) > 0).all() and (table[0] == 0).all()


@pytest.mark.parametrize("crop", ["recentred", "plain"])
@pytest.mark.parametrize("mirror", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["room", "street"])
def test_novel_views_compose_with_crop_and_mirror(kind, mirror, crop):
    config = {"mirror": mirror, "crop": {"kind": crop}, "novel_view": {"probability": 1.0, "severity": 3}}
    view = views_of(kind, config, 2, renderer=NovelViewRenderer("torch"))
    assert all(("mirror" in k) == bool(mirror) and "novel" in k and "crop" in k for k in view.kind)
    truth = truth_of(kind, view)
    error = relative_error(view.points, truth)[view.mask & torch.isfinite(truth).all(-1)]
    assert (error < 0.01).float().mean() > 0.95
    assert view.stats == {"drawn": 2, "novel": 2, "redrawn": 0, "identity": 0}


def test_the_sky_keeps_its_colours_and_is_nothing():
    config = {"mirror": 0.0, "novel_view": {"probability": 1.0, "severity": 4}}
    view = views_of("street", config, 4, renderer=NovelViewRenderer("torch"))
    truth = torch.isfinite(truth_of("street", view)).all(-1)
    assert view.negative.float().mean() > 0.1
    assert (view.negative & truth).float().mean() < 0.01  # houses that the first camera could not see
    assert (view.negative & ~truth).sum() > 0.7 * (~truth).sum()  # the rest was behind houses
    shown = view.image.permute(0, 2, 3, 1)[view.negative & ~truth]
    real = truth_of("street", view, "image")[view.negative & ~truth]
    assert (shown - real).abs().mean() < 0.03
    assert torch.isfinite(view.image).all()


def test_views_that_show_too_little_stay_in_place_and_are_counted():
    moving = {"novel_view": {"probability": 1.0, "severity": 5, "minimum_known": 1.0, "tries": 3}}
    kept = views_of("room", moving, 4, renderer=NovelViewRenderer("torch"))
    assert kept.stats == {"drawn": 4, "novel": 4, "redrawn": 8, "identity": 4}
    assert not any("novel" in kind for kind in kept.kind)
    still = views_of("room", {"novel_view": {"probability": 0.0, "tries": 3}}, 4)
    assert torch.equal(kept.image, still.image) and torch.equal(kept.transform, still.transform)
    torch.testing.assert_close(kept.points, still.points, equal_nan=True)


def test_moving_needs_a_renderer_but_severity_0_does_not():
    with pytest.raises(ValueError, match="renderer"):
        views_of("room", {"novel_view": {"probability": 1.0}})
    assert views_of("room", {"novel_view": {"probability": 1.0, "severity": 0}}).stats["novel"] == 0


def test_a_renderer_is_given_each_new_target():
    renderer = NovelViewRenderer("torch")
    config = ViewConfig(novel_view={"probability": 1.0}, **PLAIN_COLOURS)
    room, street = (
        (picture.image[0], picture.points[0], picture.mask[0], picture.intrinsics[0])
        for picture in (scene("room")[2], scene("street")[2])
    )
    first = make_views(*room, config, 2, seeded(), renderer)
    mesh = renderer.mesh
    assert torch.equal(make_views(*room, config, 2, seeded(), renderer).image, first.image)
    assert renderer.mesh is mesh  # made once for a target
    second = make_views(*street, config, 2, seeded(), renderer)
    renderer.set_scene(*street)  # somebody else used it
    assert torch.equal(make_views(*room, config, 2, seeded(), renderer).image, first.image)
    assert not torch.equal(second.image, first.image)


# ------------------------------------------------------------------------------------------------------ randomness

EVERYTHING = {
    "novel_view": {"probability": 0.5, "severity": 3},
    "photometric": {"severity": 4, "probability": 0.8, "blur": 0.5},
}


def same(first, second, rows=slice(None)):
    names = ("image", "points", "mask", "negative", "intrinsics", "transform")
    pairs = [(getattr(first, name)[rows], getattr(second, name)[rows]) for name in names]
    return all(torch.equal(a.float().nan_to_num(7.0), b.float().nan_to_num(7.0)) for a, b in pairs)


def test_the_seed_alone_decides():
    renderer = NovelViewRenderer("torch")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = views_of("room", EVERYTHING, 6, renderer=renderer)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first, views_of("room", EVERYTHING, 6, renderer=renderer))
    assert not same(first, views_of("room", EVERYTHING, 6, seed=1, renderer=renderer))
    assert {"novel", "crop", "mirror", "photometric"} <= {part for k in first.kind for part in k.split("+")}


def test_the_first_views_do_not_depend_on_how_many_follow():
    renderer = NovelViewRenderer("torch")
    many = views_of("street", EVERYTHING, 6, renderer=renderer)
    few = views_of("street", EVERYTHING, 2, renderer=renderer)
    assert many.kind[:2] == few.kind
    for name in ("image", "points"):
        a, b = getattr(many, name)[:2], getattr(few, name)
        torch.testing.assert_close(a, b, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_probabilities_are_kept():
    config = {
        "mirror": 0.3,
        "crop": {"probability": 0.6},
        "photometric": {"probability": 0.2, "severity": 1},
    }
    target = torch.rand(3, 16, 16), torch.ones(16, 16, 3), None, intrinsics_from_fov(60.0, 1.0)
    kinds = make_views(*target, ViewConfig(**config), 400, seeded()).kind
    for name, share in {"mirror": 0.3, "crop": 0.6, "photometric": 0.2}.items():
        assert abs(sum(name in kind for kind in kinds) / 400 - share) < 4 * math.sqrt(share * (1 - share) / 400)


# ------------------------------------------------------------------------------------------------------ photometric


def photograph(batch=1, size=48):
    import skimage.data

    image = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(image, (size, size), mode="area").expand(batch, -1, -1, -1)


def test_severity_0_and_probability_0_change_nothing():
    images = photograph(4)
    assert torch.equal(photometric(images, 0, seeded(), blur=1.0), images)
    assert torch.equal(photometric(images, 5, seeded(), probability=0.0, blur=1.0), images)


def test_higher_severities_change_more_and_keep_the_mean_brightness():
    images = photograph(64)
    changed = [photometric(images, severity, seeded(), blur=0.3) for severity in range(6)]
    distance = torch.stack([(x - images).abs().mean() for x in changed])
    assert (distance.diff() > 0.005).all()
    for severity, x in enumerate(changed):
        assert abs(x.mean() - images.mean()) < 0.005 + 0.012 * severity
        assert x.std() > 0.8 * images.std()  # neither white nor black nor flat


@settings(max_examples=30, deadline=None)
@given(
    severity=st.integers(0, 5),
    level=st.sampled_from([0.0, 0.5, 1.0, None]),
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(4, 24), st.integers(4, 24)),
)
def test_colours_stay_in_range_on_any_image(severity, level, seed, size):
    images = torch.rand(3, 3, *size, generator=seeded(seed)) if level is None else torch.full((3, 3, *size), level)
    changed = photometric(images, severity, seeded(seed), blur=0.5)
    assert changed.shape == images.shape and changed.dtype == images.dtype
    assert torch.isfinite(changed).all() and changed.min() >= 0 and changed.max() <= 1


def test_each_image_is_changed_on_its_own():
    images = torch.cat([photograph(3), 1 - photograph(3)])
    draws = torch.rand(6, DRAWS, generator=seeded(3))
    together = recolour(images, 5, draws, blur=0.5)
    for i in range(6):
        alone = recolour(images[i : i + 1], 5, draws[i : i + 1], blur=0.5)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_colour_jitter_does_what_its_number_says():
    """All draws in the middle change nothing; the ends of one column are one operation at full strength."""
    images = photograph() * 0.5 + 0.2
    middle = torch.full((1, DRAWS), 0.5)
    middle[:, 6:] = 0.999
    torch.testing.assert_close(recolour(images, 3, middle), images, atol=2e-3, rtol=0)
    brighter, gamma, gray = middle.clone(), middle.clone(), middle.clone()
    brighter[:, 1], gamma[:, 5], gray[:, 16] = 1.0, 1.0, 0.0
    torch.testing.assert_close(
        recolour(images, 3, brighter), images * (1 + SEVERITIES["brightness"][2]), atol=3e-3, rtol=0
    )
    torch.testing.assert_close(recolour(images, 3, gamma), images ** (1 + SEVERITIES["gamma"][2]), atol=3e-3, rtol=0)
    grays = recolour(images, 3, gray)
    torch.testing.assert_close(grays, (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
                               .expand_as(grays), atol=3e-3, rtol=0)  # fmt: skip
    blurred = recolour(images, 5, torch.cat([middle[:, :18], torch.zeros(1, 1)], 1), blur=1.0)
    assert blurred.diff(dim=-1).abs().mean() < 0.9 * recolour(images, 5, middle).diff(dim=-1).abs().mean()


def test_severities_of_every_operation_grow():
    for name, row in SEVERITIES.items():
        values = torch.tensor(row)
        step = values.diff() * (-1 if name in ("posterize_bits", "solarize_above") else 1)
        assert (step >= 0).all() and values[0] != values[-1], name


# ------------------------------------------------------------------------------------------- filling, back, CutMix


def test_filling_keeps_what_is_known_and_blends_the_rest():
    image = photograph(2, 37)[..., :30]
    mask = torch.rand(2, 37, 30, generator=seeded()) < 0.3
    mask[:, 10:25, 5:20] = False
    holes = torch.where(mask[:, None], image, torch.rand(image.shape))
    filled = fill_unknown(holes, mask)
    assert torch.equal(filled.masked_select(mask[:, None]), image.masked_select(mask[:, None]))
    assert (filled - image).abs().mean() < 0.5 * (holes - image).abs().mean()
    constant = fill_unknown(torch.where(mask[:, None], torch.tensor(0.3), 1.0), mask)
    torch.testing.assert_close(constant, torch.full_like(constant, 0.3))
    torch.testing.assert_close(fill_unknown(image, torch.zeros_like(mask)), torch.full_like(image, 0.5))


@pytest.mark.parametrize("kind", ["room", "street"])
@pytest.mark.parametrize("name", [*STILL, "novel"])
def test_perfect_predictions_carried_back_are_the_original_points(kind, name):
    moving = {"mirror": 0.5, "novel_view": {"probability": 1.0, "severity": 3}}
    view = views_of(kind, STILL.get(name, moving), 4, renderer=NovelViewRenderer("torch"))
    picture = scene(kind)[2]
    points, mask = carry_back(view, truth_of(kind, view), picture.points[0], picture.intrinsics[0])
    assert points.shape == (4, *SIZE, 3) and mask.shape == (4, *SIZE)
    assert mask.float().mean() > 0.3
    error = relative_error(points, picture.points)[mask]
    assert torch.isfinite(error).all()
    assert (error < 1e-4).float().mean() > (0.85 if "wide" in name else 0.93)
    assert (error < 0.05).float().mean() > 0.997


def test_carrying_back_does_not_need_geometry_for_cameras_in_place():
    view = views_of("room", STILL["recentred crop, mirrored"])
    picture, truth = scene("room")[2], truth_of("room", view)
    with_geometry = carry_back(view, truth, picture.points[0], picture.intrinsics[0])
    without = carry_back(view, truth, torch.full((*SIZE, 3), torch.nan), picture.intrinsics[0])
    assert (with_geometry[1] ^ without[1]).float().mean() < 0.01
    both = with_geometry[1] & without[1]
    torch.testing.assert_close(with_geometry[0][both], without[0][both], rtol=1e-4, atol=1e-4)


def test_hidden_pixels_are_not_carried_back():
    config = {"mirror": 0.0, "crop": {"probability": 0.0}, "novel_view": {"probability": 1.0, "severity": 5}}
    view = views_of("table", config, 6, renderer=NovelViewRenderer("torch"))
    picture = scene("table")[2]
    points, mask = carry_back(view, truth_of("table", view), picture.points[0], picture.intrinsics[0])
    error = relative_error(points, picture.points.expand_as(points))
    assert (error[mask] < 0.05).float().mean() > 0.998
    unmasked = torch.isfinite(error) & picture.mask
    assert (error[unmasked] < 0.05).float().mean() < 0.99  # the test above can fail: some pixels are hidden


def test_cutmix_shows_both_and_says_where():
    view, other = views_of("room", {}, 64), views_of("street", {}, 64)
    draws = torch.rand(64, CUTMIX_DRAWS, generator=seeded())
    mixed, region = cutmix(view, other, draws)
    assert torch.equal(mixed, torch.where(region[:, None], other.image, view.image))
    area = region.float().mean((1, 2))
    assert (area > 0.08).all() and (area < 0.63).all() and area.std() > 0.08
    for one in region:  # a rectangle: its rows are all alike, and so are its columns
        assert torch.equal(one, one.any(1, keepdim=True) & one.any(0, keepdim=True))
    assert torch.equal(cutmix(view, other, draws)[1], region)
    assert not cutmix(view, other, draws, probability=0.0)[1].any()
    assert 16 < (cutmix(view, other, draws, probability=0.5)[1].flatten(1).any(1)).sum() < 48
