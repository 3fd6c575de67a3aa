"""The files that belong to the names which somebody's cameras have for their photographs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ttt_lib.data.images import is_photo

INSIDE = (".", "images", "input", "photos", "images_2", "images_4", "images_8")  # folders that people use


def folders_near(*places: Path) -> list[Path]:
    """Where photographs may lie, likeliest first: `images` and the like in each place, and in the two above it."""
    above = [folder for place in places for folder in (place, place.parent, place.parent.parent)]
    return list(dict.fromkeys(Path(os.path.normpath(folder / name)) for folder in above for name in INSIDE))


def in_folders(names: list[str], folders: list[Path]) -> tuple[dict[str, Path], Path | None]:
    """The file of each name, in the one folder that has most of them, and that folder; names without a file are missing.

    A name is a path inside the folder. With another ending or none it is found where just one photograph there has its
    stem; spaces may have become underscores.
    """
    best: tuple[dict[str, Path], Path | None] = ({}, None)
    photographs_by_name = cache(_photographs_by_name)
    for folder in folders:
        if not os.path.isdir(folder):
            continue
        found = {name: file for name in names if (file := _in_folder(name, folder, photographs_by_name)) is not None}
        if len(found) > len(best[0]):
            best = found, folder
        if len(found) == len(set(names)):
            break
    return best


def in_list(names: list[str], files: list[Path]) -> dict[str, Path]:
    """The file of each name among these, by its own name or its stem.

    Example:
        >>> in_list(["images/a.png", "b"], [Path("x/a.jpg"), Path("y/b.jpg")])["b"].name
        'b.jpg'
    """
    known = _by_name(files)
    return {name: file for name in names if (file := _lookup(Path(name.replace("\\", "/")), known)) is not None}


def _in_folder(name: str, folder: Path, photographs_by_name: Callable[[Path], dict[str, Path]]) -> Path | None:
    path = folder / name.replace("\\", "/")
    try:
        if path.is_file():
            return path
        beside = _lookup(path, photographs_by_name(path.parent))
        return beside if beside is not None else _lookup(path, photographs_by_name(folder))
    except (OSError, ValueError):  # names that no file system takes
        return None


def _photographs_by_name(folder: Path) -> dict[str, Path]:
    return _by_name([path for path in folder.iterdir() if is_photo(path)]) if folder.is_dir() else {}


def _lookup(path: Path, known: dict[str, Path]) -> Path | None:
    keys = (path.name.replace(" ", "_"), path.stem.replace(" ", "_"))
    return next((known[key] for key in keys if key in known), None)


def _by_name(files: list[Path]) -> dict[str, Path]:
    """Files by stem where that is there once, and by name; spaces as underscores."""
    stems = [file.stem.replace(" ", "_") for file in files]
    number = Counter(stems)
    once = {stem: file for stem, file in zip(stems, files) if number[stem] == 1}
    return {**once, **{file.name.replace(" ", "_"): file for file in files}}
