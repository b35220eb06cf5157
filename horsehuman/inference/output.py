"""Predictions for people and programs: a table, CSV, JSON, and pictures sorted into folders."""

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

#: The columns of CSV, and the keys of JSON.
COLUMNS = ("source", "class", "probability", "logit", "status", "error")

#: What ``--format`` takes.
FORMATS = ("table", "csv", "json", "jsonl")

# What a spreadsheet takes for a formula.
_FORMULA = ("=", "+", "-", "@")


def as_row(prediction: Prediction) -> dict[str, Any]:
    """A prediction by :data:`COLUMNS`; what there is not is ``None``."""
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


def _safe(value: object) -> object:
    """Text on one line that no spreadsheet takes for a formula; numbers as they are."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _csv(values: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


class Writer:
    """Writes predictions as they come, to stdout or to a file that is whole or not there at all.

    A context manager: whatever ends it, Ctrl-C too, what was answered is written.

    Args:
        form: One of :data:`FORMATS`. In a table those with an error are left out.
        path: The file; ``None`` for stdout.
        width: Of the first column of a table.

    Raises:
        HorseHumanError: The file cannot be written.
    """

    def __init__(self, form: str, path: Path | None, width: int) -> None:
        check_choice("--format", form, FORMATS)
        self.form, self.path, self.width = form, path, width
        self._aside = path.with_name(f".{path.name}.{os.getpid()}") if path else None
        self._count = 0
        self._file: IO[str] = sys.stdout

    def __enter__(self) -> Writer:
        with self._os_error_as_message():
            if self._aside:
                self._file = self._aside.open(
                    "w", encoding="utf-8", errors="surrogateescape", newline=""
                )
            if self.form == "csv":
                self._file.write(_csv(COLUMNS))
        return self

    def write(self, prediction: Prediction) -> None:
        """Write one."""
        row = as_row(prediction)
        text = ""
        if self.form == "csv":
            text = _csv(["" if value is None else _safe(value) for value in row.values()])
        elif self.form == "jsonl":
            text = json.dumps(row, allow_nan=False) + "\n"
        elif self.form == "json":
            text = (",\n" if self._count else "[\n") + json.dumps(row, allow_nan=False)
        elif prediction.status != "error":
            text = (
                f"{printable(prediction.source):<{self.width}}  {format_prediction(prediction)}\n"
            )
        self._count += 1
        with self._os_error_as_message():
            self._file.write(text)
            if self._aside is None:
                self._file.flush()  # whoever reads it through a pipe need not wait

    def __exit__(self, *unused: object) -> None:
        with self._os_error_as_message():
            if self.form == "json":
                self._file.write("\n]\n" if self._count else "[]\n")
            self._file.flush()
            if self._aside and self.path:
                os.fsync(self._file.fileno())
                self._file.close()
                self._aside.replace(self.path)

    @contextlib.contextmanager
    def _os_error_as_message(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # whoever read it has seen enough
            raise
        except OSError as error:
            if self._aside:
                self._aside.unlink(missing_ok=True)
            place = f"--out {printable(self.path)}" if self.path else "to stdout"
            raise HorseHumanError(f"cannot write {place}: {error.strerror}") from error


class Sorter:
    """Copies pictures into a folder for each class, ``unsure`` and ``neither``.

    Args:
        folder: That they are made in. A file that is there is never written over: another name is
            found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def copy(self, prediction: Prediction) -> None:
        """Copy a picture; one with an error stays where it is."""
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
