"""The photographs that belong to the names in a file of cameras: in folders near it, or in a list."""

from __future__ import annotations

import os
from collections import Counter
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
    for folder in folders:
        if not os.path.isdir(folder):
            continue
        known: dict[Path, dict[str, Path]] = {}
        found = {name: file for name in names if (file := _in_folder(name, folder, known)) is not None}
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


def _in_folder(name: str, folder: Path, known: dict[Path, dict[str, Path]]) -> Path | None:
    path = folder / name.replace("\\", "/")
    try:
        if path.is_file():
            return path
        for inside in (path.parent, folder):
            if inside not in known:
                known[inside] = _by_name([p for p in inside.iterdir() if is_photo(p)]) if inside.is_dir() else {}
            if (file := _lookup(path, known[inside])) is not None:
                return file
    except (OSError, ValueError):  # names that no file system takes
        pass
    return None


def _lookup(path: Path, known: dict[str, Path]) -> Path | None:
    keys = (path.name.replace(" ", "_"), path.stem.replace(" ", "_"))
    return next((known[key] for key in keys if key in known), None)


def _by_name(files: list[Path]) -> dict[str, Path]:
    """Files by stem where that is there once, and by name; spaces as underscores."""
    stems = [file.stem.replace(" ", "_") for file in files]
    number = Counter(stems)
    once = {stem: file for stem, file in zip(stems, files) if number[stem] == 1}
    return {**once, **{file.name.replace(" ", "_"): file for file in files}}
