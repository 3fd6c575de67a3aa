"""A COLMAP model of four cameras that look at a cloud of points, as binary and as text, written by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 160, 120
PARAMS = 140.0, 140.0, 80.0, 60.0


def cloud(count: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Points (P,3), and where the cameras see them, (4,P,2) pixels."""
    generator = np.random.default_rng(0)
    xyz = generator.uniform([-1.6, -1.2, 4], [1.6, 1.2, 7], (count, 3))
    seen = [(xyz + [-0.3 * k, 0, 0]) for k in range(4)]
    return xyz, np.stack([p[:, :2] / p[:, 2:] * PARAMS[:2] + PARAMS[2:] for p in seen])


def binary() -> dict[str, bytes]:
    """File -> content."""
    xyz, uv = cloud()
    cameras = struct.pack("<QIiQQ4d", 1, 1, 1, *SIZE, *PARAMS)
    images = [struct.pack("<Q", 4)]
    for k in range(4):
        images.append(struct.pack("<I7dI", k + 1, 1, 0, 0, 0, -0.3 * k, 0, 0, 1) + f"p{k}.png".encode() + b"\0")
        images.append(struct.pack("<Q", len(xyz)))
        images += [struct.pack("<2dQ", *pixel, i + 1) for i, pixel in enumerate(uv[k])]
    points = [struct.pack("<Q", len(xyz))]
    for i, point in enumerate(xyz):
        points.append(struct.pack("<Q3d3Bd", i + 1, *point, 1, 2, 3, 0.1) + struct.pack("<Q", 4))
        points += [struct.pack("<II", k + 1, i) for k in range(4)]
    return {"cameras.bin": cameras, "images.bin": b"".join(images), "points3D.bin": b"".join(points)}


def text() -> dict[str, bytes]:
    """File -> content."""
    xyz, uv = cloud()
    cameras = f"# a comment\n1 PINHOLE {SIZE[0]} {SIZE[1]} {' '.join(map(str, PARAMS))}\n"
    images, points = "# two lines each\n", ""
    for k in range(4):
        images += f"{k + 1} 1 0 0 0 {-0.3 * k} 0 0 1 p{k}.png\n"
        images += " ".join(f"{u} {v} {i + 1}" for i, (u, v) in enumerate(uv[k])) + "\n"
    for i, point in enumerate(xyz):
        track = " ".join(f"{k + 1} {i}" for k in range(4))
        points += f"{i + 1} {' '.join(map(str, point))} 1 2 3 0.1 {track}\n"
    return {"cameras.txt": cameras.encode(), "images.txt": images.encode(), "points3D.txt": points.encode()}


def write_model(folder: Path, files: dict[str, bytes]) -> Path:
    """The model's files and its photographs, which are plain."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "images").mkdir(exist_ok=True)
    for k in range(4):
        Image.new("RGB", SIZE, (60 * k, 90, 120)).save(folder / "images" / f"p{k}.png")
    return folder
