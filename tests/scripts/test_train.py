"""``scripts/train.py`` in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train as script

from horsehuman import load_classifier
from tests.commands import train_script_error
from tests.conftest import small_cnn

SCRIPT = Path(script.__file__)


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("overrides", "code", "text"),
    [
        (["model=incepton"], 2, "model=incepton is not known (did you mean inception?)"),
        (["modle=cnn"], 2, "there is no option modle (did you mean model?)"),
        (["data.val_fracton=0.1"], 2, "did you mean data.val_fraction"),
        (["data.group_pattern=(.+)_"], 2, "cannot be read as OPTION=VALUE"),
        (["model=cnn", "model.chanels=[4]"], 2, "did you mean model.channels"),
        (["data.root=x"], 2, "it comes with data=folder"),
        (["model=cnn", "model.finetune=1"], 2, "it comes with model=inception"),
        (["model.channels=[4]"], 2, "it comes with model=cnn"),
        (["+trainer.devices=1"], 2, "drop the + before it"),
        (["model=null"], 2, "Config group override must be"),
        (["trainer.devices=2"], 1, "trainer.devices=2"),
        (["test=false", "data.validation=test"], 1, "does not go with"),
    ],
)
def test_typos_are_one_line(
    overrides: list[str],
    code: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exit_code, error = train_script_error(monkeypatch, capsys, tmp_path, *overrides)
    assert exit_code == code
    assert text in error


def test_an_error_of_a_process_is_one_line(tmp_path: Path) -> None:
    done = call(tmp_path, "model=cnn", "seed=-1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: seed=-1 does not work: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_sweep_prints_each_error_and_leaves_no_folder(tmp_path: Path) -> None:
    done = call(tmp_path, "-m", "model=cnn", "seed=0,1", "ema=1")
    assert done.returncode == 1
    message = "error: ema=1 does not work: give a number, above 0 and below 1"
    assert done.stderr.splitlines() == [message, message]
    assert not any(path.is_dir() for path in (tmp_path / "outputs").glob("cnn/*"))


def test_help_shows_groups_and_examples(tmp_path: Path) -> None:
    done = call(tmp_path, "--help")
    assert done.returncode == 0
    assert "model: cnn, inception" in done.stdout
    assert "python scripts/train.py model=inception" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])  # Ctrl-C, kill
def test_an_interrupted_run_keeps_its_last_epoch(
    interrupt: signal.Signals, tree: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *small_cnn(tree), "trainer.max_epochs=100000"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch   2"):
            break
    time.sleep(0.1)
    os.kill(process.pid, interrupt)
    _, rest = process.communicate()
    assert process.returncode == 128 + interrupt
    assert rest.splitlines()[-1].startswith("interrupted; the last saved epoch is in outputs/cnn/")
    last = tmp_path / rest.split(" is in ")[-1].split(";")[0]
    load_classifier(last)
    printed = [
        int(line.split("/")[0].split()[1]) for line in rest.splitlines() if "/100000" in line
    ]
    saved = torch.load(last, weights_only=True)["epoch"] + 1
    assert saved in (printed[-1] - 1, printed[-1])  # an epoch is printed just before it is saved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "least", "options"),
    [("inception", 245, ["model.scales=[150]"]), ("cnn", 165, ["trainer.max_epochs=6"])],
    ids=["inception", "cnn"],
)
def test_the_two_commands_of_the_readme(
    model: str, least: int, options: list[str], tmp_path: Path
) -> None:
    """On the official 256, in less time: at least 245 at 150 px, at least 165 in 6 epochs."""
    done = call(tmp_path, f"model={model}", *options)
    assert done.returncode == 0, done.stderr
    (metrics,) = (tmp_path / "outputs" / model / "latest").glob("metrics.json")
    assert json.loads(metrics.read_text())["test/right"] >= least


@pytest.mark.slow
def test_the_original_archives(originals: Path, tmp_path: Path) -> None:
    overrides = [f"data.archives_dir={originals}", "trainer.max_epochs=1", "model.image_size=64"]
    done = call(tmp_path, "model=cnn", "data=archives", *overrides)
    assert done.returncode == 0, done.stderr
    assert "834 to train on (54 groups)" in done.stderr
