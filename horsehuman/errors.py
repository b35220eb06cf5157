"""What a user can cause, told in one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Any

#: Longest list of layers, and widest layer, that a config or a checkpoint may ask for.
MAX_LAYERS, MAX_WIDTH = 64, 16_384


class HorseHumanError(Exception):
    """An error that a user can cause and mend.

    Its text is one line that names the value, the place and the fix; the command and the scripts
    print it without a traceback and end with a non-zero exit code.
    """


class PeerGoneError(HorseHumanError):
    """Another process of the run has ended, and this one cannot go on without it."""


def one_line(error: Exception) -> str:
    """The text of an error; of one from a worker process, the last line of its traceback."""
    if isinstance(error, OSError):
        place = f": {printable(error.filename)}" if error.filename else ""
        return f"{error.strerror or error}{place}"
    return str(error).strip().splitlines()[-1].removeprefix("horsehuman.data.images.PictureError: ")


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(path: object) -> str:
    """Write a name on one line: control characters and broken encodings are escaped."""
    text = os.fsdecode(path) if isinstance(path, bytes) else str(path)
    return text if text.isprintable() else ascii(text)


def closest(value: str, options: Iterable[str]) -> str:
    """Name what was probably meant, as in ``" (did you mean a, b?)"``; empty if nothing is near."""
    names = sorted(options)
    near = [name for name in names if value and name.startswith(value)][:3]
    near = near or difflib.get_close_matches(value, names, n=3, cutoff=0.6)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def check_number(
    name: str,
    value: Any,
    kind: type[int] | type[float],
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Check a number where it enters.

    Args:
        name: The option's name as the user writes it, such as ``data.val_fraction``.
        value: What was given. A bool is no number; an int is a good float.
        kind: ``int`` or ``float``.
        at_least: Inclusive lower bound.
        above: Exclusive lower bound.
        below: Exclusive upper bound.
        at_most: Inclusive upper bound.

    Raises:
        HorseHumanError: The value is of another kind or out of bounds.
    """
    kinds = (int,) if kind is int else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and value == value
    fits = fits and (at_least is None or value >= at_least) and (above is None or value > above)
    fits = fits and (below is None or value < below) and (at_most is None or value <= at_most)
    if fits:
        return
    words = ("of at least", at_least), ("above", above), ("below", below), ("of at most", at_most)
    bounds = " and ".join(f"{word} {bound:g}" for word, bound in words if bound is not None)
    noun = "a whole number" if kind is int else "a number"
    raise HorseHumanError(f"{name}={value!r} does not work: give {noun} {bounds}".rstrip())


def check_widths(name: str, value: Any, *, at_least: int = 0) -> None:
    """Check a list of positive whole numbers with at least so many entries."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) < at_least:
        few = f" of at least {at_least}" if at_least else ""
        raise HorseHumanError(f"{name}={value!r} does not work: give a list{few}, such as [32, 64]")
    if len(value) > MAX_LAYERS:
        raise HorseHumanError(f"{name} has {len(value)} entries: give at most {MAX_LAYERS}")
    for width in value:
        check_number(name, width, int, at_least=1, at_most=MAX_WIDTH)


def check_flag(name: str, value: Any) -> None:
    """Check that a switch is ``True`` or ``False``; raises :class:`HorseHumanError` otherwise."""
    if not isinstance(value, bool):
        raise HorseHumanError(f"{name}={value!r} does not work: give true or false")


def check_choice(name: str, value: Any, options: Sequence[str]) -> None:
    """Check that a value is one of ``options``; the error lists them and names the nearest."""
    if value not in options:
        near = closest(str(value), options)
        raise HorseHumanError(f"{name}={value!r} is not known{near}: use {' | '.join(options)}")
