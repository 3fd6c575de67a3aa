"""What a result depends on is in a job's identity."""

from __future__ import annotations

import json
import shutil

import pytest

from ttt_lib.adaptation.gate.decision import BUNDLED
from ttt_lib.core.errors import UserError
from ttt_lib.models.moge import ASSETS
from ttt_lib.runs import plan
from ttt_lib.runs.plan import choose_experiments, make_jobs


def identity(name="recommended", **overrides) -> dict[str, str]:
    overrides = {"data": [{"kind": "motorcycle", "width": 96, "height": 64, "count": 1}], **overrides}
    (job,) = make_jobs(choose_experiments(name), "demo", overrides, 1, None, False)
    return job.identity


def differing(one: dict, other: dict) -> list[str]:
    return [key for key in one if one[key] != other[key]]


def test_the_gate_counts_by_what_its_calibration_says(tmp_path):
    bundled, path = identity(), tmp_path / "gate.json"
    shutil.copy(BUNDLED, path)
    copied = identity(gate={"calibration": str(path)})
    assert copied["calibration"] == bundled["calibration"] != ""
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "accept": 0.125}))
    assert differing(copied, identity(gate={"calibration": str(path)})) == ["calibration"]
    assert identity(gate={"mode": "off"})["calibration"] == identity("original")["calibration"] == ""
    path.write_text("{}")
    with pytest.raises(UserError, match="is no calibration file"):
        identity(gate={"calibration": str(path)})


def test_a_model_counts_by_all_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(ASSETS / "tiny.pt", folder / "model.pt")
    (folder / "preprocessor_config.json").write_text("{}")
    first = identity("original", model={"name": str(folder), "num_tokens": 48})
    monkeypatch.chdir(tmp_path)
    assert identity("original", model={"name": "mine", "num_tokens": 48}) == first  # the same, by a relative path
    (folder / "preprocessor_config.json").write_text('{"size": 3}')
    assert differing(first, identity("original", model={"name": "mine", "num_tokens": 48})) == ["model"]


def test_a_profile_of_ones_own_may_be_named_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("set: {model: {num_tokens: 48}, data: [{kind: images, path: photos}]}")
    monkeypatch.setattr(plan, "_model_files", lambda name: "")
    (tmp_path / "photos").mkdir()
    shutil.copy(ASSETS.parents[1] / "notebooks" / "overview.jpg", tmp_path / "photos")
    (job,) = make_jobs(choose_experiments("original"), "mine.yaml", {}, 1, None, False)
    assert job.parameters["data"][0]["path"] == str(tmp_path / "photos") and job.samples == 1


def test_shaders_are_code_and_what_only_shows_is_not(monkeypatch):
    monkeypatch.setattr(plan, "file_hash", lambda path: path.name)
    monkeypatch.setattr(plan, "fingerprint", set)
    counted = plan._code()
    assert {"flat.vert", "flat.frag", "draw.py", "plan.py"} <= counted and not {"cli.py", "doctor.py"} & counted
