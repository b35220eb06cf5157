"""Where something is to be written: free names, and no writing over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from horsehuman.errors import HorseHumanError, shown


def free_path(path: Path, is_taken: Callable[[Path], bool], *, is_folder: bool = False) -> Path:
    """The path, or with the first number behind its name, from 2 on, that is not taken."""
    ending = "" if is_folder else path.suffix
    found, number = path, 2
    while is_taken(found):
        found = path.with_name(f"{path.name.removesuffix(ending)}-{number}{ending}")
        number += 1
    return found


def check_free(path: Path, *, force: bool) -> None:
    """Raise :class:`HorseHumanError` where ``--out`` is there already and must not be replaced."""
    if path.exists() and not force:
        raise HorseHumanError(f"--out {shown(path)} is there already: name another, or add --force")
