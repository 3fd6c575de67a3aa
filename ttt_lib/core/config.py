"""The experiment as validated data: YAML file <-> pydantic model.

An experiment file is one row of the ablation. Its top-level keys are also the parameters of
`notebooks/02_adaptation.ipynb`, so `papermill ... -f experiments/NAME.yaml` and `ttt-depth ablation` read the
same thing. A *profile* is laid over an experiment: it sets keys (`set`) and multiplies rates and counts (`scale`),
which keeps the relations between the rows while their size changes.
"""

from __future__ import annotations

import copy
import json
import reprlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import PydanticSerializationError

from ttt_lib.core import schema
from ttt_lib.core.errors import UserError, printable
from ttt_lib.core.files import read_yaml
from ttt_lib.core.registry import LOSSES, SUPERVISIONS, Registry
from ttt_lib.core.schema import Section


class ExperimentConfig(Section):
    """One row of the ablation, complete. Every random draw comes from (`seed`, name of the sample).

    `losses`: terms of the loss on views by name, each with its settings, and sets of terms (`losses/presets.py`): `own`, the
    model's, is the default; none: nothing is drawn and the teacher is silent.
    `supervision`: further sources of information by name, each with its settings (`adaptation/supervision.py`).
    `references`: pixels of each sample whose true distance is given to the method (`references.py`); they do not count
    in the scores.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=100)]
    description: str = ""
    order: Annotated[int, Field(ge=0)] = 1000  # its place in the table: lower is further up, equal ones go by name
    seed: schema.Seed = 0
    model: schema.ModelConfig = schema.ModelConfig()
    train: schema.TrainConfig = schema.TrainConfig()
    teacher: schema.TeacherConfig = schema.TeacherConfig()
    views: schema.ViewConfig = schema.ViewConfig()
    losses: dict[str, SerializeAsAny[schema.LossConfig]] = Field({"own": {}}, validate_default=True)
    supervision: dict[str, SerializeAsAny[Section]] = {}
    released: schema.ReleasedConfig = schema.ReleasedConfig()
    ensemble: schema.EnsembleConfig = schema.EnsembleConfig()
    gate: schema.GateConfig = schema.GateConfig()
    references: Annotated[int, Field(ge=0)] = 0
    data: list[schema.DataConfig] = []

    @field_validator("name")
    @classmethod
    def _no_other_folder(cls, value: str) -> str:
        if value in schema.RESERVED:
            raise ValueError("a folder of runs needs this name for something else; choose another one")
        return value

    @field_validator("losses", mode="before")
    @classmethod
    def _terms(cls, value: Any) -> Any:
        return _by_registry(value, LOSSES, schema.LossConfig)

    @field_validator("supervision", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        return _by_registry(value, SUPERVISIONS, Section)

    @model_validator(mode="after")
    def _possible(self) -> ExperimentConfig:
        if self.gate.mode == "decide" and self.train.method != "ttt":
            raise ValueError(
                f"gate.mode decide chooses between the original and a trained prediction, and train.method is "
                f"{self.train.method}; set gate.mode to off"
            )
        if self.train.prompt_tokens and self.gate.mode != "off":
            raise ValueError("train.prompt_tokens: the gate would measure the original with them; set gate.mode to off")
        if self.teacher.certainty and not (self.ensemble.members and self.ensemble.target):
            raise ValueError("teacher.certainty is about the spread of several predictions; set ensemble.members")
        return self

    def as_parameters(self) -> dict[str, Any]:
        """Plain values for YAML, JSON and papermill."""
        return json.loads(self.model_dump_json())


def _by_registry(value: Any, registry: Registry, default: type[Section]) -> Any:
    """`{name: settings}`, each validated by the class that the name was registered with (else `default`)."""
    if not isinstance(value, dict):
        return value  # pydantic says what is wrong
    result = {}
    for name, given in value.items():
        if not registry.knows(str(name)):
            said = f"there is no such {registry.what}; there are {', '.join(registry)}"
            raise schema.complaint((str(name),), said, name)
        kind = registry.about.get(name, {}).get("settings", default)
        try:
            given = given.model_dump(exclude_unset=True) if isinstance(given, Section) else given
            result[name] = kind.model_validate({} if given is None else given)
        except ValidationError as error:
            first = error.errors()[0]
            raise schema.complaint((name, *first["loc"]), first["msg"], first["input"]) from error
    return result


Factor = Annotated[float, Field(gt=0.0, le=1e6)]


class ScaleConfig(Section):
    """Factors of a profile on rates and counts. Counts round to the nearest, never below 1."""

    learning_rate: Annotated[float, Field(ge=0.0, le=1e6)] = 1.0
    passes: Factor = 1.0
    accumulation: Factor = 1.0


class ProfileConfig(Section):
    """What a profile file holds: `scale`, `set`, and `rows`: what is set for the experiment of that name alone."""

    name: str
    description: str = ""
    scale: ScaleConfig = ScaleConfig()
    set: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, dictionaries key by key, everything else replaced. Inputs stay as they are."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _validate(kind: type[Section], content: dict[str, Any], source: str) -> Any:
    """Pydantic's list of complaints as one sentence a complaint: file, key, what is allowed."""
    try:
        config = kind.model_validate(content)
        if isinstance(config, ExperimentConfig):
            config.as_parameters()
        return config
    except PydanticSerializationError as error:
        raise UserError(f"{source}: holds a name or text that is not Unicode; rename the file or folder.") from error
    except ValidationError as error:
        parts = []
        for item in error.errors():
            key = printable(".".join(str(place) for place in item["loc"]) or "(top level)", 100)
            parts.append(f"{key}: {item['msg']} (got {_shown(item['input'])})")
        raise UserError(f"{source}: {'; '.join(parts)}.") from error


