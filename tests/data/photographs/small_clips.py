"""Clips for the tests: a window that moves over a picture."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np


def window(count: int = 30, size: tuple[int, int] = (96, 128), blurred: tuple[int, ...] = ()) -> list[np.ndarray]:
    """Frames (H,W,3) uint8; those that `blurred` names are not sharp."""
    height, width = size
    picture = np.random.default_rng(0).integers(0, 255, (height, width + count, 3), dtype=np.uint8)
    picture = cv2.GaussianBlur(picture, (0, 0), 1.0)
    frames = [np.ascontiguousarray(picture[:, i : i + width]) for i in range(count)]
    return [cv2.GaussianBlur(f, (0, 0), 3.0) if i in blurred else f for i, f in enumerate(frames)]


def write_clip(
    path: Path, frames: list[np.ndarray], codec: str = "mpeg4", rotation: int = 0, aspect=None, key=12
) -> Path:
    """A clip with these frames; the container is told by the name's ending."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        stream.codec_context.gop_size = key
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """A file with nothing but sound."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = np.zeros((2, 1024), dtype=np.float32)
        for k in range(8):
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44100, k * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
