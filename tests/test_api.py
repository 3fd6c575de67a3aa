"""The package's four names: how they load, the README's first result, and how what they give shows itself."""

from __future__ import annotations

import ast
import base64
import io
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT, small_experiment
from PIL import Image

import ttt_lib
from ttt_lib import UserError, adapt, evaluate, load_samples
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.types import Prediction, Sample
from ttt_lib.data.samples import write_moge_layout
from ttt_lib.models.base import weights_checksum
from ttt_lib.report import html

QUICK = {
    "train": {"passes": 2, "accumulation": 1},
    "views": {"longest_side": 96},
    "losses": {"global": {"align_resolution": 6}},
}
small = small_experiment()


def python(code: str, timeout: float = 240, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, **options)


# ------------------------------------------------------------------------------------------------------- names


def test_importing_the_package_loads_nothing_heavy():
    done = python(
        "import ttt_lib, sys; ttt_lib.UserError; assert set(ttt_lib.__all__) <= set(dir(ttt_lib));"
        "print(sorted({'torch', 'numpy', 'moge', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr + done.stdout


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ttt_lib.nonsense  # noqa: B018
    with pytest.raises(ImportError):
        exec("from ttt_lib import nonsense")


def test_every_public_name_is_documented():
    for name in ttt_lib.__all__:
        assert len(getattr(ttt_lib, name).__doc__) > 100, name


@pytest.mark.parametrize(
    "path", sorted((ROOT / "ttt_lib").rglob("*.py")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_what_is_public_is_typed_and_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lacking = [] if ast.get_docstring(tree) else ["the module: docstring"]
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
    for scope in scopes:
        for node in scope.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                lacking.append(f"{node.name}: docstring")
            if isinstance(node, ast.FunctionDef):
                given = node.args
                every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                plain = [a.arg for a in every if a and a.arg not in ("self", "cls") and a.annotation is None]
                lacking += [f"{node.name}: type of {name}" for name in plain + ["the result"] * (node.returns is None)]
    assert not lacking


# ----------------------------------------------------------------------------------------------------- samples


def test_samples_by_name_folder_file_and_list(picture, tmp_path):
    motorcycle = load_samples("motorcycle", width=96, height=64)
    assert motorcycle.names == ["motorcycle_left", "motorcycle_right"] and len(motorcycle) == 2
    assert motorcycle[0].image.shape == (3, 64, 96) and motorcycle[0].is_metric
    assert len(load_samples("synthetic", count=3)) == 3 and len(load_samples("shifted", count=2)) == 2

    write_moge_layout([motorcycle[0]], tmp_path / "moge")
    moge = load_samples(tmp_path / "moge")
    assert moge.names == ["motorcycle_left"] and moge[0].depth is not None
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / "photos" / name)
    photos = load_samples(str(tmp_path / "photos"))
    assert photos.names == ["a.jpg", "b.png"] and photos[1].image.shape == (3, 30, 40) and photos[1].depth is None
    assert load_samples(tmp_path / "photos" / "b.png").names == ["b.png"]

    both = load_samples([tmp_path / "photos", tmp_path / "photos" / "a.jpg", tmp_path / "moge"])
    assert both.names == ["photos/a.jpg", "photos/b.png", "a/a.jpg", "moge/motorcycle_left"]
    assert [sample.name for sample in both] == ["a.jpg", "b.png", "a.jpg", "motorcycle_left"]
    assert both[1:3].names == ["photos/b.png", "a/a.jpg"] and both[1:3][1].name == "a.jpg"
    assert repr(both) == "SampleSet(photos+a+moge: 4 samples, photos/a.jpg, photos/b.png, a/a.jpg, ...)"
    twice = load_samples([tmp_path / "photos", tmp_path / "photos"])
    assert len(set(twice.names)) == 4 and twice.data_hash() != photos.data_hash()
    (tmp_path / "photos").rename(tmp_path / "photos_1")
    (tmp_path / "more" / "photos").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    for folder in ("more/photos", "photos"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / folder / "a.jpg")
    with pytest.raises(UserError, match="two samples are called 'photos_1/a.jpg'"):  # and none of them vanishes
        load_samples([tmp_path / "photos", tmp_path / "more" / "photos", tmp_path / "photos_1"])


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("nowhere", {}, "nowhere: no such folder"),
        ("pyproject.toml", {}, "no such folder, image or JSON"),
        ("motorcycle", {"colour": 1}, "colour"),
        ([], {}, "empty"),
        ("x" * 5000, {}, "no such folder"),
    ],
)
def test_a_source_that_is_none_is_said_in_one_sentence(source, options, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=words) as caught:
        load_samples(source, **options)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- adapting, evaluating


