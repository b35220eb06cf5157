"""The process: its memory allocator and its folder for things worth keeping."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import resources
from pathlib import Path

import platformdirs

#: The pretrained trunk in the package.
TRUNK = "inception_v3_trunk.safetensors"

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


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
