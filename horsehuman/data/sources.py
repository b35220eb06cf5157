"""Where pictures to be answered come from: files, folders, globs, lists on stdin, the web."""

from __future__ import annotations

import glob
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
from numpy.typing import NDArray

from horsehuman.data.images import PictureError, is_hidden, read_picture
from horsehuman.errors import printable

#: What a picture from the web may take: bytes, seconds for all of it, redirections.
MAX_BYTES, MAX_SECONDS, MAX_REDIRECTS = 50_000_000, 30.0, 5

#: Seconds that a server may be silent.
PATIENCE = 10.0


def is_url(source: str) -> bool:
    """Whether a source is looked for on the web."""
    return source.lower().startswith(("http://", "https://"))


def expand_sources(sources: Iterable[str], *, recursive: bool = False) -> Iterator[str]:
    """Files and addresses that sources stand for, in order, one at a time.

    Args:
        sources: Files; folders, whose files are meant, but for hidden ones and the litter of file
            managers; patterns such as ``*.jpg``; addresses; ``-`` for such names on stdin, one a
            line.
        recursive: Go into folders inside folders, not through links.
    """
    for source in sources:
        if source == "-":
            yield from expand_sources(_lines(), recursive=recursive)
        elif is_url(source):
            yield source
        elif Path(source).is_dir():
            yield from _some(_walk(source, recursive), source)
        elif glob.has_magic(source) and not os.path.lexists(source):
            found = sorted(glob.glob(source, recursive=True))  # noqa: PTH207  (absolute ones too)
            yield from _some(filter(os.path.isfile, found), source)
        else:
            yield source


def _some(found: Iterable[str], source: str) -> Iterator[str]:
    """What was found; where that is nothing the source itself, whose reading tells why."""
    empty = True
    for path in found:
        empty = False
        yield path
    if empty:
        yield source


def _walk(folder: str, recursive: bool) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name)) if recursive else []
        yield from (str(Path(root, name)) for name in sorted(files) if not is_hidden(name))


def _lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        if name := os.fsdecode(line).rstrip("\r\n"):
            yield "./-" if name == "-" else name


def read_source(source: str) -> NDArray[np.uint8]:
    """Read a picture from a file or an address; see :func:`~horsehuman.pictures.read_picture`.

    Raises:
        PictureError: There is none.
    """
    return (
        read_picture(download_image(source), printable(source))
        if is_url(source)
        else read_picture(source)
    )


class HttpRedirects(HTTPRedirectHandler):
    """Follows a redirection to the web, and to nowhere else."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if not is_url(newurl):
            fp.close()
            raise URLError(f"leads to {printable(newurl)}, which is not on the web")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class DownloadError(ValueError):
    """What an address gives is not what was to be had; the text says why."""


def download_blocks(url: str, enough: Callable[[int, float], str]) -> Iterator[tuple[bytes, int]]:
    """What an address gives, block by block as it comes; no scheme but the web's is followed.

    Args:
        url: The address.
        enough: From the bytes and the seconds so far: why to give up, or nothing.

    Yields:
        A block, and how many bytes the server has promised in all, or 0.

    Raises:
        WebError: It cannot be had, is a page, or breaks off.
    """
    done, began = 0, time.monotonic()
    try:
        request = Request(url, headers={"User-Agent": "horsehuman"})
        with build_opener(HttpRedirects).open(request, timeout=PATIENCE) as answer:
            kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if kind.startswith("text/"):
                raise URLError(f"is a page ({printable(kind)}), not a file")
            length = answer.headers.get("Content-Length", "")
            promised = int(length) if length.isdigit() else 0
            while block := answer.read1(65_536):  # what is there, so that the time can be kept
                done += len(block)
                if refusal := enough(done, time.monotonic() - began):
                    raise URLError(refusal)
                yield block, promised
            if done < promised:
                raise URLError(f"broke off after {done:,} of {promised:,} bytes")
    except HTTPError as error:
        error.close()
        moved = " and leads in circles, or off the web" if 300 <= error.code < 400 else ""
        raise DownloadError(f"the server answers {error.code}{moved}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        text = "does not answer in time" if isinstance(reason, TimeoutError) else str(reason)
        raise DownloadError(printable(text or type(reason).__name__)) from error


def download_image(url: str) -> io.BytesIO:
    """Fetch a picture from the web, within limits of size and time.

    Raises:
        PictureError: It cannot be had.
    """

    def enough(done: int, seconds: float) -> str:
        if done > MAX_BYTES:
            return f"is larger than {MAX_BYTES / 1e6:.0f} MB"
        return f"takes longer than {MAX_SECONDS:.0f} s" if seconds > MAX_SECONDS else ""

    try:
        return io.BytesIO(b"".join(block for block, _ in download_blocks(url, enough)))
    except DownloadError as error:
        raise PictureError(f"{printable(url)}: {error}") from error
