"""Write predictions as a table, CSV or JSON, and copy images into one folder per answer."""

import csv
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import IO, Any

from horsehuman.data.sources import is_url
from horsehuman.decision import Prediction, format_prediction
from horsehuman.errors import check_choice, os_errors, printable
from horsehuman.run_dir import unused_path
from horsehuman.runtime import Interrupted

#: Columns of CSV, and keys of JSON objects, in the order of the fields of ``Prediction``.
COLUMNS = ("source", "class", "probability", "logit", "status", "error")

#: Values of ``--format``.
FORMATS = ("table", "csv", "json", "jsonl")


def write_predictions(
    predictions: Iterable[Prediction], output_format: str, path: Path | None, width: int
) -> bool:
    """Write predictions one at a time to stdout or, atomically, to a file; errors go to stderr.

    A file appears under its name at the end, or when :class:`~horsehuman.runtime.Interrupted` is
    raised, so that the predictions written until then are kept. After any other exception there is
    no file, and an earlier file of that name stays.

    Args:
        predictions: The predictions. A table omits those with an error.
        output_format: One of :data:`FORMATS`.
        path: File to write; ``None`` for stdout.
        width: Width in characters of the first column of a table.

    Returns:
        Whether there was no error.

    Raises:
        HorseHumanError: If the format is unknown or the output cannot be written.
    """
    check_choice("--format", output_format, FORMATS)
    no_error, separator = True, ""
    output = _open(path) if path else nullcontext(sys.stdout)
    with os_errors("write", f"--out {path}" if path else "to stdout"), output as file:
        file.write({"csv": _csv_line(COLUMNS), "json": "["}.get(output_format, ""))
        try:
            for prediction in predictions:
                if prediction.status == "error":
                    no_error = False
                    print(f"error: {prediction.error}", file=sys.stderr)
                if prediction.status != "error" or output_format != "table":
                    file.write(_format(prediction, output_format, width, separator))
                    file.flush()  # A program that reads a pipe gets each prediction at once.
                    separator = ","
        finally:
            file.write("\n]\n" if output_format == "json" else "")
    return no_error


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    """Open a file that gets its name at the end or after an interruption."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
            os.fsync(file.fileno())
        temporary.replace(path)
    except Interrupted:
        temporary.replace(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _format(prediction: Prediction, output_format: str, width: int, separator: str) -> str:
    """Format one prediction; in JSON, the separator stands between it and the one before."""
    if output_format == "table":
        return f"{printable(prediction.source):<{width}}  {format_prediction(prediction)}\n"
    row = as_row(prediction)
    if output_format == "csv":
        return _csv_line(map(_escape_cell, row.values()))
    text = json.dumps(row, allow_nan=False)
    return f"{text}\n" if output_format == "jsonl" else f"{separator}\n{text}"


def copy_each(predictions: Iterable[Prediction], folder: Path) -> Iterator[Prediction]:
    """Copy each image to the subfolder of its class, or to ``unsure``, ``neither`` or ``both``.

    Nothing is copied for an error. No file is overwritten: a copy whose name is taken gets a
    number.

    Args:
        predictions: Predictions on files.
        folder: Folder that these folders are created in.

    Yields:
        Each prediction, before its image is copied.

    Raises:
        HorseHumanError: If a file cannot be copied.
    """
    for prediction in predictions:
        yield prediction
        if prediction.status == "error" or is_url(prediction.source):
            continue
        name = prediction.class_name if prediction.status == "ok" else prediction.status
        target = folder / name / Path(prediction.source).name
        with os_errors(f"copy {printable(prediction.source)} to", target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(prediction.source, unused_path(target, Path.exists))


def as_row(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as a dict with the keys :data:`COLUMNS`; missing values are ``None``."""
    row = dict(zip(COLUMNS, astuple(prediction), strict=True))
    for name, value in row.items():
        if value == "" or (isinstance(value, float) and not math.isfinite(value)):
            row[name] = None
    return row


def _csv_line(values: Iterable[object]) -> str:
    """Format values as one line of CSV; ``None`` becomes an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _escape_cell(value: object) -> object:
    """Make text safe for spreadsheets: on one line and no formula; return numbers unchanged."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
