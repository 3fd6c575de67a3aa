"""A set of samples (`SampleSet`), and the one that lies in a folder in MoGe's evaluation layout: opened and written."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttt_lib.core.errors import DataError, UserError, printable, reason
from ttt_lib.core.files import absolute
from ttt_lib.core.provenance import file_hash
from ttt_lib.core.types import Sample
from ttt_lib.data import moge_layout
from ttt_lib.data.grouping import SCENES, read_scenes
from ttt_lib.data.moge_layout import check_name

log = logging.getLogger(__name__)
FRAME_FILES = ("image.jpg", "depth.png", "meta.json", "segmentation.png")


@dataclass
class SampleSet:
    """A named list of samples that are read when they are asked for.

    `readable()` passes over those that cannot be read and notes them in `left_out`, (name, reason). `fingerprint`
    stands for the content in `data_hash`. scenes: which samples are photographs of one scene, {scene: [name, ...]},
    whole also in a shard; samples in none stand alone (`grouping.py`).
    """

    name: str
    names: list[str]
    load: Callable[[str], Sample]
    fingerprint: str = ""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    scenes: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice) -> Sample | SampleSet:
        if isinstance(index, slice):
            return replace(self, names=self.names[index], left_out=[])
        return self.load(self.names[index])

    def __repr__(self) -> str:
        shown = ", ".join(self.names[:3]) + (", ..." if len(self) > 3 else "")
        return f"SampleSet({self.name}: {len(self)} samples, {shown})"

    def readable(self) -> Iterator[Sample]:
        """Samples in order; what fails goes to `left_out` with its reason and the others follow."""
        self.left_out.clear()
        for name in self.names:
            try:
                yield self.load(name)
            except UserError as error:
                self.left_out.append((name, str(error)))
            except Exception as error:  # a reader of yours may raise anything
                log.warning("%s/%s is left out", self.name, name, exc_info=True)
                self.left_out.append((name, f"{type(error).__name__}: {reason(error)}"))

    def shard(self, index: int, count: int) -> SampleSet:
        """Every `count`-th sample from `index`: the shards 0..count-1 are disjoint and together the whole set."""
        if not 0 <= index < count:
            raise DataError(f"shard {index} of {count}: the index must be from 0 to {count - 1}.")
        return replace(self, names=self.names[index::count], left_out=[])

    def only(self, names: list[str]) -> SampleSet:
        """The samples of these names, in this order. Raises `DataError` for one that is not there."""
        if missing := sorted(set(names) - set(self.names)):
            raise DataError(
                f"data: the set {self.name} has no sample {missing[0]!r} ({len(missing)} of the `names` are not there)."
            )
        return replace(self, names=list(names), left_out=[])

    def scene_of(self, name: str) -> tuple[str, list[str]]:
        """The scene of a sample, and all of its samples; a sample that stands alone is a scene of its own."""
        return next(((scene, names) for scene, names in self.scenes.items() if name in names), (name, [name]))

    def data_hash(self) -> str:
        """Hash of the set's name, the names of its samples and its fingerprint (for files: their contents)."""
        content = "\n".join([self.name, self.fingerprint, *self.names])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def to_sample(name: str, dataset: str, view: dict[str, Any], is_metric: bool, has_sharp_boundary: bool) -> Sample:
    """A `Sample` from what `moge_layout.target_view` gives."""
    mask = view["depth_mask"]
    return Sample(
        name=name,
        dataset=dataset,
        image=view["image"].contiguous(),
        depth=torch.where(mask, view["depth"], torch.nan),
        points=torch.where(mask[..., None], view["points"], torch.nan),
        mask=mask,
        intrinsics=view["intrinsics"],
        is_metric=is_metric,
        has_sharp_boundary=has_sharp_boundary,
        segmentation=view.get("segmentation_mask"),
        segmentation_labels=view.get("segmentation_labels"),
    )


@cache
def _content(path: str, state: tuple[int, ...]) -> str:
    """Hash of all of a file's bytes; read once a process as long as its state stays."""
    return file_hash(Path(path))


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Hash of names and contents, which survives a copy; a file that is not there is part of it."""
    parts = []
    for path in paths:
        try:
            at = os.stat(path)
            state = at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino, at.st_dev
            parts.append(f"{printable(path.name)}:{_content(os.path.abspath(path), state)}")
        except OSError:
            parts.append(f"{printable(path.name)}:missing")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_moge(
    path: str | Path,
    name: str | None = None,
    split: str = moge_layout.INDEX,
    width: int | None = None,
    height: int | None = None,
    depth_unit: float | None = None,
    has_sharp_boundary: bool = False,
    include_segmentation: bool = False,
    subset: int | None = None,
    count: int | None = None,
) -> SampleSet:
    """A set in MoGe's evaluation layout, configured as MoGe's `configs/eval/*.json`.

    width, height of the evaluated view (None: the image's own shape, longer side at most 640). depth_unit: metres a
    unit; None: not metric, unless a sample's `meta.json` says `"is_metric": true` as this package's writer does.
    subset: every n-th sample; count: only the first ones. Raises `DataError` if folder or index is missing.
    """
    folder = Path(absolute(path))
    names = moge_layout.read_index(folder, split)[::subset][:count]
    title = name or printable(folder.resolve().name)

    def load(sample: str) -> Sample:
        raw = moge_layout.read_raw(folder / sample, include_segmentation)
        unit = depth_unit if depth_unit is not None else 1.0 if (raw.meta or {}).get("is_metric") is True else None
        try:
            view = moge_layout.target_view(raw, width, height, unit)
        except Exception as error:  # e.g. intrinsics so far off that nothing of the image is left
            raise DataError(f"{folder / sample}: no view can be made of it ({reason(error)}).") from error
        known = view["depth"][view["depth_mask"]]
        if not len(known):
            raise DataError(f"{folder / sample / 'depth.png'}: the evaluated part of the image has no depth.")
        if not (torch.isfinite(known).all() and (known > 0).all()):
            raise DataError(f"{folder / sample / 'depth.png'}: holds depths that are no numbers above 0.")
        return to_sample(sample, title, view, unit is not None, has_sharp_boundary)

    files = (folder / sample / file for sample in names for file in FRAME_FILES)
    drop, segments, area = moge_layout.USUAL.values()
    options = f"{width}x{height} {depth_unit} {drop} {has_sharp_boundary} {include_segmentation} {segments} {area}"
    scenes = read_scenes(folder) if (folder / SCENES).is_file() else {}
    return SampleSet(title, names, load, f"{options} {scenes or ''} {files_fingerprint(files)}", scenes=scenes)


def write_moge_layout(samples: Iterable[Sample], folder: str | Path) -> list[str]:
    """Convert samples with truth to MoGe's layout; returns the names written. The index is written last.

    Unknown depth (NaN) and no surface (inf) survive; depth is rounded to MoGe's 16-bit logarithmic steps.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for sample in samples:
        if sample.depth is None or sample.intrinsics is None:
            raise DataError(f"sample {sample.name!r}: has no depth or intrinsics, so it cannot be written.")
        image = (sample.image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
        moge_layout.write_frame(
            folder / check_name(sample.name, f"sample {sample.name!r}"),
            image,
            sample.depth.cpu().numpy(),
            sample.intrinsics.cpu().numpy(),
            is_metric=sample.is_metric,
        )
        names.append(sample.name)
    moge_layout.write_index(folder, names)
    return names
