"""Which samples of a set are photographs of one scene.

A set in MoGe's layout says it in `scenes.json` beside its index: `{"kitchen": ["kitchen/a", "kitchen/b"], ...}`, the name
of a scene and the folders of its samples as the index lists them, in the order they were taken. A sample belongs to one
scene at most; samples that are in none stand alone. `SampleSet.scenes` holds it for every kind of set.
"""

from __future__ import annotations

import os
from pathlib import Path

from ttt_lib.core.errors import DataError, UserError
from ttt_lib.core.files import read_json
from ttt_lib.data.moge_layout import check_name

SCENES = "scenes.json"


def read_scenes(folder: str | Path) -> dict[str, list[str]]:
    """The scenes that `scenes.json` of a folder in MoGe's layout names: {scene: [sample folder, ...]}.

    Raises:
        DataError: the file is missing or no JSON, is no such table, names a path outside the folder, a folder that is
            not there, or a sample twice.
    """
    folder = Path(folder)
    path = folder / SCENES
    try:
        content = read_json(path)
        if not isinstance(content, dict) or not content:
            raise DataError(f"{path}: is no table of scenes; it holds {{scene: [sample folder, ...], ...}}.", path=path)
        scenes = {scene: _members(path, scene, members) for scene, members in content.items()}
    except UserError as error:
        raise error if isinstance(error, DataError) else DataError(str(error), path=path) from error
    seen: dict[str, str] = {}
    for scene, members in scenes.items():
        for name in members:
            if name in seen:
                raise DataError(f"{path}: {name!r} is in {seen[name]!r} and in {scene!r}; leave it in one.", path=path)
            if not os.path.isdir(folder / name):
                raise DataError(f"{path}: scene {scene!r} names {name!r}; there is no such folder.", path=path)
            seen[name] = scene
    return scenes


def _members(path: Path, scene: str, members: object) -> list[str]:
    if not isinstance(members, list) or not members or not all(isinstance(name, str) for name in members):
        raise DataError(f"{path}: scene {scene!r} needs a list of the folders of its samples.", path=path)
    return [check_name(name, f"{path}: scene {scene!r}") for name in members]
