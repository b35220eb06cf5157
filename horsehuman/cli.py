"""The ``horsehuman`` command; each command imports what it needs when it is called."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import horsehuman
from horsehuman.errors import HorseHumanError, one_line, printable
from horsehuman.runtime import Interrupted, log_to_stderr, raise_on_signals

app = typer.Typer(
    name="horsehuman",
    help="Horse or human? Two picture classifiers with everything in the box.",
    epilog="Training: python scripts/train.py model=inception (in a clone of the project)",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

#: Which classifier a command uses.
Model = Annotated[
    str,
    typer.Option(
        metavar="NAME|RUN|FILE",
        help="inception or cnn (in the box), a run, a checkpoint; predict takes .onnx, too.",
    ),
]

#: Which pictures it is asked about.
Data = Annotated[
    str | None,
    typer.Option(metavar="box|RUN|FOLDER", help="Pictures [the model's own run, or the box]."),
]

Split = Annotated[
    str | None, typer.Option(help="train, validation, test or all [test, if there is one].")
]

GroupPattern = Annotated[
    str | None,
    typer.Option(help="Of a folder: regular expression with one (...) that names the group."),
]

#: Where a report goes, and whether over an earlier one.
ReportFolder = Annotated[
    Path | None, typer.Option(help="Folder for the report [below outputs; evaluate's in the run].")
]

Force = Annotated[bool, typer.Option("--force", help="Write over what --out holds.")]

Plot = Annotated[bool, typer.Option(help="Draw the pictures of the report.")]


def main() -> None:
    """Run the command; exit 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    raise_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except BrokenPipeError:  # of "| head": nobody is left to tell
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
            help="Pictures: files, folders, patterns, http(s) addresses; - takes them from stdin.",
        ),
    ],
    model: Model = "inception",
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Go into folders inside folders.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", metavar="table|csv|json|jsonl", help="Of the answers.")
    ] = "table",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write answers there, not on stdout.")
    ] = None,
    sort_into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy pictures into a folder a class.")
    ] = None,
    always_answer: Annotated[
        bool, typer.Option("--always-answer", help="Name a class, however unsure.")
    ] = False,
    force: Force = False,
) -> None:
    """Say what each picture shows, with which probability."""
    _begin()
    from horsehuman.inference.predict import predict_and_report

    if not predict_and_report(
        sources,
        model,
        form,
        out,
        sort_into,
        recursive=recursive,
        always_answer=always_answer,
        force=force,
    ):
        raise typer.Exit(1)


@app.command(epilog="Example: horsehuman evaluate --model outputs/cnn/latest --split validation")
def evaluate(
    model: Model = "inception",
    data: Data = None,
    split: Split = None,
    group_pattern: GroupPattern = None,
    out: ReportFolder = None,
    force: Force = False,
    plot: Plot = True,
) -> None:
    """Say how good a classifier is, with intervals by group, and where it fails."""
    _begin()
    from horsehuman.evaluation.evaluate import evaluate_and_report

    if not evaluate_and_report(model, data, split, group_pattern, out, force=force, plot=plot):
        raise typer.Exit(1)


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
) -> None:
    """Compare classifiers on the same pictures: accuracy, doubt, disagreements and cost."""
    _begin()
    from horsehuman.evaluation.compare import compare_and_report

    if not compare_and_report(models, data, split, group_pattern, out, force=force, plot=plot):
        raise typer.Exit(1)


@app.command(epilog="Example: horsehuman explain photo.jpg --out heat.png")
def explain(
    pictures: Annotated[
        list[str],
        typer.Argument(metavar="PICTURE...", help="As in predict -r: files, folders, ..."),
    ],
    model: Model = "inception",
    layer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose maps are meant, such as Mixed_5d [the last]."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The drawing, as PNG [explain.png]."),
    ] = None,
    force: Force = False,
) -> None:
    """Draw where a classifier looked: what spoke for its answer, laid over each picture.

    One picture is drawn with what each layer sees of it, several make a contact sheet.
    """
    _begin()
    from horsehuman.inference.explain import explain_and_draw

    if not explain_and_draw(model, pictures, layer, out, force=force):
        raise typer.Exit(1)


@app.command(epilog="Example: horsehuman data --data DIR --group-pattern '(.+)_[0-9]+'")
def data(
    data: Annotated[str, typer.Option(metavar="box|RUN|FOLDER", help="Which pictures.")] = "box",
    group_pattern: GroupPattern = None,
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Show how training sees them: a run, or model=cnn.")
    ] = False,
    out: ReportFolder = None,
    force: Force = False,
) -> None:
    """Count pictures and draw them: a sheet for each class and split, a row for each group."""
    _begin()
    from horsehuman.data.contact_sheets import show_images

    if not show_images(data, group_pattern, out, augmented=augmented, force=force):
        raise typer.Exit(1)


@app.command(epilog="Example: horsehuman export --model outputs/cnn/latest --out cnn.onnx")
def export(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where it goes.")],
    model: Model = "inception",
    form: Annotated[
        str, typer.Option("--format", metavar="onnx|torch", help="ONNX, or torch.export.")
    ] = "onnx",
    force: Force = False,
) -> None:
    """Write a classifier as one file for other programs, and check that it answers alike."""
    _begin()
    from horsehuman.inference.export import export as write

    found = write(model, form, out, force=force)
    print(f"{printable(out)}: {out.stat().st_size / 1e6:.1f} MB")
    print(f"largest difference to the checkpoint, of probabilities and strangeness: {found:.1g}")


@app.command(epilog="Example: horsehuman card --model outputs/cnn/latest --folder upload")
def model_card(
    model: Model = "inception",
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Report of evaluate [the run's, if any].")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write card, weights and config there, for a model hub."),
    ] = None,
    force: Force = False,
) -> None:
    """Print a model card, every figure of it out of the classifier's files."""
    _begin()
    from horsehuman.inference.hub import model_card as write
    from horsehuman.inference.hub import write_hub_folder

    text = write(model, report)
    if folder is None:
        print(text, end="")
    else:
        write_hub_folder(model, folder, text, force=force)
        print(printable(folder))


@app.command(epilog="Example: horsehuman demo --port 8000")
def demo(
    model: Model = "inception",
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Serve a page: drop a picture, get the answer and where it looked. For this machine alone."""
    _begin()
    from horsehuman.inference.demo import serve

    serve(model, port, browser=browser)


@app.command(epilog="Example: horsehuman audit --data DIR --fail-on error")
def audit(
    data: Annotated[str, typer.Option(metavar="box|RUN|FOLDER", help="Which pictures.")] = "box",
    group_pattern: GroupPattern = None,
    out: ReportFolder = None,
    fail_on: Annotated[
        str, typer.Option(metavar="never|error|warning", help="Exit 1 where such is found.")
    ] = "never",
    force: Force = False,
) -> None:
    """Say what is wrong with pictures, before anyone trains on them."""
    _begin()
    from horsehuman.evaluation.audit import audit_and_report

    if not audit_and_report(data, group_pattern, out, fail_on, force=force):
        raise typer.Exit(1)


@app.command(epilog="Example: horsehuman cache --clear")
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is kept.")] = False,
) -> None:
    """Show what is kept in the user's cache, or empty it; all of it can be made again."""
    from horsehuman.runtime import show_cache

    show_cache(clear=clear)


def _begin() -> None:
    """What comes before a command's first tensor."""
    log_to_stderr()
    from horsehuman.runtime import keep_freed_memory

    keep_freed_memory()
