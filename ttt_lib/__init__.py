"""Test-time training of monocular geometry models: a thin library under a set of notebooks.

A first result needs four names, and `help` on each says the rest:

    from ttt_lib import load_model, load_samples, adapt, evaluate

    model = load_model("tiny")
    sample = load_samples("motorcycle")[0]
    result = adapt(model, sample)
    print(evaluate(result, sample))

They are loaded when they are first asked for, so `import ttt_lib` costs nothing. `adapt` is that function, also after
`import ttt_lib.adaptation.adapter`; what else the module of this name holds comes by `from ttt_lib.adaptation.adapter import ...`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt_lib.api import adapt, evaluate, load_samples
    from ttt_lib.core.errors import UserError
    from ttt_lib.models.base import load_model

__version__ = "0.1.0"
__all__ = ["UserError", "adapt", "evaluate", "load_model", "load_samples"]
_MODULES = {
    "UserError": "core.errors", "adapt": "api", "evaluate": "api", "load_model": "models.base", "load_samples": "api",
}  # fmt: skip


class _Package(ModuleType):
    """A package whose public names are not hidden by a submodule of the same name when that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next time it is there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
