"""The official archives from the net: each from the first mirror that has it whole."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from horsehuman.errors import HorseHumanError, shown
from horsehuman.runtime import cache_dir
from horsehuman.sources import WebError, stream
from horsehuman.terminal import progress_bar

log = logging.getLogger(__name__)


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

#: Folders on the net that hold both archives, tried in turn.
MIRRORS = (
    "https://storage.googleapis.com/download.tensorflow.org/data/",
    "https://storage.googleapis.com/tensorflow-1-public/course2/week3/",
    "https://storage.googleapis.com/learning-datasets/",
)

#: Times that a mirror is asked again; bytes a second, over as many seconds, below which it is
#: given up.
RETRIES, SLOWEST, GRACE = 1, 10_000, 30.0


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
            reason = str(error) if isinstance(error, WebError) else "not the official file"
            reasons.append(f"{mirror}: {reason}")
        except OSError as error:
            raise HorseHumanError(
                f"cannot write into {shown(folder)}: {error.strerror}; make room there, or name "
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
        for block, promised in stream(url, enough):
            file.write(block)
            done = file.tell() // 1000
            bar.update(task, completed=done, total=promised // 1000 or None)
