"""Where pictures to be answered come from: files, folders, globs, lists on stdin, the web."""

from __future__ import annotations

import glob
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
from numpy.typing import NDArray

from horsehuman.data.folders import is_litter
from horsehuman.errors import shown
from horsehuman.pictures import PictureError, read_picture

#: What a picture from the web may take: bytes, seconds for all of it, redirections.
MAX_BYTES, MAX_SECONDS, MAX_REDIRECTS = 50_000_000, 30.0, 5

#: Seconds that a server may be silent.
PATIENCE = 10.0


def is_url(source: str) -> bool:
    """Whether a source is looked for on the web."""
    return source.lower().startswith(("http://", "https://"))


def expand(sources: Iterable[str], *, recursive: bool = False) -> Iterator[str]:
    """Files and addresses that sources stand for, in order, one at a time.

    Args:
        sources: Files; folders, whose files are meant, but for hidden ones and the litter of file
            managers; patterns such as ``*.jpg``; addresses; ``-`` for such names on stdin, one a
            line.
        recursive: Go into folders inside folders, not through links.
    """
    for source in sources:
        if source == "-":
            yield from expand(_lines(), recursive=recursive)
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
        folders[:] = sorted(name for name in folders if not is_litter(name)) if recursive else []
        yield from (str(Path(root, name)) for name in sorted(files) if not is_litter(name))


def _lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        if name := os.fsdecode(line).rstrip("\r\n"):
            yield "./-" if name == "-" else name


def open_picture(source: str) -> NDArray[np.uint8]:
    """Read a picture from a file or an address; see :func:`~horsehuman.pictures.read_picture`.

    Raises:
        PictureError: There is none.
    """
    return read_picture(fetch(source), shown(source)) if is_url(source) else read_picture(source)


class _WebOnly(HTTPRedirectHandler):
    """Follows a redirection to the web, and to nowhere else."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if not is_url(newurl):
            raise URLError(f"leads to {shown(newurl)}, which is not on the web")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str) -> io.BytesIO:
    """Fetch a picture from the web, within limits of size and time; no other scheme is followed.

    Raises:
        PictureError: It cannot be had.
    """
    deadline = time.monotonic() + MAX_SECONDS
    body = io.BytesIO()
    try:
        request = Request(url, headers={"User-Agent": "horsehuman"})
        with build_opener(_WebOnly).open(request, timeout=PATIENCE) as answer:
            kind = answer.headers.get_content_type()
            if kind.startswith("text/"):
                raise URLError(f"is no picture, but {shown(kind)}")
            while block := answer.read1(65_536):  # what is there, so that the time can be kept
                body.write(block)
                if body.tell() > MAX_BYTES:
                    raise URLError(f"is larger than {MAX_BYTES / 1e6:.0f} MB")
                if time.monotonic() > deadline:
                    raise URLError(f"takes longer than {MAX_SECONDS:.0f} s")
            promised = answer.headers.get("Content-Length", "")
            if promised.isdigit() and body.tell() < int(promised):
                raise URLError(f"broke off after {body.tell():,} of {int(promised):,} bytes")
    except HTTPError as error:
        moved = " and leads in circles, or off the web" if 300 <= error.code < 400 else ""
        raise PictureError(f"{shown(url)}: the server answers {error.code}{moved}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        text = "does not answer in time" if isinstance(reason, TimeoutError) else str(reason)
        raise PictureError(f"{shown(url)}: {shown(text or type(reason).__name__)}") from error
    body.seek(0)
    return body
