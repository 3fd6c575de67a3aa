"""Test-time training of monocular geometry models: a thin library under a set of notebooks.

A first result needs four names, and `help` on each says the rest:

    from ttt_lib import load_model, load_samples, adapt, evaluate

    model = load_model("tiny")
    sample = load_samples("motorcycle")[0]
    result = adapt(model, sample)
    print(evaluate(result, sample))

With several photographs of one scene, which is where adaptation gains: `adapt_scene(model, "folder")`.

Names are loaded when they are first asked for, so `import ttt_lib` costs nothing. Rooms, each of which imports only those
before it: core, geometry, data, models and views (not each other), adaptation, evaluation, runs, report; above them `api`,
`cli` and `doctor`. Each room's `__init__` says what comes in, what goes out and where to start reading.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt_lib.adaptation.adapter import Adapter
    from ttt_lib.adaptation.result import AdaptResult
    from ttt_lib.api import adapt, adapt_scene, evaluate, load_experiment, load_samples
    from ttt_lib.core.errors import UserError
    from ttt_lib.core.registry import LOSSES, MODELS, SHIFTS
    from ttt_lib.core.types import Prediction, Sample
    from ttt_lib.data.photographs.load import load_scene
    from ttt_lib.models.load import list_models, load_model
    from ttt_lib.report.page import write_report
    from ttt_lib.runs.catalog import list_experiments
    from ttt_lib.runs.experiment import run_experiment
    from ttt_lib.runs.results import read_runs

__version__ = "0.1.0"
__all__ = [
    "LOSSES", "MODELS", "SHIFTS", "AdaptResult", "Adapter", "Prediction", "Sample", "UserError", "adapt", "adapt_scene",
    "evaluate", "list_experiments", "list_models", "load_experiment", "load_model", "load_samples", "load_scene",
    "read_runs", "run_experiment", "write_report",
]  # fmt: skip
_PLACES = {  # module -> its names here
    "adaptation.adapter": ["Adapter"],
    "adaptation.result": ["AdaptResult"],
    "api": ["adapt", "adapt_scene", "evaluate", "load_experiment", "load_samples"],
    "core.errors": ["UserError"],
    "core.registry": ["LOSSES", "MODELS", "SHIFTS"],
    "core.types": ["Prediction", "Sample"],
    "data.photographs.load": ["load_scene"],
    "models.load": ["list_models", "load_model"],
    "report.page": ["write_report"],
    "runs.catalog": ["list_experiments"],
    "runs.experiment": ["run_experiment"],
    "runs.results": ["read_runs"],
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next time it is there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _show_in_notebooks() -> None:
    """Tell IPython, where it runs, how samples, predictions and results look: what travels knows nothing of HTML."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        return

    def later(function: str) -> Callable[[Any], str]:
        return lambda value: getattr(import_module(f"{__name__}.report.html"), function)(value)

    formatter = shell.display_formatter.formatters["text/html"]
    formatter.for_type_by_name(f"{__name__}.core.types", "Sample", later("sample_html"))
    formatter.for_type_by_name(f"{__name__}.core.types", "Prediction", later("prediction_html"))
    formatter.for_type_by_name(f"{__name__}.adaptation.result", "AdaptResult", later("result_html"))


_show_in_notebooks()
