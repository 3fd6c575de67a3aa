"""What says that a job has finished. Light: the workers of a cluster read it, and leave torch to their kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"  # of a finished job


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished job; None if there is none, or none that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    usable = isinstance(content, dict) and isinstance(content.get("identity", {}), dict)
    return content if usable else None
