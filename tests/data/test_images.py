"""Photographs: every kind of file, every orientation, all bits; tensors as images; what is none is named."""

from __future__ import annotations

import logging
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ttt_lib.core.errors import DataError, UserError
from ttt_lib.data import images
from ttt_lib.data.catalog import describe_sources, open_dataset
from ttt_lib.data.images import as_image, image_suffixes, read_photo
from ttt_lib.data.photographs.exif import read_lens
from ttt_lib.data.photographs.sources import photographs_of

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def save(tmp_path, image: Image.Image, name="photo.png", **options):
    image.save(tmp_path / name, **options)
    return read_photo(tmp_path / name)


def test_photographs_of_every_kind(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    exact = torch.from_numpy(np.asarray(rgb)).permute(2, 0, 1) / 255
    assert torch.equal(save(tmp_path, rgb), exact)
    gray = save(tmp_path, rgb.convert("L"))
    assert gray.shape == (3, 20, 30) and torch.equal(gray[0], gray[2])
    deep = Image.fromarray(np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30))
    assert save(tmp_path, deep).max() == 1 and len(save(tmp_path, deep).unique()) > 500
    clear = rgb.convert("RGBA")
    clear.putalpha(0)
    assert (save(tmp_path, clear) == 1).all()  # over white
    assert save(tmp_path, rgb.convert("P"), "p.gif").shape == (3, 20, 30)
    turned = Image.Exif()
    turned[0x0112] = 6  # turn clockwise to view
    assert save(tmp_path, rgb, "t.jpg", exif=turned, quality=95).shape == (3, 30, 20)


def test_a_phones_heic_is_read_with_its_focal_length(tmp_path):
    ramp = np.linspace(0, 255, 160).astype(np.uint8)
    rgb = np.stack(
        [np.tile(ramp, (120, 1)), np.tile(ramp[:120, None], (1, 160)), np.full((120, 160), 90, np.uint8)], -1
    )
    tags = Image.Exif()
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = 26
    assert ".heic" in image_suffixes()
    found = save(tmp_path, Image.fromarray(rgb), "phone.HEIC", exif=tags, quality=95)
    expected = torch.from_numpy(rgb).permute(2, 0, 1) / 255
    assert (found - expected).abs().max() < 4 / 255  # of its colours one is kept for four pixels
    assert read_lens(tmp_path / "phone.HEIC").focal(160, 120) == pytest.approx(0.751, abs=1e-3)
    assert [path.name for path in photographs_of(tmp_path)[0]] == ["phone.HEIC"]


def test_where_heic_is_not_known_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "phone.heic").write_bytes(b"x" * 100)
    monkeypatch.setattr(images, "readable_formats", lambda: ("JPEG", "PNG"))
    monkeypatch.setattr(images, "image_suffixes", lambda: (".jpg", ".png"))
    with pytest.raises(DataError, match=r"this can read; install pillow-heif \(pip install pillow-heif\) or convert"):
        read_photo(tmp_path / "phone.heic")
    assert "pip install pillow-heif" in photographs_of(tmp_path)[1][0][1]
    with pytest.raises(
        DataError, match=r"that can be read; install pillow-heif \(pip install pillow-heif\) or convert"
    ):
        describe_sources([tmp_path / "phone.heic"])


def test_what_is_no_photograph_is_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match="text.png"):
        read_photo(tmp_path / "text.png")
    with pytest.raises(UserError, match="no such file"):
        read_photo(tmp_path / "none.png")
    Image.new("RGB", (400, 300)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    with pytest.raises(UserError, match="cut.jpg"):
        read_photo(tmp_path / "cut.jpg")
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="at least 16"):
        read_photo(tmp_path / "small.png")
    samples = open_dataset(kind="images", path=tmp_path)
    assert list(samples.readable()) == [] and len(samples.left_out) == 3


# ---------------------------------------------------------------------------------------------------- orientation


