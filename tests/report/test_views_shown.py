"""What is shown of views: controls do what they say, figures show what they are given, wrong targets cost something."""

import io
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import adapt
from PIL import Image

from ttt_lib.adaptation import adapter, teacher
from ttt_lib.api import adapt as adapt_image
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.schema import ViewConfig
from ttt_lib.core.types import Prediction, Sample
from ttt_lib.models.load import load_model
from ttt_lib.report.view_figures import (
    SKY,
    UNKNOWN,
    first_views,
    paint_mask,
    plot_costs,
    plot_from_above,
    plot_row,
    plot_views,
)
from ttt_lib.report.widgets import VIEW_TYPES, ViewExplorer
from ttt_lib.views.draw import make_views
from ttt_lib.views.exact_targets import TARGETS, compare_targets, exact_scene, score_targets, target_views


def target(kind, seed=1):
    picture = exact_scene(kind, seed, (60, 80)).picture
    points, mask = picture.points[0], picture.mask[0]
    prediction = Prediction(points, points[..., 2], mask, picture.intrinsics[0], "metric")
    return picture.image[0], prediction


@pytest.fixture(scope="module")
def explorer():
    return ViewExplorer({"room": target("room"), "street": target("street")}, count=2)


def shown(explorer):
    return np.asarray(Image.open(io.BytesIO(explorer.image.value)), dtype=float)


def test_the_explorer_shows_a_picture(explorer):
    assert shown(explorer).std() > 10
    assert "known" in explorer.status.value and "ms a view" in explorer.status.value


@pytest.mark.parametrize("control, value, view", [
    ("picture", "street", "everything"),
    ("seed", 7, "everything"),
    ("colour", 5, "colours"),
    ("blur", 1.0, "colours"),
    ("camera", 5, "other camera"),
    ("crop", 0.2, "crop, recentred"),
])  # fmt: skip
def test_every_control_changes_the_picture(explorer, control, value, view):
    explorer.view_type.value = view
    before, slider = shown(explorer), getattr(explorer, control)
    old, slider.value = slider.value, value
    changed = shown(explorer)
    assert changed.shape != before.shape or np.abs(changed - before).max() > 3
    slider.value = old
    assert np.abs(shown(explorer) - before).max() == 0  # and back


@pytest.mark.parametrize("name", VIEW_TYPES)
def test_every_view_type_is_a_valid_configuration(explorer, name):
    explorer.view_type.value = name
    assert isinstance(explorer.config, ViewConfig)
    assert explorer.config.novel_view.probability == VIEW_TYPES[name].get("novel_view", 0.0)


def test_masks_are_painted():
    known, negative = torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    known[0, 0], negative[0, 1] = True, True
    painted = paint_mask(torch.full((3, 2, 2), 0.25), known, negative)
    np.testing.assert_allclose(painted, [[(0.25,) * 3, SKY], [UNKNOWN, UNKNOWN]])


def test_figures_have_a_panel_for_everything():
    image, prediction = target("street")
    maps = image, prediction.points, prediction.mask, prediction.intrinsics
    view = make_views(*maps, ViewConfig(), 3, torch.Generator().manual_seed(0))
    assert len(plot_views(view).axes) == 9
    assert [axis.get_title() for axis in plot_row({"a": image, "b": prediction.depth}).axes] == ["a", "b"]
    assert len(plot_from_above({"one": prediction.points, "two": view.points[0]}).axes[0].collections) == 2


def test_a_perfect_student_is_scored_up_to_scale_and_z_shift():
    points = exact_scene("room", 1, (60, 80)).picture.points
    shifted = 3 * points + torch.tensor([0.0, 0.0, 0.5])
    scores = score_targets(shifted, points)
    assert scores["loss"] < 1e-5 and scores["wrong"] == 0 and scores["known"] == 1
    half = points.clone()
    half[:, :30] = torch.nan
    assert score_targets(points, half)["known"] == 0.5
    off = points + 0.2 * points[..., 2:] * torch.tensor([1.0, 0.0, 0.0])  # every point 20 % of its depth to the right
    scores = score_targets(off, points)
    assert abs(scores["error"] - 0.2) < 0.01 and abs(scores["loss"] - 0.2 / 3) < 0.005 and scores["wrong"] == 1


