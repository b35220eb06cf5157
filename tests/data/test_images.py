from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from horsehuman.data.images import MAX_PIXELS, PictureError, read_picture

RED, GREEN, WHITE_LEVEL = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (255, 0, 0, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 128))
    found = read_picture(save(rgba, tmp_path / "a.png"))
    assert found.tolist() == [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    found = read_picture(save(image, tmp_path / "a.png", transparency=1))
    assert found.tolist() == [[list(RED), list(WHITE_LEVEL)]]


def test_grey_with_alpha(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1), (10, 255))
    image.putpixel((1, 0), (10, 0))
    assert read_picture(save(image, tmp_path / "a.png")).tolist() == [[[10] * 3, [255] * 3]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    found = read_picture(save(Image.fromarray(values), tmp_path / "a.png"))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]
    assert found.shape == (1, 4, 3)


@pytest.mark.parametrize(("high", "expected"), [(255, [0, 100, 255]), (65535, [0, 0, 255])])
def test_wide_integers_are_scaled_by_their_range(
    tmp_path: Path, high: int, expected: list[int]
) -> None:
    values = np.array([[0, 100, high]], dtype=np.int32)
    found = read_picture(save(Image.fromarray(values), tmp_path / "a.tif"))
    assert found[0, :, 1].tolist() == expected


def test_floats_from_zero_to_one(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    found = read_picture(save(Image.fromarray(values), tmp_path / "a.tif"))
    assert found[0, :, 2].tolist() == [0, 128, 255]


def test_a_hole_in_floats_is_black_and_the_rest_is_seen(tmp_path: Path) -> None:
    values = np.array([[np.nan, 0.5, 1.0]], dtype=np.float32)
    found = read_picture(save(Image.fromarray(values), tmp_path / "a.tif"))
    assert found[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk_and_bilevel_become_rgb(tmp_path: Path) -> None:
    cmyk = save(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), tmp_path / "a.tif")
    assert read_picture(cmyk)[0, 0].tolist() == list(RED)
    bilevel = save(Image.new("1", (2, 2), 1), tmp_path / "b.png")
    assert read_picture(bilevel)[0, 0].tolist() == list(WHITE_LEVEL)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    exif[0x0131] = "a program"
    found = read_picture(save(image, tmp_path / "a.png", exif=exif))
    assert found.tolist() == [[list(RED)], [list(GREEN)]]


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_picture(path)[0, 0].tolist() == list(RED)


def test_names_do_not_matter(tmp_path: Path) -> None:
    for name in ("with space.png", "new\nline.png", "馬.png", "no_suffix", "lies.jpg"):
        with (tmp_path / name).open("wb") as file:
            Image.new("RGB", (1, 1), GREEN).save(file, "PNG")
        assert read_picture(tmp_path / name).tolist() == [[list(GREEN)]]


def test_what_is_no_picture_says_why(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 90).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    os.mkfifo(tmp_path / "fifo.png")
    reasons = {
        "cut.jpg": "damaged",
        "empty.png": "empty",
        "text.png": "no picture that Pillow can read",
        "fifo.png": "not an ordinary file",
        "missing.png": "No such file",
        ".": "is a folder",
    }
    for name, reason in reasons.items():
        with pytest.raises(PictureError, match=reason) as caught:
            read_picture(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [10_001, 20_000])
def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, side: int) -> None:
    assert side**2 > MAX_PIXELS
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(PictureError, match=r"over the limit|more pixels than the limit"):
        read_picture(tmp_path / "bomb.png")
