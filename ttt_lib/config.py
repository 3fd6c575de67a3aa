"""The experiment as validated data: YAML file <-> pydantic model.

An experiment file is one row of the ablation. Its top-level keys are also the parameters of
`notebooks/02_adaptation.ipynb`, so `papermill ... -f experiments/NAME.yaml` and `ttt-depth ablation` read the
same thing. A *profile* is laid over an experiment: it sets keys (`set`) and multiplies rates and counts (`scale`),
which keeps the relations between the rows while their size changes.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from ttt_lib.config_sections import (
    DEFAULT_LOSSES,
    DataConfig,
    EnsembleConfig,
    GateConfig,
    LossConfig,
    LossName,
    ModelConfig,
    NonNegative,
    Positive,
    ReleasedConfig,
    Section,
    TeacherConfig,
    TrainConfig,
    ViewConfig,
)
from ttt_lib.errors import UserError


class ExperimentConfig(Section):
    """One row of the ablation, complete. Every random draw comes from (`seed`, name of the sample).

    `references`: pixels of each sample whose true distance is given to the method (`references.py`); they do not count
    in the scores.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str = ""
    seed: int = 0
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    teacher: TeacherConfig = TeacherConfig()
    views: ViewConfig = ViewConfig()
    losses: dict[LossName, LossConfig] = DEFAULT_LOSSES
    released: ReleasedConfig = ReleasedConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    gate: GateConfig = GateConfig()
    references: Annotated[int, Field(ge=0)] = 0
    data: list[DataConfig] = []

    @model_validator(mode="after")
    def _possible(self) -> ExperimentConfig:
        if self.gate.check_every and self.train.predict_with == "teacher":
            raise ValueError("gate.check_every keeps the best of the student; set train.predict_with to student")
        return self

    def as_parameters(self) -> dict[str, Any]:
        """Plain values for YAML, JSON and papermill."""
        return json.loads(self.model_dump_json())


class ScaleConfig(Section):
    """Factors of a profile on rates and counts. Counts round to the nearest, never below 1."""

    learning_rate: NonNegative = 1.0
    passes: Positive = 1.0
    accumulation: Positive = 1.0


class ProfileConfig(Section):
    """What a profile file holds: `scale` and `set`."""

    name: str
    description: str = ""
    scale: ScaleConfig = ScaleConfig()
    set: dict[str, Any] = {}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, dictionaries key by key, everything else replaced. Inputs stay as they are."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; check the name of the experiment or profile.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold keys and values at its top level, not {type(content).__name__}.")
    return content


def _validate(kind: type[Section], content: dict[str, Any], source: str) -> Any:
    """Pydantic's list of complaints as one sentence a complaint: file, key, what is allowed."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        parts = []
        for item in error.errors():
            key = ".".join(str(place) for place in item["loc"]) or "(top level)"
            if item["type"] == "extra_forbidden":
                parts.append(f"{key}: unknown key; allowed here: {', '.join(_keys_beside(kind, item['loc']))}")
            else:
                parts.append(f"{key}: {item['msg']} (got {item['input']!r})")
        raise UserError(f"{source}: " + "; ".join(parts) + ".") from error


def _keys_beside(kind: type[Section], place: tuple) -> list[str]:
    """The keys that are allowed where an unknown one was found."""
    current: Any = kind
    for key in place[:-1]:
        annotation = current.model_fields[key].annotation if key in getattr(current, "model_fields", {}) else current
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        current = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), current)
    return sorted(getattr(current, "model_fields", {}))


def load_profile(path: str | Path) -> ProfileConfig:
    """Read a profile file. Raises `UserError` naming file and key."""
    path = Path(path)
    return _validate(ProfileConfig, {"name": path.stem, **_read_yaml(path)}, str(path))


def build_experiment(
    content: dict[str, Any],
    profile: ProfileConfig | None = None,
    overrides: dict[str, Any] | None = None,
    source: str = "experiment",
) -> ExperimentConfig:
    """Validate `content`, lay `profile` over it, then `overrides` (which win). Raises `UserError`.

    The experiment is validated before the profile touches it, so an error names the file that holds it.
    """
    config = _validate(ExperimentConfig, content, source)
    if profile is not None:
        values = merge(config.model_dump(exclude_unset=True), profile.set)
        config = _validate(ExperimentConfig, values, f"{source} with profile {profile.name}")
        train, scale = config.train, profile.scale
        scaled = {
            "train": {
                "passes": max(1, round(train.passes * scale.passes)) if train.passes else 0,
                "accumulation": max(1, round(train.accumulation * scale.accumulation)),
                "optimizer": {"learning_rate": train.optimizer.learning_rate * scale.learning_rate},
            }
        }
        config = _validate(ExperimentConfig, merge(config.model_dump(exclude_unset=True), scaled), source)
    if overrides:
        values = merge(config.model_dump(exclude_unset=True), overrides)
        config = _validate(ExperimentConfig, values, f"{source} with the given overrides")
    return config


def load_experiment(
    path: str | Path, profile: str | Path | ProfileConfig | None = None, overrides: dict[str, Any] | None = None
) -> ExperimentConfig:
    """Read an experiment file, with a profile (file or object) and overrides laid over it. Raises `UserError`."""
    path = Path(path)
    if profile is not None and not isinstance(profile, ProfileConfig):
        profile = load_profile(profile)
    content = _read_yaml(path)
    config = build_experiment(content, profile, overrides, source=str(path))
    if config.name != path.stem:
        raise UserError(f"{path}: name is {config.name!r} but the file is called {path.stem!r}; make them equal.")
    return config
