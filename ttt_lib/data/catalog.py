"""All sets of samples by name or place; the kinds that the package has of its own, and yours, are in `DATASETS`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ttt_lib.core.errors import ConfigError, DataError
from ttt_lib.core.registry import DATASETS
from ttt_lib.data.again import seen_again
from ttt_lib.data.images import install_or, is_photo, open_images
from ttt_lib.data.moge_layout import BENCHMARKS, INDEX, read_eval_config
from ttt_lib.data.motorcycle import open_motorcycle
from ttt_lib.data.samples import SampleSet, open_moge
from ttt_lib.data.scenes.generate import open_synthetic
from ttt_lib.data.scenes.tours import open_tours

DATASETS.register("moge", needs=("path",))(open_moge)
DATASETS.register("images", needs=("path",))(open_images)
DATASETS.register("motorcycle")(open_motorcycle)
DATASETS.register("synthetic")(partial(open_synthetic, "synthetic"))
DATASETS.register("shifted")(partial(open_synthetic, "shifted"))
DATASETS.register("tours")(open_tours)


def list_datasets() -> list[str]:
    """The kinds of data that `open_dataset` and `data: [{kind: ...}]` take, yours last.

    Example:
        >>> list_datasets()[:5]
        ['moge', 'images', 'motorcycle', 'synthetic', 'shifted']
    """
    return DATASETS.all_names()


def open_dataset(kind: str = "moge", names: list[str] | None = None, draw: int = 0, **options: Any) -> SampleSet:
    """Open a set of samples.

    Args:
        kind: one of `list_datasets()`.
        names: only these samples.
        draw: above 0 the samples are seen again (`again.py`), under another draw for another number.
        options: as the function takes them that is registered for the kind.

    Raises:
        ConfigError: an unknown kind, or an option that the kind lacks or needs.
        DataError: a folder that is not there; what a damaged index or set has to say.

    Example:
        >>> open_dataset("motorcycle", width=96, height=64).names
        ['motorcycle_left', 'motorcycle_right']
    """
    if not DATASETS.knows(kind):
        raise ConfigError(f"data kind {kind!r}: use one of {', '.join(list_datasets())}.", kind=kind)
    for needed in DATASETS.about[kind].get("needs", ()):
        if needed not in options:
            raise ConfigError(f"data: a set of kind {kind!r} needs a `{needed}`.", kind=kind)
    if kind == "moge" and options.get("name") in BENCHMARKS:
        options = {**BENCHMARKS[options["name"]], **options}
    signature = inspect.signature(DATASETS[kind])
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"data: a set of kind {kind!r} does not take these options ({error}).", kind=kind) from error
    drawn = {"draw": draw} if draw and "draw" in signature.parameters else {}
    samples = DATASETS[kind](**options, **drawn)
    samples = samples if names is None else samples.only(names)
    return seen_again(samples, draw) if draw else samples


def describe_sources(entries: Iterable[str | Path], where: str = "data") -> list[dict[str, Any]]:
    """Sources of samples as the configuration's `data` entries, every path absolute.

    Args:
        entries: each the name of a kind that needs no path, a JSON file of sets as in MoGe's `configs/eval`, a folder in
            MoGe's layout, a folder of images, or one image; `~` is your home.
        where: begins the sentence of the error.

    Raises:
        DataError: an entry that is none of these.

    Example:
        >>> describe_sources(["motorcycle"])
        [{'kind': 'motorcycle'}]
    """
    by_name = [kind for kind in list_datasets() if not DATASETS.about[kind].get("needs")]
    result: list[dict[str, Any]] = []
    for entry in entries:
        path = Path(os.path.abspath(os.path.expanduser(entry)))
        if str(entry) in by_name:
            result.append({"kind": str(entry)})
        elif path.suffix == ".json":
            result += read_eval_config(path)
        elif os.path.isdir(path) and os.path.isfile(path / INDEX):  # `os.path` also answers for names no system takes
            known = BENCHMARKS.get(path.resolve().name, {})
            result.append({"kind": "moge", "path": str(path.resolve()), **known})
        elif os.path.isdir(path) and any(path.rglob("depth.png")):
            raise DataError(f"{where} {entry}: {path / INDEX} is missing; it lists the folder of one sample a line.")
        elif os.path.isdir(path) or (os.path.isfile(path) and is_photo(path)):
            result.append({"kind": "images", "path": str(path.resolve())})
        else:
            advice = f"; built in are {', '.join(by_name)}"
            if os.path.isfile(path):
                advice = f" that can be read; {install_or(path)}convert an image to JPEG"
            raise DataError(f"{where} {entry}: no such folder, image or JSON file{advice}.")
    return result
