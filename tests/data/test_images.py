from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from horsehuman.data.images import MAX_PIXELS, PictureError, read_picture

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_transparency_is_blended_with_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (255, 0, 0, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 128))
    pixels = read_picture(save(rgba, tmp_path / "a.png"))
    assert pixels.tolist() == [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    pixels = read_picture(save(image, tmp_path / "a.png", transparency=1))
    assert pixels.tolist() == [[list(RED), list(WHITE)]]


def test_grey_with_alpha(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1), (10, 255))
    image.putpixel((1, 0), (10, 0))
    assert read_picture(save(image, tmp_path / "a.png")).tolist() == [[[10] * 3, [255] * 3]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    pixels = read_picture(save(Image.fromarray(values), tmp_path / "a.png"))
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    assert pixels.shape == (1, 4, 3)


@pytest.mark.parametrize(("high", "expected"), [(255, [0, 100, 255]), (65535, [0, 0, 255])])
def test_wide_integers_are_scaled_by_their_range(
    tmp_path: Path, high: int, expected: list[int]
) -> None:
    values = np.array([[0, 100, high]], dtype=np.int32)
    pixels = read_picture(save(Image.fromarray(values), tmp_path / "a.tif"))
    assert pixels[0, :, 1].tolist() == expected


def test_floats_from_zero_to_one(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    pixels = read_picture(save(Image.fromarray(values), tmp_path / "a.tif"))
    assert pixels[0, :, 2].tolist() == [0, 128, 255]


def test_nan_becomes_black(tmp_path: Path) -> None:
    values = np.array([[np.nan, 0.5, 1.0]], dtype=np.float32)
    pixels = read_picture(save(Image.fromarray(values), tmp_path / "a.tif"))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk_and_bilevel_become_rgb(tmp_path: Path) -> None:
    cmyk = save(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), tmp_path / "a.tif")
    assert read_picture(cmyk)[0, 0].tolist() == list(RED)
    bilevel = save(Image.new("1", (2, 2), 1), tmp_path / "b.png")
    assert read_picture(bilevel)[0, 0].tolist() == list(WHITE)


#: Turns an image upright, for each EXIF orientation.
UPRIGHT = {
    1: lambda image: image,
    2: ImageOps.mirror,
    3: lambda image: image.rotate(180),
    4: ImageOps.flip,
    5: lambda image: ImageOps.mirror(image.transpose(Image.Transpose.ROTATE_270)),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_270),  # 90 degrees clockwise
    7: lambda image: ImageOps.mirror(image.transpose(Image.Transpose.ROTATE_90)),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    9: lambda image: image,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    image = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x0131] = "a program"
    pixels = read_picture(save(image, tmp_path / "a.png", exif=exif))
    assert np.array_equal(pixels, np.asarray(UPRIGHT[orientation](image)))
    assert pixels.flags.c_contiguous


def test_malformed_exif_tags_beside_the_orientation_are_ignored(tmp_path: Path) -> None:
    """``ImageOps.exif_transpose`` raises for this file."""
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    resolution = struct.pack("<HHI4s", 0x011A, 2, 1, b"x")  # text instead of a rational
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + orientation + resolution + bytes(4)
    path = save(Image.new("RGB", (4, 2)), tmp_path / "a.jpg", exif=exif)
    assert read_picture(path).shape == (4, 2, 3)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_picture(path)[0, 0].tolist() == list(RED)


def test_file_names_do_not_matter(tmp_path: Path) -> None:
    for name in ("with space.png", "new\nline.png", "馬.png", "no_suffix", "lies.jpg"):
        with (tmp_path / name).open("wb") as file:
            Image.new("RGB", (1, 1), GREEN).save(file, "PNG")
        assert read_picture(tmp_path / name).tolist() == [[list(GREEN)]]


