"""MoGe's evaluation layout on disk: read it as MoGe's own evaluation does, write it, and read its configuration.

A folder holds `.index.txt` (one sample's folder a line) and in each sample's folder `image.jpg`, `depth.png` (16-bit,
logarithmic), `meta.json` (normalised intrinsics) and optionally `segmentation.png`. Reading makes the target view of
`moge.test.dataloader.EvalDataLoaderPipeline`: turned to the image centre, field of view restricted to what the image
covers, resized. (Only that part of the class runs in the packaged release: its reading calls an undefined `read_meta`.)
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from moge.test.dataloader import EvalDataLoaderPipeline
from moge.utils import io as moge_io
from PIL import Image

from ttt_lib.core.errors import DataError, UserError, reason
from ttt_lib.core.files import first_repeated, read_json, read_text, write_json, write_text
from ttt_lib.core.types import INTRINSICS, are_normalised_intrinsics
from ttt_lib.geometry.cameras import recentred_crop, shrunk

INDEX = ".index.txt"
LONGEST_SIDE = 640  # of samples whose configuration gives no size
USUAL = {"drop_max_depth": 1000.0, "max_segments": 100, "min_seg_area": 1000}  # MoGe's, of all of its sets
LARGEST = 2**26  # pixels of an enlarged frame; intrinsics that ask for more are wrong
# Evaluation settings of MoGe's ten benchmarks (its configs/eval); a JSON file in that format overrides them.
BENCHMARKS: dict[str, dict[str, Any]] = {
    "NYUv2": {"width": 640, "height": 480, "depth_unit": 1.0},
    "KITTI": {"width": 750, "height": 375, "depth_unit": 1.0},
    "ETH3D": {"width": 2048, "height": 1365, "depth_unit": 1.0, "include_segmentation": True},
    "iBims-1": {
        "width": 640, "height": 480, "depth_unit": 1.0, "has_sharp_boundary": True, "include_segmentation": True,
    },
    "GSO": {"width": 512, "height": 512},
    "Sintel": {"width": 872, "height": 436, "has_sharp_boundary": True, "include_segmentation": True},
    "DDAD": {"width": 1400, "height": 700, "depth_unit": 1.0, "include_segmentation": True},
    "DIODE": {"width": 1024, "height": 768, "depth_unit": 1.0, "include_segmentation": True},
    "Spring": {"width": 1920, "height": 1080, "has_sharp_boundary": True},
    "HAMMER": {"width": 1664, "height": 832, "depth_unit": 1.0, "has_sharp_boundary": True},
}  # fmt: skip


@dataclass
class Raw:
    """A frame as it is on disk: image uint8 (H,W,3), depth float32 (H,W) with NaN unknown and inf for no surface,
    intrinsics (3,3) normalised, segmentation (H,W) with its labels or None."""

    image: np.ndarray
    depth: np.ndarray
    intrinsics: np.ndarray
    segmentation: np.ndarray | None = None
    labels: dict[str, int] | None = None
    meta: dict[str, Any] | None = None


def read_raw(folder: Path, include_segmentation: bool = False) -> Raw:
    """Read one sample's files. Raises `DataError` naming the file that is missing or broken."""

    def attempt(name: str, read):
        path = folder / name
        try:
            return read(path)
        except UserError:
            raise
        except Exception as error:  # of Pillow, OpenCV and NumPy, which differ by format and damage
            raise DataError(f"{path}: cannot be read ({reason(error)}).") from error

    image = attempt("image.jpg", _read_image)
    depth = attempt("depth.png", _read_depth)
    meta = attempt("meta.json", read_json)
    try:
        intrinsics = np.array(meta["intrinsics"], dtype=np.float32)
    except (KeyError, TypeError, ValueError, OverflowError):
        intrinsics = None
    if not are_normalised_intrinsics(intrinsics):
        raise DataError(f"{folder / 'meta.json'}: {INTRINSICS}.")
    if image.shape[:2] != depth.shape[:2] or depth.ndim != 2:
        turned = ", which its EXIF orientation turns: store it upright" if image.shape[:2] == depth.shape[::-1] else ""
        raise DataError(
            f"{folder / 'depth.png'}: its size {depth.shape} is not that of the image {image.shape[:2]}{turned}."
        )
    if not np.isfinite(depth).any():
        raise DataError(f"{folder / 'depth.png'}: no pixel has a depth.")
    segmentation, labels = None, None
    if include_segmentation and (folder / "segmentation.png").exists():
        segmentation, labels = attempt("segmentation.png", _read_segmentation)
        if not 0.95 < segmentation.shape[0] * depth.shape[1] / (segmentation.shape[1] * depth.shape[0]) < 1.05:
            raise DataError(f"{folder / 'segmentation.png'}: its shape is not that of the image.")
    return Raw(image, depth, intrinsics, segmentation, labels, meta)


