"""The ``horsehuman`` command; each command imports what it needs when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import horsehuman
from horsehuman.errors import HorseHumanError, shown
from horsehuman.terminal import Interrupted, raise_on_signals, show_notes

app = typer.Typer(
    name="horsehuman",
    help="Horse or human? Two picture classifiers with everything in the box.",
    epilog="Training: python scripts/train.py model=inception (in a clone of the project)",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Run the command; exit 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    raise_on_signals()
    try:
        app()
    except HorseHumanError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as interrupted:
        print("interrupted", file=sys.stderr)
        sys.exit(interrupted.exit_code)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        print(horsehuman.__version__)


@app.command(epilog="Example: horsehuman predict photo.jpg --model outputs/inception/latest")
def predict(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Picture files.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="RUN|FILE", help="A run's folder or a checkpoint [newest run]"),
    ] = None,
) -> None:
    """Say what each picture shows, with which probability."""
    show_notes()
    from horsehuman.runtime import keep_freed_memory

    keep_freed_memory()
    from horsehuman.checkpoint import load_classifier
    from horsehuman.predict import predict as answers

    classifier = load_classifier(model)
    width = min(max(len(shown(path)) for path in pictures), 60)
    failed = 0
    for answer in answers(classifier, pictures):
        if answer.error:
            failed += 1
            print(f"error: {answer.error}", file=sys.stderr)
        else:
            name = shown(answer.source)
            print(f"{name:<{width}}  {answer.class_name}  {answer.probability:7.2%}")
    if failed:
        raise typer.Exit(1)
