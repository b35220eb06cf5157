"""Folders and files of runs and reports: names, checks, locks and atomic writes.

A run's folder has ``config.yaml``, ``splits.csv``, ``run.json``, ``metrics.json``, ``checkpoints``
and the reports on its classifier. Every file is written atomically, under a temporary name that is
changed at the end, so that a reader finds either the complete file or none.
"""

import csv
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from rich.console import RenderableType

from horsehuman.errors import HorseHumanError, os_errors, printable
from horsehuman.runtime import BUNDLED, console

log = logging.getLogger(__name__)

#: Seconds to wait for the lock of a run. When a training process is killed, the processes that it
#: started notice this, exit and release the lock within that time.
LOCK_TIMEOUT = 15.0


def create_run_dir(folder: Path) -> None:
    """Create the folder of a new run.

    Args:
        folder: The run's folder. It may exist if it has no ``checkpoints`` in it.

    Raises:
        HorseHumanError: If the folder cannot be written or already holds a run.
    """
    checkpoints, fix = folder / "checkpoints", "name another folder with hydra.run.dir=DIR"
    with os_errors("write into", folder, fix):
        if checkpoints.exists():
            raise HorseHumanError(f"{printable(folder)} holds a run already: {fix}")
        checkpoints.mkdir(parents=True)


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Lock a run's folder, so that no other process trains this run at the same time.

    The operating system releases the lock of a process that dies. On a file system without locks
    the run is not locked and a warning is logged.

    Raises:
        HorseHumanError: If another process holds the lock for more than :data:`LOCK_TIMEOUT`.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / ".lock").acquire(timeout=LOCK_TIMEOUT))
        except Timeout as error:
            state = "is being trained by another process: wait for it, or stop it"
            raise HorseHumanError(f"{printable(folder)} {state}") from error
        except NotImplementedError:
            log.warning("%s: file system without locks; train it in one process", printable(folder))
        yield


def link_latest(folder: Path) -> None:
    """Point the link ``outputs/<model>/latest`` to a run in that folder or in a sweep there.

    A run elsewhere has no such link. Where links are not permitted, as on Windows, or ``latest``
    is a folder, this is logged and nothing changes.
    """
    top = folder.parent.parent if folder.parent.name.startswith("sweep_") else folder.parent
    if top.parent.name != "outputs":
        return
    link, temporary = top / "latest", top / f".latest-{os.getpid()}"
    try:
        temporary.symlink_to(os.path.relpath(folder, top), target_is_directory=True)
        temporary.replace(link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        log.info("%s is not updated: %s", printable(link), error.strerror)


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (folder / "splits.csv").is_file()


def find_run(model: str) -> Path | None:
    """Return the folder of the run that trained a classifier.

    Args:
        model: See :func:`~horsehuman.models.checkpoint.load_classifier`.

    Returns:
        The folder, or ``None`` for a bundled classifier and for a file or folder of no run.
    """
    if model in BUNDLED:
        return None
    path = Path(model).expanduser()
    folder = path if path.is_dir() else path.parent.parent
    return folder if is_run(folder) else None


def check_output_file(path: Path, *, force: bool) -> None:
    """Check the file that ``--out`` names before any work is done for it.

    Args:
        path: The file to be written.
        force: Whether an existing file may be overwritten.

    Raises:
        HorseHumanError: If the file exists and must not be overwritten, is no regular file, or its
            folder does not exist.
    """
    option = f"--out {printable(path)}"
    if path.exists() and not path.is_file():
        raise HorseHumanError(f"{option} is a folder or a device: name a file")
    if not path.parent.is_dir():
        raise HorseHumanError(f"{option}: the folder does not exist")
    if path.exists() and not force:
        raise HorseHumanError(f"{option} exists already: name another file, or add --force")


@dataclass(frozen=True)
class ReportOptions:
    """The options of all commands that write a report.

    Attributes:
        out: The folder or file that ``--out`` names, if any.
        force: Whether an earlier report there may be overwritten.
        plot: Whether figures are drawn.
        json: Whether the report is printed as JSON instead of tables.
    """

    out: Path | None = None
    force: bool = False
    plot: bool = True
    json: bool = False

    def create_dir(self, default: Path, files: Sequence[str]) -> Path:
        """Create the folder of a report without overwriting an earlier report.

        Args:
            default: The folder if ``out`` names none.
            files: Names of the files in a report.

        Returns:
            The folder, which exists and is writable.

        Raises:
            HorseHumanError: If the folder is a file, holds a run or a report, or cannot be written.
        """
        folder = self.out or default
        if is_run(folder):
            raise HorseHumanError(f"--out {printable(folder)} is a run's folder: name another one")
        if not self.force and any((folder / name).exists() for name in files):
            fix = "add --force, or name another folder with --out"
            raise HorseHumanError(f"{printable(folder)} holds a report already: {fix}")
        with os_errors("write into", folder, "name another folder with --out"):
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / ".writable", b"")
            (folder / ".writable").unlink()
        return folder

    @contextmanager
    def replace_report(self, default: Path, files: Sequence[str]) -> Iterator[Path]:
        """Create the folder, and remove the earlier report in it when the block succeeds.

        If the block fails, an earlier report is unchanged, and a new folder is removed. The new
        report is therefore computed in the block and written after it.

        Args:
            default: The folder if ``out`` names none.
            files: Names of the files in a report.

        Yields:
            The folder; see :meth:`create_dir` for the errors.
        """
        folder = self.create_dir(default, files)
        try:
            yield folder
        except BaseException:
            with suppress(OSError):  # rmdir fails if the folder holds other files
                folder.rmdir()
            raise
        for name in files:
            (folder / name).unlink(missing_ok=True)

    def print(self, content: Any, lines: Iterable[RenderableType], label: str, path: Path) -> None:
        """Print a report on stdout, as JSON or for people.

        Args:
            content: The report as plain values; printed as JSON if that was asked for.
            lines: The tables and lines that are printed otherwise, and below them ``path``.
            label: Text before the path.
            path: Where the report is.
        """
        if self.json:
            print_json(content)
        else:
            console(stderr=False).print(*lines, f"{label:<12}{printable(path)}", sep="\n")


