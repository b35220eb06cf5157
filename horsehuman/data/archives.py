"""Image archives: find the bundled set, download the official zip files, and unpack both safely."""

import errno
import hashlib
import logging
import stat
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pooch

from horsehuman.data.sources import DownloadError, download_blocks
from horsehuman.errors import HorseHumanError, is_out_of_memory, os_errors, printable
from horsehuman.runtime import asset, cache_dir, progress_bar, track

log = logging.getLogger(__name__)

#: Folders on the web that hold both official archives, tried in this order; each ends in a slash.
MIRRORS = (
    "https://storage.googleapis.com/download.tensorflow.org/data/",
    "https://storage.googleapis.com/tensorflow-1-public/course2/week3/",
    "https://storage.googleapis.com/learning-datasets/",
)

RETRIES = 1  #: Retries per mirror.
MIN_SPEED = 10_000  #: Lowest speed of a mirror in bytes per second; a slower one is given up.
SPEED_WINDOW = 30.0  #: Seconds over which the speed is averaged.

#: Largest number of files in an archive.
_MAX_FILES = 200_000

#: Largest unpacked size of an archive in bytes.
_MAX_BYTES = 4 * 2**30

#: Largest ratio of unpacked to packed size. Images are compressed already and hardly shrink, so a
#: far larger ratio means a zip bomb.
_MAX_RATIO = 100

#: What to do when a folder in the cache cannot be written.
_CACHE_FIX = "free space there, or set the environment variable HORSEHUMAN_CACHE to another folder"

#: File name of the official zip of each split (Horses or Humans, Laurence Moroney, CC BY 2.0). The
#: official validation set is used as the test set.
ARCHIVES = {"train": "horse-or-human.zip", "test": "validation-horse-or-human.zip"}

#: SHA-256 digest of each official zip; source: ``url_checksums/horses_or_humans.txt`` of TensorFlow
#: Datasets.
SHA256 = {
    "train": "e2e6f70d3d549c5dd10a57165e55af253ee66ad750403f95c0fb76bb943633a9",
    "test": "ae5fff2f4f5554791f05358108e2e05d9801b191f1896ea101402f0e7f6c32c0",
}


def image_root(source: str, root: Path | None = None, archives_dir: str | None = None) -> Path:
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
    return {split: asset(name) for split, name in ARCHIVES.items()}


def local_archives(folder: Path) -> dict[str, Path]:
    """Return the archive of each split from a folder of zip files that the user downloaded.

    A file whose digest is not the official one is used, and logged.

    Args:
        folder: Folder with both zip files under their official names.

    Raises:
        HorseHumanError: If one of the two files is missing or cannot be read.
    """
    paths = {split: folder / name for split, name in ARCHIVES.items()}
    for split, path in paths.items():
        if not path.is_file():
            raise HorseHumanError(f"data.archives_dir: there is no {printable(path)}: put it there")
        if _sha256(path) != SHA256[split]:
            log.info("%s is not the official file (its sha256 differs); using it", printable(path))
    return paths


def are_official(source: str, archives_dir: str | None) -> bool:
    """Return whether a source has the official images: bundled, or archives with their digests.

    Args:
        source: See :func:`image_root`.
        archives_dir: Folder with both zip files; ``None`` for downloads, which are verified.
    """
    if source != "archives" or archives_dir is None:
        return source != "folder"
    paths = {s: Path(archives_dir).expanduser() / name for s, name in ARCHIVES.items()}
    return all(path.is_file() and _sha256(path) == SHA256[s] for s, path in paths.items())


def download_archives(folder: Path | None = None) -> dict[str, Path]:
    """Download the official archives, each from the first mirror that delivers the intact file.

    Files with the official digest that exist already are not downloaded again.

    Args:
        folder: Folder for the downloads; by default ``archives`` in the user's cache.

    Returns:
        The zip file of each split.

    Raises:
        HorseHumanError: If no mirror delivers a file with the official digest, or the folder cannot
            be written.
    """
    folder = folder or cache_dir() / "archives"
    return {split: _download(name, SHA256[split], folder) for split, name in ARCHIVES.items()}


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
    with os_errors("unpack pictures into", parent, _CACHE_FIX):
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=parent) as temporary:
            fresh = Path(temporary, "new")
            for split, path in archives.items():
                _extract(path, members[split], fresh / split)
            if target.exists() and not _is_complete(target, members):
                target.rename(Path(temporary, "old"))
            try:
                fresh.rename(target)
            except OSError:  # another process may have unpacked the same archives meanwhile
                if not _is_complete(target, members):
                    raise
    return target


