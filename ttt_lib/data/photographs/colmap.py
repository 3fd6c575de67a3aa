"""A finished COLMAP model: where it lies, and its arrays, which pycolmap reads in a process of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ttt_lib.core.errors import DataError
from ttt_lib.data.photographs.job import Failed, Lens, SparseModel, apart

PLACES = (".", "sparse", "dense/sparse", "dense/0/sparse", "colmap/sparse")
OWN_MARK = "# Every observation is a track of ttt-depth."  # in points3D.txt of `writers.write_colmap`
BASE_MEMORY = 2**31  # bytes that the process which reads may take: its libraries,
MEMORY_PER_BYTE = 12  # and what becomes of a byte of the files. A damaged file may say that it holds anything.
PATIENCE, BYTES_A_SECOND = 60, 2**20  # how long it may take


def _files(folder: Path) -> list[Path]:
    """The model's files in a folder, all binary or all text: images, cameras, and points if there are any."""
    for suffix in (".bin", ".txt"):
        files = [folder / f"{name}{suffix}" for name in ("images", "cameras", "points3D")]
        files = [path for path in files if os.path.isfile(path)]
        if [path.stem for path in files[:2]] == ["images", "cameras"]:
            return files
    return []


def find_model(folder: Path) -> Path | None:
    """The folder of the model in a folder, or where COLMAP and those who use it put one inside; None where there is none.

    Of several that one mapping gave (`sparse/0`, `sparse/1`, ...) it is the one with most of the images.
    """
    for place in (folder / name for name in PLACES):
        found = [place] if _files(place) else [each for each in sorted(place.glob("[0-9]*")) if _files(each)]
        if found:
            return max(found, key=lambda each: _files(each)[0].stat().st_size)
    return None


def is_own(folder: Path) -> bool:
    """Whether `writers.write_colmap` wrote the model, so that every observation is a track."""
    path = folder / "points3D.txt"
    return path.is_file() and path.open("rb").readline().startswith(OWN_MARK.encode())


def read_model(folder: Path) -> tuple[SparseModel, list[str], list[Lens], list[tuple[str, str]]]:
    """Images in the order of their names, with cameras, points and observations; these names; the images' lenses; and
    (name, reason) of images whose camera cannot be used.

    Places of the observations are those of pinhole cameras, without the distortion of a lens (`as_seen`).

    Raises:
        DataError: the files are damaged, lie about what they hold, or hold no image with a camera.
    """
    files = _files(folder)
    size = sum(path.stat().st_size for path in files)
    with tempfile.TemporaryDirectory(prefix="ttt-colmap-") as name:
        # These alone: rigs and frames beside them say nothing that images do not. Points must be there, if none.
        Path(name, f"points3D{files[0].suffix}").write_bytes(bytes(8) if files[0].suffix == ".bin" else b"")
        for path in files:
            shutil.copyfile(path, Path(name, path.name))
        try:
            memory = BASE_MEMORY + MEMORY_PER_BYTE * size
            return apart("mapping.read", PATIENCE + size / BYTES_A_SECOND, Path(name), memory)
        except Failed as error:
            raise DataError(f"{folder}: the COLMAP model cannot be read, or is damaged ({error}).") from error
