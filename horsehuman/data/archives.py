"""Image archives: find the bundled set, download the official zip files, and unpack both safely."""

from __future__ import annotations

import hashlib
import logging
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from horsehuman.data.sources import DownloadError, download_blocks
from horsehuman.errors import HorseHumanError, printable
from horsehuman.runtime import asset, cache_dir, progress_bar, track

log = logging.getLogger(__name__)

#: Folders on the web that hold both official archives, tried in this order.
MIRRORS = (
    "https://storage.googleapis.com/download.tensorflow.org/data/",
    "https://storage.googleapis.com/tensorflow-1-public/course2/week3/",
    "https://storage.googleapis.com/learning-datasets/",
)

#: Retries per mirror. A mirror is given up when it delivers fewer than ``MIN_SPEED`` bytes per
#: second, averaged over ``SPEED_WINDOW`` seconds.
RETRIES, MIN_SPEED, SPEED_WINDOW = 1, 10_000, 30.0

#: Largest number of files in an archive.
_MAX_FILES = 200_000

#: Largest unpacked size of an archive in bytes.
_MAX_BYTES = 4 * 2**30

#: Largest ratio of unpacked to packed size. Images are compressed already and hardly shrink, so a
#: far larger ratio means a zip bomb.
_MAX_RATIO = 100


@dataclass(frozen=True)
class Archive:
    """One of the two official archives of Horses or Humans (Laurence Moroney, CC BY 2.0).

    Attributes:
        name: File name of the zip.
        sha256: Hexadecimal SHA-256 digest of the official file; source:
            ``url_checksums/horses_or_humans.txt`` of TensorFlow Datasets.
    """

    name: str
    sha256: str


#: The official archive of each split. The official validation set is used as the test set.
ARCHIVES = {
    "train": Archive(
        "horse-or-human.zip", "e2e6f70d3d549c5dd10a57165e55af253ee66ad750403f95c0fb76bb943633a9"
    ),
    "test": Archive(
        "validation-horse-or-human.zip",
        "ae5fff2f4f5554791f05358108e2e05d9801b191f1896ea101402f0e7f6c32c0",
    ),
}


def image_root(
    source: str, root: str | Path | None = None, archives_dir: str | None = None
) -> Path:
    """Return the folder that holds the images of a source; unpack or download them if necessary.

    Args:
        source: ``box`` (the bundled set), ``archives`` (the official PNG archives) or ``folder``.
        root: The folder, for ``folder``.
        archives_dir: Folder with both official zip files, for ``archives``; ``None`` downloads
            them.

    Raises:
        HorseHumanError: If an archive is missing, damaged or cannot be downloaded, or the images
            cannot be unpacked.
    """
    if source == "box":
        return unpack(bundled_archives())
    if source == "archives":
        if archives_dir is None:
            return unpack(download_archives())
        return unpack(local_archives(Path(str(archives_dir)).expanduser()))
    return Path(str(root)).expanduser()


def bundled_archives() -> dict[str, Path]:
    """Return the bundled archive of each split: the full set as WebP (see ``assets/ASSETS.md``)."""
    return {split: asset(archive.name) for split, archive in ARCHIVES.items()}


def local_archives(folder: Path) -> dict[str, Path]:
    """Return the archive of each split from a folder of zip files that the user downloaded.

    A file whose digest is not the official one is used, and logged.

    Args:
        folder: Folder with both zip files under their official names.

    Raises:
        HorseHumanError: If one of the two files is missing or cannot be read.
    """
    paths = {split: folder / archive.name for split, archive in ARCHIVES.items()}
    for split, path in paths.items():
        if not path.is_file():
            raise HorseHumanError(
                f"data.archives_dir={printable(folder)}: there is no {path.name} in it; "
                "put both official zip files there under their original names"
            )
        if _sha256(path) != ARCHIVES[split].sha256:
            log.info("%s is not the official file (its sha256 differs); using it", printable(path))
    return paths


def download_archives(
    folder: Path | None = None, mirrors: Sequence[str] = MIRRORS
) -> dict[str, Path]:
    """Download the official archives, each from the first mirror that delivers the intact file.

    Files with the official digest that exist already are not downloaded again.

    Args:
        folder: Folder for the downloads; by default ``archives`` in the user's cache.
        mirrors: URLs of folders, each ending in a slash.

    Returns:
        The zip file of each split.

    Raises:
        HorseHumanError: If no mirror delivers a file with the official digest, or the folder cannot
            be written.
    """
    folder = folder or cache_dir() / "archives"
    return {split: _download(archive, folder, mirrors) for split, archive in ARCHIVES.items()}


