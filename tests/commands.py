"""The ``horsehuman`` command, called as a test does it."""

from __future__ import annotations

from typer.testing import CliRunner

from horsehuman import HorseHumanError
from horsehuman.cli import app


def run(*arguments: str) -> tuple[int, str]:
    """The exit code and what was printed; any exception but ours and an exit is a failure."""
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, HorseHumanError):
        return 1, f"error: {result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output