def exif(orientation: int, tag: int | None = None, kind: int = 10, value: bytes = b"") -> bytes:
    """EXIF of one directory: the orientation and perhaps one odd entry, written byte by byte as cameras do."""
    entries = [(274, 3, 1, struct.pack("<HH", orientation, 0))]
    if tag is not None:
        width = {2: 1, 3: 2, 5: 8, 10: 8, 12: 8}[kind]
        entries.append((tag, kind, len(value) // width, value))
    entries.sort()
    body, extra, at = struct.pack("<H", len(entries)), b"", 8 + 2 + 12 * len(entries) + 4
    for tag_, kind_, count, data in entries:
        if len(data) > 4:
            data, extra = struct.pack("<I", at + len(extra)), extra + data
        body += struct.pack("<HHI", tag_, kind_, count) + data.ljust(4, b"\0")
    return b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + body + bytes(4) + extra


ODD = {
    "rational -1/0": (282, 10, struct.pack("<ii", -1, 0)),
    "double NaN": (282, 12, struct.pack("<d", float("nan"))),
    "text where a number belongs": (256, 2, b"hundred\0"),
    "orientation only": (None, 10, b""),
}
SEEN = {  # from MoGe's convention for OpenCV, which is not the reader under test
    1: lambda a: a, 2: lambda a: cv2.flip(a, 1), 3: lambda a: cv2.rotate(a, cv2.ROTATE_180), 4: lambda a: cv2.flip(a, 0),
    5: cv2.transpose, 6: lambda a: cv2.rotate(a, cv2.ROTATE_90_CLOCKWISE),
    7: lambda a: cv2.rotate(cv2.transpose(a), cv2.ROTATE_180), 8: lambda a: cv2.rotate(a, cv2.ROTATE_90_COUNTERCLOCKWISE),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("ending", ["png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_whatever_else_its_exif_says(tmp_path, orientation, ending, odd):
    path = tmp_path / f"photo.{ending}"
    Image.fromarray(RGB).save(path, exif=exif(orientation, *ODD[odd]), lossless=True)
    expected = SEEN[orientation](RGB)
    assert torch.equal((read_photo(path) * 255).round().byte(), torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_turns_nothing(tmp_path, orientation):
    Image.fromarray(RGB).save(tmp_path / "photo.jpg", exif=exif(orientation))
    assert read_photo(tmp_path / "photo.jpg").shape == (3, 20, 30)


def test_damaged_exif_is_no_reason_to_refuse_a_photograph(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "photo.jpg", exif=b"Exif\0\0II*\0" + b"\xff" * 30)
    assert read_photo(tmp_path / "photo.jpg").shape == (3, 20, 30)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(tmp_path, dtype, orientation):
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    stored = (RGB / np.float32(255) * top).astype(dtype)
    tiff(tmp_path / "photo.tif", stored, {274: orientation})
    expected = torch.from_numpy(SEEN[orientation](stored).astype(np.float32) / top).permute(2, 0, 1)
    assert torch.allclose(read_photo(tmp_path / "photo.tif"), expected, atol=1e-7)


def tiff(path, array: np.ndarray, tags: dict[int, int]) -> None:
    """An uncompressed TIFF of (H,W,3), built from its directory, whose writer is not a reader under test."""
    directory, data = ImageFileDirectory_v2(), np.ascontiguousarray(array).tobytes()
    bits = array.dtype.itemsize * 8
    fields = {
        256: array.shape[1], 257: array.shape[0], 258: (bits,) * 3, 259: 1, 262: 2, 273: 0, 277: 3, 278: array.shape[0],
        279: len(data), 284: 1, 339: (3 if array.dtype.kind == "f" else 1,) * 3, **tags,
    }  # fmt: skip
    for tag, value in fields.items():
        directory.tagtype[tag] = 4 if tag in (273, 279) else 3
        directory[tag] = value
    body = directory.tobytes(8)  # which moves the strip behind it
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + body + data)


# ------------------------------------------------------------------------------------------------------- all bits


@pytest.mark.parametrize("ending", ["png", "tif", "ppm"])
def test_16_bits_of_color_stay_16_bits(tmp_path, ending):
    ramp = np.arange(20 * 30 * 3, dtype=np.uint16).reshape(20, 30, 3)  # the darkest 1800 levels, 8 of them in 8 bits
    cv2.imwrite(str(tmp_path / f"dark.{ending}"), ramp[..., ::-1])
    image = read_photo(tmp_path / f"dark.{ending}")
    assert torch.equal((image * 65535).round(), torch.from_numpy(ramp.astype(np.float32)).permute(2, 0, 1))
    assert len(image.unique()) == 1800


def test_16_bits_of_color_with_transparency_and_orientation(tmp_path):
    deep = np.zeros((20, 30, 4), np.uint16)
    deep[..., 0], deep[..., 3] = 257, 65535  # blue, first in OpenCV's order
    deep[:5, :, 3] = 0
    cv2.imwrite(str(tmp_path / "plain.png"), deep)
    data = (tmp_path / "plain.png").read_bytes()
    block = exif(6)[6:]
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    (tmp_path / "turned.png").write_bytes(data[:33] + chunk + data[33:])
    upright, turned = read_photo(tmp_path / "plain.png"), read_photo(tmp_path / "turned.png")
    assert (upright[:, :5] == 1).all() and (upright[:2, 5:] == 0).all()
    assert torch.allclose(upright[2, 5:], torch.tensor(257 / 65535))
    assert torch.equal(turned, upright.rot90(-1, (1, 2)))


def test_color_in_float32(tmp_path):
    values = RNG.random((20, 30, 3), dtype=np.float32) * 0.7
    tiff(tmp_path / "float.tif", values, {})
    assert torch.equal(read_photo(tmp_path / "float.tif"), torch.from_numpy(values).permute(2, 0, 1))
    tiff(tmp_path / "bright.tif", values * 50, {})
    assert read_photo(tmp_path / "bright.tif").max() == 1
    Image.fromarray(values[..., 0]).save(tmp_path / "gray.tif")
    assert torch.equal(read_photo(tmp_path / "gray.tif")[1], torch.from_numpy(values[..., 0]))
    values[3, 4] = np.nan
    tiff(tmp_path / "nan.tif", values, {})
    with pytest.raises(DataError, match="nan.tif.*not finite"):
        read_photo(tmp_path / "nan.tif")


def test_a_tiff_that_says_it_is_huge_is_not_decoded(tmp_path):
    tiff(tmp_path / "huge.tif", RGB.astype(np.float32), {256: 60000, 257: 60000})
    with pytest.raises(DataError, match="60000 x 60000 pixels"):
        read_photo(tmp_path / "huge.tif")


# ------------------------------------------------------------------------------------------------ suffixes, folders


@pytest.mark.parametrize(
    "ending", ["jpg", "jfif", "jpe", "ppm", "pgm", "bmp", "tga", "jp2", "avif", "webp", "gif", "tiff"]
)
def test_what_pillow_reads_is_taken_from_a_folder_and_by_name(tmp_path, ending):
    path = tmp_path / f"photo.{ending}"
    try:
        Image.fromarray(RGB).save(path)
    except (KeyError, OSError):
        pytest.skip("a Pillow without this codec")
    assert describe_sources([path]) == [{"kind": "images", "path": str(path)}]
    assert describe_sources([tmp_path])[0]["kind"] == "images"
    (sample,) = open_dataset("images", path=str(tmp_path)).readable()
    assert sample.name == path.name and sample.image.shape == (3, 20, 30)


def test_what_is_skipped_in_a_folder_is_said(tmp_path, caplog):
    images._say_skipped.cache_clear()
    Image.fromarray(RGB).save(tmp_path / "a.jpg")
    for name in ("b.dng", "c.arw", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert open_dataset("images", path=str(tmp_path)).names == ["a.jpg"]
        open_dataset("images", path=str(tmp_path))
    (record,) = caplog.records  # once
    assert "2 files are skipped" in record.getMessage() and "b.dng, c.arw" in record.getMessage()
    with pytest.raises(DataError, match="that can be read; convert an image to JPEG"):
        describe_sources([tmp_path / "c.arw"])
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match="only 2 other files such as 'b.dng'"):
        open_dataset("images", path=str(tmp_path))


def test_programs_films_and_data_files_are_no_photographs():
    assert not {".eps", ".ps", ".mpg", ".h5", ".grib", ".wmf"} & set(image_suffixes())


# -------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
def test_floats_of_any_precision_are_images(dtype):
    given = torch.rand(3, 20, 24).to(dtype)
    found = as_image(given)
    assert found.dtype == torch.float32 and torch.equal(found, given.float())
    assert dtype != torch.float32 or found.data_ptr() == given.data_ptr()


@pytest.mark.parametrize(
    "dtype, top", [(torch.uint8, 255), (torch.uint16, 65535), (torch.int64, 255), (torch.int16, 255)]
)
def test_whole_numbers_are_levels(dtype, top):
    given = torch.tensor([0, top // 5, top]).to(dtype).reshape(3, 1, 1).expand(3, 16, 16)
    assert torch.allclose(as_image(given)[:, 0, 0], torch.tensor([0.0, 0.2, 1.0]))


@pytest.mark.parametrize(
    "image, words",
    [
        (torch.rand(3, 20, 20) * 255, "divide by 255"), (torch.rand(3, 20, 20) * 2 - 1, "not from 0 to 1; scale them"),
        (torch.full((3, 20, 20), 70000), "not from 0 to 255"), (torch.full((3, 20, 20), torch.nan), "not finite"),
        (torch.rand(20, 20, 3), "height, width"), (torch.rand(1, 3, 20, 20), "height, width"), (np.ones((3, 20, 20)), "ndarray"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_one_sentence(image, words):
    with pytest.raises(DataError, match=words):
        as_image(image)


def test_rounding_beyond_the_range_is_clamped_and_inference_tensors_can_train():
    assert as_image(torch.full((3, 16, 16), 1 + 1e-4)).max() == 1
    with torch.inference_mode():
        image = torch.rand(3, 16, 16)
        assert not as_image(image).is_inference()
