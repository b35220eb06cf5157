"""Any file that Pillow reads, as RGB."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from horsehuman.errors import HorseHumanError, printable

#: From this value on in all channels a pixel is white.
WHITE_LEVEL = 245

#: Pictures with more pixels are refused before they are decoded (Pillow's own limit only warns
#: at 89 million and lets a file of a few kilobytes fill 500 MB of memory).
MAX_PIXELS = 100_000_000

_LITTER = {"__MACOSX", "Thumbs.db", "desktop.ini"}

# Pixels that are scaled at a time; bounds memory.
_AT_ONCE = 1_000_000

# Values of EXIF's orientation tag, and what turns such a picture upright.
_ORIENTATION = 0x0112

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow grumbles about is either read right or refused; a filter for all of the process,
# since warnings.catch_warnings() must not be used in threads.
warnings.filterwarnings("ignore", module="PIL")


class PictureError(HorseHumanError):
    """A file that cannot be read as a picture; the text names the file and the reason."""


def read_picture(source: str | Path | BinaryIO, name: str | None = None) -> NDArray[np.uint8]:
    """Read a picture as a person sees it.

    The EXIF orientation is applied, transparency is laid over white, 16-bit values are scaled
    rather than clipped, grey, palette and CMYK become RGB, and of an animation the first frame
    counts.

    Args:
        source: A file, or its content, in any format that Pillow reads, whatever its name.
        name: What errors call it.

    Returns:
        Array of shape ``(H, W, 3)``, dtype uint8, RGB.

    Raises:
        PictureError: The file is missing, is no ordinary file, is no picture, is damaged, or has
            more than :data:`MAX_PIXELS` pixels.
    """
    if isinstance(source, str | Path):
        source = Path(source)
        name = name or printable(source)
        empty = _check_file(source, name)
    else:
        name = name or "the picture"
        empty = not source.read(1)
        source.seek(0)
    if empty:
        raise PictureError(f"{name}: is empty (0 bytes)")
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise PictureError(f"{name}: {size} pixels are over the limit of {MAX_PIXELS:,}")
            return as_rgb(image)
    except PictureError:
        raise
    except Exception as error:  # decoders of hostile files raise whatever they like
        raise PictureError(f"{name}: {_reason(error)}") from error


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or a file manager's own."""
    return name.startswith(".") or name in _LITTER


def _check_file(path: Path, name: str) -> bool:
    """Whether a file is empty; an error where it is missing or no ordinary file."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{name}: {reason}") from error
    if stat.S_ISDIR(found.st_mode):
        raise PictureError(f"{name}: is a folder, no file (for folders inside it: --recursive)")
    if not stat.S_ISREG(found.st_mode):
        raise PictureError(f"{name}: is not an ordinary file")
    return not found.st_size


def as_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """An opened picture as :func:`read_picture` gives it."""
    return np.array(_as_rgb(image), dtype=np.uint8)


def _as_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    image = _as_8_bit(image if turn is None else image.transpose(turn))
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _as_8_bit(image: Image.Image) -> Image.Image:
    """Scale integers and floats of more than 8 bits to 0..255 by the range that they can be in."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    high = float(np.nanmax(values, initial=0))
    if image.mode.startswith("I;16") or high > 255:
        ceiling = 65535.0 if high <= 65535 else high
    else:
        ceiling = 1.0 if image.mode == "F" and high <= 1 else 255.0
    scaled = np.empty(values.shape, np.uint8)
    rows = max(1, _AT_ONCE // values.shape[1])
    for top in range(0, len(values), rows):
        part = np.nan_to_num(values[top : top + rows].astype(np.float64)) / ceiling
        scaled[top : top + rows] = np.rint(np.clip(part, 0, 1) * 255)
    return Image.fromarray(scaled)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is no picture that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more pixels than the limit of {MAX_PIXELS:,}"
    return f"is damaged ({' '.join(str(error).split()) or type(error).__name__})"
