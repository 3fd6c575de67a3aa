"""All sets of samples by name or place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ttt_lib.core.errors import UserError
from ttt_lib.data.images import IMAGE_SUFFIXES, open_images
from ttt_lib.data.moge_layout import BENCHMARKS, INDEX, read_eval_config
from ttt_lib.data.motorcycle import open_motorcycle
from ttt_lib.data.samples import SampleSet, open_moge
from ttt_lib.data.scenes.sets import open_synthetic
from ttt_lib.data.scenes.tours import open_tours


def open_dataset(kind: str = "moge", **options: Any) -> SampleSet:
    """Open a set: `moge`, `images`, `motorcycle`, `synthetic`, `shifted` or `tours`; options as of the `open_*` functions.

    Raises `UserError` for an unknown kind, an option the kind lacks, or a folder that is not there.
    """
    if kind in ("synthetic", "shifted"):
        opener: Callable[..., SampleSet] = lambda **rest: open_synthetic(kind, **rest)  # noqa: E731
    else:
        openers = {"moge": open_moge, "images": open_images, "motorcycle": open_motorcycle, "tours": open_tours}
        if kind not in openers:
            raise UserError(f"data kind {kind!r}: use one of {', '.join([*openers, 'synthetic', 'shifted'])}.")
        opener = openers[kind]
    if kind in ("moge", "images") and "path" not in options:
        raise UserError(f"data: a set of kind {kind!r} needs a `path`.")
    if kind == "moge" and options.get("name") in BENCHMARKS:
        options = {**BENCHMARKS[options["name"]], **options}
    try:
        return opener(**options)
    except TypeError as error:
        raise UserError(f"data: a set of kind {kind!r} does not take these options ({error}).") from error


BUILT_IN = ("motorcycle", "synthetic", "shifted", "tours")


def describe_sources(entries: Iterable[str | Path], where: str = "data") -> list[dict[str, Any]]:
    """Sources of samples as the configuration's `data` entries.

    An entry is a built-in name (`BUILT_IN`), a JSON file of sets as in MoGe's `configs/eval`, a folder in MoGe's layout, a
    folder of images, or one image. where: begins the sentence of the `UserError` for one that is none of these.
    """
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
