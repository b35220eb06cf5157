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
    """Check the file that ``--out`` names before any work is done for it.

    Raises:
        HorseHumanError: It is there already and must not be replaced, is no file, or is in no
            folder.
    """
    if path.exists() and not path.is_file():
        raise HorseHumanError(f"--out {shown(path)} is a folder or a device: name a file")
    if not path.parent.is_dir():
        raise HorseHumanError(f"--out {shown(path)}: there is no folder {shown(path.parent)}")
    if path.exists() and not force:
        raise HorseHumanError(f"--out {shown(path)} is there already: name another, or add --force")
