"""Resume runs that were killed at random times; they end as uninterrupted runs do.

One of the kinds is killed once. The hash of the commit selects it and the moment, so that all
combinations are tested over time. All kinds with five kills each:

    pytest -n 0 -m slow tests/training/test_resume.py --kills 5
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import train as script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from horsehuman import HorseHumanError, run_dir
from horsehuman.training.config import compose
from horsehuman.training.run import resume_run, train
from tests.commands import train_script_error
from tests.conftest import SMALL_CNN, small_cnn, small_data

INCEPTION = ["model=inception", "model.image_size=96", "model.scales=[80]", "trainer.max_epochs=2"]

KINDS = {
    "cnn": SMALL_CNN,
    "inception, cached": INCEPTION,
    "cnn, two workers": [*SMALL_CNN, "data.memory_limit=0", "data.num_workers=2"],
    "inception, not cached": [*INCEPTION, "model.cache_features=false"],
}

#: Runs scripts/train.py and saves every epoch, so that a run lasts for several kills.
SAVING = f"""
import runpy, sys
from horsehuman.training import callbacks
callbacks.WRITE_SHARE = 1
sys.argv[0] = {script.__file__!r}
sys.path.insert(0, {str(Path(script.__file__).parent)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""

#: What a run is doing when it is killed.
MOMENTS = ("writes a checkpoint", "trains an epoch", "begins")

#: Metrics that differ between any two runs.
CLOCK = ("seconds", "seconds_training", "peak_memory_gb")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SAVING, *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def printed_by(process: subprocess.Popen[str]) -> str:
    """Return the output of a process, which must end within five minutes."""
    printed, _ = process.communicate(timeout=300)
    return printed


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    log = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    times = {f"final/{name}" for name in CLOCK}
    return {
        tag: [(event.step, event.value) for event in log.Scalars(tag)]
        for tag in log.Tags()["scalars"]
        if tag not in times
    }


def same(a: Any, b: Any) -> bool:
    """Return whether two checkpoints are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def commit() -> str:
    """Return the commit of the clone, or nothing without git or a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose kinds and moments of the kills."""
    if "moments" not in metafunc.fixturenames:
        return
    kills = metafunc.config.getoption("--kills")
    if kills > 1:
        cases = [(kind, [MOMENTS[k % 3] for k in range(kills)]) for kind in KINDS]
    else:
        chosen = random.Random(commit())
        cases = [(chosen.choice(sorted(KINDS)), [chosen.choice(MOMENTS)])]
    names = [f"{kind}, {len(moments)} kills: {moments[0]}" for kind, moments in cases]
    metafunc.parametrize(("kind", "moments"), cases, ids=names)


@pytest.mark.slow
def test_killed_runs_end_to_the_bit_as_they_would_have(
    kind: str, moments: list[str], tree: Path, tmp_path: Path
) -> None:
    options = [*KINDS[kind], *small_data(tree), "trainer.log_every_n_steps=3"]
    options += [f"trainer.max_epochs={6 + 4 * len(moments)}"]
    uninterrupted = start(tmp_path, *options, "hydra.run.dir=uninterrupted")
    text = printed_by(uninterrupted)
    assert uninterrupted.returncode == 0, text
    generator = random.Random(f"{kind} {commit()}")
    process = start(tmp_path, *options, "hydra.run.dir=run")
    writing = 0
    for moment in moments:
        wait_for(moment, tmp_path / "run", process, generator)
        assert process.poll() is None, printed_by(process)
        process.send_signal(signal.SIGKILL)
        printed_by(process)
        writing += sum(
            name.endswith(f".{process.pid}") for name in incomplete_files(tmp_path / "run")
        )
        process = start(tmp_path, "resume=run")
    print(f"{kind}: {len(moments)} kills, {writing} of them while a checkpoint was written")
    printed = printed_by(process)
    assert process.returncode == 0, printed
    assert "changed since" not in printed
    check_alike(tmp_path / "uninterrupted", tmp_path / "run")
    assert not (tmp_path / "outputs").exists()  # no second folder
    assert not incomplete_files(tmp_path / "run")


def check_alike(*runs: Path) -> None:
    """Check that metrics, checkpoints and logs of two runs are equal to the bit."""
    first, second = (json.loads((run / "metrics.json").read_text()) for run in runs)
    assert first | dict.fromkeys(CLOCK) == second | dict.fromkeys(CLOCK)
    check_same_checkpoints(*runs)


def check_same_checkpoints(*runs: Path) -> None:
    """Check that checkpoints and logs of two runs are equal to the bit."""
    for name in ("last", "final", "best"):
        both = [torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in runs]
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "averaging_state"):
            if key in both[0]:
                assert same(both[0][key], both[1][key]), (name, key)
    assert scalars(runs[0]) == scalars(runs[1])


def incomplete_files(run: Path) -> set[str]:
    """Return the names of incomplete files beside the checkpoints."""
    return {path.name for path in (run / "checkpoints").glob(".*")}


def written_at(run: Path) -> int:
    last = run / "checkpoints" / "last.ckpt"
    return last.stat().st_mtime_ns if last.exists() else 0


def wait_for(
    moment: str, run: Path, process: subprocess.Popen[str], generator: random.Random
) -> None:
    """Wait for one of :data:`MOMENTS` of a run."""
    if moment == "begins":
        while process.poll() is None and not (run / "config.yaml").is_file():
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.5))  # all epochs of the CNN take about 2 s
        return
    wanted = generator.randint(1, 4)
    while process.poll() is None and wanted > 0:
        before = written_at(run)
        while process.poll() is None and written_at(run) == before:
            time.sleep(0.0003)
        wanted -= 1
    left = incomplete_files(run)
    if moment == "trains an epoch":
        time.sleep(generator.uniform(0, 0.2))
    else:
        while process.poll() is None and incomplete_files(run) <= left:
            time.sleep(0.0003)


def run(
    folder: Path, tree: Path, *overrides: str, model: Sequence[str] = tuple(SMALL_CNN)
) -> dict[str, Any]:
    return train(compose(*model, *small_data(tree), "test=false", *overrides), folder)


@pytest.fixture
def unfinished(cnn_run: Path, tmp_path: Path) -> Path:
    """A run that was killed after its last epoch, before it wrote its metrics."""
    folder = shutil.copytree(cnn_run, tmp_path / "run")
    (folder / "metrics.json").unlink()
    return folder


def test_what_has_changed_is_named(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, copy = tmp_path / "run", shutil.copytree(tree, tmp_path / "set")
    run(folder, copy, "data.val_fraction=0")
    (folder / "metrics.json").unlink()
    record = json.loads((folder / "run.json").read_text())
    assert {"torch", "lightning", "data", "cpu", "commit"} <= set(record)
    (folder / "run.json").write_text(json.dumps({**record, "torch": "1.0"}))
    picture = next((copy / "train" / "horses").iterdir())
    shutil.copy(next((copy / "test" / "horses").iterdir()), picture)
    with pytest.raises(HorseHumanError, match="allow_changes=true"):
        resume_run(folder)
    metrics = resume_run(folder, allow_changes=True)
    assert metrics["epochs"] == 2
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    seconds = last["callbacks"]["CheckpointMetrics"]["seconds"]
    assert metrics["seconds"] > metrics["seconds_training"] >= seconds > 0
    (warning,) = [r.getMessage() for r in caplog.records if "changed since" in r.getMessage()]
    assert "torch (1.0, now" in warning
    assert "data" in warning
    assert "config" not in warning
    with pytest.raises(HorseHumanError, match="has ended"):
        resume_run(folder)


@pytest.mark.parametrize("value", ["${oc.env:HOME}", '"\\u0024{oc.env:HOME}"'])
def test_a_config_that_would_look_something_up_is_refused(value: str, unfinished: Path) -> None:
    config = unfinished / "config.yaml"
    config.write_text(config.read_text() + f"more: {value}\n")
    with pytest.raises(HorseHumanError, match="is not the config of a run"):
        resume_run(unfinished)


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [[], ["data.val_fraction=0"]], ids=["held out", "nothing"])
def test_a_run_that_was_killed_after_its_last_epoch_reports_the_same_metrics(
    held_out: list[str], tree: Path, tmp_path: Path
) -> None:
    expected = run(tmp_path / "run", tree, *held_out)
    (tmp_path / "run" / "metrics.json").unlink()
    metrics = resume_run(tmp_path / "run")
    assert metrics | dict.fromkeys(CLOCK) == expected | dict.fromkeys(CLOCK)


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_epoch_begins_again(
    tree: Path, tmp_path: Path
) -> None:
    expected, folder = run(tmp_path / "uninterrupted", tree), tmp_path / "run"
    run(folder, tree)
    for path in [folder / "metrics.json", *(folder / "checkpoints").iterdir()]:
        path.unlink()
    metrics = resume_run(folder)
    assert metrics | dict.fromkeys(CLOCK) == expected | dict.fromkeys(CLOCK)
    assert scalars(folder) == scalars(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_a_run_that_is_alive_is_left_alone(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dir, "LOCK_TIMEOUT", 0.1)
    process = start(tmp_path, *small_cnn(tree, "trainer.max_epochs=10000"), "hydra.run.dir=run")
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file() and process.poll() is None:
        time.sleep(0.05)
    with pytest.raises(HorseHumanError, match=r"run is being trained by another process"):
        resume_run(tmp_path / "run")
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    printed_by(process)
    with run_dir.lock_run(tmp_path / "run"):  # a process that died does not hold it
        pass


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["resume=nowhere", "seed=1"], "drop seed=1"),
        (["resume=nowhere", "allow_changes=perhaps"], "give true or false"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, error = train_script_error(monkeypatch, capsys, tmp_path, *arguments)
    assert code == 1
    assert text in error
    assert not list(tmp_path.iterdir())
