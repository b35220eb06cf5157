"""Write predictions as a table, CSV or JSON, and copy images into one folder per answer."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from horsehuman.data.sources import is_url
from horsehuman.decision import Prediction, format_prediction
from horsehuman.errors import HorseHumanError, check_choice, printable
from horsehuman.run_dir import unused_path

#: Columns of CSV, and keys of JSON objects.
COLUMNS = ("source", "class", "probability", "logit", "status", "error")

#: Values of ``--format``.
FORMATS = ("table", "csv", "json", "jsonl")

# First characters of a cell that make a spreadsheet read it as a formula.
_FORMULA_PREFIXES = ("=", "+", "-", "@")


class Writer:
    """Write predictions one at a time to stdout or, atomically, to a file.

    Use it as a context manager. Leaving the context completes the output, after an exception or
    Ctrl-C too, so that the predictions written until then are kept. A file appears under its name
    only then.

    Args:
        output_format: One of :data:`FORMATS`. A table omits predictions with an error.
        path: File to write; ``None`` for stdout.
        width: Width in characters of the first column of a table.

    Attributes:
        output_format: The format.
        path: The file, or ``None``.
        width: The width of the first column.

    Raises:
        HorseHumanError: If the format is unknown or the output cannot be written.
    """

    def __init__(self, output_format: str, path: Path | None, width: int) -> None:
        check_choice("--format", output_format, FORMATS)
        self.output_format, self.path, self.width = output_format, path, width
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}") if path else None
        self._count = 0
        self._file: IO[str] = sys.stdout

    def __enter__(self) -> Writer:
        with self._os_error_as_message():
            if self._temporary:
                self._file = self._temporary.open(
                    "w", encoding="utf-8", errors="surrogateescape", newline=""
                )
            if self.output_format == "csv":
                self._file.write(_csv_line(COLUMNS))
        return self

    def write(self, prediction: Prediction) -> None:
        """Write one prediction; on stdout, it is flushed at once."""
        row = as_row(prediction)
        text = ""
        if self.output_format == "csv":
            text = _csv_line("" if value is None else _escape_cell(value) for value in row.values())
        elif self.output_format == "jsonl":
            text = json.dumps(row, allow_nan=False) + "\n"
        elif self.output_format == "json":
            text = (",\n" if self._count else "[\n") + json.dumps(row, allow_nan=False)
        elif prediction.status != "error":
            source = printable(prediction.source)
            text = f"{source:<{self.width}}  {format_prediction(prediction)}\n"
        self._count += 1
        with self._os_error_as_message():
            self._file.write(text)
            if self._temporary is None:
                self._file.flush()  # A program that reads a pipe gets each prediction at once.

    def __exit__(self, *unused: object) -> None:
        with self._os_error_as_message():
            if self.output_format == "json":
                self._file.write("\n]\n" if self._count else "[]\n")
            self._file.flush()
            if self._temporary and self.path:
                os.fsync(self._file.fileno())
                self._file.close()
                self._temporary.replace(self.path)

    @contextlib.contextmanager
    def _os_error_as_message(self) -> Iterator[None]:
        """Remove the temporary file and raise a one-line error if writing fails."""
        try:
            yield
        except BrokenPipeError:  # The reader of the pipe has stopped, which is no error of ours.
            raise
        except OSError as error:
            if self._temporary:
                self._temporary.unlink(missing_ok=True)
            target = f"--out {printable(self.path)}" if self.path else "to stdout"
            raise HorseHumanError(f"cannot write {target}: {error.strerror}") from error


class Sorter:
    """Copy images into one folder per class, and into ``unsure`` and ``neither``.

    Args:
        folder: Folder that these folders are created in. No file is overwritten: a copy whose name
            is taken gets a number.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def copy(self, prediction: Prediction) -> None:
        """Copy the image of a prediction, unless it has an error or comes from the web.

        Raises:
            HorseHumanError: If the file cannot be copied.
        """
        if prediction.status == "error" or is_url(prediction.source):
            return
        source = Path(prediction.source)
        name = prediction.class_name if prediction.status == "ok" else prediction.status
        target = self.folder / name / source.name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, unused_path(target, Path.exists))
        except OSError as error:
            raise HorseHumanError(
                f"cannot copy {printable(source)} to {printable(target)}: {error.strerror}"
            ) from error


def as_row(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as a dict with the keys :data:`COLUMNS`; missing values are ``None``."""
    values = (
        prediction.source,
        prediction.class_name or None,
        prediction.probability,
        prediction.logit,
        prediction.status,
        prediction.error or None,
    )
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in zip(COLUMNS, values, strict=True)
    }


def _csv_line(values: Iterable[object]) -> str:
    """Format values as one line of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _escape_cell(value: object) -> object:
    """Make text safe for spreadsheets: on one line and no formula; return numbers unchanged."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA_PREFIXES) else text
