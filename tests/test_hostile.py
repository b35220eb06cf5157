"""Files that mean harm: each is refused in one line, soon, and leaves nothing behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from horsehuman import HorseHumanError
from horsehuman.runtime import PeakMemory
from tests import hostile, hostile_commands

SECONDS = 10


@pytest.mark.slow
def test_hostile_inputs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, canary = tmp_path / "given", tmp_path / "canary"
    folder.mkdir()
    cases = [
        *hostile.pictures(folder),
        *hostile.archives(folder),
        *hostile.checkpoints(folder, canary),
        *hostile.weights(folder),
        *hostile.runs(folder, canary),
        *hostile.exports(folder),
        *hostile.trees(folder),
        *hostile_commands.commands(folder),
        *hostile_commands.trainings(folder, canary),
        *hostile_commands.aliases(folder),
    ]
    assert len(cases) >= 200
    outcomes = {"refused": 0, "read": 0}
    memory = PeakMemory()
    held = memory.gigabytes() or 0
    for name, call in cases:
        start = time.monotonic()
        try:
            call()
        except HorseHumanError as error:
            text = str(error)
        except Exception as error:  # whatever else is a traceback for the user
            pytest.fail(f"{name}: {type(error).__name__}: {error}")
        else:
            text = ""
        assert len(text.splitlines()) <= 1, name
        assert time.monotonic() - start < SECONDS, name
        outcomes["refused" if text else "read"] += 1
    print(f"{len(cases)} hostile inputs: {outcomes}")
    assert not canary.exists()
    assert (memory.gigabytes() or 0) - held < 2
    assert [path.name for path in tmp_path.iterdir()] == ["given"]
    assert outcomes["refused"] > 120
    assert (folder / "resumed0" / "metrics.json").is_file()  # nothing was wrong with that one
