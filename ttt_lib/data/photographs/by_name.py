"""The files that belong to the names which somebody's cameras have for their photographs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ttt_lib.data.images import is_photo

INSIDE = (".", "images", "input", "photos", "images_2", "images_4", "images_8")  # folders that people use


def find_photographs(names: list[str], place: Path) -> tuple[dict[str, Path], Path]:
    """The file of each name in the one folder near a place that has most of them, and that folder; names without a file are
    missing.

    A name is a path inside the folder. With another ending or none it is found where just one photograph there has its
    stem.
    """
    above = (place, place.parent, place.parent.parent)
    folders = dict.fromkeys(Path(os.path.normpath(folder / name)) for folder in above for name in INSIDE)
    best: tuple[dict[str, Path], Path] = ({}, place)
    listed = cache(_by_name)
    for folder in filter(os.path.isdir, folders):
        found = {name: file for name in names if (file := _in_folder(name, folder, listed)) is not None}
        if len(found) > len(best[0]):
            best = found, folder
        if len(found) == len(set(names)):
            break
    return best


def _in_folder(name: str, folder: Path, listed: Callable[[Path], dict[str, Path]]) -> Path | None:
    path = folder / name.replace("\\", "/")
    for place in (path.parent, folder):
        known = listed(place) if os.path.isdir(place) else {}
        if file := known.get(path.name) or known.get(path.stem):
            return file
    return None


def _by_name(folder: Path) -> dict[str, Path]:
    """The photographs of a folder by stem where that is there once, and by name."""
    files = [path for path in folder.iterdir() if is_photo(path)]
    number = Counter(file.stem for file in files)
    return {**{file.stem: file for file in files if number[file.stem] == 1}, **{file.name: file for file in files}}
