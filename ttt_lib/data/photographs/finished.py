"""Scenes whose cameras somebody else computed: a COLMAP model, with points or without, or a `transforms.json`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ttt_lib.core.errors import DataError, UserError, printable
from ttt_lib.data.photographs.beside import folders_near, in_folders, in_list
from ttt_lib.data.photographs.colmap import Finished, read_model
from ttt_lib.data.photographs.colmap_files import Lens, Model, find_model
from ttt_lib.data.photographs.posed import Found, Posed, scene_of_cameras, scene_of_model, stored_turns
from ttt_lib.data.photographs.scene import Photograph, Scene
from ttt_lib.data.photographs.sources import SHOWN, distinct_names, from_files, photos_in, thinned
from ttt_lib.data.photographs.transforms import find_transforms, lens_of, read_transforms, size_of


def find_cameras(path: Path) -> Model | Path | None:
    """The files of a COLMAP model in a folder, else a `transforms.json` there or of this name; None without either."""
    return (find_model(path) if os.path.isdir(path) else None) or find_transforms(path)


def scene_of_finished(
    cameras: Model | Path, photographs: Path | list[Path] | None, every: int | None, count: int | None, seed: int
) -> Scene:
    """The scene of a file of cameras.

    Args:
        cameras: as `find_cameras` gives it.
        photographs: the folder that they lie in, or their files; None: beside the cameras.
        every, count, seed: see `load_scene`.

    Raises:
        DataError: the files of cameras are damaged, or fewer than two of their photographs can be found.
    """
    if isinstance(cameras, Model):
        return _of_colmap(cameras, photographs, every, count, seed)
    return _of_transforms(cameras, photographs, every, count, seed)


def _files(
    names: list[str], photographs: Path | list[Path] | None, near: list[Path], what: Path, found: Found
) -> dict[str, Path]:
    """The photograph of each name. Raises `DataError` where fewer than two are there."""
    if isinstance(photographs, list):
        files, where = in_list(names, photographs), None
        unused = from_files([file for file in photographs if file not in set(files.values())])
        found.rest = [Photograph(picture.name, picture.source) for picture in unused.pictures]
        found.left_out += unused.left_out + [(p.name, f"has no camera in {what}") for p in found.rest]
    else:
        files, where = in_folders(names, folders_near(photographs) if photographs else near)
        others = sorted(set(photos_in(where)[0]) - set(files.values())) if where else []
        found.left_out += [(printable(file.stem, 100), f"has no camera in {what}") for file in others[:SHOWN]]
        if len(others) > SHOWN:
            found.left_out.append((f"{len(others) - SHOWN} other photographs", f"have no camera in {what}"))
    at = where or ("the list" if isinstance(photographs, list) else photographs or near[0])
    if len(files) < 2:
        raise DataError(
            f"{what}: of its {len(names)} photographs (such as {printable(names[0], 100)!r}) {len(files)} are in {at}; "
            "give the folder that they lie in."
        )
    found.left_out += [(printable(name, 100), f"is not in {at}") for name in names if name not in files]
    return files


# ------------------------------------------------------------------------------------------------ COLMAP


def _of_colmap(files: Model, photographs: Any, every: int | None, count: int | None, seed: int) -> Scene:
    finished, found = read_model(files), Found()
    other = "is another model, of fewer images, which is not read; name it to have it"
    found.left_out = [(f"{path.parent.name}/{path.name}", other) for path in files.others]
    model, listing = finished.model, finished.listing
    names = [str(name) for name in model.name]
    paths = _files(names, photographs, folders_near(files.folder), files.folder, found)
    of_image = {int(i): paths[name] for i, name in zip(model.image, names) if name in paths}
    of_image = dict(list(of_image.items())[::every])
    if listing.points:
        return scene_of_model(finished, of_image, count, files.folder, found)
    return scene_of_cameras(_posed(finished, of_image, count, files.folder, found), seed, False, found)


def _posed(finished: Finished, of_image: dict[int, Path], count: int | None, where: Path, found: Found) -> list[Posed]:
    """The photographs of a model without points."""
    rows = {int(image): row for row, image in enumerate(finished.model.image)}
    found.left_out += [(of_image[i].stem, why) for i, why in finished.unusable.items() if i in of_image]
    usable = [image for image in of_image if image not in finished.unusable]
    entries = []
    for image in thinned(usable, None, count, where):
        lens = finished.listing.lenses[finished.listing.images[image][1]]
        entries.append((of_image[image], lens, finished.model.pose[rows[image]]))
    return _put_beside(entries, where, found)


def _put_beside(entries: list[tuple[Path, Any, Any]], where: Path, found: Found) -> list[Posed]:
    """Photographs with their cameras, those that can be read. entries: file, a `Lens` or what `lens_of` takes, pose."""
    result = []
    for name, (file, camera, pose) in zip(distinct_names([file for file, _, _ in entries]), entries):
        try:
            known = (camera.width, camera.height) if isinstance(camera, Lens) else size_of(camera)
            turns, stored = stored_turns(file, known)
            lens = camera if isinstance(camera, Lens) else lens_of(camera, known or stored)
        except UserError as error:
            found.left_out.append((name, str(error)))
            continue
        result.append(Posed(name, file, turns, lens, pose))
    if len(result) < 2:
        first = next((f" ({name} {why.rstrip('.')})" for name, why in found.left_out), "")
        raise DataError(f"{where}: {len(result)} photographs with a camera can be used, two are needed{first}.")
    return result


# ------------------------------------------------------------------------------------------------ transforms.json


def _of_transforms(path: Path, photographs: Any, every: int | None, count: int | None, seed: int) -> Scene:
    found = Found()
    frames, found.left_out = read_transforms(path)
    if not frames:
        raise DataError(f"{path}: no frame has a camera ({found.left_out[0][0]} {found.left_out[0][1]}).")
    files = _files([frame.path for frame in frames], photographs, folders_near(path.parent), path, found)
    there = [frame for frame in frames if frame.path in files]
    entries = [(files[f.path], f.values, f.pose) for f in thinned(there, every, count, path)]
    return scene_of_cameras(_put_beside(entries, path, found), seed, False, found)
