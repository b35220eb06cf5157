"""Exceptions for errors that a user can cause, their one-line texts, and checks of values."""

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import ge, gt, le, lt
from typing import Any

#: Largest number of layers that a config or a checkpoint may ask for, and the largest width of one.
MAX_LAYERS, MAX_WIDTH = 64, 16_384

# The bounds of check_number. Error messages use their names.
_BOUNDS = {"at_least": ge, "above": gt, "below": lt, "at_most": le}


class HorseHumanError(Exception):
    """An error that a user can cause and correct.

    Its text is one line that names the value, the place and the fix. The command and the scripts
    print it without a traceback and exit with a non-zero code.
    """


class ResumableError(HorseHumanError):
    """A run has stopped before its end, through no fault of its options, and can be resumed."""


def one_line(error: Exception) -> str:
    """Return an error's text as one line.

    Args:
        error: For an ``OSError``, the text is its reason and the name of the file. For an error
            that a worker process raised, it is the last line of the worker's traceback.
    """
    if isinstance(error, OSError):
        place = f": {printable(error.filename)}" if error.filename else ""
        return f"{error.strerror or error}{place}"
    return str(error).strip().splitlines()[-1].removeprefix("horsehuman.data.images.PictureError: ")


@contextmanager
def os_errors(action: str, path: object, fix: str = "") -> Iterator[None]:
    """Turn an ``OSError`` of the block into an error that names the action, the path and the fix.

    Args:
        action: What the block does, such as ``read`` or ``write into``.
        path: The file or folder.
        fix: What the user can do about it, if that is not obvious.

    Raises:
        HorseHumanError: If the block raises an ``OSError``, other than for a closed pipe.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        remedy = f"; {fix}" if fix else ""
        reason = error.strerror or error
        raise HorseHumanError(f"cannot {action} {printable(path)}: {reason}{remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; torch and ONNX Runtime raise errors of other types then."""
    if isinstance(error, MemoryError | OSError):  # the text of an OSError holds a file name
        return isinstance(error, MemoryError)
    texts = "out of memory", "allocate memory", "bad allocation", "bad_alloc"
    return any(text in str(error).lower() for text in texts)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(path: object) -> str:
    """Escape a name for one line of output: control characters and undecodable bytes."""
    text = os.fsdecode(path) if isinstance(path, bytes) else str(path)
    return text if text.isprintable() else ascii(text)


def closest(value: str, options: Iterable[str]) -> str:
    """Return a hint that names the options nearest to a mistyped value.

    Args:
        value: What the user wrote.
        options: All valid values.

    Returns:
        A text such as ``" (did you mean a, b?)"`` with up to three options: those that start with
        ``value``, otherwise those that are spelled similarly. Empty if there are none.
    """
    names = sorted(options)
    near = [name for name in names if value and name.startswith(value)][:3]
    near = near or difflib.get_close_matches(value, names, n=3, cutoff=0.6)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def check_number(name: str, value: Any, kind: type[float], **bounds: float | None) -> None:
    """Check the type and the range of a number.

    Args:
        name: The option's name as the user writes it, such as ``data.val_fraction``.
        value: The value to check. A bool or NaN is refused; an int is accepted as a float.
        kind: ``int`` or ``float``.
        bounds: The inclusive ``at_least`` and ``at_most``, the exclusive ``above`` and ``below``;
            ``None`` is no bound.

    Raises:
        HorseHumanError: If the value is of another type or out of bounds.
    """
    limits = {bound: limit for bound, limit in bounds.items() if limit is not None}
    kinds = (int,) if kind is int else (int, float)
    valid = isinstance(value, kinds) and not isinstance(value, bool) and value == value
    if valid and all(_BOUNDS[bound](value, limit) for bound, limit in limits.items()):
        return
    noun = "a whole number" if kind is int else "a number"
    words = " and ".join(f"{bound.replace('_', ' ')} {limit:g}" for bound, limit in limits.items())
    raise HorseHumanError(f"{name}={value!r} does not work: give {noun}, {words}".rstrip(", "))


def check_widths(
    name: str, value: Any, *, at_least: int = 0, bounds: tuple[int, int] = (1, MAX_WIDTH)
) -> None:
    """Check a list of layer widths or image sizes.

    Args:
        name: The option's name as the user writes it, such as ``model.channels``.
        value: The value to check: a list of whole numbers.
        at_least: Smallest number of entries; the largest is :data:`MAX_LAYERS`.
        bounds: Smallest and largest entry.

    Raises:
        HorseHumanError: If the value is no list, or its length or an entry is out of bounds.
    """
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not at_least <= len(value) <= MAX_LAYERS:
        fix = f"give a list of {at_least} to {MAX_LAYERS} whole numbers, such as [32, 64]"
        raise HorseHumanError(f"{name}={value!r} does not work: {fix}")
    for width in value:
        check_number(name, width, int, at_least=bounds[0], at_most=bounds[1])


def check_flag(name: str, value: Any) -> None:
    """Check that a value is ``True`` or ``False``.

    Args:
        name: The option's name as the user writes it, such as ``model.batch_norm``.
        value: The value to check. Numbers and strings are refused.

    Raises:
        HorseHumanError: If the value is no bool.
    """
    if not isinstance(value, bool):
        raise HorseHumanError(f"{name}={value!r} does not work: give true or false")


def check_choice(name: str, value: Any, options: Sequence[str]) -> None:
    """Check that a value is one of several options.

    Args:
        name: The option's name as the user writes it, such as ``data.source``.
        value: The value to check.
        options: All valid values.

    Raises:
        HorseHumanError: If the value is none of them. The message lists all options and names the
            nearest.
    """
    if value not in options:
        near = closest(str(value), options)
        raise HorseHumanError(f"{name}={value!r} is not known{near}: use {' | '.join(options)}")