def test_adapt_by_names_is_the_loop_with_those_settings(tiny, picture, tmp_path):
    from conftest import adapt as loop

    from ttt_lib.core.config import load_experiment
    from ttt_lib.runs.catalog import NOTEBOOKS, resolve_profile

    sample = Sample("room", "set", picture.image[0])
    before = weights_checksum(tiny)
    result = adapt(tiny, sample, "unfreeze_encoder", overrides=QUICK, progress=False)
    file = NOTEBOOKS / "experiments" / "unfreeze_encoder.yaml"
    same = loop(tiny, sample.image, load_experiment(file, resolve_profile("demo"), QUICK), name="set/room")
    assert torch.equal(result.final.depth, same.final.depth) and result.passes_done == 2
    assert not torch.equal(result.final.depth, result.original.depth)
    assert weights_checksum(tiny) == before
    # Without the profile the paper's rate, which is more than a hundred times as high.
    far = adapt(tiny, sample, "unfreeze_encoder", profile=None, overrides=QUICK, progress=False)
    assert (far.final.depth - far.original.depth).norm() > 3 * (result.final.depth - result.original.depth).norm()


def test_adapt_takes_samples_photographs_tensors_and_whole_experiments(tiny, picture, tmp_path):
    Image.new("RGB", (64, 48), "gray").save(tmp_path / "photo.png")
    config = small(train={"passes": 0})
    assert adapt(tiny, tmp_path / "photo.png", config).final.depth.shape == (48, 64)
    assert adapt(tiny, str(tmp_path / "photo.png"), config).decision == "original"
    tensor = adapt(tiny, picture.image[0], config)
    sample = adapt(tiny, Sample("room", "set", picture.image[0]), config)
    assert torch.equal(tensor.final.depth, sample.final.depth)


