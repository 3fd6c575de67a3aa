"""Tours: exact poses and depth from several cameras, fine structure that stays on surfaces, traps, grouping of samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ttt_lib.core.errors import ConfigError, DataError, UserError
from ttt_lib.core.files import write_json
from ttt_lib.core.schema import DataConfig
from ttt_lib.data.catalog import open_dataset
from ttt_lib.data.grouping import SCENES, read_scenes
from ttt_lib.data.samples import open_moge, write_moge_layout
from ttt_lib.data.scenes.detail import Detail
from ttt_lib.data.scenes.failures import FAILURES
from ttt_lib.data.scenes.generate import KINDS
from ttt_lib.data.scenes.raycast import make_atlas
from ttt_lib.data.scenes.tours import make_tour, open_tours, path_offsets
from ttt_lib.geometry.cameras import project, transform_points

SMALL = (48, 64)


def places(poses: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(poses)[:, :3, 3]


def carried(tour, i: int, j: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels of view i that view j sees too: where (N,2) in [-1,1], and the colors (3,N) of both there."""
    first, second = tour.samples[i], tour.samples[j]
    points = transform_points(first.points, tour.poses[j] @ torch.linalg.inv(tour.poses[i]))
    uv = (2 * project(points, second.intrinsics) - 1).nan_to_num(9)
    seen = torch.nn.functional.grid_sample(second.depth[None, None], uv[None], mode="nearest", align_corners=False)[
        0, 0
    ]
    color = torch.nn.functional.grid_sample(second.image[None], uv[None], align_corners=False)[0]
    same = first.mask & (uv.abs() < 1).all(-1) & ((points[..., 2] / seen - 1).abs() < 0.02)
    return uv[same], first.image[:, same], color[:, same]


@given(st.integers(1, 9), st.floats(0.01, 0.3), st.floats(0.5, 30), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_neighbors_on_a_path_are_a_baseline_apart(views, baseline, distance, seed):
    offsets = path_offsets(views, baseline * distance, distance, np.random.default_rng(seed)).double()
    assert offsets.shape == (views, 3)
    steps = (offsets[1:] - offsets[:-1]).norm(dim=-1)
    assert torch.allclose(steps, torch.full_like(steps, baseline * distance), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_poses_carry_the_points_of_one_photograph_onto_another(kind):
    """Where two cameras see the same place, its color is the same: the fine structure lies on surfaces, not on the
    screen."""
    tour = make_tour(kind, 21, 2, 0.1, (120, 160))
    _, here, there = carried(tour, 0, 1)
    assert here.shape[1] > 0.3 * 120 * 160
    gray = torch.stack([here.mean(0), there.mean(0)])
    assert torch.corrcoef(gray)[0, 1] > 0.85
    middle = places(tour.poses)
    assert (middle[1] - middle[0]).norm() == pytest.approx(0.1 * tour.median_depth, rel=1e-3)


def test_a_tour_is_samples_with_exact_truth_and_one_focal_length():
    tour = make_tour("table", 3, 3, 0.1, SMALL)
    rotation = tour.poses[:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3), atol=1e-5) and tour.poses.shape == (3, 4, 4)
    for sample in tour.samples:
        assert torch.equal(sample.intrinsics, tour.samples[0].intrinsics) and sample.is_metric
        assert sample.image.shape == (3, *SMALL) and sample.depth.shape == SMALL
        assert torch.equal(torch.isfinite(sample.depth), sample.mask)
        assert torch.equal(sample.depth[sample.mask], sample.points[..., 2][sample.mask])
        levels = sample.image * 255
        assert (levels - levels.round()).abs().max() < 1e-3  # as a file would hold it


def test_the_same_from_the_same_seed_and_a_shift_leaves_the_truth_alone():
    first, again, other = (make_tour("room", seed, 2, 0.1, SMALL) for seed in (5, 5, 6))
    foggy = make_tour("room", 5, 2, 0.1, SMALL, "fog", 3)
    assert torch.equal(first.samples[1].image, again.samples[1].image)
    assert not torch.equal(first.samples[1].image, other.samples[1].image)
    assert not torch.equal(first.samples[1].image, foggy.samples[1].image)
    assert torch.equal(first.samples[1].depth.nan_to_num(0), foggy.samples[1].depth.nan_to_num(0))
    assert torch.equal(first.poses, foggy.poses)


def detail_at(uv: torch.Tensor, span: float, repeat: float | None = None) -> torch.Tensor:
    """Luminance (N,) that the detail gives to gray 0.3 on a floor at places uv (N,2), pixels `span` metres wide."""
    count = len(uv)
    detail = Detail(8, make_atlas(torch.full((80, 3, 128, 128), 0.5)), repeat)
    index, face = torch.full((count,), 2), torch.ones(count, dtype=torch.long)
    color = detail(torch.full((count, 3), 0.3), index, face, uv, torch.full((count,), span), torch.full((count,), 2.0))
    return color[:, 0]


def test_detail_repeats_only_where_it_is_asked_to_and_fades_with_distance():
    uv = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)) * 3
    step = torch.tensor([0.5, 1.0])
    alone, moved = detail_at(uv, 0.004), detail_at(uv + step, 0.004)
    assert torch.corrcoef(torch.stack([alone, moved]))[0, 1].abs() < 0.3
    # At the seam a rounding error takes a place to the other end of the period: few of them, not the rest.
    same = (detail_at(uv, 0.004, 0.5) - detail_at(uv + step, 0.004, 0.5)).abs() < 0.02
    assert same.float().mean() > 0.99
    spread = [float(detail_at(uv, span).log().std()) for span in (0.004, 0.1, 0.5, 3.0)]
    assert spread[0] > spread[1] > spread[2] > spread[3] == 0.0


