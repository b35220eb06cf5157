"""Read an image file in any format that Pillow supports, or HEIF, as an RGB array."""

import stat
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from horsehuman.errors import HorseHumanError, is_out_of_memory, printable

#: A pixel counts as white if each channel is at least this (0 to 255).
WHITE_LEVEL = 245

#: Largest number of pixels; larger images are refused before they are decoded. Pillow itself only
#: warns from 89 million pixels on, and a file of a few kilobytes could fill 500 MB of memory.
MAX_PIXELS = 100_000_000

#: Largest width and height in pixels. Pillow raises a ``MemoryError`` for far longer lines.
MAX_SIDE = 1_000_000

#: Files and folders that operating systems and file managers create.
_SYSTEM_NAMES = {"__MACOSX", "Thumbs.db", "desktop.ini"}

#: Number of pixels that are converted at a time, which bounds the memory for float64 values.
_PIXELS_PER_STEP = 1_000_000

#: EXIF tag of the orientation.
_ORIENTATION_TAG = 0x0112

#: What the first bytes of a file that Pillow cannot read say about it: offset, bytes, description.
_SIGNATURES = (
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a zip archive or an office document"),
    (0, b"\x1aE\xdf\xa3", "a video"),  # Matroska, WebM
    (8, b"AVI ", "a video"),
    (4, b"ftypavi", "an AVIF image that is damaged or needs a newer Pillow"),
    (4, b"ftyp", "a video"),  # MP4, QuickTime
)

#: Brands of HEIF files with HEVC images, which telephones write (ISO/IEC 23008-12).
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# Pillow warns about files that are either read correctly or refused here. The filter holds for the
# whole process because warnings.catch_warnings() is not thread-safe.
warnings.filterwarnings("ignore", module="PIL")


class PictureError(HorseHumanError):
    """An image cannot be read; the message names the image and the reason."""


class _UnreadableError(ValueError):
    """The reason why an image cannot be read, without its name."""


def read_picture(source: str | Path | BinaryIO, name: str | None = None) -> NDArray[np.uint8]:
    """Read an image as it is displayed.

    The EXIF orientation is applied, transparent pixels are blended with white, values of more than
    8 bits are scaled instead of clipped, grey, palette and CMYK images are converted to RGB, and of
    an animation the first frame is read.

    Args:
        source: Path or open binary file; the format is detected from the contents.
        name: Name of the image in error messages; by default the path.

    Returns:
        RGB array of shape ``(H, W, 3)``, dtype uint8.

    Raises:
        PictureError: If the file is missing, empty, damaged, not a regular file or not in a format
            that Pillow supports; if it is HEIF and pillow-heif is not installed; or if the image
            has more than :data:`MAX_PIXELS` pixels or a side above :data:`MAX_SIDE`.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from horsehuman import read_picture
        >>> file = io.BytesIO()
        >>> Image.new("L", (40, 30)).save(file, "PNG")
        >>> read_picture(file).shape
        (30, 40, 3)
    """
    name = name or (printable(source) if isinstance(source, str | Path) else "the picture")
    with ExitStack() as stack:
        with _decoder_errors(name):
            if isinstance(source, str | Path):
                _check_file(Path(source))
                source = stack.enter_context(Path(source).open("rb"))
            image = stack.enter_context(_open(source))
            size = f"{image.width} x {image.height} pixels"
            if image.width * image.height > MAX_PIXELS:
                raise _UnreadableError(f"{size}, over the limit of {MAX_PIXELS:,}")
            if max(image.size) > MAX_SIDE:
                raise _UnreadableError(f"{size}, a side is over the limit of {MAX_SIDE:,}")
        return as_rgb(image, name)


