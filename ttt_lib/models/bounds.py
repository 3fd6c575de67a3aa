"""What a model's files ask for, measured before anything of that size is made: files may be damaged, or hostile."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch

from ttt_lib.core.files import read_json

PLAIN = 1 << 16  # whole numbers of a configuration up to here are looked at by what they make together
LARGEST_SIDE = 16384  # pixels that a picture may be resized to
LAYERS = 64  # layers that a network may have with fewer tensors than that
UNPACKED = 2.0  # times its own size: what a checkpoint, which is stored and not compressed, may unpack to
SPARE = 1 << 20  # bytes or numbers beside that
LARGEST_HEADER = 100 << 20  # bytes; the safetensors library has the same bound


class BoundsError(ValueError):
    """Files that ask for more than they hold."""


def check_archive(path: Path) -> None:
    """A checkpoint of PyTorch is a zip; whether it unpacks to about what it is. Raises `BoundsError`.

    Other files pass: what they are is said by who reads them.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > UNPACKED * size + SPARE:
        raise BoundsError(f"it would unpack to {unpacked / 2**20:.0f} MiB from {size / 2**20:.1f}")


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _stored_shapes(files: list[Path]) -> list[tuple[int, ...]]:
    """Shapes of the tensors in the files of a transformers model, read without the tensors. Raises `BoundsError`."""
    shapes: list[tuple[int, ...]] = []
    for path in files:
        if path.suffix == ".bin":
            check_archive(path)
            weights = torch.load(path, map_location="meta", weights_only=True)
            shapes += [tuple(tensor.shape) for tensor in weights.values() if isinstance(tensor, torch.Tensor)]
            continue
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(LARGEST_HEADER, path.stat().st_size):
                raise BoundsError(f"{path.name} is damaged")
            header = json.loads(file.read(length))
        shapes += [tuple(about["shape"]) for name, about in header.items() if name != "__metadata__"]
    return shapes


def check_numbers(value: Any, largest: int, layers: int, where: str, key: str = "") -> None:
    """Numbers of a configuration against what may be the largest one, or for layers the number of tensors.

    A width is a side of some tensor, and each layer has a tensor: so a network that fits its file is never refused, and
    another one is before anything of its size is made. Raises `BoundsError`.
    """
    if isinstance(value, dict):
        for inner, content in value.items():
            check_numbers(content, largest, layers, where, str(inner))
    elif isinstance(value, list | tuple):
        for content in value:
            check_numbers(content, largest, layers, where, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        counts_layers = "layers" in key or key == "depths" or ("_blocks" in key and not key.startswith("dim"))
        limit = layers if counts_layers else largest
        if not abs(value) <= limit:
            raise BoundsError(f"{where} says {key} {value}, more than {limit}, which there can be")


def check_folder(folder: Path, network: type) -> None:
    """Whether `config.json` of a transformers folder asks for no more than its tensors show. Raises `BoundsError`.

    network: the class of the library that would be built. It is, without memory, and has at most twice the stored
    numbers (what a file may lack is initialised, so it would be there before anybody complains).
    """
    files = _weight_files(folder)
    shapes = _stored_shapes(files)
    longest = max((side for shape in shapes for side in shape), default=0)
    limits = {"config.json": max(PLAIN, longest), "preprocessor_config.json": LARGEST_SIDE}
    for name, largest in limits.items():
        if (folder / name).is_file():
            content = read_json(folder / name)
            check_numbers(content, largest, max(LAYERS, len(shapes)), name)
    with torch.device("meta"):
        built = network(network.config_class.from_pretrained(folder, local_files_only=True))
    wanted = sum(tensor.numel() for tensor in built.state_dict().values())
    # A shape is only what a file says of itself; no number takes less than a byte.
    stored = min(sum(math.prod(shape) for shape in shapes), sum(path.stat().st_size for path in files))
    if wanted > 2 * stored + SPARE:
        raise BoundsError(f"config.json asks for {wanted} weights and the file holds {stored}")