def _read_image(path: Path) -> np.ndarray:
    """uint8 (H,W,3), turned as its EXIF orientation says, which MoGe's evaluation does too (through OpenCV)."""
    with Image.open(path) as image:
        image.load()  # OpenCV fills what a truncated file lacks with gray; PIL refuses
    return moge_io.read_image(path)


def _read_depth(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if "near" not in image.info or "far" not in image.info:
            raise ValueError("no near and far in the file: not MoGe's depth encoding")
        if not image.mode.startswith("I"):
            raise ValueError(f"one channel of 16 bits is needed, this is Pillow's mode {image.mode}")
        near, far = float(image.info["near"]), float(image.info["far"])
    if not (0 < near <= far and math.isfinite(far)):
        raise ValueError(f"near {near} and far {far} are no range of depths")
    with np.errstate(over="ignore"):  # of a far beyond all numbers
        depth = moge_io.read_depth(path)
    if (depth <= 0).any():
        raise ValueError("a depth is not above 0")
    return depth


def _read_segmentation(path: Path) -> tuple[np.ndarray, dict[str, int]]:
    segmentation, labels = moge_io.read_segmentation(path)
    if segmentation.ndim != 2:
        raise ValueError("one channel is needed")
    labels = labels or {str(i): int(i) for i in np.unique(segmentation)}
    if not isinstance(labels, dict) or not all(isinstance(number, int) for number in labels.values()):
        raise ValueError("its labels are not names with a whole number each")
    return segmentation, labels


def target_view(
    raw: Raw, width: int | None = None, height: int | None = None, depth_unit: float | None = None
) -> dict[str, Any]:
    """MoGe's evaluation view of a frame, by its own `EvalDataLoaderPipeline._process_instance`.

    Returns image float32 (3,h,w) in [0,1], depth float32 (h,w) and its mask `depth_mask` (h,w), points (h,w,3),
    intrinsics (3,3) centred, all tensors; `segmentation_mask` and `segmentation_labels` where the frame has them. Depth is
    multiplied by `depth_unit` (metres a unit) where that is given.
    """
    if width is None or height is None:
        usual = shrunk(raw.image.shape[:2], LONGEST_SIDE)
        width, height = width or usual[1], height or usual[0]
    # MoGe enlarges the frame: by what the view is narrower, and where the camera's pixels are not the view's, once more.
    lens = torch.from_numpy(raw.intrinsics)
    _, crop = recentred_crop(lens, torch.full((2,), 0.5), torch.ones(()))
    oblong = float(lens[1, 1] * height / (lens[0, 0] * width))
    if width * height * float(crop[0, 0] / lens[0, 0]) ** 2 * max(oblong, 1 / oblong) > LARGEST:
        raise ValueError(f"a view of {width} x {height} pixels with these intrinsics is too large")
    settings = SimpleNamespace(
        **USUAL, depth_unit=depth_unit, include_segmentation=raw.segmentation is not None, has_sharp_boundary=False
    )
    instance = {
        "width": width,
        "height": height,
        "image": raw.image,
        "depth": np.nan_to_num(raw.depth, nan=1, posinf=1, neginf=1),
        "depth_mask": np.isfinite(raw.depth),
        "intrinsics": raw.intrinsics,
    }
    if raw.segmentation is not None:
        instance |= {"segmentation_mask": raw.segmentation, "segmentation_labels": dict(raw.labels)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice")  # no depth in view: said below
        view = EvalDataLoaderPipeline._process_instance(settings, instance)
    if view.get("label_type") == "invalid":  # where no pixel is known, MoGe makes all of them known, at a depth of one
        view["depth_mask"] = torch.zeros_like(view["depth_mask"])
    return view


def read_index(folder: Path, split: str = INDEX) -> list[str]:
    """Names listed in the index: relative paths that stay in the folder, each once (links in it are followed).

    Raises `DataError` if folder or index is missing, the index is empty, or a name is not such a path.
    """
    path = folder / check_name(split, "split")
    if not os.path.isdir(folder):  # os.path also answers for names that no file system takes
        raise DataError(f"{folder}: there is no such folder; give the folder of a set in the MoGe layout.")
    if not os.path.isfile(path):
        raise DataError(f"{path}: the index is missing; it lists the folder of one sample a line.")
    lines = [(i, line.strip()) for i, line in enumerate(read_text(path).splitlines(), start=1)]
    names = [check_name(line, f"{path}: line {i}") for i, line in lines if line]
    if not names:
        raise DataError(f"{path}: the index lists no sample.")
    if (twice := first_repeated(names)) is not None:
        raise DataError(f"{path}: lists {twice!r} twice; remove one of the lines.")
    return names


def check_name(name: str, where: str) -> str:
    """The name of a sample, set or index, if it is a path that stays in its folder. Raises `DataError`."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or not name.isprintable():
        raise DataError(f"{where}: {name!r} is no path inside the set's folder.")
    return path.as_posix()


def write_frame(folder: Path, image: np.ndarray, depth: np.ndarray, intrinsics: np.ndarray, **meta: Any) -> None:
    """Write one frame: image uint8 (H,W,3), depth (H,W) with NaN and inf, normalised intrinsics (3,3).

    The folder appears at once with all its files, or not at all; one that is there is replaced. Raises `DataError` for
    intrinsics that are none.
    """
    if not are_normalised_intrinsics(np.asarray(intrinsics)):
        raise DataError(f"{folder}: {INTRINSICS}.")
    temporary = folder.with_name(folder.name + ".partial")
    temporary.mkdir(parents=True, exist_ok=True)
    moge_io.write_image(temporary / "image.jpg", np.ascontiguousarray(image), quality=98)
    moge_io.write_depth(temporary / "depth.png", depth)
    write_json(temporary / "meta.json", {"intrinsics": np.asarray(intrinsics, dtype=float), **meta})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def write_index(folder: Path, names: list[str]) -> None:
    """Write `.index.txt` in one step."""
    write_text(folder / INDEX, "".join(f"{name}\n" for name in names))


def read_eval_config(path: Path) -> list[dict[str, Any]]:
    """A JSON file in the format of MoGe's `configs/eval`: {"NAME": {"path": ..., "width": ...}, ...}.

    Returns one dictionary a set, with `name` and `kind: moge`; paths come back absolute, relative ones taken from the file's folder (or,
    where nothing is there, from the working folder), and the settings of a known benchmark fill what the file leaves out.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not content or not all(isinstance(v, dict) for v in content.values()):
        raise DataError(f"{path}: is not a JSON file of sets, name by name, each with its `path`.")
    entries = [{"kind": "moge", **BENCHMARKS.get(name, {}), **values, "name": name} for name, values in content.items()]
    for entry in entries:
        if not isinstance(entry.get("path"), str) or entry["kind"] != "moge":
            raise DataError(f"{path}: set {entry['name']!r} needs a `path`, the folder of a set in the MoGe layout.")
        check_name(entry["name"], str(path))
        given = os.path.expanduser(entry["path"])
        beside = os.path.join(os.path.dirname(os.path.abspath(path)), given)
        # MoGe's own files name paths from the folder that its script is started in.
        entry["path"] = os.path.abspath(given if not os.path.isdir(beside) and os.path.isdir(given) else beside)
    return entries
