"""What names stand for: the checkout's notebooks and experiments, and sources of samples. Light, for the command."""

from __future__ import annotations

from pathlib import Path

from ttt_lib.core.errors import UserError

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


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
