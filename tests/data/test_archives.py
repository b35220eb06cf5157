from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from horsehuman.data import archives
from horsehuman.data.archives import local_archives, unpack
from horsehuman.errors import HorseHumanError


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_unpack_runs_once_and_restores_deleted_files(tmp_path: Path) -> None:
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


def swallowed(path: Path) -> None:
    """Flip a bit so that the comment of one member covers the entry of the next."""
    make_zip(path, {"horses/1.png": b"one", "horses/" + 71 * "2" + ".png": b"two"})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    size = data.index(b"PK\5\6") - data.index(b"PK\1\2", entry + 1)
    assert size.bit_count() == 1
    data[entry + 32] ^= size  # length of the comment
    path.write_bytes(bytes(data))


def web_page(path: Path) -> None:
    path.write_text("<html>not found</html>")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: make_zip(path, {"../out.png": b"x"}), "points outside the archive"),
        (lambda path: make_zip(path, {"/etc/out.png": b"x"}), "points outside the archive"),
        (lambda path: make_zip(path, {"a\\..\\out.png": b"x"}), "points outside the archive"),
        (link, "is a link or device"),
        (bomb, "would unpack to 1 files and 50 MiB: too much for pictures"),
        (truncated, "is not an intact zip file"),
        (corrupt, "is not an intact zip file"),
        (no_deflate_stream, r"is not an intact zip file \(Error -3 while decompressing"),
        (swallowed, "is not an intact zip file"),
        (web_page, "is not an intact zip file"),
    ],
)
def test_unsafe_and_damaged_archives_leave_no_files(
    tmp_path: Path, make: object, reason: str
) -> None:
    source = tmp_path / "a.zip"
    make(source)  # type: ignore[operator]
    with pytest.raises(HorseHumanError, match=reason) as caught:
        unpack({"train": source}, tmp_path / "cache")
    assert str(source) in str(caught.value)
    remaining = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert remaining == []
    assert not (tmp_path / "out.png").exists()


def test_full_disk_while_unpacking_leaves_no_partial_tree(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "a.zip", {"horses/1.png": b"x", "horses/2.png": bytes(200_000)})
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from horsehuman.data.archives import unpack\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"unpack({{'train': Path({str(source)!r})}}, Path({str(tmp_path / 'cache')!r}))\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "HorseHumanError: cannot unpack pictures into" in completed.stderr
    assert "HORSEHUMAN_CACHE" in completed.stderr
    assert list((tmp_path / "cache" / "pictures").iterdir()) == []


def test_unwritable_cache_is_an_error(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "a.zip", {"horses/1.png": b"x"})
    (tmp_path / "cache").touch()
    with pytest.raises(HorseHumanError, match=r"cannot unpack pictures into .*HORSEHUMAN_CACHE"):
        unpack({"train": source}, tmp_path / "cache")


def test_local_archives_log_unofficial_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(HorseHumanError, match=r"there is no .*/horse-or-human\.zip: put it there"):
        local_archives(tmp_path)
    for name in archives.ARCHIVES.values():
        make_zip(tmp_path / name, {"horses/1.png": b"x"})
    assert set(local_archives(tmp_path)) == {"train", "test"}
    assert caplog.text.count("is not the official file") == 2


def test_archives_are_official_if_both_digests_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert archives.are_official("box", None)
    assert archives.are_official("archives", None)
    assert not archives.are_official("folder", None)
    assert not archives.are_official("archives", str(tmp_path))
    for name in archives.ARCHIVES.values():
        (tmp_path / name).write_bytes(name.encode())
    assert not archives.are_official("archives", str(tmp_path))
    digests = {s: hashlib.sha256(n.encode()).hexdigest() for s, n in archives.ARCHIVES.items()}
    monkeypatch.setattr(archives, "SHA256", digests)
    assert archives.are_official("archives", str(tmp_path))
