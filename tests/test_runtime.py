from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from horsehuman.runtime import cache_dir, lacks_bf16

HEAVY = "torch", "lightning", "timm", "matplotlib", "numpy", "scipy", "PIL", "yaml", "hydra"


@pytest.mark.parametrize(
    "statement",
    [
        "import horsehuman",
        "import horsehuman.cli as c; sys.argv = ['horsehuman', '--help']; c.main()",
    ],
)
def test_importing_the_package_or_showing_help_imports_nothing_heavy(statement: str) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules]))\n"
        f"{statement}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("HEAVY []")


def test_allocator_setting_is_accepted_by_glibc_and_ignored_elsewhere() -> None:
    code = (
        "import ctypes, platform\n"
        "from horsehuman.runtime import tune_process\n"
        "print(tune_process() == (platform.libc_ver()[0] == 'glibc'))\n"
        "ctypes.CDLL = lambda name: object()\n"
        "print(tune_process())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "3000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_waiting_threads_sleep_soon_unless_the_environment_says_otherwise(
    given: dict[str, str], expected: str
) -> None:
    code = (
        "import os, sys\n"
        "from horsehuman.runtime import tune_process\n"
        "tune_process()\n"
        "assert 'torch' not in sys.modules  # which reads the setting\n"
        "print(os.environ.get('GOMP_SPINCOUNT'))\n"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP", "OMP"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**env, **given})
    assert done.stdout.split() == [expected], done.stderr


@pytest.mark.slow
def test_allocator_setting_does_not_change_weights(tree: Path) -> None:
    code = """
import hashlib, sys
import lightning as L
from horsehuman import CNNClassifier, HorseHumanDataModule
from horsehuman.runtime import tune_process
assert sys.argv[1] == "default" or tune_process() or sys.platform != "linux"
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
    digests = [
        subprocess.run(
            [sys.executable, "-c", code, mode, str(tree)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-1]
        for mode in ("default", "keep")
    ]
    assert digests[0] == digests[1]


def cpu_time(*arguments: str) -> float:
    """Return the CPU seconds of the fastest of three runs of Python."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_takes_little_cpu_time() -> None:
    """Help takes three times as long as importing typer; importing torch takes fifteen times."""
    assert cpu_time("-m", "horsehuman", "--help") < 6 * cpu_time("-c", "import typer")


@pytest.mark.parametrize(
    ("flags", "lacks"), [("avx2 fma", True), ("avx512_bf16", False), ("", False)]
)
def test_lacks_bf16(flags: str, lacks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("horsehuman.runtime.cpu_flags", lambda: frozenset(flags.split()))
    assert lacks_bf16() is lacks


def test_environment_variable_moves_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HORSEHUMAN_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("HORSEHUMAN_CACHE")
    assert cache_dir().name == "horsehuman"


@pytest.mark.parametrize(
    ("failure", "lines", "text"),
    [
        ("None.name", 100, "error: this is a bug in horsehuman: please report it"),
        ("[0] * 10**15", 1, "error: out of memory (MemoryError): close other programs"),
        ("__import__('torch').empty(10**15)", 1, "error: out of memory ("),
    ],
)
def test_bugs_and_missing_memory_are_reported_as_such(failure: str, lines: int, text: str) -> None:
    """A command whose work fails; the failure is put in its place."""
    program = (
        "import sys\nfrom horsehuman import cli\n"
        f"cli.runtime.show_cache = lambda **unused: {failure}\n"
        "sys.argv = ['horsehuman', 'cache']\ncli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    printed = done.stderr.splitlines()
    assert len(printed) <= lines
    assert printed[-1].startswith(text)
    assert ("Traceback" in done.stderr) == (lines > 1)
