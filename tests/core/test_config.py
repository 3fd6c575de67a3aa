"""Experiments and profiles: every file is valid, mistakes name file, key and what is allowed."""

from __future__ import annotations

import pickle

import pytest
import yaml
from conftest import ROOT

from ttt_lib.adaptation.losses.presets import resolved
from ttt_lib.core.config import ExperimentConfig, ProfileConfig, build_experiment, load_experiment, load_profile, merge
from ttt_lib.core.errors import UserError
from ttt_lib.core.registry import LOSSES, MODELS
from ttt_lib.models.base import GeometryModel

EXPERIMENTS = sorted((ROOT / "notebooks" / "experiments").glob("*.yaml"))
MORE = sorted((ROOT / "notebooks" / "experiments" / "more").glob("*.yaml"))
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))
PUBLISHED = (
    "original freeze_encoder unfreeze_encoder unfreeze_encoder_normal_loss unfreeze_encoderSGD "
    "unfreeze_encoderSGD_lower_lr unfreeze_encoderSGD_higher_lr unfreeze_encoder_lower_lr unfreeze_encoder_higher_lr "
    "unfreeze_encoder_shorter unfreeze_encoder_longer"
).split()


def test_all_published_rows_and_ours_are_there():
    names = {path.stem for path in EXPERIMENTS}
    assert set(PUBLISHED) <= names
    assert {"control_lr0", "tta", "unfreeze_encoder_render", "freeze_encoder_render", "recommended"} <= names
    assert {path.stem for path in PROFILES} >= {"paper", "demo"} and MORE


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_is_valid_under_every_profile(path, profile):
    config = load_experiment(path, profile)
    assert config.name == path.stem
    assert ExperimentConfig.model_validate(config.as_parameters()) == config


def test_settings_follow_the_paper():
    rows = {path.stem: load_experiment(path) for path in EXPERIMENTS}
    rate = {name: row.train.optimizer.learning_rate for name, row in rows.items()}
    passes = {name: row.train.passes for name, row in rows.items()}
    assert rate["unfreeze_encoder"] == 5e-4 and rate["unfreeze_encoder_lower_lr"] == 1e-5
    assert rate["unfreeze_encoder_higher_lr"] == 1e-3 and rate["control_lr0"] == 0
    assert (passes["unfreeze_encoder_shorter"], passes["unfreeze_encoder"], passes["unfreeze_encoder_longer"]) == (
        256, 512, 1024,
    )  # fmt: skip
    assert rows["freeze_encoder"].train.parts == ["neck", "heads"]
    assert rows["unfreeze_encoderSGD"].train.optimizer.name == "sgd"
    assert rows["unfreeze_encoderSGD"].train.accumulation_mode == "sum"
    assert all(row.train.batch_size == 2 and row.views.photometric.severity == 3 for row in rows.values())
    trained = [row for name, row in rows.items() if row.train.method == "ttt" and name != "recommended"]
    assert len(trained) > 10 and all(row.train.accumulation == 32 for row in trained)


def test_the_release_trains_the_encoder_alone_and_has_rates_of_its_own():
    profile = load_profile(ROOT / "notebooks" / "profiles" / "as_released.yaml")
    assert set(profile.rows) == set(PUBLISHED) - {"original"} | {"unfreeze_encoder_render"}
    rows = {path.stem: load_experiment(path, profile) for path in EXPERIMENTS if path.stem in profile.rows}
    plain = {path.stem: load_experiment(path) for path in EXPERIMENTS if path.stem in profile.rows}
    parts = {name: row.train.parts for name, row in rows.items()}
    assert parts.pop("freeze_encoder") == ["neck", "heads"] and all(each == ["encoder"] for each in parts.values())
    assert rows["freeze_encoder"].views.photometric.severity == 2
    for name, row in rows.items():
        decay = 0.01 if name == "freeze_encoder" else 1e-3 if "SGD" in name else 1e-4
        assert row.train.optimizer.weight_decay == decay and row.train.passes == plain[name].train.passes
    rate = {name: row.train.optimizer.learning_rate for name, row in rows.items()}
    assert rate["unfreeze_encoder_lower_lr"] == rate["unfreeze_encoderSGD_lower_lr"] == 1e-4
    assert rate["unfreeze_encoderSGD_higher_lr"] == 5e-4 and rate["unfreeze_encoder_higher_lr"] == 1e-3
    assert rows["unfreeze_encoder_longer"].train.accumulation == 64


def test_a_row_of_a_profile_is_validated_and_wins_over_its_set():
    profile = ProfileConfig(name="p", set={"train": {"passes": 2}}, rows={"mine": {"train": {"passes": 3}}})
    assert build_experiment({"name": "mine"}, profile).train.passes == 3
    assert build_experiment({"name": "other"}, profile).train.passes == 2
    with pytest.raises(UserError, match="train.pases"):
        build_experiment({"name": "mine"}, ProfileConfig(name="p", rows={"mine": {"train": {"pases": 3}}}))


