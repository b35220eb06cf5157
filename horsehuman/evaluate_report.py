"""An evaluation as a person sees it: tables on the terminal, and pictures."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from horsehuman.checkpoint import load_classifier
from horsehuman.errors import HorseHumanError, shown
from horsehuman.evaluate import (
    Answers,
    answer,
    check_classes,
    summarise,
    worst,
    write_predictions,
)
from horsehuman.explain import heat_on_figures
from horsehuman.picture_set import PictureSet, choose_set, seen_in_training
from horsehuman.pictures import PictureError, read_picture
from horsehuman.report_folders import EVALUATION, evaluation_folder, report_folder
from horsehuman.runs import write_metrics
from horsehuman.terminal import console, number, span, table

log = logging.getLogger(__name__)

#: Below this number of groups the intervals are said to be too narrow.
FEW_GROUPS = 20


def tables(summary: dict[str, Any], title: str) -> list[Table]:
    """The tables that a person reads: figures with intervals, and the groups by trouble."""
    figures = table("", "value", "95 % by group", "95 % by picture", title=title)
    for name, found in summary["metrics"].items():
        figures.add_row(
            name, number(found["value"]), *map(span, (found["by group"], found["by picture"]))
        )
    groups = table("group", "class", "right", "mean probability of its class", left=2)
    for row in summary["by group"][:20]:
        groups.add_row(
            shown(row["group"]),
            shown(row["class"]),
            f"{row['right']} of {row['pictures']}",
            f"{row['mean probability']:.3f}",
        )
    return [figures, groups]


def caveats(summary: dict[str, Any], *, grouped: bool) -> list[str]:
    """What a reader of the figures must know, a line each."""
    lines = []
    count, whole = summary["groups"], summary["groups without an error"]
    low, high = summary["groups without an error, 95 % interval"]
    if not grouped:
        lines.append(
            "no groups are known: if several pictures show the same thing, all intervals are too "
            "narrow (name groups with --group-pattern)"
        )
    noun = "groups" if grouped else "pictures"
    lines.append(
        f"{whole} of {count} {noun} have no error; by that alone, the share of {noun} without "
        f"one lies between {low:.0%} and {high:.0%} (exact 95 % interval)"
    )
    if grouped and count < FEW_GROUPS:
        lines.append(
            f"few groups ({count}): the intervals by group are still too narrow, where there are "
            "any, and those by picture are not to be trusted"
        )
    if summary["unsure"] or summary["neither"]:
        others = summary["pictures"] - summary["unsure"] - summary["neither"]
        lines.append(
            f"{summary['unsure']} answers are unsure and {summary['neither']} pictures taken for "
            f"neither; of the other {others}, {summary['right of the others']} are right"
        )
    if heat := summary["heat on the figure"]:
        lines.append(
            f"{heat['share of heat']:.0%} of what spoke for the answers lies on the figure, which "
            f"takes {heat['share of area']:.0%} of the picture (mean of {heat['pictures']} cut-outs"
            " on white; horsehuman explain draws it)"
        )
    undefined = [name for name, found in summary["metrics"].items() if found["value"] is None]
    if undefined:
        lines.append(f"not defined, for want of a class or an answer: {', '.join(undefined)}")
    return lines


def draw(folder: Path, answers: Answers, title: str) -> None:
    """Write ``report.png``, six panels, and ``pictures.png``, the worst and least certain ones."""
    from horsehuman import drawings, plots  # matplotlib, for pictures alone

    names = answers.pictures.class_names
    figure = plots.report(
        answers.probabilities, answers.labels, answers.groups, answers.threshold, names, title
    )
    plots.save(figure, folder / "report.png")
    chosen = worst(answers, 24)
    figure = drawings.contact_sheet(
        [read_again(answers.records[index].path) for index in chosen],
        [
            f"{shown(answers.records[index].path.stem)[-22:]}\n{names[answers.labels[index]]} "
            f"{answers.of_truth[index]:.0%}"
            for index in chosen
        ],
        [not answers.right[index] for index in chosen],
        "Wrong (vermilion) and least certain answers: what is shown, and its probability",
    )
    plots.save(figure, folder / "pictures.png")


def read_again(path: Path) -> NDArray[np.uint8]:
    """A picture to be drawn; a grey one where it vanished since it was answered."""
    try:
        return read_picture(path)
    except PictureError as error:
        log.warning("not drawn: %s", error)
        return np.full((64, 64, 3), 128, np.uint8)


def tell_if_seen(model: str, pictures: PictureSet) -> None:
    """Say how many of the pictures trained a classifier, or that nobody knows."""
    seen = seen_in_training(model, pictures.records)
    if seen is None:
        log.warning("it is not known which pictures trained %s", shown(model))
    elif seen:
        log.warning("%d of these pictures trained %s: it is flattered", seen, shown(model))


def evaluate_and_report(
    model: str,
    data: str | None,
    split: str | None,
    group_pattern: str | None,
    out: Path | None,
    *,
    force: bool,
    plot: bool,
) -> bool:
    """What ``horsehuman evaluate`` does; returns whether all pictures could be read."""
    classifier = load_classifier(model)
    pictures, split = choose_set(model, data, split, group_pattern)
    check_classes(classifier, pictures)
    default = evaluation_folder(model, split, data)
    folder = report_folder(out, default, force=force, report=EVALUATION)
    tell_if_seen(model, pictures)
    try:
        answers = answer(classifier, pictures)
    except HorseHumanError:
        with contextlib.suppress(OSError):  # it is empty, unless it was there before
            folder.rmdir()
        raise
    summary = {"model": model, "data": str(pictures.root), "split": split, **summarise(answers)}
    summary["heat on the figure"] = heat_on_figures(classifier, answers.records)
    write_predictions(folder, answers)
    write_metrics(folder, summary)
    title = f"{model}: {summary['right']} of {summary['pictures']} right"
    title += f", {summary['groups']} groups" if pictures.grouped else ""
    show(summary, title, grouped=pictures.grouped)
    if plot:
        draw(folder, answers, title)
    else:
        for drawing in ("report.png", "pictures.png"):  # of an earlier report
            (folder / drawing).unlink(missing_ok=True)
    print(f"report      {shown(folder)}")
    return not answers.errors


def show(summary: dict[str, Any], title: str, *, grouped: bool) -> None:
    """Print the tables and what a reader must know."""
    out = console(stderr=False)
    for each in tables(summary, title):
        out.print(each)
        out.print()
    for line in caveats(summary, grouped=grouped):
        out.print(line)