def as_rgb(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Convert an opened image to RGB uint8 ``(H, W, 3)`` in the way of :func:`read_picture`."""
    with _decoder_errors(name):
        image.load()
        orientation = image.getexif().get(_ORIENTATION_TAG)
    image = _to_8_bit(image)
    with _decoder_errors(name):
        if image.mode in ("RGBa", "La"):
            image = image.convert(image.mode.upper())
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    return _turn_upright(np.array(image, dtype=np.uint8), orientation)


def _open(file: BinaryIO) -> Image.Image:
    """Open an image; register the reader of HEIF files when the first such file comes.

    Raises:
        _UnreadableError: If Pillow cannot read the format.
    """
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        start = b""
        if file.seekable():
            file.seek(0)
            start = file.read(512)
    if start[4:8] != b"ftyp" or start[8:12] not in _HEIF_BRANDS:
        raise _UnreadableError(f"not an image format that Pillow supports{_describe(start)}")
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        fix = "pip install pillow-heif, or convert it to JPEG"
        raise _UnreadableError(f"a HEIF image, as telephones write them: {fix}") from error
    register_heif_opener()
    return Image.open(file)


def _describe(start: bytes) -> str:
    """Say what a file that is not an image seems to be, by its first bytes, and what to do."""
    for offset, signature, name in _SIGNATURES:
        if start.startswith(signature, offset):
            return f", but {name}: convert it to JPEG or PNG"
    return ", but a text file" if start and start.isascii() and b"\0" not in start else ""


@contextmanager
def _decoder_errors(name: str) -> Iterator[None]:
    """Turn what Pillow raises in the block for an unreadable image into a :class:`PictureError`."""
    try:
        yield
    except Exception as error:  # decoders raise many types of exception for malformed files
        if is_out_of_memory(error):
            raise
        raise PictureError(f"cannot read {name}: {_reason(error)}") from error


def is_hidden(name: str) -> bool:
    """Return whether a file or folder name is hidden or created by the operating system."""
    return name.startswith(".") or name in _SYSTEM_NAMES


def _check_file(path: Path) -> None:
    """Check that there is a regular file that is not empty.

    Raises:
        OSError: If there is nothing.
        _UnreadableError: If it is something else.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise _UnreadableError("a folder, not an image file (use --recursive for subfolders)")
    if not stat.S_ISREG(status.st_mode):
        raise _UnreadableError("not a regular file")
    if not status.st_size:
        raise _UnreadableError("empty (0 bytes)")


def _turn_upright(pixels: NDArray[np.uint8], orientation: object) -> NDArray[np.uint8]:
    """Apply an EXIF orientation, 1 to 8; other values change nothing.

    Used instead of ``ImageOps.exif_transpose``, which fails if another EXIF tag is malformed.
    """
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale integers of more than 8 bits and floats to 0..255 by the range of their values.

    The range is 0..65535 for 16-bit integers. For wider integers and floats it is inferred from the
    largest value: 0..1 (floats only), 0..255, 0..65535, or up to that value. NaN becomes 0.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    high = float(np.nanmax(values, initial=0))
    if image.mode.startswith("I;16") or high > 255:
        ceiling = 65535.0 if high <= 65535 else high
    else:
        ceiling = 1.0 if image.mode == "F" and high <= 1 else 255.0
    scaled = np.empty(values.shape, np.uint8)
    rows = max(1, _PIXELS_PER_STEP // values.shape[1])
    for top in range(0, len(values), rows):
        part = np.nan_to_num(values[top : top + rows].astype(np.float64)) / ceiling
        scaled[top : top + rows] = np.rint(np.clip(part, 0, 1) * 255)
    return Image.fromarray(scaled)


def _reason(error: Exception) -> str:
    """Return in one line, for users, why an image cannot be read."""
    if isinstance(error, _UnreadableError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):  # its text is the representation of an object
        return "damaged"
    if isinstance(error, Image.DecompressionBombError):
        return f"more pixels than the limit of {MAX_PIXELS:,}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"damaged ({' '.join(str(error).split()) or type(error).__name__})"
