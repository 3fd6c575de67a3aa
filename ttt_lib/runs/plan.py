"""From words on the command line to jobs with an identity."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ttt_lib.adaptation.gate.decision import BUNDLED, read_calibration
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import UserError, printable
from ttt_lib.core.files import parse_yaml
from ttt_lib.core.provenance import COMPUTING, environment, file_hash, fingerprint
from ttt_lib.core.registry import load_installed
from ttt_lib.data.samples import files_fingerprint
from ttt_lib.models.base import weights_checksum
from ttt_lib.models.load import load_model
from ttt_lib.runs.catalog import experiment_file, list_experiments, notebooks_folder
from ttt_lib.runs.experiment import load_with_profile, open_samples
from ttt_lib.runs.jobs import Job

# Rooms and modules that decide no number: a change in them does not make finished runs old.
SHOWING = ("api", "cli", "doctor", "models/pretraining", "report", "runs/jobs", "runs/results")
CODE = (".py", ".vert", ".frag")  # what code is, with the shaders that draw views


def parse_set(entries: list[str]) -> dict[str, Any]:
    """`--set train.passes=4` as nested overrides; values are YAML."""
    overrides: dict[str, Any] = {}
    for entry in entries:
        key, separator, value = entry.partition("=")
        if not separator or not key:
            raise UserError(f"--set {entry}: must look like train.passes=4.")
        put(overrides, key, parse_yaml(value, f"--set {printable(entry, 100)}"))
    return overrides


def put(overrides: dict[str, Any], key: str, value: Any) -> None:
    """`train.passes` into nested overrides. Raises `UserError` where `train` itself was given a value."""
    *parents, last = key.split(".")
    for parent in parents:
        overrides = overrides.setdefault(parent, {})
        if not isinstance(overrides, dict):
            raise UserError(f"--set {key}: {parent} was given the value {overrides!r} before; leave one of them out.")
    overrides[last] = value


def choose_experiments(names: str | None) -> list[Path]:
    """Files of the named experiments (also of those in `more/`), or of all rows of the table in its order."""
    if names is not None:
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        if not wanted:
            raise UserError(f"--experiments {names!r}: names no experiment; leave it out for all.")
        return [experiment_file(name, "--experiments") for name in wanted]
    return [experiment_file(name) for name in list_experiments(more=False)]


def _model_files(name: str) -> str:
    """Of a model that is a file or folder here, what is beside its weights: how pictures are prepared, sizes, ranges."""
    path = Path(name)
    files = [path] if os.path.isfile(path) else sorted(path.glob("*.json")) if os.path.isdir(path) else []
    return files_fingerprint(files) if files else ""


def _calibration(config: ExperimentConfig) -> str:
    """Hash of the file by which the gate decides; nothing where it does not. Raises `UserError` for one that is none."""
    if config.gate.mode != "decide":
        return ""
    read_calibration(config.gate.calibration)
    return file_hash(Path(config.gate.calibration or BUNDLED))


def _code() -> str:
    """Hash of the code that decides numbers: the package's but for `SHOWING`, and that of installed plugins."""
    package, showing = Path(__file__).parents[1], tuple(f"{name}/" for name in SHOWING)
    files = [path for path in sorted(package.rglob("*")) if path.suffix in CODE]
    names = [path.relative_to(package).with_suffix("").as_posix() for path in files]
    hashes = [file_hash(path) for name, path in zip(names, files) if not f"{name}/".startswith(showing)]
    return fingerprint(hashes + list(load_installed()))


def make_jobs(
    files: list[Path], profile: str, overrides: dict[str, Any], shards: int, limit: int | None, views: bool
) -> list[Job]:
    """One job an experiment and shard. Raises `UserError` for anything wrong in files, profile, data or model."""
    names = ["01_augmentation.ipynb"] * views + ["02_adaptation.ipynb"]
    notebooks = tuple(str(notebooks_folder() / name) for name in names)
    code, packages = _code(), environment()["packages"]
    models: dict[str, str] = {}
    jobs = []
    for file in files:
        config = load_with_profile(file, profile, overrides)
        sets = open_samples(config)
        if config.model.name not in models:
            loaded = load_model(config.model.name, "cpu")  # for its checksum only: GPUs are for the jobs
            models[config.model.name] = fingerprint([weights_checksum(loaded), _model_files(config.model.name)])
        settings = config.as_parameters()
        identity = {
            "settings": fingerprint({key: settings[key] for key in settings.keys() - {"description", "order"}}),
            "limit": str(limit or 0),
            "shards": str(shards),
            "model": models[config.model.name],
            "data": fingerprint([s.data_hash() for s in sets]),
            "calibration": _calibration(config),
            "code": code,
            "torch": packages["torch"],
            "packages": fingerprint([packages[name] for name in COMPUTING]),
        }
        # The settings are complete, so the notebook lays no profile over them.
        parameters = {**settings, "profile": "", "limit": limit or 0}
        total = min(sum(len(s) for s in sets), (limit or 10**9) * shards)
        if shards > max(total, 1):
            raise UserError(f"--shards {shards}: the data of {config.name} has only {total} samples.")
        jobs += [
            Job(config.name, i, shards, parameters, identity, notebooks, -(-(total - i) // shards))
            for i in range(shards)
        ]
    return jobs