@pytest.mark.parametrize(
    ("image", "options", "words"),
    [
        ("/nowhere.jpg", {}, "nowhere.jpg"),
        (torch.zeros(64, 64, 3), {}, r"must be a tensor .*not \(64, 64, 3\)"),
        (torch.full((3, 64, 64), 200.0), {}, "divide by 255"),
        (None, {}, "NoneType"),
        (torch.zeros(3, 64, 64), {"experiment": "nonsense"}, "no such experiment; there are .*recommended"),
        (torch.zeros(3, 64, 64), {"profile": "fast"}, "no such profile"),
        (torch.zeros(3, 64, 64), {"overrides": {"train": {"steps": 1}}}, "train.steps"),
    ],
)
def test_what_adapt_cannot_take_is_said_in_one_sentence(tiny, image, options, words):
    with pytest.raises(UserError, match=words) as caught:
        adapt(tiny, image, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def samples():
    return [load_samples("motorcycle", width=96, height=64)[i] for i in range(2)]


def test_scores_of_models_predictions_and_results(tiny, samples):
    from ttt_lib.evaluation.scores import scores_of

    prediction = tiny.predict(samples[0].image)
    table = evaluate(prediction, samples[0])
    scores = scores_of(prediction, samples[0])
    assert list(table.columns) == ["value"] and list(table.index.names) == ["metric", "score"]
    assert table.value["depth_metric", "delta1"] == scores["depth_metric"]["delta1"]
    assert len(table) == sum(len(group) for group in scores.values())
    pd.testing.assert_frame_equal(evaluate(tiny, samples[0]), table)

    many = evaluate(tiny, samples)
    assert list(many.index.names) == ["dataset", "sample", "metric", "score"] and len(many) == 2 * len(table)
    assert many.value["motorcycle", "motorcycle_left", "depth_metric", "delta1"] == scores["depth_metric"]["delta1"]
    pd.testing.assert_frame_equal(evaluate([tiny.predict(s.image) for s in samples], iter(samples)), many)


def test_before_and_after_side_by_side(tiny, samples):
    sample = samples[0]
    before = tiny.predict(sample.image)
    perfect = Prediction(
        sample.points.nan_to_num(3.0), sample.depth.nan_to_num(3.0), before.mask, sample.intrinsics, "metric"
    )
    table = evaluate(AdaptResult(before, perfect, perfect, "accept"), sample)
    assert list(table.columns) == ["before", "after", "better"]
    aligned = [m for m in table.index.get_level_values("metric").unique() if m.startswith(("depth", "points"))]
    assert (table.loc[aligned].better == "after").all() and table.after["depth_metric", "rel"] < 1e-4
    swapped = evaluate(AdaptResult(perfect, before, before, "accept"), sample)
    assert (swapped.loc[aligned].better == "before").all()
    rejected = evaluate(AdaptResult(before, perfect, before, "reject"), sample)
    assert (rejected.better == "same").all() and rejected.adapted["depth_metric", "rel"] < 1e-4


def test_what_cannot_be_evaluated_is_said(tiny, samples):
    photo = Sample("photo", "mine", samples[0].image)
    with pytest.raises(UserError, match="'photo' has no true depth"):
        evaluate(tiny, photo)
    with pytest.raises(UserError, match="2 predictions for 1 samples"):
        evaluate([tiny.predict(photo.image)] * 2, [photo])
    with pytest.raises(UserError, match="empty"):
        evaluate(tiny, [])


@pytest.mark.slow
def test_the_first_result_of_the_readme_runs(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- first result -->\s*```python\n(.*?)```", readme, re.S).group(1)
    assert len([line for line in block.splitlines() if line.strip()]) <= 6
    shell = "from IPython.core.interactiveshell import InteractiveShell\nshell = InteractiveShell.instance()\n"
    shown = "\nfor each in (sample, result.original, result):"
    shown += "\n    assert '<img' in shell.display_formatter.format(each)[0]['text/html']"
    done = python(shell + block + shown, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("before", "after", "depth_metric", "delta1"):
        assert word in done.stdout


# ---------------------------------------------------------------------------------------------------- appearance


def shown_in_notebooks(value) -> str:
    kinds = {Sample: html.sample_html, Prediction: html.prediction_html, AdaptResult: html.result_html}
    return kinds[type(value)](value)


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in found]


@pytest.fixture(scope="module")
def prediction():
    depth = torch.linspace(1, 5, 48)[:, None].expand(48, 64).clone()
    mask = torch.ones(48, 64, dtype=torch.bool)
    mask[:24, 32:] = False
    lens = torch.tensor([[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]])
    return Prediction(torch.ones(48, 64, 3), depth, mask, lens, "metric", normal=torch.zeros(48, 64, 3))


def test_text_says_sizes_units_and_ranges_and_dumps_no_tensors(prediction):
    sample = Sample("one", "set", torch.rand(3, 48, 64), prediction.depth, mask=prediction.mask, is_metric=True)
    result = AdaptResult(prediction, None, prediction, "reject", "too far", [{"loss": 0.5}], 1.25, 100.0, 4)
    assert "set/one: 64 x 48 pixels, true depth 1 to 5 m" in repr(sample) and "known in 75%" in repr(sample)
    assert "metric, 64 x 48 pixels, depth 1 to 5 m" in repr(prediction)
    assert "field of view 53 x 53 degrees" in repr(prediction)
    for word in ("reject: the gate kept the original", "too far", "4 passes", "1.2 s", "100 MiB"):
        assert word in repr(result)
    assert all("tensor" not in repr(each) and len(repr(each)) < 500 for each in (sample, prediction, result))
    unknown = Sample("one", "set", torch.rand(3, 8, 8), torch.full((8, 8), torch.nan), mask=torch.zeros(8, 8) > 0)
    assert "unknown everywhere" in repr(unknown) and "no truth" in repr(Sample("a", "b", torch.rand(3, 8, 8)))


def test_a_prediction_in_a_notebook_near_is_bright_and_unknown_is_gray(prediction):
    shown = pictures(shown_in_notebooks(prediction))
    assert [image.size for image in shown] == [(64, 48), (64, 48)]  # depth and normals
    near, far, nothing = (shown[0].getpixel(place) for place in ((16, 2), (16, 45), (50, 10)))
    assert sum(near) > sum(far) + 100
    assert max(nothing) - min(nothing) < 12 and abs(nothing[0] - 191) < 8


def test_a_result_in_a_notebook(prediction):
    closer = Prediction(prediction.points, prediction.depth * 1.1, prediction.mask, prediction.intrinsics, "metric")
    kept = AdaptResult(prediction, closer, closer, "accept", seconds=2.0, image=torch.rand(3, 48, 64))
    page = shown_in_notebooks(kept)
    assert len(pictures(page)) == 4 and "after (accept)" in page and "after / before" in page and "2.0 s" in page
    rejected = AdaptResult(prediction, closer, prediction, "reject", reason="<b>& unsafe")
    page = shown_in_notebooks(rejected)
    assert len(pictures(page)) == 3 and "adapted, not used" in page
    assert "&lt;b&gt;&amp; unsafe" in page and "<b>& unsafe" not in page


def test_pages_stay_small_whatever_the_picture(prediction):
    noise = torch.rand(3, 900, 1600)
    maps = torch.rand(900, 1600) + 0.5
    noisy = Prediction(
        torch.rand(900, 1600, 3), maps, maps > 0, prediction.intrinsics, "metric", torch.rand(900, 1600, 3)
    )
    result = AdaptResult(noisy, noisy, Prediction(None, maps * 1.1, maps > 0, None, "metric"), "blend", image=noise)
    for each in (Sample("a", "b", noise, maps, mask=maps > 0), noisy, result):
        page = shown_in_notebooks(each)
        assert len(page) < 200_000 and all(max(image.size) <= 280 for image in pictures(page))
        assert "http" not in page and "<script" not in page


def test_batches_relative_and_empty_predictions_are_shown(tiny, picture):
    batch = tiny.predict(picture.image)
    assert "2 images, of the first" in repr(batch) and len(pictures(shown_in_notebooks(batch))) >= 1
    relative = Prediction(None, None, None, None, "disparity", disparity=torch.rand(20, 30) * 5 + 0.1)
    assert "disparity" in repr(relative) and len(pictures(shown_in_notebooks(relative))) == 1
    assert "empty" in repr(Prediction(None, None, None, None, "metric"))
    assert pictures(shown_in_notebooks(Prediction(None, None, None, None, "metric"))) == []


def test_adapt_keeps_the_image_for_the_picture(tiny, image):
    result = adapt(tiny, image, small(train={"passes": 0}))
    assert torch.equal(result.image, image) and len(pictures(shown_in_notebooks(result))) == 3


def test_the_bundled_model_runs_at_the_size_it_was_trained_at():
    assert ttt_lib.load_model("tiny", "cpu").num_tokens == 192
    assert ttt_lib.load_model("tiny", "cpu", num_tokens=96).num_tokens == 96
