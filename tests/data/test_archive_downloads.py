"""Download the official archives from a loopback server that misbehaves like real mirrors."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import pytest

from horsehuman.data import archives, sources
from horsehuman.data.archives import download_archives
from horsehuman.errors import HorseHumanError
from tests.commands import serving

FILES = {"a.zip": b"a" * 50_000, "b.zip": b"b" * 70_000}


class Handler(BaseHTTPRequestHandler):
    """Serve two files; the folder in the URL selects how the server misbehaves."""

    requests: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        kind, name = self.path.strip("/").split("/")
        self.requests[kind] += 1
        body = FILES[name]
        if kind.isdigit() or (kind == "flaky" and self.requests[kind] % 2):
            self.send_error(int(kind) if kind.isdigit() else 503)
            return
        self.send_response(302 if kind in ("circle", "redirect") else 200)
        if kind in ("circle", "redirect"):
            self.send_header("Location", f"/{'good' if kind == 'redirect' else kind}/{name}")
            body = b""
        length = {"cut": len(body) + 9, "short": len(body) - 9}.get(kind, len(body))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if kind == "silent":
            time.sleep(0.6)
        if kind == "drip":
            for _ in range(40):
                self.wfile.write(b"x")
                time.sleep(0.1)
        self.wfile.write(b"x" * length if kind == "wrong" else body[:length])

    def log_message(self, *unused: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(Handler) as address:
        yield address


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    Handler.requests.clear()
    for key, (name, content) in zip(("train", "test"), FILES.items(), strict=True):
        monkeypatch.setitem(archives.ARCHIVES, key, name)
        monkeypatch.setitem(archives.SHA256, key, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(archives, "RETRIES", 0)
    monkeypatch.setattr(archives, "SPEED_WINDOW", 0.3)
    monkeypatch.setattr(sources, "TIMEOUT", 0.3)


def download(folder: Path, mirrors: list[str]) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "MIRRORS", mirrors)
        return download_archives(folder)


def check_complete(paths: dict[str, Path]) -> None:
    assert {path.name: path.read_bytes() for path in paths.values()} == FILES


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("404", "the server answers 404"),
        ("429", "the server answers 429"),
        ("500", "the server answers 500"),
        ("circle", "the server answers 302 and redirects in circles"),
        ("cut", "connection closed after 50,000 of 50,009 bytes"),
        ("short", "not the official file"),
        ("wrong", "not the official file"),
        ("silent", "no answer in time"),
        ("drip", "slower than 10,000 bytes per second"),
    ],
)
def test_a_failing_mirror_is_replaced_by_the_next(
    kind: str, reason: str, server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    mirrors = [f"{server}/{kind}/", f"{server}/good/"]
    check_complete(download(tmp_path / "good", mirrors))
    assert time.monotonic() - start < 10
    assert caplog.text.count("trying the next mirror") == 2
    assert reason in caplog.text
    assert sorted(path.name for path in (tmp_path / "good").iterdir()) == ["a.zip", "b.zip"]
    with pytest.raises(HorseHumanError, match=r"data=horse_or_human.*data\.archives_dir=DIR"):
        download(tmp_path / "none", mirrors[:1])
    assert not list((tmp_path / "none").glob("*"))


def test_redirections_are_followed_and_intact_files_kept(server: str, tmp_path: Path) -> None:
    check_complete(download(tmp_path, [f"{server}/on/"]))
    check_complete(download(tmp_path, [f"{server}/500/"]))  # no request is sent
    assert Handler.requests["500"] == 0
    (tmp_path / "a.zip").write_bytes(b"damaged")
    check_complete(download(tmp_path, [f"{server}/good/"]))


def test_a_mirror_is_retried(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(archives, "RETRIES", 1)
    check_complete(download(tmp_path, [f"{server}/flaky/"]))
    assert Handler.requests["flaky"] == 4
    assert "mirror" not in caplog.text


def test_no_mirror_can_be_reached(tmp_path: Path) -> None:
    with pytest.raises(HorseHumanError, match=r"cannot download a\.zip \(http.*refused"):
        download(tmp_path, ["http://127.0.0.1:9/"])
