"""Adaptation to single photographs and the files it leaves: depth, point cloud, figure, record."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import utils3d
from moge.utils import io as moge_io
from torch.nn import functional as F

from ttt_lib.adaptation.adapter import Adapter
from ttt_lib.adaptation.known_distances import KnownDistances
from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import UserError, printable, reason
from ttt_lib.core.memory import is_out_of_memory
from ttt_lib.core.types import Prediction
from ttt_lib.data.images import read_photo
from ttt_lib.data.known_distances import read_references
from ttt_lib.geometry.warp import EDGE_RTOL, depth_edges
from ttt_lib.models.base import GeometryModel, weights_checksum
from ttt_lib.report.figures import plot_before_after

LONGEST_CLOUD = 1024  # pixels of the longer side from which the point cloud is made


def write_cloud(path: Path, image: torch.Tensor, prediction: Prediction) -> None:
    """Coloured triangle mesh of the predicted surface as PLY (y up, z backwards, as viewers expect); edges are cut."""
    height, width = prediction.depth.shape
    step = max(1, -(-max(height, width) // LONGEST_CLOUD))
    points = prediction.points[::step, ::step].cpu()
    mask = prediction.mask[::step, ::step].cpu() & torch.isfinite(points).all(-1) & (points[..., 2] > 0)
    mask &= ~depth_edges(points[..., 2], mask, rtol=EDGE_RTOL)
    small = image[:, ::step, ::step].permute(1, 2, 0).cpu().numpy()
    faces, vertices, colours = utils3d.np.build_mesh_from_map(
        points.numpy().astype(np.float32), small.astype(np.float32), mask=mask.numpy(), tri=True
    )
    moge_io.save_ply(path, vertices * np.array([1, -1, -1], np.float32), faces, (colours * 255).astype(np.uint8))


def adapt_photo(
    path: Path, output: Path, model: GeometryModel, config: ExperimentConfig, metric_points: Path | None = None
) -> Path:
    """Adapt `model` to one photograph; writes `output/<stem>/` in one step and returns it.

    depth.png (16-bit, MoGe's logarithmic encoding; inf where there is no surface), depth.npy (H,W) float32, and the
    same before adaptation in depth_original.npy, cloud.ply, before_after.png, record.json (settings, device, times,
    decision). Depth is in metres for metric models, and for all with `metric_points`, a file of known distances
    (`references.read_references`). An earlier result of this name is replaced. Raises `UserError` when the photograph
    or the file cannot be read, or the folder cannot be written or holds something else.
    """
    image = read_photo(path)
    references = read_references(metric_points, tuple(image.shape[-2:])) if metric_points else None
    folder = result_folder(path, output)
    work = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        supervision = [KnownDistances(references, config)] if references is not None else []
        result = Adapter(model, config).adapt(image, printable(Path(path).name), supervision)
        _write_result(work, path, image, result, model, config, metric_points)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(work, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason(error)}).") from error
    except FloatingPointError as error:
        raise UserError(f"{path}: the model {model.name!r} fails on it ({reason(error)}).") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{path}: {image.shape[-1]} x {image.shape[-2]} pixels do not fit in memory; shrink the photograph."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def result_folder(path: Path, output: Path) -> Path:
    """`output/<stem>`. Raises `UserError` if it is there and no earlier result, or if it would not be inside."""
    stem = Path(path).stem
    folder = Path(output) / stem
    if stem in (".", ".."):
        raise UserError(f"{path}: no folder can be named after it; rename the photograph.")
    if os.path.lexists(folder) and not (folder / "record.json").is_file():
        raise UserError(
            f"{folder}: is there already and is no earlier result; move it, or choose another output folder."
        )
    return folder


def _write_result(
    work: Path, path: Path, image: torch.Tensor, result: AdaptResult, model: GeometryModel, config: ExperimentConfig,
    metric_points: Path | None,
) -> None:  # fmt: skip
    """The files of one photograph into the folder `work`."""
    for name, prediction in (("depth", result.final), ("depth_original", result.original)):
        depth = torch.where(prediction.mask, prediction.depth, torch.inf).cpu().numpy().astype(np.float32)
        np.save(work / f"{name}.npy", depth)
        if name == "depth" and np.isfinite(depth).any():
            moge_io.write_depth(work / "depth.png", depth)
    write_cloud(work / "cloud.ply", image, result.final)
    shrink = min(1.0, 640 / max(image.shape[-2:]))
    shown = F.interpolate(image[None], scale_factor=shrink, mode="area")[0] if shrink < 1 else image
    plot_before_after(shown, result).savefig(work / "before_after.png", dpi=110)
    record = {
        "image": str(path), "width": image.shape[-1], "height": image.shape[-2],
        "unit": "metre" if result.final.kind == "metric" else "arbitrary",
        "decision": result.decision, "reason": result.reason, "seconds": result.seconds,
        "peak_memory_mb": result.peak_memory_mb, "passes_done": result.passes_done, "views": result.view_stats,
        "intrinsics": result.final.intrinsics.tolist(), "device": str(model.device), "model": model.name,
        "weights": weights_checksum(model), "settings": config.as_parameters(), "history": result.history,
        "signals": result.signals, "assumptions": result.original.note,
        "metric_points": str(metric_points) if metric_points else None, "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }  # fmt: skip
    (work / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