def test_wrong_targets_cost_more_than_right_ones():
    costs = compare_targets([("room", 1), ("table", 2)], count=2)
    assert list(costs["target"].unique()) == list(TARGETS) and len(costs) == 2 * 2 * len(TARGETS)
    loss = costs.groupby("target")["loss"].mean()
    assert loss["mirror, x negated"] < 1e-5 and loss["mirror, x kept (the release)"] > 0.02
    assert loss["crop, recentred"] < 1e-3 and loss["crop, plain (as published)"] > 0.01
    assert loss["novel view, masked"] < 0.5 * loss["novel view, no mask"]
    known = costs.groupby("target")["known"].mean()
    assert known["novel view, masked"] < known["novel view, no mask"]
    assert len(plot_costs(costs).axes[0].patches) == len(TARGETS)


def test_a_plain_crop_is_seen_turned_by_a_student_that_centres_it():
    view, student = target_views(exact_scene("room", 1), "crop, plain (as published)", 2)
    known = view.mask
    turned, straight = student[known], view.points[known]
    torch.testing.assert_close(turned.norm(dim=-1), straight.norm(dim=-1), rtol=1e-2, atol=1e-3)
    angle = torch.arccos(torch.nn.functional.cosine_similarity(turned, straight).clamp(-1, 1)).rad2deg()
    assert angle.median() > 2


@pytest.mark.parametrize("method", ["ttt", "tta"])
def test_the_views_shown_are_those_that_the_loop_draws(monkeypatch, method):
    config = ExperimentConfig(
        name="shown",
        train={
            "method": method,
            "passes": 3,
            "accumulation": 1,
            "parts": ["norms"],
            "optimizer": {"learning_rate": 1e-5},
        },
        teacher={"refresh_every": 0},
        views={"novel_view": {"probability": 0.5, "backend": "torch"}, "longest_side": 64},
        losses={"global": {"align_resolution": 4}, "local_4": {"align_resolution": 4, "num_patches": 2}},
    )
    network = load_model("tiny", "cpu", num_tokens=48)
    sample = Sample("one", "set", target("street")[0])
    used = []

    def record(*arguments):
        used.append(draw(*arguments))
        return used[-1]

    draw = teacher.draw_views
    for module in (teacher, adapter):  # of training, and of the mean over views
        monkeypatch.setattr(module, "draw_views", record)
    adapt(network, sample.image, config, name="set/one")
    shown_views, losses = first_views(network, sample, config, passes=3)
    assert len(losses) == (3 if method == "ttt" else 0) and all(np.isfinite(losses))
    assert shown_views.kind == [kind for view in used for kind in view.kind]
    torch.testing.assert_close(shown_views.image, torch.cat([view.image for view in used]))
    torch.testing.assert_close(shown_views.points, torch.cat([view.points for view in used]), equal_nan=True)


def test_the_overview_is_made_of_the_view_and_the_result(tiny, picture):
    image, points, mask = picture.image[0], picture.points[0], picture.mask[0]
    nothing = {"train": {"optimizer": {"learning_rate": 0}, "passes": 1, "accumulation": 1}}
    result = adapt_image(tiny, image, "unfreeze_encoder", overrides=nothing, progress=False)
    config = ViewConfig(mirror=1.0, crop={"probability": 0.0})
    view = make_views(image, points, mask, picture.intrinsics[0], config, 3, torch.Generator().manual_seed(0))
    figure = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "pictures.py"))["plot_overview"](
        image, result, view
    )
    pictures = [axis.images[0].get_array() for axis in figure.axes]
    assert len(pictures) == 10
    unknown = (np.asarray(pictures[6]) == np.asarray(UNKNOWN)).all(-1)
    assert np.array_equal(unknown, (~view.mask[0] & ~view.negative[0]).numpy())
    assert np.ptp(pictures[9]) < 1 and (pictures[9] == pictures[9][0, 0]).all()  # nothing changed
