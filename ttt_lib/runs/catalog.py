"""What names stand for: the checkout's notebooks and experiments, and sources of samples. Light, for the command."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ttt_lib.core.errors import UserError

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
BUILT_IN = ("motorcycle", "synthetic", "shifted")


def notebooks_folder() -> Path:
    """Where notebooks and experiments are. Raises `UserError` if the package was installed without its checkout."""
    if not (NOTEBOOKS / "02_adaptation.ipynb").is_file():
        raise UserError(f"{NOTEBOOKS}: the notebooks are missing; install from a checkout with `pip install -e .`.")
    return NOTEBOOKS


def experiment_files(more: bool = True) -> dict[str, Path]:
    """The experiments of the checkout by name; with `more` also those in `more/`. Raises `UserError`."""
    folder = notebooks_folder() / "experiments"
    files = sorted(folder.glob("*.yaml")) + (sorted((folder / "more").glob("*.yaml")) if more else [])
    return {path.stem: path for path in files}


def experiment_file(name: str | Path, where: str = "experiment") -> Path:
    """The file of an experiment given by name or path. where: begins the sentence of the `UserError`."""
    files = experiment_files()
    if str(name) in files:
        return files[str(name)]
    if Path(name).suffix not in (".yaml", ".yml"):
        raise UserError(f"{where} {str(name)!r}: there is no such experiment; there are {', '.join(files)}.")
    return Path(name)


def describe_sources(entries: Iterable[str | Path], where: str = "data") -> list[dict[str, Any]]:
    """Sources of samples as the configuration's `data` entries.

    An entry is a built-in name (`BUILT_IN`), a JSON file of sets as in MoGe's `configs/eval`, a folder in MoGe's layout, a
    folder of images, or one image. where: begins the sentence of the `UserError` for one that is none of these.
    """
    from ttt_lib.data.moge_layout import BENCHMARKS, INDEX, read_eval_config
    from ttt_lib.data.samples import IMAGE_SUFFIXES

    result: list[dict[str, Any]] = []
    for entry in entries:
        path = Path(os.path.expanduser(entry))  # `os.path` also answers for names that no file system takes
        if str(entry) in BUILT_IN:
            result.append({"kind": str(entry)})
        elif path.suffix == ".json":
            result += read_eval_config(path)
        elif os.path.isdir(path) and os.path.isfile(path / INDEX):
            known = BENCHMARKS.get(path.resolve().name, {})
            result.append({"kind": "moge", "path": str(path.resolve()), **known})
        elif os.path.isdir(path) and any(path.rglob("depth.png")):
            raise UserError(f"{where} {entry}: {path / INDEX} is missing; it lists the folder of one sample a line.")
        elif os.path.isdir(path) or (
            path.suffix.lower() in IMAGE_SUFFIXES and os.path.isdir(path.parent) and os.path.isfile(path)
        ):
            result.append({"kind": "images", "path": str(path.resolve())})
        else:
            raise UserError(f"{where} {entry}: no such folder, image or JSON file; built in are {', '.join(BUILT_IN)}.")
    return result
