"""A torchvision that cannot be imported counts as absent."""

from __future__ import annotations

import importlib.util
import sys


def hide_broken_torchvision() -> None:
    """Make a torchvision that cannot be imported count as absent.

    PyPI's torchvision is built for CUDA; beside a CPU build of torch its import fails. MoGe never imports it, but
    transformers does when it finds it. `None` in `sys.modules` makes every later import fail as for a missing
    package, and `find_spec` find nothing, which transformers reads as "not installed"; what a transformers imported
    earlier remembers of it is forgotten.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        remembered = sys.modules.get("transformers.utils.import_utils")
        for name in ("is_torchvision_available", "is_torchvision_v2_available"):
            getattr(getattr(remembered, name, None), "cache_clear", lambda: None)()
        for name in ("_torchvision_available", "_torchvision_v2_available"):  # transformers 4
            if hasattr(remembered, name):
                setattr(remembered, name, False)
