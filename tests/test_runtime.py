from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from horsehuman.runtime import cache_dir, lacks_bf16

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


@pytest.mark.slow
def test_allocator_setting_changes_no_bit_of_the_weights(tree: Path) -> None:
    code = """
import hashlib, sys
import lightning as L
from horsehuman import CNNClassifier, HorseHumanDataModule
from horsehuman.runtime import keep_freed_memory
assert sys.argv[1] == "plain" or keep_freed_memory() or sys.platform != "linux"
L.seed_everything(0)
model = CNNClassifier(image_size=64, channels=[16, 32])
data = HorseHumanDataModule(64, "folder", sys.argv[2], augment={"rotation": 20})
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
L.Trainer(max_epochs=2, enable_model_summary=False, **quiet).fit(model, datamodule=data)
digest = hashlib.sha256()
for tensor in model.state_dict().values():
    digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", code, way, str(tree)], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
        for way in ("plain", "keep")
    ]
    assert found[0] == found[1]


def processor_time(*arguments: str) -> float:
    """Seconds of the quickest of three calls of Python."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_takes_little_processor_time() -> None:
    """Three times that of its parser's import; torch alone would take fifteen times as much."""
    assert processor_time("-m", "horsehuman", "--help") < 6 * processor_time("-c", "import typer")


@pytest.mark.parametrize(
    ("flags", "lacks"), [("avx2 fma", True), ("avx512_bf16", False), ("", False)]
)
def test_bf16_is_known_to_be_missing_or_not(
    flags: str, lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("horsehuman.runtime.cpu_flags", lambda: frozenset(flags.split()))
    assert lacks_bf16() is lacks


def test_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HORSEHUMAN_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("HORSEHUMAN_CACHE")
    assert cache_dir().name == "horsehuman"
