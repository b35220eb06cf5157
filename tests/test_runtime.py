from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from horsehuman.runtime import cache_dir

HEAVY = "torch", "lightning", "timm", "matplotlib", "numpy", "hydra"


@pytest.mark.parametrize(
    "statement",
    [
        "import horsehuman",
        "import horsehuman.cli as c; sys.argv = ['horsehuman', '--help']; c.main()",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement: str) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules]))\n"
        f"{statement}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("HEAVY []")


def test_allocator_setting_is_made_on_glibc_and_harmless_elsewhere() -> None:
    code = (
        "import ctypes, platform\n"
        "from horsehuman.runtime import keep_freed_memory\n"
        "print(keep_freed_memory() == (platform.libc_ver()[0] == 'glibc'))\n"
        "ctypes.CDLL = lambda name: object()\n"
        "print(keep_freed_memory())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HORSEHUMAN_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("HORSEHUMAN_CACHE")
    assert cache_dir().name == "horsehuman"