def test_the_set_groups_its_samples_and_takes_its_options():
    tours = open_dataset("tours", count=5, views=[2, 3], baselines=[0.1], width=64, height=48)
    groups = tours.scenes
    assert list(groups) == [f"tour_{n:03d}" for n in range(5)] and {len(g) for g in groups.values()} <= {2, 3}
    assert [name for group in groups.values() for name in group] == tours.names
    sample = tours.load(groups["tour_001"][1])
    assert sample.name == "tour_001/view_1" and sample.dataset == "tours" and sample.image.shape == (3, 48, 64)
    whole = make_tour(KINDS[1], 1, len(groups["tour_001"]), 0.1, (48, 64)).samples[1]
    assert torch.equal(sample.image, whole.image)  # a view does not depend on what was drawn before it
    shifted = open_dataset("tours", count=5, views=[2, 3], baselines=[0.1], shifts=["fog"], width=64, height=48)
    assert shifted.data_hash() != tours.data_hash()
    config = DataConfig(kind="tours", views=[2], baselines=[0.2], count=2)
    assert len(open_dataset(config.kind, **config.options())) == 4


def test_mistakes_with_tours_are_named():
    with pytest.raises(ConfigError, match="baselines"):
        open_tours(baselines=[2.0])
    with pytest.raises(ConfigError, match="views"):
        open_tours(views=[])
    with pytest.raises(UserError, match="rain"):
        open_tours(shifts=["rain"])
    with pytest.raises(ConfigError, match="baseline"):
        make_tour("room", 0, 2, 0.0)


