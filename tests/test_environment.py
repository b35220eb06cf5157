"""Runs whose images, folders, permissions or cache change while they train."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest
import torch

from horsehuman import load_classifier
from horsehuman.errors import ResumableError
from horsehuman.training import callbacks
from horsehuman.training import run as training_run
from horsehuman.training.run import resume_run
from tests.commands import run_train_script
from tests.conftest import small_cnn, small_data
from tests.training.test_resume import CLOCK, INCEPTION, check_alike, run, start

resource = pytest.importorskip("resource")

NOBODY = 65534

#: Something that keeps the checkpoints in a run's folder from being written.
Fault = Callable[[Path], AbstractContextManager[None]]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _save_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "WRITE_SHARE", 1)


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


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take the right to write into the checkpoints of a run; root becomes another user."""
    is_root = os.geteuid() == 0
    path = folder / "checkpoints"
    for other in folder.iterdir():  # the log can still be written
        other.chmod(0o777)
    path.chmod(0o555)
    if is_root:
        for parent in path.parents[:-2]:  # all but the root and the folder of temporary files
            parent.chmod(0o755)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        path.chmod(0o700)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Limit files to 600 kB, which the checkpoints of :data:`LARGE` exceed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


#: Options of a CNN whose checkpoints have 1.1 MB.
LARGE = ["model=cnn", "model.image_size=48", "model.channels=[32,64]", "trainer.max_epochs=6"]


@pytest.fixture(scope="module")
def undisturbed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(folder, tree, model=LARGE)
    return folder


def begins(folder: Path) -> bool:
    return (folder / "checkpoints" / "last.ckpt").is_file()


@contextmanager
def disturbed(
    folder: Path, fault: Fault, begin: Callable[[], bool], end: Callable[[], bool]
) -> Iterator[None]:
    """Let a fault begin and end in a thread, when these conditions hold."""
    over = threading.Event()

    def work() -> None:
        while not begin() and not over.wait(0.001):
            pass
        with fault(folder):
            while not end() and not over.wait(0.01):
                pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("fault", [small_disk, read_only])
def test_a_last_epoch_that_cannot_be_saved_is_not_reported(
    fault: Fault, tree: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "SAVE_SECONDS", 0.1)
    folder = tmp_path / "run"
    with (
        pytest.raises(ResumableError) as raised,
        disturbed(folder, fault, lambda: begins(folder), lambda: False),
    ):
        run(folder, tree, model=LARGE)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] + 1
    assert 1 <= saved < 6
    assert "cannot save" in str(raised.value)
    assert "after epoch 6" in str(raised.value)
    assert f"epoch {saved} is on the disk" in str(raised.value)
    assert not (folder / "metrics.json").exists()
    assert not (folder / "checkpoints" / "final.ckpt").exists()
    resume_run(folder)
    check_alike(undisturbed, folder)


@pytest.mark.parametrize("fault", [small_disk, read_only])
def test_a_last_epoch_is_saved_when_that_is_possible_again(
    fault: Fault, tree: Path, undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    with disturbed(folder, fault, lambda: begins(folder), lambda: "trying to save" in caplog.text):
        metrics = run(folder, tree, model=LARGE)
    assert "the run goes on" in caplog.text
    final = torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)
    assert final["epoch"] + 1 == metrics["epochs"] == 6
    check_alike(undisturbed, folder)


def test_a_disk_that_is_full_from_the_start_ends_the_command_in_one_line(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training_run, "SAVE_SECONDS", 0.1)
    options = [*LARGE, *small_data(tree), "hydra.run.dir=run"]
    with small_disk(tmp_path):
        assert run_train_script(monkeypatch, tmp_path, *options) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: cannot save ")
    assert "no epoch is on the disk" in line
    assert line.endswith("go on with python scripts/train.py resume=run")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the log's
def test_a_disk_without_any_space_ends_the_run_which_is_resumed(
    tree: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "SAVE_SECONDS", 0.1)
    disk, folder = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")

    def fill() -> bool:
        """Take all space, again and again: a checkpoint that is being written has some, too."""
        with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as filler:
            while True:
                filler.write(bytes(1024))
        return False

    try:
        with (
            pytest.raises((ResumableError, OSError)),
            disturbed(folder, lambda _: contextlib.nullcontext(), lambda: begins(folder), fill),
        ):
            run(folder, tree, model=LARGE)
        assert not (folder / "metrics.json").exists()
        (disk / "filler").unlink()
        resume_run(folder)
        check_alike(undisturbed, folder)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_runs_at_once_on_one_cache(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*INCEPTION, *small_data(tree)]
    monkeypatch.setenv("HORSEHUMAN_CACHE", str(tmp_path / "another cache"))
    last_line(start(tmp_path, *options, "hydra.run.dir=alone"))
    monkeypatch.setenv("HORSEHUMAN_CACHE", str(tmp_path / "cache"))
    both = [start(tmp_path, *options, f"hydra.run.dir={name}") for name in ("one", "two")]
    for process in both:
        last_line(process)
        assert process.returncode == 0
    for name in ("one", "two"):
        check_alike(tmp_path / "alone", tmp_path / name)
    (path,) = (tmp_path / "cache" / "features").glob("*.sqlite")
    with closing(sqlite3.connect(path)) as cache:
        assert cache.execute("SELECT count(*) FROM features").fetchone() == (28,)
