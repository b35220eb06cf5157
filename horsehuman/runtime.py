"""The current process: bundled files and cache folder, memory and CPU, signals, terminal output.

Nothing here imports torch, so that commands start quickly.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TypeVar

import platformdirs
from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from horsehuman.errors import HorseHumanError, first_line, is_out_of_memory, os_errors, printable

T = TypeVar("T")

#: Names of the trained classifiers that are bundled with the package.
BUNDLED = ("inception", "cnn")

#: File name of the bundled InceptionV3 backbone, pretrained on ImageNet.
BACKBONE_FILE = "inception_v3_trunk.safetensors"

#: Subfolders of the cache folder: for each, a description and the patterns of the names that this
#: package creates there. They include what killed commands leave behind. Nothing else in the cache
#: folder is counted or removed.
CACHED = {
    "pictures": ("unpacked archives", ["[0-9a-f]" * 16, ".unpacking-*"]),
    "features": ("features of the frozen backbone", ["[0-9a-f]" * 32 + ".sqlite*"]),
    "archives": ("downloaded archives", ["*horse-or-human.zip", "tmp????????"]),
}

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

#: Rounds that waiting threads of GNU OpenMP spin (``GOMP_SPINCOUNT``). On two cores a step of the
#: CNN takes as long as with the default, and 0.65 of the time beside a busy process.
SPIN_COUNT = "3000"

# The folder of the package.
_PACKAGE = Path(__file__).resolve().parent

#: The folder of the bundled files; ``ASSETS.md`` in it describes them all.
ASSETS = _PACKAGE / "assets"

#: The file there that lists the SHA-256 digests of the others, in the format of ``sha256sum``.
DIGESTS = "SHA256SUMS"

# Whether this process shows nothing on the terminal; see silence().
_silent = False


def asset(name: str) -> Path:
    """Return the path of a bundled file after its SHA-256 digest is verified.

    Raises:
        HorseHumanError: The file is missing or has changed.
    """
    path, fix = ASSETS / name, "install horsehuman again"
    with os_errors("read", path, fix), path.open("rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
        listed = f"{digest}  {name}" in (ASSETS / DIGESTS).read_text().splitlines()
    if not listed:
        raise HorseHumanError(f"{printable(path)} is damaged (its sha256 differs): {fix}")
    return path


def configs_dir() -> Path:
    """Return the folder of the training configs: in an installed package, or in a clone."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def cache_dir() -> Path:
    """Return the user's cache folder, or the one in the variable ``HORSEHUMAN_CACHE``."""
    folder = os.environ.get("HORSEHUMAN_CACHE")
    return Path(folder) if folder else Path(platformdirs.user_cache_dir("horsehuman"))


def show_cache(*, clear: bool = False) -> None:
    """Print the path of the cache folder and the size of each kind of content.

    Args:
        clear: Also remove this content.

    Raises:
        OSError: If a file cannot be read or removed.
    """
    print(printable(cache_dir()))
    for name, (description, patterns) in CACHED.items():
        paths = [path for pattern in patterns for path in (cache_dir() / name).glob(pattern)]
        files = [file for path in paths for file in (path, *path.rglob("*"))]
        size = sum(file.stat().st_size for file in files if file.is_file())
        print(f"{name:<9} {size / 2**20:8.1f} MiB  {description}")
        for path in paths if clear else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if clear:
        print("removed")


def tune_process() -> bool:
    """Set up memory and threads of this process for tensors; no result changes.

    Freed memory stays in the process. By default glibc maps new pages for every large tensor and
    unmaps them when it is freed, so that each training step pays for the same page faults again.
    With another C library than glibc (musl, macOS, Windows) this does nothing.

    Threads of OpenMP that wait for others spin for :data:`SPIN_COUNT` rounds and then sleep, unless
    the environment says otherwise. By default they spin for much longer, which takes the cores from
    the threads that work if other processes are busy, too.

    Call it before torch is imported, which reads the second setting, and before the first tensor.

    Returns:
        Whether glibc accepted the setting.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (exists only in glibc)
    except (AttributeError, OSError, TypeError):
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 * 2**20}
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings.items())


class PeakMemory:
    """Peak resident memory of the process since this object was created; on Linux only."""

    def __init__(self) -> None:
        self._is_reset = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
            self._is_reset = True

    def gigabytes(self) -> float | None:
        """Return the peak resident memory in GB (10^9 bytes), or ``None`` if it is unknown."""
        peak = _proc_field("self/status", "vmhwm") if self._is_reset else ""
        return round(int(peak.split()[0]) * 1024 / 1e9, 3) if peak else None


def memory_size() -> int:
    """Return the size of the machine's memory in bytes; 8 GiB if it is unknown."""
    size = _proc_field("meminfo", "memtotal")
    return int(size.split()[0]) * 1024 if size else 8 * 2**30


