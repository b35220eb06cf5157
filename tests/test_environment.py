"""Runs whose images, folders, permissions or cache change while they train."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from horsehuman import load_classifier
from horsehuman.training.callbacks import AtomicCheckpointIO
from tests.conftest import small_cnn, small_data
from tests.training.test_resume import CLOCK, INCEPTION, run, start

NOBODY = 65534

pytestmark = pytest.mark.slow


def begin(folder: Path, tree: Path, *options: str) -> subprocess.Popen[str]:
    """Start a run of many epochs, and return after its first checkpoint."""
    process = start(
        folder, *small_cnn(tree, "trainer.max_epochs=300", *options), "hydra.run.dir=run"
    )
    last = folder / "run" / "checkpoints" / "last.ckpt"
    while not last.is_file() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    assert process.poll() is None
    return process


def last_line(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=200)
    assert "Traceback" not in printed, printed
    return printed.splitlines()[-1]


def test_pictures_that_vanish_end_the_run_in_one_line(tree: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tree, tmp_path / "set")
    process = begin(tmp_path, copy, "data.memory_limit=0")
    shutil.rmtree(copy)
    line = last_line(process)
    assert line.startswith(f"error: cannot read {copy}")
    assert "No such file" in line
    assert process.returncode == 1
    assert load_classifier(tmp_path / "run" / "checkpoints" / "last.ckpt")


def test_a_run_whose_folder_vanishes_ends_in_one_line(tree: Path, tmp_path: Path) -> None:
    process = begin(tmp_path, tree)
    (tmp_path / "run").rename(tmp_path / "gone")  # at once, unlike rmtree
    printed, _ = process.communicate(timeout=200)
    line = printed.splitlines()[-1]
    assert line.startswith("error: ")
    assert printed.count(line.removeprefix("error: ")) == 1
    assert "No such file or directory" in line
    assert process.returncode == 1


def test_a_cache_that_vanishes(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tmp_path / "undisturbed", tree, model=INCEPTION)
    monkeypatch.setenv("HORSEHUMAN_CACHE", str(tmp_path / "cache"))
    stop = repeatedly(lambda: shutil.rmtree(tmp_path / "cache", ignore_errors=True))
    try:
        metrics = run(tmp_path / "run", tree, model=INCEPTION)
    finally:
        stop()
    assert metrics | dict.fromkeys(CLOCK) == expected | dict.fromkeys(CLOCK)


def repeatedly(action: Callable[[], object]) -> Callable[[], None]:
    """Call a function repeatedly in a thread, and return a function that ends this."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.01):
            action()

    thread = threading.Thread(target=work)
    thread.start()

    def stop() -> None:
        over.set()
        thread.join()

    return stop


def test_a_folder_that_may_not_be_written_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    last = folder / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, last)
    before = last.read_bytes()
    folder.chmod(0o500)
    is_root = os.geteuid() == 0  # root may write everywhere
    if is_root:
        for parent in (folder, *folder.parents[:3]):
            parent.chmod(0o555)
        os.seteuid(NOBODY)
    try:
        AtomicCheckpointIO().save_checkpoint({"epoch": 2}, last)
    finally:
        if is_root:
            os.seteuid(0)
        for parent in (folder, *folder.parents[:3]):
            parent.chmod(0o700)
    assert "is not saved (Permission denied)" in caplog.text
    assert last.read_bytes() == before


def test_two_runs_at_once_on_one_cache(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HORSEHUMAN_CACHE", str(tmp_path / "cache"))
    options = [*INCEPTION, *small_data(tree)]
    both = [start(tmp_path, *options, f"hydra.run.dir={name}") for name in ("one", "two")]
    for process in both:
        last_line(process)
        assert process.returncode == 0
    first, second = (
        json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")
    )
    assert first | dict.fromkeys(CLOCK) == second | dict.fromkeys(CLOCK)
    (path,) = (tmp_path / "cache" / "features").glob("*.sqlite")
    with closing(sqlite3.connect(path)) as cache:
        assert cache.execute("SELECT count(*) FROM features").fetchone() == (24,)
