"""Folders of reports: where a new one goes, and which one is the newest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horsehuman.checkpoint import IN_THE_BOX
from horsehuman.errors import HorseHumanError, shown
from horsehuman.picture_set import is_run, run_of
from horsehuman.places import free_path
from horsehuman.runs import read_json, write_bytes

#: What ``horsehuman evaluate`` writes.
EVALUATION = ("metrics.json", "predictions.csv", "report.png", "pictures.png")


def report_folder(given: Path | None, default: Path, *, force: bool, report: Sequence[str]) -> Path:
    """Make the folder of a report; one that holds a report already is not written over.

    Args:
        given: What the user named, if anything.
        default: Otherwise; a number is added to its name while that holds a report.
        force: Write over a report in the folder that the user named.
        report: Patterns of the files that a report has.

    Raises:
        HorseHumanError: The folder holds a report, or cannot be written.
    """

    def holds_report(folder: Path) -> bool:
        return folder.is_file() or any(any(folder.glob(pattern)) for pattern in report)

    folder = given or free_path(default, holds_report, is_folder=True)
    if is_run(folder):
        raise HorseHumanError(f"--out {shown(folder)} is a run: name another folder")
    if not force and holds_report(folder):
        raise HorseHumanError(
            f"--out {shown(folder)} holds a report already: name another folder, or add --force"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise HorseHumanError(
            f"cannot write into {shown(folder)}: {error.strerror}; name another folder with --out"
        ) from error
    return folder


def evaluation_folder(model: str, split: str | None, data: str | None = None) -> Path:
    """Where an evaluation of a classifier goes, unless the user says otherwise.

    Args:
        model: See :func:`~horsehuman.checkpoint.load_classifier`.
        split: Of the run's own pictures.
        data: Other pictures, if any.
    """
    run = None if data else run_of(model)
    if run:
        return run / f"evaluate-{split}"
    name = model if model in IN_THE_BOX else Path(model).expanduser().resolve().name
    return Path("outputs/evaluate") / name


def newest_evaluation(model: str, root: Path | None) -> Path:
    """The newest report on a classifier's test set, under its own name or one with a number.

    Args:
        model: See :func:`~horsehuman.checkpoint.load_classifier`.
        root: Folder of the classifier's own pictures, if they are known; reports on others do not
            count.

    Returns:
        Its folder; where there is none, the one that it would have.
    """
    default = evaluation_folder(model, "test")
    numbered = re.compile(rf"{re.escape(default.name)}(-[0-9]+)?")
    found = {
        path.parent: path.stat().st_mtime
        for path in default.parent.glob("*/metrics.json")
        if numbered.fullmatch(path.parent.name) and _is_on(read_json(path), root)
    }
    return max(found, key=found.__getitem__, default=default)


def _is_on(report: dict[str, Any], root: Path | None) -> bool:
    if root is None:
        return "metrics" in report
    return Path(str(report.get("data"))).name == root.name and report.get("split") == "test"