def _download(name: str, sha256: str, folder: Path) -> Path:
    pooch.get_logger().setLevel("WARNING")
    reasons: list[str] = []
    for mirror in MIRRORS:
        if reasons:
            log.info("%s: %s; trying the next mirror", name, reasons[-1])
        downloads = pooch.create(folder, mirror, registry={name: sha256}, retry_if_failed=RETRIES)
        try:
            with os_errors("write into", folder, _CACHE_FIX):
                return Path(downloads.fetch(name, downloader=_write_download))
        except ValueError as error:  # a DownloadError, or pooch's error for a wrong digest
            reason = error if isinstance(error, DownloadError) else "not the official file"
            reasons.append(f"{mirror}: {reason}")
    fix = "use the bundled set with data=horse_or_human, or zip files with data.archives_dir=DIR"
    raise HorseHumanError(f"data=archives: cannot download {name} ({reasons[0]}): {fix}")


def _write_download(url: str, output_file: str, _: object) -> None:
    """Download a URL into a file under a progress bar; has the signature of a pooch downloader."""
    start, position = time.monotonic(), 0
    with Path(output_file).open("wb") as file, progress_bar() as bar:
        task = bar.add_task(f"{url.rpartition('/')[2]}, kB", total=None)
        for block, length in download_blocks(url):
            file.write(block)
            bar.update(task, completed=file.tell() // 1000, total=length // 1000 or None)
            seconds = time.monotonic() - start
            if seconds >= SPEED_WINDOW:
                if file.tell() - position < MIN_SPEED * seconds:
                    raise DownloadError(f"slower than {MIN_SPEED:,} bytes per second")
                start, position = time.monotonic(), file.tell()


@contextmanager
def _damage_errors(path: Path) -> Iterator[None]:
    """Turn the exceptions that zipfile raises for a damaged archive into one that names it."""
    try:
        yield
    except Exception as error:  # many types: zlib and lzma errors, unknown methods, passwords
        # bz2 raises an OSError without errno, and a seek before the beginning one with EINVAL.
        system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if system or is_out_of_memory(error):
            raise
        reason = f"is not an intact zip file ({error})"
        raise HorseHumanError(f"{printable(path)} {reason}; download it again") from error


def _safe_members(path: Path) -> list[zipfile.ZipInfo]:
    """Return the files of an archive, without macOS metadata.

    Raises:
        HorseHumanError: If the file is not a complete zip, the archive is too large, or one of its
            members could write outside the target folder.
    """
    with _damage_errors(path), zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if any(b"PK\1\2" in member.comment for member in members):
            raise zipfile.BadZipFile("a comment covers the entry of a file")
    members = [m for m in members if not m.filename.startswith("__MACOSX/")]
    size = sum(member.file_size for member in members)
    packed = sum(member.compress_size for member in members)
    if len(members) > _MAX_FILES or size > min(_MAX_BYTES, _MAX_RATIO * packed + 2**20):
        content = f"{len(members):,} files and {size / 2**20:,.0f} MiB"
        raise HorseHumanError(f"{printable(path)} would unpack to {content}: too much for pictures")
    for member in members:
        name = PurePosixPath(member.filename)
        outside = name.is_absolute() or ".." in name.parts or {"\\", ":"} & set(member.filename)
        if outside or stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            reason = "points outside the archive" if outside else "is a link or device"
            raise HorseHumanError(f"{printable(path)}: {member.filename!r} {reason}: not unpacked")
    return members


def _extract(path: Path, members: Sequence[zipfile.ZipInfo], folder: Path) -> None:
    """Extract members of an archive into a new folder; their CRC-32 is checked."""
    folder.mkdir(parents=True)
    with _damage_errors(path), zipfile.ZipFile(path) as archive:
        for member in track(members, f"unpacking {path.name}", len(members)):
            archive.extract(member, folder)


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
    with os_errors("read", path):
        return str(pooch.file_hash(path))
