from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from horsehuman.data import archives
from horsehuman.data.archives import Archive, download_archives, local_archives, unpack
from horsehuman.errors import HorseHumanError


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_unpacks_once_and_mends_what_was_deleted(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "a.zip", {"horses/1.png": b"one", "humans/2.png": b"two"})
    root = unpack({"train": source}, tmp_path / "cache")
    assert (root / "train" / "horses" / "1.png").read_bytes() == b"one"
    before = (root / "train" / "humans" / "2.png").stat().st_ino
    assert unpack({"train": source}, tmp_path / "cache") == root
    assert (root / "train" / "humans" / "2.png").stat().st_ino == before
    (root / "train" / "horses" / "1.png").unlink()
    assert unpack({"train": source}, tmp_path / "cache") == root
    assert (root / "train" / "horses" / "1.png").read_bytes() == b"one"
    assert [entry.name for entry in root.parent.iterdir()] == [root.name]


def link(path: Path) -> None:
    member = zipfile.ZipInfo("horses/link")
    member.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "/etc/passwd")


def bomb(path: Path) -> None:
    make_zip(path, {"horses/1.png": bytes(50 * 2**20)})


def truncated(path: Path) -> None:
    make_zip(path, {f"horses/{n}.png": bytes(range(256)) * 40 for n in range(20)})
    path.write_bytes(path.read_bytes()[:-200])


def corrupt(path: Path) -> None:
    make_zip(path, {"horses/1.png": bytes(range(256)) * 40})
    data = bytearray(path.read_bytes())
    data[60:80] = bytes(20)
    path.write_bytes(bytes(data))


def no_deflate_stream(path: Path) -> None:
    make_zip(path, {"horses/1.png": bytes(range(256)) * 40})
    data = bytearray(path.read_bytes())
    data[42:60] = b"\xff" * 18
    path.write_bytes(bytes(data))


def web_page(path: Path) -> None:
    path.write_text("<html>not found</html>")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: make_zip(path, {"../out.png": b"x"}), "leads outside"),
        (lambda path: make_zip(path, {"/etc/out.png": b"x"}), "leads outside"),
        (lambda path: make_zip(path, {"a\\..\\out.png": b"x"}), "leads outside"),
        (link, "link or device"),
        (bomb, "no archive of pictures"),
        (truncated, "no complete zip file"),
        (corrupt, "damaged"),
        (no_deflate_stream, r"damaged \(Error -3 while decompressing"),
        (web_page, "no complete zip file"),
    ],
)
def test_hostile_and_broken_archives_leave_nothing_behind(
    tmp_path: Path, make: object, reason: str
) -> None:
    source = tmp_path / "a.zip"
    make(source)  # type: ignore[operator]
    with pytest.raises(HorseHumanError, match=reason) as caught:
        unpack({"train": source}, tmp_path / "cache")
    assert str(source) in str(caught.value)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == []
    assert not (tmp_path / "out.png").exists()


def test_full_disk_while_unpacking_leaves_no_half_tree(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "a.zip", {"horses/1.png": b"x", "horses/2.png": bytes(200_000)})
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from horsehuman.data.archives import unpack\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"unpack({{'train': Path({str(source)!r})}}, Path({str(tmp_path / 'cache')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "HorseHumanError: cannot unpack pictures into" in done.stderr
    assert "HORSEHUMAN_CACHE" in done.stderr
    assert list((tmp_path / "cache" / "pictures").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "a.zip", {"horses/1.png": b"x"})
    (tmp_path / "cache").touch()
    with pytest.raises(HorseHumanError, match=r"cannot unpack pictures into .*HORSEHUMAN_CACHE"):
        unpack({"train": source}, tmp_path / "cache")


def test_local_archives_tell_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(HorseHumanError, match=r"there is no horse-or-human\.zip"):
        local_archives(tmp_path)
    for archive in archives.ARCHIVES.values():
        make_zip(tmp_path / archive.name, {"horses/1.png": b"x"})
    assert set(local_archives(tmp_path)) == {"train", "test"}
    assert caplog.text.count("is not the official file") == 2


@pytest.fixture
def mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A server on loopback with three folders; the last two hold the first archive, one whole."""
    served = tmp_path / "served"
    for name in ("empty", "wrong", "whole"):
        (served / name).mkdir(parents=True)
    for key, name in (("train", "a.zip"), ("test", "b.zip")):
        whole = make_zip(served / "whole" / name, {f"horses/{key}.png": b"x" * 1000})
        (served / "wrong" / name).write_bytes(whole.read_bytes()[:100])
        digest = archives._sha256(whole)
        monkeypatch.setitem(archives.ARCHIVES, key, Archive(name, digest))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(served), **kwargs)  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    yield tmp_path / "downloads", [f"{base}/{name}/" for name in ("empty", "wrong", "whole")]
    server.shutdown()
    server.server_close()


def test_download_goes_from_mirror_to_mirror(
    mirrors: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, addresses = mirrors
    found = download_archives(folder, addresses)
    for split, path in found.items():
        assert archives._sha256(path) == archives.ARCHIVES[split].sha256
    assert caplog.text.count("trying the next mirror") == 4
    assert sorted(path.name for path in folder.iterdir()) == ["a.zip", "b.zip"]


def test_no_mirror_names_the_offline_way(mirrors: tuple[Path, list[str]]) -> None:
    folder, addresses = mirrors
    with pytest.raises(HorseHumanError, match=r"data=horse_or_human.*data\.archives_dir=DIR"):
        download_archives(folder, addresses[:2])
    assert not folder.exists() or list(folder.iterdir()) == []
