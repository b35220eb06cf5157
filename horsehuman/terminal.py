"""What a person sees on the terminal: all of it on stderr, results alone go to stdout."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def console() -> Console:
    """A console on the present stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def show_notes() -> None:
    """Print what the package logs as plain lines on stderr; for commands, not for libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("horsehuman")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def progress_bar() -> Progress:
    """A bar with count and time left; it leaves nothing behind and needs a terminal to show."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console(),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Pass ``items`` through under a progress bar of ``total`` steps."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=total)
        for item in items:
            yield item
            bar.advance(task)