def cpu_flags() -> frozenset[str]:
    """Return the CPU's instruction sets as Linux names them; empty if they are unknown."""
    return frozenset(_proc_field("cpuinfo", "flags", "features").split())


def cpu_name() -> str:
    """Return the CPU's model name, or its architecture if the name is unknown."""
    return _proc_field("cpuinfo", "model name") or platform.processor() or platform.machine()


def _proc_field(file: str, *fields: str) -> str:
    """Return the first value of one of these fields in a file of ``/proc``; empty if unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() in fields:
                return value.strip()
    return ""


def lacks_bf16() -> bool:
    """Return whether the CPU is known to lack bf16 instructions, which torch then emulates."""
    flags = cpu_flags()
    return bool(flags) and not flags & {"avx512_bf16", "amx_bf16", "bf16"}


class Interrupted(SystemExit):
    """Ctrl-C or SIGTERM; ``code``, the command's exit code, is 128 plus the signal's number.

    It is no ``Exception`` and no ``KeyboardInterrupt``, so that no library catches it.
    """


def report_uncaught_errors() -> None:
    """Print one line if memory runs out, and one below the traceback of a bug; for commands."""

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if is_out_of_memory(error):
            fix = "close other programs, or lower batch and image sizes"
            print(f"error: out of memory ({first_line(error)}): {fix}", file=sys.stderr)
        else:
            traceback.print_exception(kind, error, trace)
            fix = "please report it with the lines above, as CONTRIBUTING.md says"
            print(f"error: this is a bug in horsehuman: {fix}", file=sys.stderr)

    sys.excepthook = report


def raise_on_signals() -> None:
    """Make Ctrl-C and SIGTERM raise :class:`Interrupted`; for commands, not for libraries."""

    def stop(signum: int, frame: FrameType | None) -> None:
        for handled in (signal.SIGINT, signal.SIGTERM):
            signal.signal(handled, signal.SIG_IGN)  # a second one must not disturb the cleanup
        raise Interrupted(128 + signum)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def console(*, stderr: bool = True) -> Console:
    """Return a console on stderr or stdout that prints text as it is, without markup."""
    return Console(
        stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=_silent
    )


def table(*columns: str, left: int = 1, title: str | None = None) -> Table:
    """Return a table without lines.

    Args:
        columns: Header of each column.
        left: Number of columns, from the first on, that hold text and are aligned to the left. The
            others hold numbers and are aligned to the right.
        title: Title above the table, if any.
    """
    grid = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    for index, name in enumerate(columns):
        grid.add_column(name, justify="left" if index < left else "right")
    return grid


def format_number(value: float | None) -> str:
    """Format a metric with four decimals, or ``undefined`` for ``None``."""
    return "undefined" if value is None else f"{value:.4f}"


def format_interval(bounds: Sequence[float | None]) -> str:
    """Format an interval with four decimals; empty if a bound is ``None``."""
    low, high = bounds
    return "" if low is None or high is None else f"{low:.4f} - {high:.4f}"


def log_to_stderr() -> None:
    """Print the package's log messages as lines on stderr; for commands, not for libraries."""
    logger = logging.getLogger("horsehuman")
    logger.handlers[:] = [logging.StreamHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def silence() -> None:
    """Hide this rank's warnings, log messages, tables and progress bars, which rank 0 shows."""
    global _silent
    _silent = True
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")


def progress_bar() -> progress.Progress:
    """Return a progress bar with count, rate and time left; shown only on a terminal."""
    text = progress.TextColumn("{task.description}", markup=False)
    count = progress.BarColumn(), progress.MofNCompleteColumn(), _Rate()
    left = progress.TimeRemainingColumn(compact=True)
    hidden = _silent or not sys.stderr.isatty()
    return progress.Progress(text, *count, left, console=console(), transient=True, disable=hidden)


class _Rate(progress.ProgressColumn):
    """The column that shows steps per second."""

    def render(self, task: progress.Task) -> Text:
        """Return the rate with three digits; empty before the first step."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s")


def track(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    """Yield each item and advance a progress bar.

    Args:
        items: What to iterate over.
        description: Text beside the progress bar.
        total: Number of items, or ``None`` if it is unknown.
    """
    with progress_bar() as bar:
        task = bar.add_task(description, total=total)
        for item in items:
            yield item
            bar.advance(task)
