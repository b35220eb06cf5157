"""What is kept in the user's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

from horsehuman.errors import HorseHumanError, shown
from horsehuman.runtime import cache_dir

#: What is ours in the cache folder, also of commands that were killed; nothing else in it is
#: counted or removed.
CACHED = {
    "pictures": ("unpacked archives", ["[0-9a-f]" * 16, ".unpacking-*"]),
    "features": ("what the frozen backbone saw", ["[0-9a-f]" * 32 + ".sqlite*"]),
    "archives": ("downloaded zips", ["*horse-or-human.zip", "tmp????????"]),
}


def show_cache(*, clear: bool = False) -> None:
    """Print where the cache is and how much each kind takes, and empty it where that is wanted.

    Raises:
        HorseHumanError: Something cannot be read or removed.
    """
    print(shown(cache_dir()))
    try:
        for name, (what, patterns) in CACHED.items():
            found = [path for each in patterns for path in (cache_dir() / name).glob(each)]
            size = sum(_size(path) for path in found)
            print(f"{name:<9} {size / 2**20:8.1f} MiB  {what}")
            for path in found if clear else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        place = shown(error.filename or cache_dir())
        what = "empty" if clear else "look into"
        raise HorseHumanError(f"cannot {what} {place}: {error.strerror}") from error
    if clear:
        print("removed")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
