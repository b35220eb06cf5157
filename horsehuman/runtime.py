"""The process: its memory allocator and its folder for things worth keeping."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import TypeVar

import platformdirs
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from horsehuman.errors import HorseHumanError, printable

#: The trained classifiers in the package.
BUNDLED = ("inception", "cnn")

#: The pretrained trunk in the package.
BACKBONE_FILE = "inception_v3_trunk.safetensors"

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

T = TypeVar("T")

_silent = False

#: What is ours in the cache folder, also of commands that were killed; nothing else in it is
#: counted or removed.
CACHED = {
    "pictures": ("unpacked archives", ["[0-9a-f]" * 16, ".unpacking-*"]),
    "features": ("what the frozen backbone saw", ["[0-9a-f]" * 32 + ".sqlite*"]),
    "archives": ("downloaded zips", ["*horse-or-human.zip", "tmp????????"]),
}


def keep_freed_memory() -> bool:
    """Keep freed tensors in the process instead of handing their pages back to the kernel.

    By default glibc maps every large tensor anew and unmaps it when it is freed, so each training
    step pays for the same page faults again. Results do not change, only the speed does; more
    memory is held. Call it before the first tensor. Where the C library is not glibc (musl,
    macOS, Windows) nothing happens.

    Returns:
        Whether the setting was made.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (only glibc has it)
    except (AttributeError, OSError, TypeError):
        return False
    return all(
        libc.mallopt(parameter, value) == 1
        for parameter, value in (
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, 2**31 - 1),
            (_M_TOP_PAD, 64 * 2**20),
        )
    )


class PeakMemory:
    """The most memory that the process has held since this was made, where Linux tells it."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
            self._reset = True
        except OSError:
            self._reset = False

    def gigabytes(self) -> float | None:
        """Resident memory at its highest, in GB; ``None`` where it is not told."""
        if not self._reset:
            return None
        text = Path("/proc/self/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith("VmHWM:"))
        return round(int(line.split()[1]) * 1024 / 1e9, 3)


def cpu_flags() -> frozenset[str]:
    """Names of the CPU's instruction sets, as Linux writes them; empty where it is not told."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    found = (value for name, _, value in lines if name.strip().lower() in ("flags", "features"))
    return frozenset(next(found, "").split())


def cpu_name() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def lacks_bf16() -> bool:
    """Whether the CPU is known to have no bf16 instructions; torch then emulates them."""
    flags = cpu_flags()
    return bool(flags) and not flags & {"avx512_bf16", "amx_bf16", "bf16"}


def asset(name: str) -> Path:
    """A file that the package carries; see ``assets/ASSETS.md``."""
    return Path(str(resources.files("horsehuman") / "assets" / name))


def cache_dir() -> Path:
    """The user's cache folder of this project; the variable ``HORSEHUMAN_CACHE`` moves it."""
    given = os.environ.get("HORSEHUMAN_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("horsehuman"))


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; a class of its own, so that no library takes it for its own affair.

    Args:
        signum: The signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def raise_on_signals() -> None:
    """Let Ctrl-C and SIGTERM raise :class:`Interrupted`; for commands, not for libraries."""

    def stop(signum: int, frame: FrameType | None) -> None:
        for handled in (signal.SIGINT, signal.SIGTERM):
            signal.signal(handled, signal.SIG_IGN)  # once is enough
        raise Interrupted(signum)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def console(*, stderr: bool = True) -> Console:
    """A console on the present stderr or stdout that takes names as they are."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, quiet=_silent)


def table(*columns: str, left: int = 1, title: str | None = None) -> Table:
    """A table without lines; the first ``left`` columns are text, the others figures."""
    found = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    for index, name in enumerate(columns):
        found.add_column(name, justify="left" if index < left else "right")
    return found


def format_number(value: float | None) -> str:
    """A figure, or that it is undefined."""
    return "undefined" if value is None else f"{value:.4f}"


def format_interval(bounds: Sequence[float | None]) -> str:
    """An interval; nothing where it is not defined."""
    low, high = bounds
    return "" if low is None or high is None else f"{low:.4f} - {high:.4f}"


def log_to_stderr() -> None:
    """Print what the package logs as plain lines on stderr; for commands, not for libraries."""
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # ours is another
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("horsehuman")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def silence() -> None:
    """Show nothing more on the terminal: another process of the same run says it."""
    global _silent
    _silent = True
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def progress_bar() -> Progress:
    """A bar with count, rate and time left; it leaves nothing behind and needs a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        console=console(),
        transient=True,
        disable=_silent or not sys.stderr.isatty(),
    )


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s")


def track(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    """Pass ``items`` through under a progress bar of ``total`` steps, if that is known."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=total)
        for item in items:
            yield item
            bar.advance(task)


def show_cache(*, clear: bool = False) -> None:
    """Print where the cache is and how much each kind takes, and empty it where that is wanted.

    Raises:
        HorseHumanError: Something cannot be read or removed.
    """
    print(printable(cache_dir()))
    try:
        for name, (what, patterns) in CACHED.items():
            found = [path for each in patterns for path in (cache_dir() / name).glob(each)]
            size = sum(_size(path) for path in found)
            print(f"{name:<9} {size / 2**20:8.1f} MiB  {what}")
            for path in found if clear else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        place = printable(error.filename or cache_dir())
        what = "empty" if clear else "look into"
        raise HorseHumanError(f"cannot {what} {place}: {error.strerror}") from error
    if clear:
        print("removed")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