def unpack(archives: dict[str, Path], cache: Path | None = None) -> Path:
    """Unpack archives into ``<cache>/pictures/<digest>/<split>/``, all or nothing.

    Images that were unpacked before and are intact are reused.

    Args:
        archives: Zip file of each split.
        cache: Cache folder; by default the user's.

    Returns:
        The folder with one subfolder per split.

    Raises:
        HorseHumanError: If an archive is damaged or unsafe, or the disk is full or read-only.
    """
    parent = (cache or cache_dir()) / "pictures"
    digests = "".join(split + _sha256(path) for split, path in archives.items())
    target = parent / hashlib.sha256(digests.encode()).hexdigest()[:16]
    members = {split: _safe_members(path) for split, path in archives.items()}
    if _is_complete(target, members):
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=parent) as temporary:
            fresh = Path(temporary) / "new"
            for split, path in archives.items():
                _extract(path, members[split], fresh / split)
            if target.exists() and not _is_complete(target, members):
                target.rename(Path(temporary) / "old")
            try:
                fresh.rename(target)
            except OSError:  # another process may have unpacked the same archives meanwhile
                if not _is_complete(target, members):
                    raise
    except OSError as error:
        raise HorseHumanError(
            f"cannot unpack pictures into {printable(parent)}: {error.strerror or error}; free "
            "space there, or set the environment variable HORSEHUMAN_CACHE to another folder"
        ) from error
    return target


def _download(archive: Archive, folder: Path, mirrors: Sequence[str]) -> Path:
    import pooch

    pooch.get_logger().setLevel("WARNING")
    registry = {archive.name: f"sha256:{archive.sha256}"}
    reasons: list[str] = []
    for mirror in mirrors:
        if reasons:
            log.info("%s: %s; trying the next mirror", archive.name, reasons[-1])
        downloads = pooch.create(folder, mirror, registry=registry, retry_if_failed=RETRIES)
        try:
            return Path(downloads.fetch(archive.name, downloader=_write_download))
        except ValueError as error:  # a DownloadError, or pooch's error for a wrong digest
            reason = str(error) if isinstance(error, DownloadError) else "not the official file"
            reasons.append(f"{mirror}: {reason}")
        except OSError as error:
            raise HorseHumanError(
                f"cannot write into {printable(folder)}: {error.strerror}; free space there, or "
                "set the environment variable HORSEHUMAN_CACHE to another folder"
            ) from error
    raise HorseHumanError(
        f"data=archives: cannot download {archive.name} ({reasons[0]}): use the bundled copy of "
        "the set with data=horse_or_human, or zip files on disk with data.archives_dir=DIR"
    )


def _write_download(url: str, output_file: str, _: object) -> None:
    """Download a URL into a file under a progress bar; has the signature of a pooch downloader."""
    previous_bytes, previous_seconds = 0, 0.0

    def stop_reason(received: int, seconds: float) -> str:
        nonlocal previous_bytes, previous_seconds
        if seconds - previous_seconds < SPEED_WINDOW:
            return ""
        slow = received - previous_bytes < MIN_SPEED * (seconds - previous_seconds)
        previous_bytes, previous_seconds = received, seconds
        return f"is slower than {MIN_SPEED:,} bytes per second" if slow else ""

    name = url.rpartition("/")[2]
    with Path(output_file).open("wb") as file, progress_bar() as bar:
        task = bar.add_task(f"{name}, kB", total=None)
        for block, length in download_blocks(url, stop_reason):
            file.write(block)
            bar.update(task, completed=file.tell() // 1000, total=length // 1000 or None)


def _safe_members(path: Path) -> list[zipfile.ZipInfo]:
    """Return the files of an archive, without macOS metadata.

    Raises:
        HorseHumanError: If the file is not a complete zip, the archive is too large, or one of its
            members could write outside the target folder.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except Exception as error:  # zipfile raises many types of exception for damaged files
        raise HorseHumanError(
            f"{printable(path)} is not a complete zip file ({error}); download it again"
        ) from error
    size = sum(member.file_size for member in members)
    packed = sum(member.compress_size for member in members)
    if len(members) > _MAX_FILES or size > _MAX_BYTES or size > _MAX_RATIO * packed + 2**20:
        raise HorseHumanError(
            f"{printable(path)} would unpack to {len(members):,} files and {size / 2**20:,.0f} MiB,"
            " too much for an archive of pictures; it is not unpacked"
        )
    for member in members:
        name = PurePosixPath(member.filename)
        outside = name.is_absolute() or ".." in name.parts or {"\\", ":"} & set(member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if outside or kind not in (0, stat.S_IFREG):
            reason = "points outside the archive" if outside else "is a link or device"
            raise HorseHumanError(
                f"{printable(path)}: {member.filename!r} {reason}; the archive is not unpacked"
            )
    return [member for member in members if not member.filename.startswith("__MACOSX/")]


def _extract(path: Path, members: list[zipfile.ZipInfo], folder: Path) -> None:
    """Extract members of an archive into a new folder."""
    folder.mkdir(parents=True)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in track(members, f"unpacking {path.name}", len(members)):
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except OSError:
        raise
    except Exception as error:  # zlib and lzma errors, unknown methods, passwords
        raise HorseHumanError(
            f"{printable(path)} is damaged ({error}); download it again"
        ) from error


def _is_complete(target: Path, members: dict[str, list[zipfile.ZipInfo]]) -> bool:
    """Return whether every member exists below ``target`` with the CRC-32 of the archive."""
    try:
        return all(
            zlib.crc32((target / split / member.filename).read_bytes()) == member.CRC
            for split, split_members in members.items()
            for member in split_members
        )
    except OSError:
        return False


def _sha256(path: Path) -> str:
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise HorseHumanError(f"cannot read {printable(path)}: {error.strerror}") from error
