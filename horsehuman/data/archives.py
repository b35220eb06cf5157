"""Where the pictures come from: the box, the official archives, or archives on disk."""

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

# An archive of pictures hardly shrinks; what goes far beyond this is made to fill a disk.
_MAX_FILES = 200_000

_MAX_BYTES = 4 * 2**30

_MAX_RATIO = 100

#: Folders on the net that hold both archives, tried in turn.
MIRRORS = (
    "https://storage.googleapis.com/download.tensorflow.org/data/",
    "https://storage.googleapis.com/tensorflow-1-public/course2/week3/",
    "https://storage.googleapis.com/learning-datasets/",
)

#: Times that a mirror is asked again; bytes a second, over as many seconds, below which it is
#: given up.
RETRIES, SLOWEST, GRACE = 1, 10_000, 30.0


@dataclass(frozen=True)
class Archive:
    """One of the two official archives of Horses or Humans (Laurence Moroney, CC BY 2.0).

    Attributes:
        name: The file's name.
        sha256: Digest of the official file; source: ``url_checksums/horses_or_humans.txt`` of
            TensorFlow Datasets.
    """

    name: str
    sha256: str


#: The split that each archive holds. The official validation set is our test set.
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
    """The folder with the pictures of a source, unpacked or downloaded where need be.

    Args:
        source: ``box``, ``archives`` or ``folder``.
        root: The folder, for ``folder``.
        archives_dir: Folder with both official zips, for ``archives``; without it they are
            downloaded.

    Raises:
        HorseHumanError: They are not there or cannot be unpacked.
    """
    if source == "box":
        return unpack(bundled_archives())
    if source == "archives":
        local = archives_dir is not None and Path(str(archives_dir)).expanduser()
        return unpack(local_archives(local) if local else download_archives())
    return Path(str(root)).expanduser()


def bundled_archives() -> dict[str, Path]:
    """The archives in the package: the complete set as WebP (see ``assets/ASSETS.md``)."""
    return {split: asset(archive.name) for split, archive in ARCHIVES.items()}


def local_archives(folder: Path) -> dict[str, Path]:
    """Archives that the user has downloaded by hand.

    Raises:
        HorseHumanError: One of the two files is missing.
    """
    found = {split: folder / archive.name for split, archive in ARCHIVES.items()}
    for split, path in found.items():
        if not path.is_file():
            raise HorseHumanError(
                f"data.archives_dir={printable(folder)}: there is no {path.name} in it; "
                "put both official zips there under their own names"
            )
        if _sha256(path) != ARCHIVES[split].sha256:
            log.info("%s is not the official file (its sha256 differs); using it", printable(path))
    return found


