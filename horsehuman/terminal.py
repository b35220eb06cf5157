"""What a person sees on the terminal: all of it on stderr, results alone go to stdout."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import TypeVar

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

T = TypeVar("T")

_silent = False


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


def number(value: float | None) -> str:
    """A figure, or that it is undefined."""
    return "undefined" if value is None else f"{value:.4f}"


def span(bounds: Sequence[float | None]) -> str:
    """An interval; nothing where it is not defined."""
    low, high = bounds
    return "" if low is None or high is None else f"{low:.4f} - {high:.4f}"


def show_notes() -> None:
    """Print what the package logs as plain lines on stderr; for commands, not for libraries."""
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # ours is another
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("horsehuman")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def be_silent() -> None:
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