def print_json(value: Any) -> None:
    """Print plain values as JSON on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def unused_path(path: Path, is_taken: Callable[[Path], bool]) -> Path:
    """Return ``path``, or the first of ``NAME-2.SUFFIX``, ``NAME-3.SUFFIX``, ... not taken."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not is_taken(name))


def evaluation_dir(model: str, split: str | None, data: str | None = None) -> Path:
    """Return the default folder of an evaluation.

    Args:
        model: See :func:`~horsehuman.models.checkpoint.load_classifier`.
        split: The evaluated split of the images of the classifier's own run.
        data: Other images that were evaluated, if any.

    Returns:
        ``evaluate-SPLIT`` in the run's folder if its own images are evaluated, otherwise a folder
        below ``outputs/evaluate``.
    """
    run = None if data else find_run(model)
    if run:
        return run / f"evaluate-{split}"
    name = model if model in BUNDLED else Path(model).expanduser().resolve().name
    return Path("outputs/evaluate") / name


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: write a temporary file, sync it to the disk and rename it.

    Args:
        path: The file; it is replaced if it exists.
        write: Writes the content to the open temporary file.

    Raises:
        OSError: If the file cannot be written. An existing file is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch.save hides the error of a full disk
            raise error.__context__ from None
        raise


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of a process that was killed in :func:`write_atomic`."""
    for temporary in folder.glob(".*.*.*"):
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file with this content atomically."""
    write_atomic(path, lambda file: file.write(content))


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write a JSON file atomically.

    Args:
        path: The file.
        value: Dicts, lists, strings, bools, ``None`` and numbers; finite, as JSON has no NaN.
        sort_keys: Whether keys are sorted.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    text = json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or damaged."""
    with suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically; file names that are no valid UTF-8 keep their bytes.

    Args:
        path: The file.
        header: Names of the columns.
        rows: Values of each row, in the order of ``header``.
    """
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write_bytes(path, text.getvalue().encode(errors="surrogateescape"))