def unpack(archives: dict[str, Path], cache: Path | None = None) -> Path:
    """Unpack archives once into ``<cache>/pictures/<digest>/<split>/``, all or nothing.

    Args:
        archives: Split name to zip file.
        cache: The cache folder; by default the user's.

    Returns:
        The folder that holds one folder for each split.

    Raises:
        HorseHumanError: An archive is damaged or hostile, or the disk is full or read-only.
    """
    parent = (cache or cache_dir()) / "pictures"
    digests = "".join(split + _sha256(path) for split, path in archives.items())
    target = parent / hashlib.sha256(digests.encode()).hexdigest()[:16]
    members = {split: _members(path) for split, path in archives.items()}
    if _is_complete(target, members):
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=parent) as scratch:
            fresh = Path(scratch) / "new"
            for split, path in archives.items():
                _extract(path, members[split], fresh / split)
            if target.exists() and not _is_complete(target, members):
                target.rename(Path(scratch) / "old")
            try:
                fresh.rename(target)
            except OSError:  # another process was faster
                if not _is_complete(target, members):
                    raise
    except OSError as error:
        raise HorseHumanError(
            f"cannot unpack pictures into {printable(parent)}: {error.strerror or error}; make room "
            "there, or name another folder in the environment variable HORSEHUMAN_CACHE"
        ) from error
    return target


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """List the files of an archive; refuse it whole if one could do harm."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except Exception as error:  # damaged files raise whatever they like
        raise HorseHumanError(
            f"{printable(path)} is no complete zip file ({error}); fetch it again"
        ) from error
    size = sum(member.file_size for member in members)
    packed = sum(member.compress_size for member in members)
    if len(members) > _MAX_FILES or size > _MAX_BYTES or size > _MAX_RATIO * packed + 2**20:
        raise HorseHumanError(
            f"{printable(path)} would unpack to {len(members):,} files and {size / 2**20:,.0f} MiB: "
            "that is no archive of pictures, and it is not unpacked"
        )
    for member in members:
        name = PurePosixPath(member.filename)
        outside = name.is_absolute() or ".." in name.parts or {"\\", ":"} & set(member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if outside or kind not in (0, stat.S_IFREG):
            what = "leads outside" if outside else "is a link or device"
            raise HorseHumanError(
                f"{printable(path)}: {member.filename!r} {what}; the archive is not unpacked"
            )
    return [member for member in members if not member.filename.startswith("__MACOSX/")]


def _extract(path: Path, members: list[zipfile.ZipInfo], folder: Path) -> None:
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
    except Exception as error:  # zlib, lzma, unknown methods, passwords
        raise HorseHumanError(f"{printable(path)} is damaged ({error}); fetch it again") from error


def _is_complete(target: Path, members: dict[str, list[zipfile.ZipInfo]]) -> bool:
    """Whether all that was unpacked is there, with the content that the archive says."""
    try:
        return all(
            zlib.crc32((target / split / member.filename).read_bytes()) == member.CRC
            for split, listed in members.items()
            for member in listed
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


def download_archives(
    folder: Path | None = None, mirrors: Sequence[str] = MIRRORS
) -> dict[str, Path]:
    """Download the official archives once, each from the first mirror that has it whole.

    Args:
        folder: Where they are kept; by default in the user's cache.
        mirrors: Addresses of folders, each ending in a slash.

    Raises:
        HorseHumanError: No mirror gave a file with the official sha256.
    """
    folder = folder or cache_dir() / "archives"
    return {split: _download(archive, folder, mirrors) for split, archive in ARCHIVES.items()}


def _download(archive: Archive, folder: Path, mirrors: Sequence[str]) -> Path:
    import pooch

    pooch.get_logger().setLevel("WARNING")
    registry = {archive.name: f"sha256:{archive.sha256}"}
    reasons: list[str] = []
    for mirror in mirrors:
        if reasons:
            log.info("%s: %s; trying the next mirror", archive.name, reasons[-1])
        box = pooch.create(folder, mirror, registry=registry, retry_if_failed=RETRIES)
        try:
            return Path(box.fetch(archive.name, downloader=_write))
        except ValueError as error:  # of the web, or pooch's of the digest
            reason = str(error) if isinstance(error, DownloadError) else "not the official file"
            reasons.append(f"{mirror}: {reason}")
        except OSError as error:
            raise HorseHumanError(
                f"cannot write into {printable(folder)}: {error.strerror}; make room there, or name "
                "another folder in the environment variable HORSEHUMAN_CACHE"
            ) from error
    raise HorseHumanError(
        f"data=archives: cannot download {archive.name} ({reasons[0]}): use the same pictures in "
        "the box with data=horse_or_human, or zips fetched elsewhere with data.archives_dir=DIR"
    )


def _write(url: str, output_file: str, _: object) -> None:
    """Write what an address gives into a file, as pooch asks for it, under a progress bar."""
    before, began = 0, 0.0

    def enough(done: int, seconds: float) -> str:
        nonlocal before, began
        if seconds - began < GRACE:
            return ""
        slow = done - before < SLOWEST * (seconds - began)
        before, began = done, seconds
        return f"gives less than {SLOWEST:,} bytes a second" if slow else ""

    name = url.rpartition("/")[2]
    with Path(output_file).open("wb") as file, progress_bar() as bar:
        task = bar.add_task(f"{name}, kB", total=None)
        for block, promised in download_blocks(url, enough):
            file.write(block)
            done = file.tell() // 1000
            bar.update(task, completed=done, total=promised // 1000 or None)
