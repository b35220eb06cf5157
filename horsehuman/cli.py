"""The ``horsehuman`` command: options, help texts and exit codes.

Each command is one call of a function, which is imported when the command runs: importing torch
takes seconds, and ``--help`` must not wait for it.
"""

import io
import os
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option, Typer
from typer.main import get_command

from horsehuman import __version__, runtime
from horsehuman.errors import HorseHumanError, one_line
from horsehuman.run_dir import ReportOptions


def _exit_unless_complete(complete: bool | None, **unused: object) -> None:
    """Exit with code 1 if a command left something out, such as an image that cannot be read."""
    if complete is False:
        raise Exit(1)


app = Typer(
    name="horsehuman",
    help="Horse or human? Two image classifiers with their data and weights bundled.",
    epilog="Training: python scripts/train.py model=inception (in a clone of the project)",
    result_callback=_exit_unless_complete,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

#: The images to classify or to explain.
Sources = Annotated[
    list[str], Argument(metavar="SOURCE...", help="Files, folders, patterns, URLs, - (stdin).")
]

#: The classifier to use.
Model = Annotated[str, Option(metavar="NAME|RUN|FILE", help="inception, cnn, run or checkpoint.")]

#: The labelled images to use.
Data = Annotated[
    str | None, Option(metavar="box|RUN|FOLDER", help="Images [default: the model's run, or box].")
]

#: The images of a command that needs no classifier.
Images = Annotated[str, Option(metavar="box|RUN|FOLDER", help="Labelled images.")]

#: The split of these images.
Split = Annotated[str | None, Option(help="train, validation, test, all [default: test if any].")]

#: The groups of the images in a folder.
GroupPattern = Annotated[str | None, Option(help="For folders: regex whose (...) is the group.")]

#: The folder of a report.
Folder = Annotated[Path | None, Option(metavar="DIR", help="Folder [default: outputs or the run].")]

#: The findings for which an audit fails.
FailOn = Annotated[str, Option(metavar="never|error|warning", help="Least severity for exit 1.")]

#: The precision of a frozen backbone.
Precision = Annotated[
    str, Option(metavar="auto|float32|bfloat16", help="Of InceptionV3's frozen backbone.")
]

#: Whether an earlier output is overwritten.
Force = Annotated[bool, Option("--force", help="Overwrite existing output.")]

#: Whether a report has figures.
Plot = Annotated[bool, Option(help="Draw the figures of the report.")]

#: Whether a program reads the report from stdout.
Json = Annotated[bool, Option("--json", help="Print the report as JSON.")]


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    runtime.raise_on_signals()
    runtime.report_uncaught_errors()
    runtime.log_to_stderr()
    runtime.tune_process()  # before the first tensor
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        get_command(app)()  # app() would replace sys.excepthook
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except runtime.Interrupted:
        print("interrupted", file=sys.stderr)
        raise


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, Option("--version", help="Show the version.")] = False) -> None:
    if version:
        print(__version__)


@app.command(epilog="Example: horsehuman predict photos --format csv --out answers.csv")
def predict(
    sources: Sources,
    model: Model = "inception",
    recursive: Annotated[bool, Option("--recursive", "-r", help="Search subfolders too.")] = False,
    form: Annotated[str, Option("--format", help="Output: table, csv, json or jsonl.")] = "table",
    out: Annotated[Path | None, Option(metavar="FILE", help="Output [default: stdout].")] = None,
    sort_into: Annotated[Path | None, Option(metavar="DIR", help="Copy to DIR/CLASS.")] = None,
    always: Annotated[bool, Option("--always-answer", help="Always name a class.")] = False,
    precision: Precision = "float32",
    force: Force = False,
) -> bool:
    """Predict the class of each image, with its probability.

    The model may also be an ONNX file that `horsehuman export` wrote. `--sort-into` copies each
    image into the subfolder of its class.
    """
    from horsehuman.inference.predict import predict_and_report

    return predict_and_report(
        sources, model, form, out, sort_into, precision,
        recursive=recursive, always_answer=always, force=force,
    )  # fmt: skip


@app.command(epilog="Example: horsehuman evaluate --model outputs/cnn/latest --split validation")
def evaluate(
    model: Model = "inception",
    data: Data = None,
    split: Split = None,
    group_pattern: GroupPattern = None,
    precision: Precision = "float32",
    out: Folder = None,
    force: Force = False,
    plot: Plot = True,
    json: Json = False,
) -> bool:
    """Evaluate a classifier: metrics with confidence intervals by group, and its errors."""
    from horsehuman.data.image_sets import ImageQuery
    from horsehuman.evaluation.evaluate import evaluate_and_report

    query = ImageQuery(data, split, group_pattern)
    return evaluate_and_report(model, query, ReportOptions(out, force, plot, json), precision)