def _shown(value: Any) -> str:
    """A value as the user wrote it, the first parts of a large one (which YAML's references can make without end)."""
    try:
        short = reprlib.Repr()
        short.maxstring = short.maxother = 100
        return printable(short.repr(value), 120)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"


def load_profile(path: str | Path) -> ProfileConfig:
    """Read a profile file. Raises `UserError` naming file and key."""
    path = Path(path)
    return _validate(ProfileConfig, {"name": path.stem, **read_yaml(path)}, str(path))


def _laid(over: dict[str, Any], config: ExperimentConfig, source: str) -> ExperimentConfig:
    """What was set, with other settings laid over it. The terms of the loss are there also where they are the defaults,
    so that `losses.normal.weight=1` adds a term and leaves the others."""
    terms = {name: term.model_dump(exclude_unset=True) for name, term in config.losses.items()}
    values = {**config.model_dump(exclude_unset=True), "losses": terms}
    return _validate(ExperimentConfig, merge(values, over), source)


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
        own = merge(profile.set, profile.rows.get(config.name, {}))
        config = _laid(own, config, f"{source} with profile {profile.name}")
        train = config.train
        scale = profile.scale if train.profiled else ScaleConfig()
        scaled = {
            "passes": max(1, round(train.passes * scale.passes)) if train.passes else 0,
            "accumulation": max(1, round(train.accumulation * scale.accumulation)),
            "optimizer": {"learning_rate": train.optimizer.learning_rate * scale.learning_rate},
        }
        config = _laid({"train": scaled}, config, source)
    return _laid(overrides, config, f"{source} with the given overrides") if overrides else config


def load_experiment(
    path: str | Path, profile: str | Path | ProfileConfig | None = None, overrides: dict[str, Any] | None = None
) -> ExperimentConfig:
    """Read an experiment file, with a profile (file or object) and overrides laid over it. Raises `UserError`."""
    path = Path(path)
    if profile is not None and not isinstance(profile, ProfileConfig):
        profile = load_profile(profile)
    config = build_experiment(read_yaml(path), profile, overrides, source=str(path))
    if config.name != path.stem:
        raise UserError(f"{path}: name is {config.name!r} but the file is called {path.stem!r}; make them equal.")
    return config
