"""Which samples of a set are photographs of one scene.

A set in MoGe's layout says it in `scenes.json` beside its index: `{"kitchen": ["kitchen/a", "kitchen/b"], ...}`, the name
of a scene and the folders of its samples as the index lists them, in the order they were taken. A sample belongs to one
scene at most; samples that are in none stand alone. `SampleSet.scenes` holds it for every kind of set.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from ttt_lib.core.errors import DataError, UserError
from ttt_lib.core.files import read_json
from ttt_lib.data.moge_layout import check_name

SCENES = "scenes.json"
TABLE = TypeAdapter(Annotated[dict[str, Annotated[list[str], Field(min_length=1)]], Field(min_length=1)])


def read_scenes(folder: str | Path) -> dict[str, list[str]]:
    """The scenes that `scenes.json` of a folder in MoGe's layout names: {scene: [sample folder, ...]}.

    Raises:
        DataError: the file is missing or no JSON, is no such table, names a path outside the folder, a folder that is
            not there, or a sample twice.
    """
    folder = Path(folder)
    path = folder / SCENES
    try:
        scenes = TABLE.validate_python(read_json(path))
    except ValidationError as error:
        place = error.errors()[0]["loc"]
        said = "is no table of scenes; it holds {scene: [sample folder, ...], ...}"
        if place:
            said = f"scene {place[0]!r} needs a list of the folders of its samples"
        raise DataError(f"{path}: {said}.", path=path) from error
    except UserError as error:
        raise DataError(str(error), path=path) from error
    where = f"{path}: scene"
    scenes = {scene: [check_name(name, f"{where} {scene!r}") for name in names] for scene, names in scenes.items()}
    seen: dict[str, str] = {}
    for scene, members in scenes.items():
        for name in members:
            if name in seen:
                raise DataError(f"{path}: {name!r} is in {seen[name]!r} and in {scene!r}; leave it in one.", path=path)
            if not os.path.isdir(folder / name):
                raise DataError(f"{path}: scene {scene!r} names {name!r}; there is no such folder.", path=path)
            seen[name] = scene
    return scenes
