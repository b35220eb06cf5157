"""What is kept in the user's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

from horsehuman.errors import HorseHumanError, shown
from horsehuman.runtime import cache_dir

#: What is ours in the cache folder; nothing else in it is counted or removed.
CACHED = {
    f"pictures/{'[0-9a-f]' * 16}": "unpacked archives",
    f"features/{'[0-9a-f]' * 32}.sqlite": "what the frozen backbone saw",
    "archives/*horse-or-human.zip": "downloaded zips",
}


def show_cache(*, clear: bool = False) -> None:
    """Print where the cache is and how much each kind takes, and empty it where that is wanted.

    Raises:
        HorseHumanError: Something cannot be read or removed.
    """
    print(shown(cache_dir()))
    try:
        for pattern, what in CACHED.items():
            found = sorted(cache_dir().glob(pattern))
            size = sum(_size(path) for path in found)
            print(f"{pattern.partition('/')[0]:<9} {size / 2**20:8.1f} MiB  {what}")
            for path in found if clear else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        place = shown(error.filename or cache_dir())
        raise HorseHumanError(f"cannot empty {place}: {error.strerror}") from error
    if clear:
        print("removed")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