def test_unreadable_files_are_errors_with_a_reason(tmp_path: Path) -> None:
    complete = tmp_path / "complete.jpg"
    Image.effect_noise((64, 64), 90).save(complete)
    (tmp_path / "cut.jpg").write_bytes(complete.read_bytes()[:900])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    os.mkfifo(tmp_path / "fifo.png")
    reasons = {
        "cut.jpg": "damaged (image file is truncated",
        "empty.png": "empty (0 bytes)",
        "text.png": "not an image format that Pillow supports",
        "fifo.png": "not a regular file",
        "missing.png": "No such file",
        ".": "a folder, not an image file",
    }
    for name, reason in reasons.items():
        with pytest.raises(PictureError) as caught:
            read_picture(tmp_path / name)
        assert str(caught.value).startswith(f"cannot read {tmp_path / name}: {reason}")
        assert "\n" not in str(caught.value)
    with (tmp_path / "text.png").open("rb") as file, pytest.raises(PictureError) as caught:
        read_picture(file, "this file")
    reason = "not an image format that Pillow supports, but a text file"
    assert str(caught.value) == f"cannot read this file: {reason}"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"%PDF-1.7\n", "a PDF document"),
        (b"PK\x03\x04\x14", "a zip archive or an office document"),
        (b"\0\0\0\x18ftypmp42", "a video"),
        (b"\0\0\0\x14ftypqt  ", "a video"),
        (b"\x1aE\xdf\xa3\x01", "a video"),
        (b"RIFF\0\0\0\0AVI LIST", "a video"),
    ],
)
def test_errors_say_what_a_file_seems_to_be(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(PictureError, match=f"but {kind}: convert it to JPEG or PNG"):
        read_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", [".heic", ".avif"])
def test_images_of_telephones_are_upright(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, orientation: int
) -> None:
    Image.init()  # adds formats to the list that is replaced
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    image = Image.new("RGB", (96, 64), GREEN)
    image.paste(RED, (0, 0, 32, 32))  # the upper left corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    if suffix == ".heic":  # without registering the reader
        pytest.importorskip("pillow_heif").from_pillow(image).save(path, exif=exif.tobytes())
    elif features.check("avif"):
        image.save(path, exif=exif)
    else:
        pytest.skip("this Pillow reads no AVIF")
    expected = np.asarray(UPRIGHT[orientation](image), dtype=int)
    pixels = read_picture(path)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < 8


def test_damaged_heif_is_an_error_of_one_line(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif").from_pillow(Image.new("RGB", (64, 64), GREEN))
    heif.save(tmp_path / "complete.heic")
    content = (tmp_path / "complete.heic").read_bytes()
    for length in (40, len(content) // 2, len(content) - 20):
        (tmp_path / "cut.heic").write_bytes(content[:length])
        with pytest.raises(PictureError, match=r"cut\.heic: damaged") as caught:
            read_picture(tmp_path / "cut.heic")
        assert "object" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_heif_without_its_reader_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    Image.init()  # adds formats to the list that is replaced
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    with pytest.raises(PictureError, match=r"a HEIF image, .*: pip install pillow-heif"):
        read_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("side", [10_001, 20_000])
def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, side: int) -> None:
    assert side**2 > MAX_PIXELS
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(
        PictureError, match=r"pixels, over the limit of|more pixels than the limit of"
    ):
        read_picture(tmp_path / "bomb.png")


def test_missing_memory_is_not_called_a_damaged_image(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("the memory in use is read from /proc")
    path = tmp_path / "large.png"
    Image.new("L", (10_000, 10_000)).save(path)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, limits[1]))
    try:
        with pytest.raises(MemoryError):
            read_picture(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_name_does_not_make_a_missing_image_missing_memory(tmp_path: Path) -> None:
    path = tmp_path / "out of memory.png"
    with pytest.raises(PictureError, match="No such file"):
        read_picture(path)
    path.write_bytes(b"no picture")
    with pytest.raises(PictureError, match="not an image format"):
        read_picture(path)
