"""What experiment files name: losses, shifts, models, kinds of data. The package's own and yours enter by the same decorators.

The package's own are in the module that its registry calls home, which is imported when a name is first looked for: this
room knows names, not what they stand for. Yours are registered in a notebook, or, so that the jobs of a batch in other
processes know them too, in a module that an installed distribution names under the entry-point group `ttt_depth`
(pyproject.toml: `[project.entry-points.ttt_depth]`, `mine = "my_package.my_module"`). A string in an experiment file never
imports anything.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from ttt_lib.core.errors import UserError, reason
from ttt_lib.core.provenance import file_hash

GROUP = "ttt_depth"
Function = TypeVar("Function", bound=Callable[..., Any])


class Registry(dict[str, Callable[..., Any]]):
    """Functions by name: `LOSSES`, `SHIFTS`, `MODELS` and others below, which say what their functions take and give.

    Args:
        what: what one of them is called in a sentence.
        home: the module that registers the package's own.

    Raises:
        UserError: by `register`, for a name that something else has.

    Example:
        >>> from ttt_lib import SHIFTS
        >>> SHIFTS.all_names()[:2]
        ['low_light', 'fog']
        >>> @SHIFTS.register("dimmed")
        ... def dimmed(image, depth, severity, generator):
        ...     return image / (1 + severity)
        >>> SHIFTS.knows("dimmed"), SHIFTS.pop("dimmed") is dimmed
        (True, True)
    """

    def __init__(self, what: str, home: str = "") -> None:
        super().__init__()
        self.what, self.home = what, home
        self.about: dict[str, dict[str, Any]] = defaultdict(dict)

    def load_home(self) -> None:
        """Make sure that the package's own are registered."""
        if self.home:
            import_module(self.home)

    def knows(self, name: str) -> bool:
        """Whether the name is there, at home or among installed modules (`load_installed`), which are asked last."""
        self.load_home()
        return name in self or (bool(load_installed()) and name in self)

    def all_names(self) -> list[str]:
        """Every name there is, the package's own first, then those of installed modules, then a notebook's."""
        self.knows("")
        return list(self)

    def register(self, name: str, **about: Any) -> Callable[[Function], Function]:
        """Decorator. Registering the same function again (a cell that runs twice) replaces it.

        about: what those who look it up want to know beside the function, kept in `self.about[name]`; each registry
        says what it takes. Raises `UserError` for a name that something else has.
        """

        def keep(function: Function) -> Function:
            if self.home and not _place(function)[0].startswith("ttt_lib."):
                import_module(self.home)  # so that no name of the package's own is free
            if name in self and _place(self[name]) != _place(function):
                raise UserError(f"{self.what} {name!r}: this name is taken; choose another one.")
            self[name], self.about[name] = function, about
            return function

        return keep


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    """Where a function was defined; empty for callables that do not say."""
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", "")


@cache
def load_installed() -> tuple[str, ...]:
    """Import the modules of the entry-point group `ttt_depth`, once; what was loaded, as `name version module SHA-256`.

    Raises `UserError` that names the distribution when one of them fails to import.
    """
    loaded = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?"
        try:
            entry.load()
        except Exception as error:  # anything at all may go wrong in other people's modules
            raise UserError(f"plugin {entry.value!r} of {origin} cannot be imported ({reason(error)}).") from error
        source = Path(getattr(sys.modules.get(entry.module), "__file__", None) or "")
        digest = file_hash(source) if source.is_file() else ""
        loaded.append(f"{origin} {entry.value} {digest}")
    return tuple(loaded)


# `LossInputs` -> (B,) or a scalar; settings, needs, where, reads: see `adaptation/losses/terms.py`
LOSSES = Registry("loss", home="ttt_lib.adaptation.losses")
# `Episode` -> `Supervision`, or None where the experiment has none of it; settings: its section of `supervision`
SUPERVISIONS = Registry("supervision", home="ttt_lib.adaptation.methods")
# image (3,H,W) in [0,1], depth (H,W) with inf or NaN where there is none, severity 1 to 5, generator -> image (3,H,W)
SHIFTS = Registry("shift", home="ttt_lib.data.shifts")
# Families of models: `loader(name, device=..., num_tokens=..., autocast=..., fov_x=...)` -> `GeometryModel`. matches: whether
# a name is the family's; without it those that begin with `FAMILY:` are, and the loader gets what follows. listed: names.
MODELS = Registry("model", home="ttt_lib.models.load")
# Kinds of data: an opener with options by name -> `SampleSet`. `needs`: options without which there is no such set.
DATASETS = Registry("data set", home="ttt_lib.data.catalog")
