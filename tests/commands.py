"""Run the ``horsehuman`` command, the training script and an HTTP server in this process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import train
from typer.testing import CliRunner

from horsehuman import HorseHumanError
from horsehuman.cli import app


def run(*arguments: str) -> tuple[int, str]:
    """Run ``horsehuman`` and return exit code and output; only its own errors may be raised."""
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, HorseHumanError):
        return 1, f"error: {result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def run_train_script(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """Run ``scripts/train.py`` in this process, as if it were called in ``folder``."""
    monkeypatch.chdir(folder)
    command = ["scripts/train.py", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(train, "COMMAND", command)
    monkeypatch.setattr(train, "exit_codes", [])
    monkeypatch.setattr(train.runtime, "raise_on_signals", lambda: None)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    try:
        return train.run()
    except SystemExit as ended:
        return int(ended.code or 0)


def train_script_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    *arguments: str,
) -> tuple[int, str]:
    """Run ``scripts/train.py`` and return exit code and error, which must be its only output."""
    code = run_train_script(monkeypatch, folder, *arguments)
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
    return code, printed.err


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a server on loopback, and yield its address; clients may disconnect early."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *unused: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
