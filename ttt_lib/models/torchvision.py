"""A torchvision that cannot be imported counts as absent."""

from __future__ import annotations

import sys


def hide_broken_torchvision() -> None:
    """Make a torchvision that cannot be imported count as absent.

    PyPI's torchvision is built for CUDA; beside a CPU build of torch its import fails. MoGe never imports it, but
    transformers does when it finds it. `None` in `sys.modules` makes every later import fail as for a missing
    package, and `find_spec` find nothing, which transformers reads as "not installed".
    """
    try:
        import torchvision  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
