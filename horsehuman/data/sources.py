"""Image sources of the commands: files, folders, glob patterns, names on stdin, and URLs."""

import glob
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn
from urllib.error import HTTPError, URLError
from urllib.request import FTPHandler, Request, build_opener

import numpy as np
from numpy.typing import NDArray

from horsehuman.data.images import PictureError, is_hidden, read_picture
from horsehuman.errors import printable

#: Limits for an image from the web: size in bytes, and seconds for the whole download.
MAX_BYTES, MAX_SECONDS = 50_000_000, 30.0

#: Seconds without any data after which a server is given up.
TIMEOUT = 10.0


class DownloadError(ValueError):
    """A download failed; the message is the reason, without the URL."""


def is_url(source: str) -> bool:
    """Return whether a source is an http or https URL."""
    return source.lower().startswith(("http://", "https://"))


def expand_sources(sources: Iterable[str], *, recursive: bool = False) -> Iterator[str]:
    """Yield the files and URLs of sources lazily and in order.

    Args:
        sources: Each is a file; a folder, which stands for its files except hidden ones and those
            of file managers; a glob pattern such as ``*.jpg``; a URL; or ``-``, which reads such
            sources from stdin, one per line. A source without files is yielded unchanged, so that
            reading it reports the reason.
        recursive: Include subfolders of folders, but do not follow links.
    """
    for source in sources:
        if source == "-":
            yield from expand_sources(_stdin_lines(), recursive=recursive)
        else:
            files = _find_files(source, recursive)
            yield next(files, source)
            yield from files


def read_source(source: str) -> NDArray[np.uint8]:
    """Read an image from a file or URL; see :func:`~horsehuman.data.images.read_picture`.

    A download may take :data:`MAX_BYTES` and :data:`MAX_SECONDS`.

    Raises:
        PictureError: If the image cannot be downloaded or read.
    """
    if not is_url(source):
        return read_picture(source)
    content, start = bytearray(), time.monotonic()
    try:
        for block, _ in download_blocks(source):
            content += block
            if len(content) > MAX_BYTES:
                raise DownloadError(f"larger than {MAX_BYTES / 1e6:.0f} MB")
            if time.monotonic() - start > MAX_SECONDS:
                raise DownloadError(f"not complete after {MAX_SECONDS:.0f} s")
    except DownloadError as error:
        raise PictureError(f"cannot read {printable(source)}: {error}") from error
    return read_picture(io.BytesIO(content), printable(source))


def download_blocks(url: str) -> Iterator[tuple[bytes, int]]:
    """Yield the contents of a URL in blocks as they arrive; only http and https are followed.

    Args:
        url: The URL.

    Yields:
        A block, and the length of the whole file in bytes as announced by the server, or 0.

    Raises:
        DownloadError: If the server cannot be reached, reports an error, sends text, redirects to
            another scheme or closes the connection early.
    """
    received = 0
    try:
        request = Request(url, headers={"User-Agent": "horsehuman"})
        with build_opener(_NoFtpHandler).open(request, timeout=TIMEOUT) as response:
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if media_type.startswith("text/"):
                raise DownloadError(f"a page ({media_type}), not a file")
            length = response.length or 0
            while block := response.read1(65_536):  # read() would block until all bytes are there
                received += len(block)
                yield block, length
            if received < length:
                raise DownloadError(f"connection closed after {received:,} of {length:,} bytes")
    except HTTPError as error:
        error.close()
        redirect = " and redirects in circles or off the web" if 300 <= error.code < 400 else ""
        raise DownloadError(f"the server answers {error.code}{redirect}") from error
    except (OSError, HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) else error
        text = "no answer in time" if isinstance(cause, TimeoutError) else str(cause)
        raise DownloadError(printable(text or type(cause).__name__)) from error


class _NoFtpHandler(FTPHandler):
    """Refuse ftp, the only scheme beside http and https to which urllib follows redirections."""

    handler_order = 0  # before a proxy for ftp

    def ftp_open(self, request: Request) -> NoReturn:
        raise DownloadError(f"redirects to {request.full_url}, which is not an http or https URL")


def _find_files(source: str, recursive: bool) -> Iterator[str]:
    """Yield the files that a folder or a pattern stands for; none for a file or a URL."""
    if is_url(source):
        return
    if Path(source).is_dir():
        for root, folders, files in os.walk(source):
            visible = sorted(name for name in folders if not is_hidden(name))
            folders[:] = visible if recursive else []
            yield from (str(Path(root, name)) for name in sorted(files) if not is_hidden(name))
    elif glob.has_magic(source) and not os.path.lexists(source):
        # Path.glob refuses absolute patterns.
        matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207
        yield from filter(os.path.isfile, matches)


def _stdin_lines() -> Iterator[str]:
    """Yield the lines of stdin; a line ``-`` names the file ``./-`` instead of stdin again."""
    for line in sys.stdin.buffer:
        if name := os.fsdecode(line).rstrip("\r\n"):
            yield "./-" if name == "-" else name
