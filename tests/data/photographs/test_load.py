"""Photographs as files: what EXIF says of their focal length, names, damaged ones, and a folder as a scene."""

from __future__ import annotations

import math
import warnings
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from PIL.ExifTags import IFD, Base

from ttt_lib.core.errors import DataError
from ttt_lib.core.types import Sample
from ttt_lib.data.motorcycle import open_motorcycle
from ttt_lib.data.photographs import load
from ttt_lib.data.photographs.load import load_scene
from ttt_lib.data.photographs.scene import Scene
from ttt_lib.data.photographs.sources import from_list, photographs_of

TAGS = {
    "FOCAL_35": Base.FocalLengthIn35mmFilm, "FOCAL": Base.FocalLength, "PLANE_X": Base.FocalPlaneXResolution,
    "PLANE_UNIT": Base.FocalPlaneResolutionUnit, "WIDTH": Base.ExifImageWidth, "HEIGHT": Base.ExifImageHeight,
}  # fmt: skip


def photo(path, size=(120, 90), orientation=None, own=None, **tags):
    """Noise as JPEG with these tags of EXIF's directory."""
    values = np.random.default_rng(crc32(path.name.encode())).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    content = Image.Exif()
    for tag, value in {274: orientation, **(own or {})}.items():
        if value is not None:
            content[tag] = value
    for name, value in tags.items():
        content.get_ifd(IFD.Exif)[TAGS[name]] = value
    Image.fromarray(values).save(path, exif=content)
    return path


def focal_of(path):
    return from_list([path]).pictures[0].focal


def test_the_equivalent_focal_length_compares_diagonals(tmp_path):
    diagonal = math.hypot(120, 90) / math.hypot(36, 24)
    upright = photo(tmp_path / "a.jpg", FOCAL_35=26)
    turned = photo(tmp_path / "b.jpg", orientation=6, FOCAL_35=26)
    assert focal_of(upright) == pytest.approx(26 * diagonal / 120)
    assert focal_of(turned) == pytest.approx(26 * diagonal / 90)  # 90 is the width of what is seen
    one, other = from_list([upright, turned]).pictures
    assert one.exact and other.exact and one.camera == other.camera == "26 mm"
    assert focal_of(photo(tmp_path / "film.jpg", size=(150, 100), FOCAL_35=36)) == pytest.approx(1.0)


def test_the_focal_length_on_the_sensor_needs_the_sensors_size(tmp_path):
    assert focal_of(photo(tmp_path / "a.jpg", FOCAL=4.2)) is None
    # 20 mm at 2500 pixels a centimetre are 5000 pixels of 6000
    sensor = {"FOCAL": 20.0, "PLANE_X": 2500.0, "PLANE_UNIT": 3, "WIDTH": 6000, "HEIGHT": 4500}
    assert focal_of(photo(tmp_path / "b.jpg", **sensor)) == pytest.approx(5000 / 6000)
    assert focal_of(photo(tmp_path / "c.jpg", orientation=8, **sensor)) == pytest.approx(5000 / 4500)
    inches = {**sensor, "PLANE_X": 6350.0, "PLANE_UNIT": 2}
    assert focal_of(photo(tmp_path / "d.jpg", **inches)) == pytest.approx(5000 / 6000)


def test_a_sensor_that_cannot_be_is_of_a_picture_that_was_shrunk(tmp_path):
    """Its size was written anew and the pixels per inch were not: 19 mm before 3.2 mm would be a telescope."""
    shrunk = {"FOCAL": 19.0, "PLANE_X": 5728.0, "PLANE_UNIT": 2, "WIDTH": 718, "HEIGHT": 479}
    assert focal_of(photo(tmp_path / "a.jpg", size=(718, 479), **shrunk)) is None
    assert focal_of(photo(tmp_path / "b.jpg", size=(718, 479), **{**shrunk, "WIDTH": 3000, "HEIGHT": 2001})) is None
    whole = {**shrunk, "WIDTH": 5184, "HEIGHT": 3459}  # a picture that was shrunk and says how large it was
    assert focal_of(photo(tmp_path / "c.jpg", size=(718, 479), **whole)) == pytest.approx(0.827, abs=1e-3)
    phone = {"FOCAL": 4.2, "PLANE_X": 7100.0, "PLANE_UNIT": 3, "WIDTH": 4000, "HEIGHT": 3000}  # of 1.4 micrometres
    assert focal_of(photo(tmp_path / "d.jpg", **phone)) == pytest.approx(4.2 / 5.634, abs=1e-3)
    watch = {**phone, "WIDTH": 400, "HEIGHT": 300}
    assert focal_of(photo(tmp_path / "e.jpg", **watch)) is None


