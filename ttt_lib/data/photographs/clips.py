"""Sharp frames of a clip, spread evenly over it, as files of a temporary folder: any clip that PyAV reads.

The clip is gone through twice, once to measure how sharp each frame is, once to write the chosen ones, so that one frame is
held at a time and nothing rests on what the file says of its length. Of a long clip only the key frames are decoded.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image

from ttt_lib.core.errors import DataError, UserError, printable, reason
from ttt_lib.data.images import read_photo
from ttt_lib.data.photographs.job import Picture
from ttt_lib.data.photographs.sources import MOST, evenly

log = logging.getLogger(__name__)

USUAL_COUNT = 14
LONG = 4 * 10**9  # pixels of all frames: a minute of full HD at 30 frames a second; beyond, key frames come first
ENOUGH = 2  # key frames for each picture that is wanted
BUDGET, LEAST = 4 * 10**10, 10**5  # pixels that are decoded at most; what a frame counts at least
LARGEST = 2**26  # pixels of a frame: 8192 x 8192
SHARPNESS_WIDTH = 480  # of the gray frames that are compared
WINDOW = 0.5  # of the distance between two places: where the sharpest frame is looked for
# What is read: files that hold a clip. Playlists name other files and addresses, which nobody asked for.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,yuv4mpegpipe,h264,hevc,m4v,dv,mxf"


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first stream of frames."""
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    # Of a name FFmpeg may make an address or a pattern, so it gets an open file.
    with open(path, "rb") as file, av.open(file, options=options, metadata_errors="replace") as container:
        if not container.streams.video:
            raise DataError(f"{path}: holds no moving pictures, only sound or other data.")
        yield container, container.streams.video[0]


def _frames(path: Path, keys_only: bool) -> Iterator[av.VideoFrame]:
    """The clip's frames. Packets that cannot be decoded are passed over, and what comes after BUDGET pixels is not read."""
    left = BUDGET
    with _open(path) as (container, stream):
        stream.codec_context.options = {"max_pixels": str(LARGEST)}
        stream.codec_context.thread_type, stream.codec_context.thread_count = "AUTO", 2
        stream.codec_context.skip_frame = "NONKEY" if keys_only else "DEFAULT"
        with suppress(av.FFmpegError):  # where it was cut off
            for packet in container.demux(stream):
                with suppress(av.FFmpegError):
                    for frame in packet.decode():
                        yield frame
                        left -= max(frame.width * frame.height, LEAST)
                if left < 0:
                    log.warning("%s: the clip is long; only its beginning is read", path)
                    return


def _sharpness(frame: av.VideoFrame) -> float:
    """Variance of the Laplacian of the small gray frame: it falls with blur."""
    width = min(frame.width, SHARPNESS_WIDTH)
    height = max(1, round(frame.height * width / frame.width))
    gray = frame.reformat(width=width, height=height, format="gray", interpolation="AREA").to_ndarray()
    return -1.0 if frame.is_corrupt else float(cv2.Laplacian(gray, cv2.CV_32F).var())


def choose(sharpness: np.ndarray, every: int | None, count: int | None) -> list[int]:
    """The sharpest frame near each place: each `every`-th, or `count` (USUAL_COUNT) places spread evenly.

    Example:
        >>> choose(np.array([1, 2, 3, 2, 1, 9, 1, 2, 8, 3]), None, 2), choose(np.arange(10), 4, None)
        ([2, 8], [1, 5, 9])
    """
    total = len(sharpness)
    if every is None:
        count = min(count or USUAL_COUNT, total)
        step = total / count
        places = [(k + 0.5) * step - 0.5 for k in range(count)]
    else:
        step, places = float(every), range(0, total, every)
        places = [places[k] for k in evenly(count, len(places))]
    chosen = set()
    for place in places:
        low = max(0, round(place - WINDOW * step / 2))
        high = max(low + 1, round(place + WINDOW * step / 2) + 1)
        chosen.add(low + int(np.argmax(sharpness[low:high])))
    return sorted(chosen)


def _upright(frame: av.VideoFrame, aspect: float) -> np.ndarray:
    """(H,W,3) uint8 as the clip is to be seen: turned as it says, pixels, of this width over height, square."""
    width = round(frame.width * aspect) if 0.2 < aspect < 5 else frame.width
    array = frame.reformat(width=width, height=frame.height, format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90) % 4))


def read_clip(
    path: Path, every: int | None = None, count: int | None = None, focal: float | None = None
) -> list[Picture]:
    """Sharp frames of a clip as pictures, in order. They lie as PNG files in a temporary folder that is removed at the exit.

    Args:
        every: a frame of each so many. count: so many frames, spread evenly. Without both some USUAL_COUNT.
        focal: over the width of the upright frame, where it is known.

    Raises:
        DataError: the file is no clip, is damaged, holds no moving pictures or fewer than two frames, or would give
            more than MOST pictures.
    """
    try:
        return _read(path, every, count, focal)
    except UserError:
        raise
    except Exception as error:  # what a decoder makes of damaged bytes differs by format
        raise DataError(f"{path}: is no clip that this can read, or is damaged ({reason(error)}).") from error


def _read(path: Path, every: int | None, count: int | None, focal: float | None) -> list[Picture]:
    with _open(path) as (_, stream):
        aspect, context = float(stream.sample_aspect_ratio or 1), stream.codec_context
        keys_only = every is None and stream.frames * context.width * context.height > LONG
    sharpness = np.array([_sharpness(frame) for frame in _frames(path, keys_only)])
    if keys_only and len(sharpness) < ENOUGH * (count or USUAL_COUNT):
        keys_only = False
        sharpness = np.array([_sharpness(frame) for frame in _frames(path, keys_only)])
    if len(sharpness) < 2:
        raise DataError(f"{path}: the clip holds {len(sharpness)} frames that can be read; at least two are needed.")
    chosen = choose(sharpness, every, count)
    if len(chosen) > MOST:
        raise DataError(f"{path}: {len(chosen)} frames are too many for one scene, at most {MOST}; take fewer.")
    folder, pictures = tempfile.mkdtemp(prefix="ttt-frames-"), []
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for index, frame in enumerate(itertools.islice(_frames(path, keys_only), chosen[-1] + 1)):
        if index in chosen:
            file = Path(folder, f"{index:06d}.png")
            Image.fromarray(_upright(frame, aspect)).save(file, compress_level=1)
            name = f"{printable(path.stem, 80)}_{index:04d}"
            pictures.append(Picture(name, partial(read_photo, file), focal, focal is not None))
    return pictures