def test_a_profile_keeps_the_relations_between_rows():
    demo = ROOT / "notebooks" / "profiles" / "demo.yaml"
    plain = {p.stem: load_experiment(p).train for p in EXPERIMENTS}
    small = {p.stem: load_experiment(p, demo).train for p in EXPERIMENTS}
    base = "unfreeze_encoder"
    for name in ("unfreeze_encoder_shorter", "unfreeze_encoder_longer"):
        assert small[name].passes / small[base].passes == plain[name].passes / plain[base].passes
    for name in ("unfreeze_encoder_lower_lr", "unfreeze_encoder_higher_lr"):
        before = plain[name].optimizer.learning_rate / plain[base].optimizer.learning_rate
        after = small[name].optimizer.learning_rate / small[base].optimizer.learning_rate
        assert after == pytest.approx(before)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"train": {"optimizer": {"lr": 3}}}, ["train.optimizer.lr", "unknown key", "learning_rate"]),
        ({"train": {"passes": "many"}}, ["train.passes", "integer", "many"]),
        ({"train": {"passes": -1}}, ["train.passes", "greater than or equal to 0"]),
        ({"views": {"crop": {"scale": [0.9, 0.5]}}}, ["views.crop", "low <= high"]),
        ({"teacher": {"ema_decay": 1.5}}, ["teacher.ema_decay", "less than or equal to 1"]),
        ({"losses": {"globl": {}}}, ["losses.globl", "global"]),
        ({"unknown": 1}, ["unknown", "allowed here", "train"]),
    ],
)
def test_a_mistake_is_named_with_file_key_and_what_is_allowed(tmp_path, content, words):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", **content}))
    with pytest.raises(UserError) as caught:
        load_experiment(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_files_that_are_missing_or_not_yaml(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_experiment(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_experiment(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="keys and values"):
        load_profile(tmp_path / "list.yaml")
    (tmp_path / "a.yaml").write_text("name: b")
    with pytest.raises(UserError, match="make them equal"):
        load_experiment(tmp_path / "a.yaml")


@pytest.mark.parametrize("path", MORE, ids=lambda p: p.stem)
def test_every_other_experiment_keeps_its_losses_in_every_profile(path):
    def terms(*given):
        losses = resolved(load_experiment(path, *given), GeometryModel).losses
        return {name for name, term in losses.items() if term.weight > 0}

    wanted = terms()
    assert wanted
    for profile in ("paper", "demo"):
        active = terms(ROOT / "notebooks" / "profiles" / f"{profile}.yaml")
        assert not [name for name in active - wanted if name != "mask"]
        assert all(name in active for name in wanted if not name.startswith("local"))


def test_merge_replaces_leaves_and_leaves_inputs_alone():
    base, over = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"c": [2]}, "e": 3}
    assert merge(base, over) == {"a": {"b": 1, "c": [2]}, "d": 2, "e": 3}
    assert base == {"a": {"b": 1, "c": [1]}, "d": 2}


def test_overrides_win_over_the_profile():
    demo = load_profile(ROOT / "notebooks" / "profiles" / "demo.yaml")
    config = build_experiment({"name": "x"}, demo, {"train": {"passes": 3}, "data": [{"kind": "synthetic"}]})
    assert config.train.passes == 3 and [d.kind for d in config.data] == ["synthetic"]


def test_an_override_adds_a_term_and_leaves_the_others():
    config = build_experiment({"name": "x"}, overrides={"losses": {"normal": {"weight": 0.5}}})
    assert set(resolved(config, GeometryModel).losses) == {
        "global",
        "local_4",
        "local_16",
        "local_64",
        "mask",
        "normal",
    }
    assert build_experiment({"name": "x", "losses": {}}).losses == {}
    chosen = build_experiment({"name": "x", "losses": {"global": {}}}, overrides={"losses": {"mask": {"weight": 0.1}}})
    assert set(chosen.losses) == {"global", "mask"}


def test_paths_of_models_sets_and_calibrations_become_absolute_where_they_enter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("m.pt", "home/m.pt", "tiny", "gate.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def model(name):
        return build_experiment({"name": "x"}, overrides={"model": {"name": name}}).model.name

    assert model("m.pt") == str(tmp_path / "m.pt") and model("~/m.pt") == str(tmp_path / "home" / "m.pt")
    assert [model(name) for name in ("tiny", "Ruicheng/moge-vitl", "none.pt")] == [
        "tiny",
        "Ruicheng/moge-vitl",
        "none.pt",
    ]
    monkeypatch.setitem(MODELS, "mine", print)
    assert model("mine:./m.pt") == f"mine:{tmp_path / 'm.pt'}" and model("mine:7") == "mine:7"
    (tmp_path / "paths.yaml").write_text(
        "name: paths\nmodel: {name: m.pt}\ngate: {calibration: gate.json}\ndata: [{kind: images, path: ~/photos}]"
    )
    (tmp_path / "mine.yaml").write_text("set: {model: {name: ~/m.pt}}")
    config = load_experiment("paths.yaml")
    assert config.model.name == str(tmp_path / "m.pt") and config.gate.calibration == str(tmp_path / "gate.json")
    assert config.data[0].path == str(tmp_path / "home" / "photos")
    assert load_experiment("paths.yaml", "mine.yaml").model.name == str(tmp_path / "home" / "m.pt")


def test_settings_of_every_loss_travel_to_another_process():
    config = build_experiment({"name": "x", "losses": {name: {} for name in LOSSES.all_names()}})
    assert pickle.loads(pickle.dumps(config)) == config


def test_keys_of_data_are_known_before_anything_is_opened():
    for kind in ("images", "moge"):
        with pytest.raises(UserError, match="typo: unknown key"):
            build_experiment({"name": "x", "data": [{"kind": kind, "path": "x", "typo": 1}]})
