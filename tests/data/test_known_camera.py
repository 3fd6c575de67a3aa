"""Known cameras of single photographs: a plane at a known place comes back where it is, whatever the camera."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import IFD, Base

from ttt_lib import adapt
from ttt_lib.core.errors import UserError
from ttt_lib.core.types import Prediction
from ttt_lib.data.known_camera import centre_photograph, known_camera, parse_intrinsics
from ttt_lib.data.known_distances import References
from ttt_lib.data.moge_layout import Raw, target_view
from ttt_lib.geometry.cameras import fov_from_intrinsics, project, unproject

SIZE = (96, 128)
OFF = (110.0, 112.0, 80.0, 40.0)  # fx, fy, cx, cy: 16 pixels to the right and 8 above the middle, oblong pixels
CENTRED = (110.0, 110.0, 64.0, 48.0)
PLANE = torch.tensor([0.2, -0.3, 1.0], dtype=torch.float64) / 2.0  # points X of it: PLANE . X = 1, 2 m away on the axis
QUICK = {"train": {"passes": 0, "method": "none"}, "gate": {"mode": "off"}, "ensemble": {"members": []}}


def picture(size=SIZE):
    """Smooth colours (3,H,W)."""
    v, u = torch.meshgrid(torch.linspace(0, 3, size[0]), torch.linspace(0, 4, size[1]), indexing="ij")
    return torch.stack([u.sin(), v.cos(), (u * v).sin()]) / 2 + 0.5


def plane_depth(intrinsics, size, plane=PLANE):
    """Depth (H,W) of the plane in the frame of a camera."""
    return (1 / (unproject(torch.ones(*size, dtype=torch.float64), intrinsics.double()) @ plane)).float()


def seen_plane(seen):
    """Depth of the same plane for the centred camera of a photograph."""
    turned = PLANE if seen.rotation is None else seen.rotation @ PLANE
    return plane_depth(seen.intrinsics, tuple(seen.image.shape[-2:]), turned)


def assert_is_the_plane(prediction, camera, share):
    """Its points lie on the plane and on the rays of the photograph's camera, at `share` of the pixels at least."""
    known = torch.isfinite(prediction.depth)
    assert share <= known.float().mean() <= 1 and torch.equal(known, torch.isfinite(prediction.points).all(-1))
    assert not prediction.mask[~known].any() and prediction.mask[known].float().mean() > 0.99
    assert torch.equal(prediction.intrinsics, camera.intrinsics)
    expected = plane_depth(camera.intrinsics, SIZE)
    assert torch.allclose(prediction.depth[known], expected[known], rtol=4e-3)  # half a pixel at the border
    assert (prediction.depth / expected - 1)[known].abs().mean() < 5e-4
    rays = unproject(torch.ones(SIZE), camera.intrinsics)
    assert torch.allclose(prediction.points[known], (rays * prediction.depth[..., None])[known], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given, share", [(CENTRED, 1.0), (OFF, 0.6), ((90.0, 90.0, 20.0, 60.0), 0.35)])
def test_a_plane_goes_to_the_centred_camera_and_back(given, share):
    camera = known_camera(SIZE, given)
    seen = centre_photograph(picture(), camera)
    depth = seen_plane(seen)
    assert (seen.rotation is None) == (given is CENTRED)
    height, width = seen.image.shape[-2:]
    assert float(seen.intrinsics[0, 0]) * width == pytest.approx(given[0], rel=1e-5)
    assert float(seen.intrinsics[1, 1]) * height == pytest.approx(given[0], rel=1e-5)  # square pixels
    assert seen.fov_x == pytest.approx(float(fov_from_intrinsics(seen.intrinsics)[0]), abs=1e-3)
    normal = (PLANE if seen.rotation is None else seen.rotation @ PLANE).float().expand(height, width, 3)
    found = seen.back(Prediction(None, depth, torch.ones_like(depth) > 0, seen.intrinsics, "metric", normal=normal))
    assert_is_the_plane(found, camera, share)
    known = torch.isfinite(found.depth)
    assert torch.allclose(found.normal[known], PLANE.float().expand(SIZE + (3,))[known], atol=1e-5)
    assert "intrinsics that were given" in found.note and ("have no depth" in found.note) == (given is not CENTRED)


def test_edges_and_places_without_surface_stay_as_sharp_as_they_are():
    camera = known_camera(SIZE, OFF)
    seen = centre_photograph(picture(), camera)
    depth = torch.where(torch.arange(seen.image.shape[-1]) < 50, 1.0, 3.0).expand(seen.image.shape[-2:]).clone()
    depth[:10] = torch.inf
    found = seen.back(Prediction(None, depth, torch.isfinite(depth), seen.intrinsics, "metric", disparity=1 / depth))
    rays = unproject(torch.ones(*SIZE, dtype=torch.float64), camera.intrinsics.double())
    along = (rays @ seen.rotation.mT)[..., 2]
    values = (found.depth * along)[torch.isfinite(found.depth)]
    assert ((values - 1).abs() < 1e-3).logical_or((values - 3).abs() < 1e-3).all()  # nothing between
    sky = torch.isinf(found.depth)
    assert sky.any() and torch.isinf(found.points[sky]).all() and not found.mask[sky].any()
    assert torch.equal(torch.isnan(found.disparity), torch.isnan(found.depth))


def test_known_distances_go_along():
    camera = known_camera(SIZE, OFF)
    seen = centre_photograph(picture(), camera)
    uv = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    rays = torch.cat([uv, torch.ones(200, 1)], -1).double() @ torch.linalg.inv(camera.intrinsics.double()).mT
    carried = seen.carried(References(uv, (1 / (rays @ PLANE)).float()))
    again = torch.cat([carried.uv, torch.ones(len(carried.uv), 1)], -1).double()
    again = again @ torch.linalg.inv(seen.intrinsics.double()).mT
    assert 60 < len(carried.depth) < 200
    assert torch.allclose(carried.depth.double(), 1 / (again @ (seen.rotation @ PLANE)), rtol=1e-4)
    with pytest.raises(UserError, match="known distances: none lies in the part"):
        seen.carried(References(torch.tensor([[0.0, 1.0]]), torch.ones(1)))


def test_the_centred_picture_is_the_view_of_moges_evaluation():
    camera, image = known_camera(SIZE, (110.0, 110.0, 80.0, 40.0)), picture()
    seen = centre_photograph(image, camera)
    height, width = seen.image.shape[-2:]
    raw = Raw((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8), np.ones(SIZE, np.float32),
              camera.intrinsics.numpy())  # fmt: skip
    view = target_view(raw, width, height)
    assert torch.allclose(view["intrinsics"], seen.intrinsics, rtol=0.02)  # whole pixels of width and height
    assert (view["image"] - seen.image).abs().mean() < 0.01
    # The right part of the picture, not the same part: a corner of the plane's rays lies where the camera says.
    corner = torch.tensor([[0.3, 0.2, 1.0]]).double()
    there = project(corner, camera.intrinsics.double())[0] * torch.tensor([128, 96])
    here = project(corner @ seen.rotation.mT, seen.intrinsics.double())[0] * torch.tensor([width, height])
    (u, v), (a, b) = there.long().tolist(), here.long().tolist()
    assert torch.allclose(image[:, v, u], seen.image[:, b, a], atol=0.05)


def stand_in(model, seen, monkeypatch):
    """The network's answer is the plane, up to MoGe's scale and shift."""
    depth = seen_plane(seen)
    points = unproject(depth, seen.intrinsics) / 1.5
    points[..., 2] -= 0.4
    output = {"points": points[None], "mask": torch.ones_like(depth)[None], "metric_scale": torch.tensor([1.5])}

    def forward(image, num_tokens):
        assert torch.allclose(image[0], seen.image, atol=1e-6)
        return {key: value.clone() for key, value in output.items()}

    monkeypatch.setattr(model.network, "forward", forward)


@pytest.mark.parametrize("given, share", [(CENTRED, 1.0), (OFF, 0.6)])
def test_moge_gives_the_right_points_under_a_known_camera(tiny, monkeypatch, given, share):
    camera = known_camera(SIZE, given)
    seen = centre_photograph(picture(), camera)
    stand_in(tiny, seen, monkeypatch)
    result = adapt(tiny, picture(), "original", overrides=QUICK, intrinsics=given)
    assert_is_the_plane(result.final, camera, share)
    assert result.final is result.original and tuple(result.image.shape[-2:]) == SIZE and tiny.fov_x is None
    with tiny.knowing(fov_x=seen.fov_x):  # with gradients too
        output = tiny.forward(seen.image[None])
        assert torch.allclose(tiny.metric_depth(output, seen.image[None])[0], seen_plane(seen), rtol=1e-3)


def test_a_wrong_camera_gives_other_points_and_the_models_own_is_close(tiny, monkeypatch):
    """What the field of view is for: the same answer of the network means another depth."""
    seen = centre_photograph(picture(), known_camera(SIZE, CENTRED))
    stand_in(tiny, seen, monkeypatch)
    right = adapt(tiny, picture(), "original", overrides=QUICK, fov=seen.fov_x).final
    wrong = adapt(tiny, picture(), "original", overrides=QUICK, fov=seen.fov_x / 2).final
    own = adapt(tiny, picture(), "original", overrides=QUICK).final
    assert torch.allclose(own.depth, right.depth, rtol=0.02)
    assert (wrong.depth / right.depth - 1).abs().mean() > 0.2
    assert float(fov_from_intrinsics(wrong.intrinsics)[0]) == pytest.approx(seen.fov_x / 2, rel=1e-4)


def test_training_sees_the_known_camera(tiny, monkeypatch):
    """Its views are drawn with it, and predictions on them are by their own field of view."""
    seen = []
    infer = tiny.network.infer
    monkeypatch.setattr(tiny.network, "infer", lambda *a, **k: seen.append(k["fov_x"]) or infer(*a, **k))
    quick = {"train": {"passes": 1, "method": "tta"}, "ensemble": {"members": []}}
    result = adapt(tiny, picture(), "tta", overrides=quick, intrinsics=OFF)
    whole, views = [f for f in seen if isinstance(f, float)], [f for f in seen if isinstance(f, torch.Tensor)]
    assert len(set(whole)) == 1 and views and all((f <= whole[0] + 1e-3).all() for f in views)
    assert result.decision == "averaged" and 0.5 < torch.isfinite(result.final.depth).float().mean() < 1


def test_exif_is_used_unless_it_is_not_wanted(tiny, tmp_path, monkeypatch):
    image, exif = Image.new("RGB", (128, 96), "gray"), Image.Exif()
    exif.get_ifd(IFD.Exif)[Base.FocalLengthIn35mmFilm] = 26
    image.save(tmp_path / "phone.jpg", exif=exif)
    said = []
    whole = type(tiny).predict

    def predict(self, images, intrinsics=None):
        said.append(self.fov_x)
        return whole(self, images, intrinsics)

    monkeypatch.setattr(type(tiny), "predict", predict)
    result = adapt(tiny, tmp_path / "phone.jpg", "original", overrides=QUICK)
    assert said[-1] == pytest.approx(67.4, abs=0.2) and "EXIF (26 mm)" in result.final.note
    adapt(tiny, tmp_path / "phone.jpg", "original", overrides=QUICK, exif=False)
    assert said[-1] is None
    adapt(tiny, tmp_path / "phone.jpg", "original", overrides=QUICK, fov=40.0)
    assert said[-1] == pytest.approx(40.0)
    tiny.fov_x = 50.0  # the experiment's own
    adapt(tiny, tmp_path / "phone.jpg", "original", overrides=QUICK)
    assert said[-1] == 50.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"intrinsics": OFF, "fov": 60.0}, "give one of them"),
        ({"intrinsics": (110.0, 110.0, 64.0)}, "intrinsics: are not those of a photograph of 128 x 96 pixels"),
        ({"intrinsics": (1.0, 1.0, 0.5, 900.0)}, "intrinsics: are not those"),
        ({"intrinsics": (110.0, float("nan"), 64.0, 48.0)}, "intrinsics: are not those"),
        ({"intrinsics": "110,110,64,48"}, "intrinsics: are not those"),
        ({"intrinsics": (110.0, 20.0, 64.0, 48.0)}, "fx is 5.5 times fy"),
        ({"fov": 0.0}, "lies from 1 to 179"),
        ({"fov": float("nan")}, "lies from 1 to 179"),
        ({"intrinsics": (8.0, 8.0, 128.0, 96.0)}, "too few; check cx, cy"),
    ],
)
def test_what_is_no_camera_is_said_in_one_sentence(options, says):
    with pytest.raises(UserError, match=says) as caught:
        centre_photograph(picture(), known_camera(SIZE, **options))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_intrinsics_on_the_command_line():
    assert parse_intrinsics("500, 501,320.5,240") == (500, 501, 320.5, 240)
    for text in ("500,500,320", "a,b,c,d", ""):
        with pytest.raises(UserError, match="--intrinsics .*must be four numbers in pixels"):
            parse_intrinsics(text)
