from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from PIL import Image

from horsehuman.data import sources
from horsehuman.data.images import PictureError
from horsehuman.data.sources import expand_sources, read_source
from tests.commands import serving


def picture(colour: str = "red") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(content, "PNG")
    return content.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Serve an image; the path selects how the server misbehaves."""

    def do_GET(self) -> None:
        name, body = self.path.strip("/"), picture()
        if name.isdigit():
            self.send_error(int(name))
            return
        redirections = {"file": "file:///etc/passwd", "circle": "/circle", "redirect": "/good"}
        redirections["ftp"] = "ftp://127.0.0.1/x"
        if name in redirections:
            self.send_response(302)
            self.send_header("Location", redirections[name])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if name == "html" else "image/png")
        self.send_header("Content-Length", str(10**9 if name in ("cut", "drip") else len(body)))
        self.end_headers()
        if name == "huge":
            body = bytes(10_000)
        if name == "drip":
            for _ in range(300):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        if name == "hang":
            time.sleep(30)
        self.wfile.write(body)

    def log_message(self, *unused: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(Handler) as address:
        yield address


def test_read_an_image_from_a_url(server: str) -> None:
    assert read_source(f"{server}/good").shape == (6, 8, 3)
    assert read_source(f"{server}/redirect").shape == (6, 8, 3)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("404", "the server answers 404"),
        ("500", "the server answers 500"),
        ("html", r"a page \(text/html\), not a file"),
        ("file", "the server answers 302 and redirects in circles or off the web"),
        ("ftp", "redirects to ftp://127.0.0.1/x, which is not an http or https URL"),
        ("circle", "the server answers 302 and redirects in circles"),
        ("cut", r"connection closed after .* of 1,000,000,000 bytes"),
        ("huge", "larger than 0 MB"),
        ("drip", "not complete after 0 s"),
        ("hang", "no answer in time"),
    ],
)
def test_failing_servers_are_errors_with_a_reason(
    path: str, text: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path in ("drip", "hang"):
        monkeypatch.setattr(sources, "MAX_SECONDS" if path == "drip" else "TIMEOUT", 0.4)
    if path == "huge":
        monkeypatch.setattr(sources, "MAX_BYTES", 50)
    monkeypatch.setenv("ftp_proxy", server)  # must not be used
    start = time.monotonic()
    with pytest.raises(PictureError, match=text) as caught:
        read_source(f"{server}/{path}")
    assert str(caught.value).startswith(f"cannot read {server}/{path}: ")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 15


def test_unreachable_servers_are_errors() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/x.png", "http://[bad/x.png", "http:///x.png"):
        with pytest.raises(PictureError, match=r"^cannot read http"):
            read_source(url)


def test_files_folders_patterns_and_urls_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.png", "a.png", ".hidden.png", "Thumbs.db", "deep/c.png", "[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = ["b.png", ".", "http://x/y.png", "*.png", "[1].png", "none*.png", "missing"]
    assert list(expand_sources(names)) == [
        "b.png",
        *("[1].png", "a.png", "b.png"),
        "http://x/y.png",
        *("[1].png", "a.png", "b.png"),
        *("[1].png", "none*.png", "missing"),
    ]
    assert list(expand_sources(["."], recursive=True))[-1] == "deep/c.png"
    (tmp_path / "empty").mkdir()
    with pytest.raises(PictureError, match="a folder, not an image file"):
        read_source(next(expand_sources(["empty"])))


def test_names_on_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [b"a.png", b"with space.png", b"-", b"\xff.png", b""]
    reading, writing = os.pipe()
    os.write(writing, b"\r\n".join(names))
    os.close(writing)
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        expanded = list(expand_sources(["x.png", "-"]))
    assert expanded == ["x.png", "a.png", "with space.png", "./-", os.fsdecode(b"\xff.png")]