def test_another_zoom_is_another_camera_and_a_cropped_picture_is_a_guess(tmp_path):
    wide = photo(tmp_path / "a.jpg", own={Base.Make: "Maker", Base.Model: "One"}, FOCAL_35=24)
    tele = photo(tmp_path / "b.jpg", own={Base.Make: "Maker", Base.Model: "One"}, FOCAL_35=70)
    cropped = photo(tmp_path / "c.jpg", size=(90, 90), FOCAL_35=24, WIDTH=4000, HEIGHT=3000)
    pictures = from_list([wide, tele, cropped]).pictures
    assert [p.camera for p in pictures] == ["Maker One 24 mm", "Maker One 70 mm", "24 mm"]
    assert [p.exact for p in pictures] == [True, True, False]


def rational(numerator, denominator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TiffImagePlugin.IFDRational(numerator, denominator)


@pytest.mark.parametrize(
    "tags", [{"FOCAL_35": 0}, {"FOCAL_35": 65535}, {"FOCAL_35": "wide"}, {"FOCAL_35": (26, 27)}, {"FOCAL": rational(4, 0)},
             {"FOCAL": 4.2, "PLANE_X": rational(0, 0), "WIDTH": 10}, {"FOCAL": 4.2, "PLANE_X": 3000.0, "WIDTH": 0, "HEIGHT": 0},
             {"FOCAL": 4.2, "PLANE_X": 3000.0, "PLANE_UNIT": 77, "WIDTH": 4000, "HEIGHT": 3000}, {"FOCAL_35": b"\0\1"}]
)  # fmt: skip
def test_odd_tags_say_nothing(tmp_path, tags):
    given = from_list([photo(tmp_path / "a.jpg", **tags)])
    assert given.pictures[0].focal is None and not given.pictures[0].exact and not given.left_out


def test_what_the_user_says_goes_before_exif_and_a_guess_comes_last(tmp_path):
    known, plain = photo(tmp_path / "a.jpg", FOCAL_35=26), photo(tmp_path / "b.jpg")
    turned = photo(tmp_path / "c.jpg", size=(90, 120))
    assert [p.focal for p in from_list([known, plain, turned], focal=1.5).pictures] == [1.5, 1.5, 2.0]
    guessed = from_list([known, plain], prior=lambda image: image.shape[2] / 100).pictures
    assert guessed[0].exact and guessed[1].focal == 1.2 and not guessed[1].exact
    assert from_list([known, plain], prior={"b": 0.7}).pictures[1].focal == 0.7
    assert from_list([plain], prior=lambda image: math.nan).pictures[0].focal is None
    with pytest.raises(DataError, match="focal: must be"):
        load_scene([known, plain], focal=26)


def test_a_refusal_names_the_focal_length_that_exif_says(tmp_path, monkeypatch):
    """Where it came so far that one was used, and by nobody but EXIF."""
    files = [photo(tmp_path / name, FOCAL_35=200) for name in ("a.jpg", "b.jpg")]
    about = {"focal": [5.78]}
    monkeypatch.setattr(load, "reconstruct", lambda *_: Scene([], about=about, refused="nothing fits."))
    said = load_scene(files).refused
    assert (
        said == "nothing fits; EXIF says the focal length (5.78 of the width), --focal (in Python: focal) says another."
    )
    assert load_scene(files, focal=1.0).refused == "nothing fits."
    assert load_scene([photo(tmp_path / "c.jpg"), photo(tmp_path / "d.jpg")]).refused == "nothing fits."
    about.clear()
    assert load_scene(files).refused == "nothing fits."


def test_damaged_photographs_are_left_out_by_name_and_names_differ(tmp_path):
    (tmp_path / "sub").mkdir()
    files = [photo(tmp_path / "a.jpg"), photo(tmp_path / "a.png"), photo(tmp_path / "sub" / "a.jpg")]
    (tmp_path / "broken.jpg").write_bytes(files[0].read_bytes()[:300])
    given = from_list([*files, tmp_path / "broken.jpg", tmp_path / "none.jpg"])
    assert [p.name for p in given.pictures] == ["a", "a_png", "a_jpg"]
    assert [name for name, _ in given.left_out] == ["broken", "none"] and "damaged" in given.left_out[0][1]
    assert torch.equal(given.pictures[2].read(), from_list([files[2]]).pictures[0].read())


def test_a_folder_says_what_it_does_not_read(tmp_path):
    samples = [open_motorcycle(width=384, height=256)[i] for i in range(2)]
    for sample in samples:
        array = (sample.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(array).save(tmp_path / f"{sample.name.replace('/', '_')}.png")
    (tmp_path / "notes.txt").write_text("taken on a Monday")
    (tmp_path / "old").mkdir()
    (tmp_path / "z.png").write_bytes(b"\x89PNG no more")
    scene = load_scene(tmp_path, seed=1, focal=float(samples[0].intrinsics[0, 0]))
    assert not scene.refused and len(scene.photographs) == 2 and len(scene.track_ids()) > 200
    assert [name for name, _ in scene.left_out] == ["z", "old", "notes.txt"]
    assert scene.photographs[0].image.shape == samples[0].image.shape and callable(scene.photographs[0].source)
    assert scene.photographs[0].intrinsics[0, 0] == pytest.approx(float(samples[0].intrinsics[0, 0]), rel=1e-5)


def test_files_that_are_no_pictures_are_one_line_and_pictures_keep_theirs(tmp_path):
    for name in ["a.jpg", "b.dng", "c.mp4", *(f"{k}.{end}" for k in range(12) for end in ("bin", "XML")), "notes"]:
        (tmp_path / name).touch()
    files, others = photographs_of(tmp_path)
    assert [file.name for file in files] == ["a.jpg"]
    assert [name for name, _ in others] == ["b.dng", "c.mp4", "25 other files (.bin, .xml, no ending)"]
    assert "convert it to JPEG" in others[0][1] and not any("convert" in why for _, why in others[1:])


def test_what_is_no_scene(tmp_path):
    one = photo(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="two or more"):
        load_scene(one)
    with pytest.raises(DataError, match="at least two"):
        load_scene([one])
    with pytest.raises(DataError, match="at least two.*no such file"):
        load_scene([one, tmp_path / "b.jpg"])
    with pytest.raises(DataError, match="no such folder"):
        load_scene(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no photographs"):
        load_scene(tmp_path / "empty")
    with pytest.raises(DataError, match="do not mix"):
        load_scene([one, ("b", torch.zeros(3, 20, 20))])
    with pytest.raises(DataError, match="count"):
        load_scene(tmp_path, count=1)
    for source in ("", 3, None):
        with pytest.raises(DataError, match="source: must be"):
            load_scene(source)
    with pytest.raises(DataError, match="nope.json: there is no such file"):
        load_scene(tmp_path, cameras=tmp_path / "nope.json")
    with pytest.raises(DataError, match="neither a COLMAP model"):
        load_scene(tmp_path, cameras=tmp_path / "empty")
    with pytest.raises(DataError, match="too many"):
        load_scene([one] * 301)
    with pytest.raises(DataError, match="1 photographs can be read"):  # every and count hold for lists too
        load_scene([one, one, one, tmp_path / "none.jpg"], every=3)
    sample = Sample("s", "set", torch.zeros(3, 20, 20))
    assert [p.name for p in from_list([sample, sample, ("t", sample.image)]).pictures] == ["s", "s_2", "t"]