def test_a_tour_goes_through_moges_layout_with_its_scenes(tmp_path):
    tours = open_tours(count=2, views=[2], baselines=[0.1], width=64, height=48)
    write_moge_layout(tours.readable(), tmp_path)
    alone = open_moge(tmp_path)
    assert alone.scenes == {} and alone.scene_of("tour_001/view_0") == ("tour_001/view_0", ["tour_001/view_0"])
    write_json(tmp_path / SCENES, tours.scenes)
    grouped = open_moge(tmp_path)
    assert read_scenes(tmp_path) == tours.scenes == grouped.scenes and grouped.data_hash() != alone.data_hash()
    shard = grouped.shard(0, 4)  # the other photographs of its scene are in other shards
    assert shard.names == ["tour_000/view_0"]
    assert shard.scene_of("tour_000/view_0") == ("tour_000", ["tour_000/view_0", "tour_000/view_1"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("{", "not a JSON file"),
        ("[]", "no table of scenes"),
        ("{}", "no table of scenes"),
        ('{"s": "a"}', "scene 's' needs a list"),
        ('{"s": []}', "scene 's' needs a list"),
        ('{"s": [1]}', "scene 's' needs a list"),
        ('{"s": ["../a"]}', "no path inside"),
        ('{"s": ["/a"]}', "no path inside"),
        ('{"s": ["b"]}', "no such folder"),
        ('{"s": ["a", "a"]}', "leave it in one"),
        ('{"s": ["a"], "t": ["./a"]}', "leave it in one"),
        ('{"s": ["a"], "s": ["a"]}', "twice"),
    ],
)
def test_a_bad_file_of_scenes_ends_in_one_sentence(tmp_path, content, said):
    (tmp_path / "a").mkdir()
    if content is not None:
        (tmp_path / "scenes.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said) as caught:
        read_scenes(tmp_path)
    assert "scenes.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def traps():
    return {name: trap(0, SMALL) for name, trap in FAILURES.items()}


@pytest.mark.parametrize("name", FAILURES)
def test_each_trap_is_a_few_photographs_with_truth(traps, name):
    samples = traps[name]
    assert [s.name for s in samples] == [f"view_{number}" for number in range(len(samples))] and 3 <= len(samples) <= 5
    assert all(s.image.shape == (3, *SMALL) and s.mask.any() for s in samples)
    again = FAILURES[name](0, SMALL)
    assert all(torch.equal(a.image, b.image) for a, b in zip(samples, again))


def test_the_traps_are_what_they_are_called(traps):
    assert all(torch.equal(s.image, traps["copies"][0].image) for s in traps["copies"])
    assert not torch.equal(traps["stranger"][2].intrinsics, traps["stranger"][0].intrinsics)
    assert torch.equal(traps["stranger"][1].intrinsics, traps["stranger"][3].intrinsics)
    for sample in traps["poster"]:  # a camera that faces a wall sees one depth
        assert torch.allclose(sample.depth, sample.depth[0, 0], rtol=1e-4)
    for sample in traps["plain"]:
        assert sample.image.std() < 0.5 * traps["copies"][0].image.std()
    # A camera that only turns sees the same distances along the same rays; one that moves does not.
    first, turned = traps["rotation"][0], traps["rotation"][1]
    cosine, sine = np.cos(np.radians(8)), np.sin(np.radians(8))
    turn = torch.tensor([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]], dtype=torch.float32)
    uv = 2 * project(first.points @ turn.T, turned.intrinsics) - 1
    distance = turned.points.norm(dim=-1)
    seen = torch.nn.functional.grid_sample(
        distance[None, None], uv.nan_to_num(9)[None], mode="nearest", align_corners=False
    )
    ratio = (first.points.norm(dim=-1) / seen[0, 0])[(uv.abs() < 0.95).all(-1) & first.mask]
    assert (ratio.log().abs() < 0.05).float().mean() > 0.9


def reconstruct(samples, folder) -> tuple[int, int, int]:
    """SIFT, exhaustive matching, incremental mapping: photographs, points, and cells (of 16) in the poorest view."""
    import pycolmap

    (folder / "images").mkdir()
    for sample in samples:
        pixels = (sample.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{sample.name}.png")
    height, width = samples[0].image.shape[-2:]
    reader = pycolmap.ImageReaderOptions()
    reader.camera_model = "SIMPLE_PINHOLE"
    reader.camera_params = f"{float(samples[0].intrinsics[0, 0]) * width},{width / 2},{height / 2}"
    pycolmap.set_random_seed(0)
    single = pycolmap.CameraMode.SINGLE
    pycolmap.extract_features(folder / "db", folder / "images", camera_mode=single, reader_options=reader)
    pycolmap.match_exhaustive(folder / "db")
    options = pycolmap.IncrementalPipelineOptions()
    options.min_model_size, options.mapper.init_min_tri_angle = 2, 2.0
    options.random_seed, options.triangulation.ignore_two_view_tracks = 0, False
    models = pycolmap.incremental_mapping(folder / "db", folder / "images", folder / "out", options=options)
    best = max(models.values(), key=lambda model: model.num_points3D(), default=None)
    if best is None:
        return 0, 0, 0
    cells = []
    for image in best.images.values():
        xy = np.array([p.xy for p in image.points2D if p.has_point3D()]).reshape(-1, 2)
        cells.append(len({tuple(cell) for cell in (xy / [width, height] * 4).astype(int)}))
    return best.num_reg_images(), best.num_points3D(), min(cells, default=0)


@pytest.mark.slow
def test_most_tours_reconstruct_and_hopeless_ones_do_not(tmp_path):
    good = []
    for number in range(8):
        tour = make_tour(KINDS[number % 4], 300 + number, 4, (0.08, 0.1, 0.12, 0.15)[number % 4])
        (tmp_path / str(number)).mkdir()
        images, points, cells = reconstruct(tour.samples, tmp_path / str(number))
        good.append(images == 4 and points > 150 and cells >= 8)
    assert np.mean(good) >= 0.75, good
    for name in ("copies", "plain"):
        (tmp_path / name).mkdir()
        assert reconstruct(FAILURES[name](0, (240, 320)), tmp_path / name)[1] < 50
