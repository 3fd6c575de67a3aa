"""Adaptation to single photographs and the files it leaves: depth, point cloud, figure, record."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import utils3d
from moge.utils import io as moge_io
from PIL import Image

from ttt_lib.adaptation.known_camera import adapt_photograph, camera_of
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import UserError, printable
from ttt_lib.core.files import absolute, first_repeated, replacing, write_json
from ttt_lib.core.types import Prediction
from ttt_lib.data.images import photographs_in, read_photo
from ttt_lib.data.known_distances import read_references
from ttt_lib.geometry.warp import EDGE_RTOL, depth_edges, in_front
from ttt_lib.models.base import GeometryModel, weights_checksum
from ttt_lib.report.figures import plot_before_after
from ttt_lib.runs.experiment import why_left_out

log = logging.getLogger(__name__)

LONGEST_CLOUD = 1024  # pixels of the longer side from which the point cloud is made
COMPRESSION = 3  # of PNG, lossless: a tenth larger than with the usual 6 or 7, in a third of the time
DEPTH_ENCODING = "depth = near * (far / near) ** ((value - 1) / 65533); value 0: unknown, 65535: no surface"


def write_cloud(path: Path, image: torch.Tensor, prediction: Prediction) -> None:
    """Coloured triangle mesh of the predicted surface as PLY (y up, z backwards, as viewers expect); edges are cut."""
    height, width = prediction.depth.shape
    step = max(1, -(-max(height, width) // LONGEST_CLOUD))
    points = prediction.points[::step, ::step].cpu()
    mask = prediction.mask[::step, ::step].cpu() & in_front(points)
    mask &= ~depth_edges(points[..., 2], mask, rtol=EDGE_RTOL)
    small = image[:, ::step, ::step].permute(1, 2, 0).cpu().numpy()
    faces, vertices, colours = utils3d.np.build_mesh_from_map(
        points.numpy().astype(np.float32), small.astype(np.float32), mask=mask.numpy(), tri=True
    )
    moge_io.save_ply(path, vertices * np.array([1, -1, -1], np.float32), faces, (colours * 255).astype(np.uint8))


def surface_depth(prediction: Prediction) -> np.ndarray:
    """The depth (H,W) float32, infinite where there is no surface, NaN where it is not known."""
    known = prediction.mask | torch.isnan(prediction.depth)
    return torch.where(known, prediction.depth, torch.inf).cpu().numpy().astype(np.float32)


def write_depth(path: Path, prediction: Prediction) -> dict[str, float]:
    """`path` with .npy, and with .png (`DEPTH_ENCODING`) where any depth is finite; returns `near` and `far` of that."""
    depth = surface_depth(prediction)
    np.save(path.with_name(f"{path.name}.npy"), depth)
    if not np.isfinite(depth).any():
        return {}
    png = path.with_name(f"{path.name}.png")
    moge_io.write_depth(png, depth, compression_level=COMPRESSION)
    with Image.open(png) as written:
        return {key: float(written.info[key]) for key in ("near", "far")}


def find_photos(entries: Sequence[str | Path]) -> list[Path]:
    """Photographs that are named, and those of folders that are named. Raises `DataError` for a folder without any."""
    found = []
    for entry in entries:
        path = Path(absolute(entry))
        found += photographs_in(path) if str(entry) and os.path.isdir(path) else [Path(entry)]
    return found


def name_results(paths: Sequence[Path], output: Path) -> dict[Path, str]:
    """The name of each photograph's folder, another one for every other: its stem, or its whole name where two have one.

    Raises `UserError` if these are the same too (no system keeps names apart that differ in case alone).
    """
    stems = [path.stem.casefold() for path in paths]
    names = [path.stem if stems.count(stem) == 1 else path.name for path, stem in zip(paths, stems)]
    if (twice := first_repeated(name.casefold() for name in names)) is not None:
        raise UserError(f"{output / twice}: two of the photographs would be written there; rename one.")
    return dict(zip(paths, names))


def adapt_photos(
    photos: dict[Path, str], output: Path, model: GeometryModel, config: ExperimentConfig,
    metric_points: Path | None = None, metric_unit: float | None = None, **camera: Any,
) -> Iterator[tuple[Path, Path | None, str]]:  # fmt: skip
    """Adapt to each of the photographs (`name_results`); gives it, its folder or None, and in words what came of it.

    Whatever goes wrong with one costs no other (`why_left_out`). Only a device that has failed ends all of it.
    """
    for path, name in photos.items():
        try:
            if name in (".", ".."):
                raise UserError(f"{path}: no folder can be named after it; rename the photograph.")
            result = adapt_photo(path, output / name, model, config, metric_points, metric_unit, **camera)
            yield path, output / name, f"{result.decision} in {result.seconds:.1f} s"
        except UserError as error:
            yield path, None, str(error)
        except Exception as error:
            why = why_left_out(printable(path), error)
            yield path, None, f"{printable(path)}: cannot be adapted to ({why.rstrip('.')})."


def adapt_photo(
    path: Path, folder: Path, model: GeometryModel, config: ExperimentConfig, metric_points: Path | None = None,
    metric_unit: float | None = None, **camera: Any,
) -> AdaptResult:  # fmt: skip
    """Adapt `model` to one photograph; writes the folder in one step.

    depth.png (16 bits, `DEPTH_ENCODING`), depth.npy (H,W) float32 (inf where there is no surface), and the same before
    adaptation in depth_original.npy, cloud.ply, before_after.png, record.json (settings, device, times, decision, how
    depth.png is encoded). Depth is in metres for metric models, and for all with `metric_points`, a file of known
    distances of `metric_unit` metres (`data.known_distances.read_references`).
    camera: `intrinsics`, `fov` and `exif` of `adaptation.known_camera.camera_of`; depth is
    NaN where a camera away from the middle leaves it unknown. An earlier result is replaced. Raises
    `UserError` when the photograph or the file cannot be read, or the folder cannot be written or holds something else.
    """
    image = read_photo(path)
    references = read_references(metric_points, tuple(image.shape[-2:]), metric_unit) if metric_points else None
    if references is not None and references.unit is not None and metric_unit is None:
        log.warning("%s: a unit is taken for 1/256 m, as KITTI has it; --metric-unit says another", metric_points)
    lens = camera_of(model, image, path, **camera)
    check_free(folder)
    with replacing(folder) as work:
        result = adapt_photograph(model, config, image, printable(path.name), references, lens)
        unit, final = "metre" if result.final.kind == "metric" else "arbitrary", result.final
        span = write_depth(work / "depth", final)
        np.save(work / "depth_original.npy", surface_depth(result.original))
        write_cloud(work / "cloud.ply", image, final)
        plot_before_after(image, result).savefig(work / "before_after.png", dpi=110)
        write_json(work / "record.json", {
            "image": str(path), **about_result(result), **about_run(model, config), "unit": unit,
            "depth_png": {"encoding": DEPTH_ENCODING, **span, "unit": unit} if span else None,
            "peak_memory_mb": result.peak_memory_mb, "passes_done": result.passes_done, "views": result.view_stats,
            "intrinsics": final.intrinsics, "history": result.history, "assumptions": result.original.note,
            "metric_points": absolute(metric_points) if metric_points else None,
            "metric_unit": references.unit if references is not None else None,
            "camera": lens.source if lens is not None else None,
        })  # fmt: skip
    return result


def check_free(folder: Path) -> None:
    """Raises `UserError` where the folder is there, holds something, and is no earlier result."""
    if os.path.lexists(folder) and not (folder / "record.json").is_file():
        if not os.path.isdir(folder) or any(os.scandir(folder)):
            raise UserError(
                f"{folder}: is there already and is no earlier result; move it, or choose another output folder."
            )


def about_run(model: GeometryModel, config: ExperimentConfig) -> dict[str, Any]:
    """What a record says of the model and the settings, and the date."""
    return {
        "model": model.name, "weights": weights_checksum(model), "device": str(model.device),
        "settings": config.as_parameters(), "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }  # fmt: skip


def about_result(result: AdaptResult) -> dict[str, Any]:
    """What a record says of one photograph."""
    return {
        "width": result.image.shape[-1], "height": result.image.shape[-2], "decision": result.decision,
        "reason": result.reason, "seconds": result.seconds, "signals": result.signals,
    }  # fmt: skip
