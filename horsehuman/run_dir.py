"""The run folder: what is in it, and which is the newest."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from horsehuman.errors import HorseHumanError, printable
from horsehuman.runtime import BUNDLED

log = logging.getLogger(__name__)

#: Seconds within which what a process that was killed has started notices that, and ends.
LOCK_TIMEOUT = 15.0

#: What ``horsehuman evaluate`` writes.
EVALUATION_FILES = ("metrics.json", "predictions.csv", "report.png", "pictures.png")


def create_run_dir(folder: Path) -> None:
    """Take a folder for a new run.

    Raises:
        HorseHumanError: It cannot be written, or holds a run already.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True)
    except FileExistsError as error:
        raise HorseHumanError(
            f"{printable(folder)} holds a run already: start again, or name another folder with "
            "hydra.run.dir=DIR"
        ) from error
    except OSError as error:
        raise HorseHumanError(
            f"cannot write into {printable(folder)}: {error.strerror}; name another folder with "
            "hydra.run.dir=DIR"
        ) from error


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Let no other process train into a run's folder meanwhile; a process that dies lets go of it.

    Raises:
        HorseHumanError: Another one does.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=LOCK_TIMEOUT)
    except Timeout as error:
        raise HorseHumanError(
            f"{printable(folder)} is being trained by another process: let it end, or end it"
        ) from error
    except NotImplementedError:
        log.warning(
            "%s is on a disk without locks: let no other process train it", printable(folder)
        )
    try:
        yield
    finally:
        lock.release()


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file aside, sync it to the disk and rename it: it is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch.save hides a full disk
            raise error.__context__ from None
        raise


def remove_partial_files(folder: Path) -> None:
    """Remove what :func:`write_atomic` was writing when its process was killed."""
    for aside in folder.glob(".*.*.*"):
        aside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file with this content, whole or not at all."""
    write_atomic(path, lambda file: file.write(content))


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write plain values as JSON, whole or not at all; there is no NaN in JSON."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """What a file of JSON says; nothing where it is not there, or not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, whole or not at all; names that are no text stay what they are."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode(errors="surrogateescape"))


def write_skipped(folder: Path, skipped: Mapping[str, str]) -> None:
    """Write ``skipped.csv``: files that were left out and why."""
    write_csv(folder / "skipped.csv", ("picture", "reason"), skipped.items())


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> Path:
    """Write ``metrics.json`` and return its path."""
    write_json(folder / "metrics.json", metrics, sort_keys=True)
    return folder / "metrics.json"


def link_latest(folder: Path) -> None:
    """Let ``latest``, beside the folder of a run or of its sweep, point to the run."""
    top = folder.parent.parent if folder.parent.name.startswith("sweep_") else folder.parent
    link, aside = top / "latest", top / f".latest-{os.getpid()}"
    try:
        aside.symlink_to(os.path.relpath(folder, top), target_is_directory=True)
        aside.replace(link)
    except OSError as error:  # Windows without the right to link; a folder of that name
        aside.unlink(missing_ok=True)
        log.info("%s is not updated: %s", printable(link), error.strerror)


def unused_path(path: Path, is_taken: Callable[[Path], bool], *, is_folder: bool = False) -> Path:
    """The path, or with the first number behind its name, from 2 on, that is not taken."""
    ending = "" if is_folder else path.suffix
    found, number = path, 2
    while is_taken(found):
        found = path.with_name(f"{path.name.removesuffix(ending)}-{number}{ending}")
        number += 1
    return found


def check_output_file(path: Path, *, force: bool) -> None:
    """Check the file that ``--out`` names before any work is done for it.

    Raises:
        HorseHumanError: It is there already and must not be replaced, is no file, or is in no
            folder.
    """
    if path.exists() and not path.is_file():
        raise HorseHumanError(f"--out {printable(path)} is a folder or a device: name a file")
    if not path.parent.is_dir():
        raise HorseHumanError(
            f"--out {printable(path)}: there is no folder {printable(path.parent)}"
        )
    if path.exists() and not force:
        raise HorseHumanError(
            f"--out {printable(path)} is there already: name another, or add --force"
        )


def create_report_dir(
    given: Path | None, default: Path, *, force: bool, report: Sequence[str]
) -> Path:
    """Make the folder of a report; one that holds a report already is not written over.

    Args:
        given: What the user named, if anything.
        default: Otherwise; a number is added to its name while that holds a report.
        force: Write over a report in the folder that the user named.
        report: Patterns of the files that a report has.

    Raises:
        HorseHumanError: The folder holds a report, or cannot be written.
    """

    def holds_report(folder: Path) -> bool:
        return folder.is_file() or any(any(folder.glob(pattern)) for pattern in report)

    folder = given or unused_path(default, holds_report, is_folder=True)
    if is_run(folder):
        raise HorseHumanError(f"--out {printable(folder)} is a run: name another folder")
    if not force and holds_report(folder):
        raise HorseHumanError(
            f"--out {printable(folder)} holds a report already: name another folder, or add --force"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise HorseHumanError(
            f"cannot write into {printable(folder)}: {error.strerror}; name another folder with --out"
        ) from error
    return folder


def evaluation_dir(model: str, split: str | None, data: str | None = None) -> Path:
    """Where an evaluation of a classifier goes, unless the user says otherwise.

    Args:
        model: See :func:`~horsehuman.checkpoint.load_classifier`.
        split: Of the run's own pictures.
        data: Other pictures, if any.
    """
    run = None if data else find_run(model)
    if run:
        return run / f"evaluate-{split}"
    name = model if model in BUNDLED else Path(model).expanduser().resolve().name
    return Path("outputs/evaluate") / name


def latest_evaluation(model: str, root: Path | None) -> Path:
    """The newest report on a classifier's test set, under its own name or one with a number.

    Args:
        model: See :func:`~horsehuman.checkpoint.load_classifier`.
        root: Folder of the classifier's own pictures, if they are known; reports on others do not
            count.

    Returns:
        Its folder; where there is none, the one that it would have.
    """
    default = evaluation_dir(model, "test")
    numbered = re.compile(rf"{re.escape(default.name)}(-[0-9]+)?")
    found = {
        path.parent: path.stat().st_mtime
        for path in default.parent.glob("*/metrics.json")
        if numbered.fullmatch(path.parent.name) and _is_on(read_json(path), root)
    }
    return max(found, key=found.__getitem__, default=default)


def _is_on(report: dict[str, Any], root: Path | None) -> bool:
    if root is None:
        return "metrics" in report
    return Path(str(report.get("data"))).name == root.name and report.get("split") == "test"


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "splits.csv").is_file()


def find_run(model: str) -> Path | None:
    """The folder of the run that a classifier comes from, where that is known."""
    if model in BUNDLED:
        return None
    path = Path(model).expanduser()
    folders = [path] if path.is_dir() else [path.parent.parent]
    return next(filter(is_run, folders), None)
