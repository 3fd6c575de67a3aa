"""What names stand for: notebooks, experiments and profiles. Light, for the command."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import ConfigError, RunError
from ttt_lib.core.files import absolute, read_yaml

PACKAGE = Path(__file__).resolve().parents[1]
# Inside the package where it was installed, beside it in a checkout.
PLACES = (PACKAGE / "notebooks", PACKAGE.parent / "notebooks")
NOTEBOOKS = next((place for place in PLACES if place.is_dir()), PLACES[0])


def notebooks_folder() -> Path:
    """Where notebooks and experiments are. Raises `RunError` if the installation lacks them."""
    if not (NOTEBOOKS / "02_adaptation.ipynb").is_file():
        raise RunError(f"{NOTEBOOKS}: the notebooks are missing; install the package again.", path=str(NOTEBOOKS))
    return NOTEBOOKS


def experiment_files(more: bool = True) -> dict[str, Path]:
    """The package's experiments by name; with `more` also those in `more/`. Raises `RunError`."""
    folder = notebooks_folder() / "experiments"
    files = sorted(folder.glob("*.yaml")) + (sorted((folder / "more").glob("*.yaml")) if more else [])
    return {path.stem: path for path in files}


def list_experiments(more: bool = True) -> list[str]:
    """Names of the package's experiments in the order of the table (`order:` of their files, then by name).

    Args:
        more: also those in `more/`, which run only by name.

    Returns:
        Names that `load_experiment`, `adapt` and the command take.

    Raises:
        RunError: the installation lacks them.
        ConfigError: for a file that is no YAML.

    Example:
        >>> list_experiments(more=False)[:2]
        ['original', 'control_lr0']
    """
    return sorted(experiment_files(more), key=lambda name: (table_places()[name], name))


@cache
def table_places() -> dict[str, int]:
    """`order:` of each of the package's experiments by name."""
    contents = {name: read_yaml(path) for name, path in experiment_files().items()}
    default = ExperimentConfig.model_fields["order"].default
    return {name: content.get("order", default) for name, content in contents.items()}


def profile_files() -> dict[str, Path]:
    """The package's profiles by name."""
    return {path.stem: path for path in sorted((NOTEBOOKS / "profiles").glob("*.yaml"))}


def experiment_file(name: str | Path, where: str = "experiment") -> Path:
    """The file of an experiment given by name or path. where: begins the sentence of the `ConfigError`."""
    return _named(name, experiment_files(), where, "experiment")


def resolve_profile(profile: str | Path | None) -> Path | None:
    """The file of a profile given by name or path; None for an empty one. Raises `ConfigError`."""
    return _named(profile, profile_files(), "profile", "profile") if profile else None


def _named(name: str | Path, files: dict[str, Path], where: str, what: str) -> Path:
    if str(name) in files:
        return files[str(name)]
    if Path(name).suffix not in (".yaml", ".yml"):
        known = ", ".join(files)
        raise ConfigError(f"{where} {str(name)!r}: there is no such {what}; there are {known}, or name a YAML file.")
    return Path(absolute(name))