@app.command(epilog="Example: horsehuman compare outputs/cnn/latest outputs/inception/latest")
def compare(
    models: Annotated[list[str], Argument(metavar="MODEL MODEL...", help="Runs, files or names.")],
    data: Data = None,
    split: Split = None,
    group_pattern: GroupPattern = None,
    precision: Precision = "float32",
    out: Folder = None,
    force: Force = False,
    plot: Plot = True,
    json: Json = False,
) -> bool:
    """Compare classifiers on the same images: accuracy, intervals, disagreements, cost."""
    from horsehuman.data.image_sets import ImageQuery
    from horsehuman.evaluation.compare import compare_and_report

    query = ImageQuery(data, split, group_pattern)
    return compare_and_report(models, query, ReportOptions(out, force, plot, json), precision)


@app.command(epilog="Example: horsehuman explain photo.jpg --out heat.png")
def explain(
    sources: Sources,
    model: Model = "inception",
    layer: Annotated[str | None, Option(help="Layer, such as Mixed_5d [default: last].")] = None,
    out: Annotated[Path | None, Option(metavar="FILE", help="PNG [default: explain.png].")] = None,
    force: Force = False,
    plot: Plot = True,
    json: Json = False,
) -> bool:
    """Draw heat maps: the regions of each image that support the classifier's answer.

    One image is drawn with feature maps of each layer, several as a contact sheet. Folders are
    searched recursively.
    """
    from horsehuman.inference.explain import explain_and_report

    return explain_and_report(model, sources, layer, ReportOptions(out, force, plot, json))


@app.command(epilog="Example: horsehuman data --data DIR --group-pattern '(.+)_[0-9]+'")
def data(
    data: Images = "box",
    group_pattern: GroupPattern = None,
    augmented: Annotated[bool, Option("--augmented", help="Augment as in training.")] = False,
    out: Folder = None,
    force: Force = False,
    plot: Plot = True,
    json: Json = False,
) -> bool:
    """Count labelled images and draw a contact sheet per class and split, a row per group.

    With `--augmented`, they are augmented as in the training of the run, or of `model=cnn`.
    """
    from horsehuman.data.contact_sheets import report_images
    from horsehuman.data.image_sets import ImageQuery

    query = ImageQuery(data, group_pattern=group_pattern)
    return report_images(query, ReportOptions(out, force, plot, json), augmented=augmented)


@app.command(epilog="Example: horsehuman audit --data DIR --fail-on error")
def audit(
    data: Images = "box",
    group_pattern: GroupPattern = None,
    out: Folder = None,
    fail_on: FailOn = "never",
    force: Force = False,
    plot: Plot = True,
    json: Json = False,
) -> bool:
    """Check labelled images for errors, duplicates and split problems before training."""
    from horsehuman.data.image_sets import ImageQuery
    from horsehuman.evaluation.audit import audit_and_report

    query = ImageQuery(data, group_pattern=group_pattern)
    return audit_and_report(query, ReportOptions(out, force, plot, json), fail_on)


@app.command(epilog="Example: horsehuman calibrate outputs/cnn/latest")
def calibrate(run: Annotated[Path, Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Calibrate a run's classifier on held-out folds: temperature, unsure, neither.

    Trains the run's recipe again for each of five folds of its training groups, and writes what
    the held-out predictions yield into the run's final checkpoint. The test set is not used.
    """
    from horsehuman.training.calibrate import calibrate_and_report

    calibrate_and_report(run)


@app.command(epilog="Example: horsehuman export --model outputs/cnn/latest --out cnn.onnx")
def export(
    out: Annotated[Path, Option(metavar="FILE", help="ONNX file to write.")],
    model: Model = "inception",
    force: Force = False,
) -> None:
    """Export a classifier to ONNX for other programs, and check that its outputs match."""
    from horsehuman.inference.export import export_and_report

    export_and_report(model, out, force=force)


@app.command(epilog="Example: horsehuman card --model outputs/cnn/latest --folder upload")
def card(
    model: Model = "inception",
    report: Annotated[Path | None, Option(metavar="DIR", help="Report of evaluate.")] = None,
    folder: Annotated[Path | None, Option(metavar="DIR", help="Folder for a model hub.")] = None,
    force: Force = False,
) -> None:
    """Print a model card, whose numbers are read from the classifier's files.

    The report is one of `horsehuman evaluate`. With `--folder`, the card, the weights and the
    config are written there instead, to be uploaded to a model hub.
    """
    from horsehuman.inference.hub import write_model_card

    write_model_card(model, report, folder, force=force)


@app.command(epilog="Example: horsehuman demo --port 8000")
def demo(
    model: Model = "inception",
    port: Annotated[int, Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 7860,
    browser: Annotated[bool, Option(help="Open the page in a browser.")] = True,
) -> None:
    """Serve a web page on this machine that shows the prediction and heat map of an image."""
    from horsehuman.inference.demo import serve

    serve(model, port, browser=browser)


@app.command(epilog="Example: horsehuman cache --clear")
def cache(clear: Annotated[bool, Option("--clear", help="Remove the files.")] = False) -> None:
    """Show the size of the user's cache, or clear it; its files are recreated when needed."""
    runtime.show_cache(clear=clear)
