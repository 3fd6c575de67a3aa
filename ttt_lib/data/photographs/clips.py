"""Sharp frames of a clip, spread evenly over it, as files of a temporary folder: any clip that PyAV reads.

The clip is gone through twice, once to measure how sharp each frame is, once to write the chosen ones, so that one frame is
held at a time and nothing rests on what the file says of its length. Of a long clip only the key frames are decoded.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from ttt_lib.core.errors import DataError, UserError, printable, reason
from ttt_lib.data.images import SMALLEST, read_photo, readable_formats
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
FORMATS = (
    "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,apng,yuv4mpegpipe,h264,hevc,m4v,dv,mxf"
)


class Clip(NamedTuple):
    """The frames that were chosen, in their order, and how many were decoded."""

    pictures: list[Picture]
    frames: int


class _Folder(tempfile.TemporaryDirectory):
    """Goes when the last frame that lies in it is forgotten."""

    def __reduce__(self) -> tuple[Any, ...]:  # another process gets the name; the files stay this one's
        return str, (self.name,)

    def __deepcopy__(self, memo: dict) -> _Folder:
        return self


def _read_frame(path: Path, folder: _Folder) -> Tensor:
    """folder: held, so that the file stays."""
    return read_photo(path)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    # Of a name FFmpeg may make an address or a pattern, so it gets an open file.
    with open(path, "rb") as file, av.open(file, options=options, metadata_errors="replace") as container:
        yield container


def _pictures(path: Path) -> Iterator[av.VideoFrame]:
    """The frames of a picture that moves (GIF, PNG, WebP), by Pillow, which knows more of their kinds."""
    with Image.open(path, formats=readable_formats()) as image:
        if image.width * image.height > LARGEST:
            raise ValueError(f"{image.width} x {image.height} pixels")
        for number in itertools.count():
            try:
                image.seek(number)
                whole = image.convert("RGBA")
            except (EOFError, OSError, SyntaxError, ValueError):  # the end, or where it was cut off
                return
            white = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
            yield av.VideoFrame.from_ndarray(np.asarray(white.convert("RGB")), "rgb24")


def is_moving_picture(path: Path) -> bool:
    """Whether a file is a picture with several frames."""
    try:
        with Image.open(path, formats=readable_formats()) as image:
            return image.format in ("GIF", "PNG", "WEBP") and getattr(image, "n_frames", 1) > 1
    except Exception:  # no picture, or a damaged one
        return False


def _frames(path: Path, keys_only: bool) -> Iterator[tuple[av.VideoFrame, float]]:
    """The clip's frames, each with the width of its pixels over their height. Raises what the decoders raise.

    Packets that cannot be decoded are passed over, and what comes after BUDGET pixels is not read.
    """
    left = BUDGET
    found = ((frame, 1.0) for frame in _pictures(path)) if is_moving_picture(path) else _decoded(path, keys_only)
    for frame, aspect in found:
        left -= max(frame.width * frame.height if frame else 0, LEAST)
        if frame:
            yield frame, aspect
        if left < 0:
            log.warning("%s: the clip is long; only its beginning is read", path)
            return


def _decoded(path: Path, keys_only: bool) -> Iterator[tuple[av.VideoFrame | None, float]]:
    """As `_frames`, by PyAV; None for a packet that is damaged."""
    with _open(path) as container:
        stream = _stream(container, path)
        aspect = float(stream.sample_aspect_ratio or 1)
        context = stream.codec_context
        context.options = {"max_pixels": str(LARGEST)}
        context.thread_type, context.thread_count = "AUTO", 2
        context.skip_frame = "NONKEY" if keys_only else "DEFAULT"
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.FFmpegError):  # the end, or where it was cut off
                return
            try:
                yield from ((frame, aspect) for frame in packet.decode())
            except av.FFmpegError as error:
                log.info("%s: a damaged packet is passed over (%s)", path, reason(error))
                yield None, aspect


def _stream(container: Any, path: Path) -> Any:
    """The first stream of frames that is no cover picture."""
    attached = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not streams:
        raise DataError(f"{path}: holds no moving pictures, only sound or other data.")
    if streams[0].codec_context is None:
        raise DataError(f"{path}: is coded in a way that this cannot read; convert it to MP4 (H.264).")
    return streams[0]


def _expected(path: Path) -> int:
    """Pixels of all frames together as the file says, which may be wrong; 0 where it says nothing."""
    with _open(path) as container:
        stream = _stream(container, path)
        seconds = max(float(stream.duration * stream.time_base) if stream.duration else 0.0,
                      container.duration / av.time_base if container.duration else 0.0)  # fmt: skip
        frames = stream.frames or seconds * float(stream.average_rate or 0)
        return int(max(frames, 0) * stream.codec_context.width * stream.codec_context.height)


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
    """(H,W,3) uint8 as the clip is to be seen: turned as it says, pixels square."""
    width = round(frame.width * aspect) if 0.2 < aspect < 5 else frame.width
    array = frame.reformat(width=width, height=frame.height, format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90) % 4))


def read_clip(path: str | Path, every: int | None = None, count: int | None = None, focal: float | None = None) -> Clip:
    """Sharp frames of a clip as pictures, in order.

    They lie as PNG files in a temporary folder that is removed when the last picture is forgotten, or at the exit.

    Args:
        every: a frame of each so many. count: so many frames, spread evenly. Without both some USUAL_COUNT.
        focal: over the width of the upright frame, where it is known.

    Raises:
        DataError: the file is no clip, is damaged, holds no moving pictures or fewer than two frames, or would give
            more than MOST pictures.

    Example:
        >>> frames = [Image.new("RGB", (64, 48), color) for color in ("red", "green", "blue")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     frames[0].save(f"{folder}/x.gif", save_all=True, append_images=frames[1:])
        ...     clip = read_clip(f"{folder}/x.gif", count=2)
        >>> [picture.name for picture in clip.pictures], clip.pictures[0].read().shape
        (['x_0000', 'x_0001'], torch.Size([3, 48, 64]))
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise DataError(f"{path}: there is no such file; check the name.")
    try:
        return _read(path, every, count, focal)
    except UserError:
        raise
    except Exception as error:  # what a decoder makes of damaged bytes differs by format
        raise DataError(f"{path}: is no clip that this can read, or is damaged ({reason(error)}).") from error


def _read(path: Path, every: int | None, count: int | None, focal: float | None) -> Clip:
    keys_only = every is None and not is_moving_picture(path) and _expected(path) > LONG
    sharpness = np.array([_sharpness(frame) for frame, _ in _frames(path, keys_only)])
    if keys_only and len(sharpness) < ENOUGH * (count or USUAL_COUNT):
        keys_only = False
        sharpness = np.array([_sharpness(frame) for frame, _ in _frames(path, False)])
    if len(sharpness) < 2:
        raise DataError(f"{path}: the clip holds {len(sharpness)} frames that can be read; at least two are needed.")
    chosen = choose(sharpness, every, count)
    if len(chosen) > MOST:
        raise DataError(f"{path}: {len(chosen)} frames are too many for one scene, at most {MOST}; take fewer.")
    clip, folder = Clip([], len(sharpness)), _Folder(prefix="ttt-frames-")
    for index, (frame, aspect) in enumerate(itertools.islice(_frames(path, keys_only), chosen[-1] + 1)):
        if index in chosen:
            array = _upright(frame, aspect)
            if min(array.shape[:2]) < SMALLEST:
                raise DataError(f"{path}: frames of {array.shape[1]} x {array.shape[0]} pixels are too small.")
            file = Path(folder.name, f"{index:06d}.png")
            Image.fromarray(array).save(file, compress_level=1)
            source = partial(_read_frame, file, folder)
            clip.pictures.append(Picture(f"{printable(path.stem, 80)}_{index:04d}", source, focal, focal is not None))
    return clip
