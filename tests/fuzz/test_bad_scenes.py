"""Scenes from damaged files: whatever bytes a model, a clip, EXIF or a transforms.json hold, a scene or one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import IFD

from ttt_lib.core.errors import UserError
from ttt_lib.data.photographs.clips import read_clip
from ttt_lib.data.photographs.colmap_files import find_model, list_model
from ttt_lib.data.photographs.exif import read_lens
from ttt_lib.data.photographs.load import load_scene
from ttt_lib.data.photographs.sources import from_list
from ttt_lib.data.photographs.transforms import lens_of, read_transforms

sys.path.append(str(ROOT / "tests" / "data" / "photographs"))
import small_models  # noqa: E402
from small_clips import window, write_clip  # noqa: E402

FUZZ = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
few = settings(max_examples=25, **FUZZ)
some = settings(max_examples=100, **FUZZ)
many = settings(max_examples=500, **FUZZ)

PIECES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([b"\xff" * 8, bytes(8), b"\x00\x00\x00\x00\x00\x00\xf0\x7f", b"nan ", b"-1 ", b"1e999 ", b"\n", b"#", b"9" * 40]),
)  # fmt: skip
# Where (a share of the file, or a byte near its beginning or end), how many bytes go, and what comes in their place.
PLACES = st.floats(0, 1) | st.integers(0, 400) | st.integers(-400, -1)
CHANGES = st.lists(st.tuples(PLACES, st.integers(0, 60), PIECES), min_size=1, max_size=5)


def damaged(content: bytes, changes: list) -> bytes:
    for place, length, piece in changes:
        at = int(place * len(content)) if isinstance(place, float) else place
        at = at + len(content) if at < 0 else at
        at = max(0, min(at, len(content)))
        content = content[:at] + piece + content[at + length :]
    return content


def one_sentence(read: Callable, *arguments: object, **options: object) -> object:
    """What it gives, or None where it ended in a sentence. Anything else fails."""
    try:
        return read(*arguments, **options)
    except UserError as error:
        text = str(error)
        assert text.isprintable() and 10 < len(text) <= 2000, text
    return None


# ------------------------------------------------------------------------------------------------ COLMAP

KINDS = {"binary": small_models.binary(), "text": small_models.text()}
FILES = st.sampled_from([(kind, name) for kind, files in KINDS.items() for name in files])


def check_a_model(folder: Path, file: tuple[str, str], changes: list, whole: bool) -> None:
    kind, name = file
    folder = folder / f"model_{kind}"
    small_models.write_model(folder, {**KINDS[kind], name: damaged(KINDS[kind][name], changes)})
    listing = one_sentence(list_model, find_model(folder))
    if listing is not None and whole:
        scene = one_sentence(load_scene, folder)
        if scene is not None and not scene.refused:
            assert all(
                bool(p.tracks.depth.isfinite().all()) and bool(p.pose.isfinite().all()) for p in scene.photographs
            )


@some
@given(FILES, CHANGES)
def test_a_damaged_model_is_listed_or_refused(tmp_path_factory, file, changes):
    check_a_model(tmp_path_factory.getbasetemp(), file, changes, whole=False)


@few
@given(FILES, CHANGES)
def test_a_damaged_model_as_a_scene(tmp_path_factory, file, changes):
    check_a_model(tmp_path_factory.getbasetemp(), file, changes, whole=True)


@pytest.mark.slow
@many
@given(FILES, CHANGES)
def test_many_damaged_models(tmp_path_factory, file, changes):
    check_a_model(tmp_path_factory.getbasetemp(), file, changes, whole=True)


# ------------------------------------------------------------------------------------------------ transforms.json

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("x" * 300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
MATRIX = np.eye(4).tolist()
KEYS = ["w", "h", "fl_x", "fl_y", "cx", "cy", "k1", "k4", "camera_angle_x", "camera_model", "is_fisheye", "frames",
        "file_path", "transform_matrix", ("transform_matrix", 0), ("transform_matrix", 1, 2)]  # fmt: skip


def transforms(key: object, junk: object, shared: bool) -> dict:
    frame = {"file_path": "a.png", "transform_matrix": json.loads(json.dumps(MATRIX))}
    content = {"fl_x": 300, "w": 64, "h": 48, "frames": [frame, dict(frame)]}
    if isinstance(key, tuple):
        place = frame[key[0]]
        for index in key[1:-1]:
            place = place[index]
        place[key[-1]] = junk
    else:
        (content if shared else frame)[key] = junk
    return content


@some
@given(st.sampled_from(KEYS), JUNK, st.booleans())
def test_a_transforms_file_with_a_value_of_any_kind(tmp_path_factory, key, junk, shared):
    path = tmp_path_factory.getbasetemp() / "transforms.json"
    path.write_text(json.dumps(transforms(key, junk, shared)), encoding="utf-8", errors="surrogatepass")
    found = one_sentence(read_transforms, path)
    for frame in found[0] if found else []:
        assert np.isfinite(frame.pose).all() and abs(np.linalg.det(frame.pose[:3, :3]) - 1) < 1e-6
        lens = one_sentence(lens_of, frame.values, (64, 48))
        assert lens is None or np.isfinite(lens.params).all()
    one_sentence(load_scene, path)


@few
@given(st.binary(max_size=200), CHANGES)
def test_any_bytes_as_a_transforms_file(tmp_path_factory, content, changes):
    path = tmp_path_factory.getbasetemp() / "any.json"
    for text in (content, damaged(json.dumps(transforms("w", 64, True)).encode(), changes)):
        path.write_bytes(text)
        one_sentence(load_scene, path)


# ------------------------------------------------------------------------------------------------ clips

CODECS = {"mp4": "libx264", "mov": "mpeg4", "avi": "mpeg4", "mkv": "ffv1", "webm": "libvpx", "ts": "libx264"}
CODECS.update(gif="", png="")  # pictures that move, written by Pillow


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, bytes]:
    folder, frames = tmp_path_factory.mktemp("clips"), window(8, (48, 64))
    for suffix, codec in CODECS.items():
        if codec:
            write_clip(folder / f"c.{suffix}", frames, codec)
        else:
            first, *others = map(Image.fromarray, frames)
            first.save(folder / f"c.{suffix}", save_all=True, append_images=others, duration=40)
    return {suffix: (folder / f"c.{suffix}").read_bytes() for suffix in CODECS}


def check_a_clip(folder: Path, suffix: str, content: bytes, options: dict) -> None:
    path = folder / f"damaged.{suffix}"
    path.write_bytes(content)
    clip = one_sentence(read_clip, path, **options)
    if clip is not None:
        assert len(clip.pictures) >= 1
        assert all(float(picture.read().amax()) <= 1 for picture in clip.pictures)


OPTIONS = st.sampled_from([{}, {"every": 3}, {"count": 2}])


@some
@given(st.sampled_from(sorted(CODECS)), CHANGES, OPTIONS)
def test_a_damaged_clip(clips, tmp_path_factory, suffix, changes, options):
    check_a_clip(tmp_path_factory.getbasetemp(), suffix, damaged(clips[suffix], changes), options)


@pytest.mark.slow
@many
@given(st.sampled_from(sorted(CODECS)), CHANGES, OPTIONS)
def test_many_damaged_clips(clips, tmp_path_factory, suffix, changes, options):
    check_a_clip(tmp_path_factory.getbasetemp(), suffix, damaged(clips[suffix], changes), options)


@few
@given(st.sampled_from(["mp4", "mkv", "avi", "gif", "m3u8", "xyz"]), st.binary(max_size=300))
def test_any_bytes_as_a_clip(tmp_path_factory, suffix, content):
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(content)
    one_sentence(load_scene, path)


# ------------------------------------------------------------------------------------------------ EXIF

TAGS = [271, 272, 274, 37386, 40962, 40963, 41486, 41488, 41989]
VALUES = st.one_of(
    st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.floats(width=32), st.text(max_size=12), st.binary(max_size=12),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
)  # fmt: skip


@some
@given(st.dictionaries(st.sampled_from(TAGS), VALUES, max_size=5), CHANGES)
def test_exif_of_any_kind(tmp_path_factory, tags, changes):
    path = tmp_path_factory.getbasetemp() / "exif.jpg"
    content = Image.Exif()
    for tag, value in tags.items():
        (content if tag < 300 else content.get_ifd(IFD.Exif))[tag] = value
    image = Image.new("RGB", (40, 30))
    try:
        raw = content.tobytes()
    except Exception:  # what cannot be written is no case
        return
    for exif in (raw, raw[:6] + damaged(raw[6:], changes)):
        image.save(path, exif=exif[:65000])
        focal = read_lens(path).focal(40, 30)
        assert focal is None or 0.1 < focal < 60
        given_ = from_list([path])
        assert len(given_.pictures) == 1 and not given_.left_out  # a tag spoils no photograph
