"""The ``horsehuman`` command: options, help texts and exit codes.

Each command is one call of a function, which is imported when the command runs: importing torch
takes seconds, and ``--help`` must not wait for it.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import horsehuman
from horsehuman.errors import HorseHumanError, one_line
from horsehuman.run_dir import ReportOptions
from horsehuman.runtime import (
    Interrupted,
    keep_freed_memory,
    log_to_stderr,
    raise_on_signals,
    show_cache,
)

app = typer.Typer(
    name="horsehuman",
    help="Horse or human? Two image classifiers with their data and weights bundled.",
    epilog="Training: python scripts/train.py model=inception (in a clone of the project)",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

#: The classifier to use.
Model = Annotated[
    str,
    typer.Option(
        metavar="NAME|RUN|FILE",
        help="inception or cnn (bundled), a run or a checkpoint; for predict also an .onnx file.",
    ),
]

#: The labelled images to use.
Data = Annotated[
    str | None,
    typer.Option(metavar="box|RUN|FOLDER", help="Labelled images [default: model's run, or box]."),
]

#: The images of a command that needs no classifier.
Images = Annotated[str, typer.Option(metavar="box|RUN|FOLDER", help="Labelled images.")]

#: The split of these images.
Split = Annotated[
    str | None, typer.Option(help="train, validation, test or all [default: test, if any].")
]

#: The groups of the images in a folder.
GroupPattern = Annotated[
    str | None,
    typer.Option(help="For a folder: regular expression whose one (...) matches the group."),
]

#: The folder of a report.
ReportFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Report folder [default: outputs or the run].")
]

#: Whether an earlier output is overwritten.
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing output.")]

#: Whether a report has figures.
Plot = Annotated[bool, typer.Option(help="Draw the figures of the report.")]

#: Whether a program reads the report from stdout.
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    raise_on_signals()
    log_to_stderr()
    keep_freed_memory()  # before the first tensor
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
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


@app.command(epilog="Example: horsehuman predict photos --format csv --out answers.csv")
def predict(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Images: files, folders, patterns, http(s) URLs; - reads such names from stdin.",
        ),
    ],
    model: Model = "inception",
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Search folders recursively.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", metavar="table|csv|json|jsonl", help="Output format.")
    ] = "table",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Output file instead of stdout.")
    ] = None,
    sort_into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy each image to DIR/CLASS.")
    ] = None,
    always_answer: Annotated[
        bool, typer.Option("--always-answer", help="Never answer unsure or neither.")
    ] = False,
    force: Force = False,
) -> None:
    """Predict the class of each image, with its probability."""
    from horsehuman.inference.predict import predict_and_report

    _exit_unless(
        predict_and_report(
            sources,
            model,
            form,
            out,
            sort_into,
            recursive=recursive,
            always_answer=always_answer,
            force=force,
        )
    )


@app.command(epilog="Example: horsehuman evaluate --model outputs/cnn/latest --split validation")
def evaluate(
    model: Model = "inception",
    data: Data = None,
    split: Split = None,
    group_pattern: GroupPattern = None,
    out: ReportFolder = None,
    force: Force = False,
    plot: Plot = True,
    json: Json = False,
) -> None:
    """Evaluate a classifier: metrics with confidence intervals by group, and its errors."""
    from horsehuman.data.image_sets import ImageQuery
    from horsehuman.evaluation.evaluate import evaluate_and_report

    query = ImageQuery(data, split, group_pattern)
    _exit_unless(evaluate_and_report(model, query, ReportOptions(out, force, plot, json)))


@app.command(epilog="Example: horsehuman compare outputs/cnn/latest outputs/inception/latest")
def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL MODEL...", help="Runs, checkpoints, inception, cnn."),
    ],
    data: Data = None,
    split: Split = None,
    group_pattern: GroupPattern = None,
    out: ReportFolder = None,
    force: Force = False,
    plot: Plot = True,
    json: Json = False,
) -> None:
    """Compare classifiers on the same images: accuracy, intervals, disagreements, cost."""
    from horsehuman.data.image_sets import ImageQuery
    from horsehuman.evaluation.compare import compare_and_report

    query = ImageQuery(data, split, group_pattern)
    _exit_unless(compare_and_report(models, query, ReportOptions(out, force, plot, json)))


@app.command(epilog="Example: horsehuman explain photo.jpg --out heat.png")
def explain(
    pictures: Annotated[
        list[str],
        typer.Argument(metavar="PICTURE...", help="Images, as for predict -r: files, folders, ..."),
    ],
    model: Model = "inception",
    layer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Layer to explain, such as Mixed_5d [default: last]."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PNG file to write [default: explain.png]."),
    ] = None,
    force: Force = False,
    plot: Plot = True,
    json: Json = False,
) -> None:
    """Draw heat maps: the regions of each image that support the classifier's answer.

    One image is drawn with feature maps of each layer, several as a contact sheet.
    """
    from horsehuman.inference.explain import explain_and_report

    options = ReportOptions(out, force, plot, json)
    _exit_unless(explain_and_report(model, pictures, layer, options))


@app.command(epilog="Example: horsehuman data --data DIR --group-pattern '(.+)_[0-9]+'")
def data(
    data: Images = "box",
    group_pattern: GroupPattern = None,
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Draw augmented images, as the run or model=cnn.")
    ] = False,
    out: ReportFolder = None,
    force: Force = False,
    plot: Plot = True,
    json: Json = False,
) -> None:
    """Count labelled images and draw a contact sheet per class and split, a row per group."""
    from horsehuman.data.contact_sheets import show_images
    from horsehuman.data.image_sets import ImageQuery

    query = ImageQuery(data, None, group_pattern)
    _exit_unless(show_images(query, ReportOptions(out, force, plot, json), augmented=augmented))


@app.command(epilog="Example: horsehuman audit --data DIR --fail-on error")
def audit(
    data: Images = "box",
    group_pattern: GroupPattern = None,
    out: ReportFolder = None,
    fail_on: Annotated[
        str, typer.Option(metavar="never|error|warning", help="Least severity that exits with 1.")
    ] = "never",
    force: Force = False,
    plot: Plot = True,
    json: Json = False,
) -> None:
    """Check labelled images for errors, duplicates and split problems before training."""
    from horsehuman.data.image_sets import ImageQuery
    from horsehuman.evaluation.audit import audit_and_report

    query = ImageQuery(data, None, group_pattern)
    _exit_unless(audit_and_report(query, ReportOptions(out, force, plot, json), fail_on))


@app.command(epilog="Example: horsehuman calibrate outputs/cnn/latest")
def calibrate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
) -> None:
    """Calibrate a run's classifier on held-out folds: temperature, unsure, neither.

    Trains the run's recipe again for each of five folds of its training groups, and writes what
    the held-out predictions yield into the run's final checkpoint. The test set is not used.
    """
    from horsehuman.training.calibrate import calibrate_and_report

    calibrate_and_report(run)


@app.command(epilog="Example: horsehuman export --model outputs/cnn/latest --out cnn.onnx")
def export(
    out: Annotated[Path, typer.Option(metavar="FILE", help="ONNX file to write.")],
    model: Model = "inception",
    force: Force = False,
) -> None:
    """Export a classifier to ONNX for other programs, and check that its outputs match."""
    from horsehuman.inference.export import export_and_report

    export_and_report(model, out, force=force)


@app.command(epilog="Example: horsehuman card --model outputs/cnn/latest --folder upload")
def card(
    model: Model = "inception",
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Report of evaluate [default: the latest].")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write card, weights and config there, for a model hub."),
    ] = None,
    force: Force = False,
) -> None:
    """Print a model card, whose numbers are read from the classifier's files."""
    from horsehuman.inference.hub import write_model_card

    write_model_card(model, report, folder, force=force)


@app.command(epilog="Example: horsehuman demo --port 8000")
def demo(
    model: Model = "inception",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Serve a web page on this machine that shows the prediction and heat map of an image."""
    from horsehuman.inference.demo import serve

    serve(model, port, browser=browser)


@app.command(epilog="Example: horsehuman cache --clear")
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove the cached files.")] = False,
) -> None:
    """Show the size of the user's cache, or clear it; its files are recreated when needed."""
    show_cache(clear=clear)


def _exit_unless(success: bool) -> None:
    """Exit with code 1 if something was left out, such as an image that cannot be read."""
    if not success:
        raise typer.Exit(1)
