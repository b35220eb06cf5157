"""An evaluation as a person sees it: tables on the terminal, and pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from horsehuman.checkpoint import load_classifier
from horsehuman.errors import shown
from horsehuman.evaluate import (
    Answers,
    answer,
    check_classes,
    report_folder,
    summarise,
    worst,
    write_predictions,
)
from horsehuman.explain import heat_on_figures
from horsehuman.picture_set import choose_set, run_of, seen_in_training
from horsehuman.pictures import read_picture
from horsehuman.runs import write_metrics

log = logging.getLogger(__name__)

#: Below this number of groups the intervals are said to be too narrow.
FEW_GROUPS = 20


def tables(summary: dict[str, Any], title: str) -> list[Table]:
    """The tables that a person reads: figures with intervals, and the groups by trouble."""
    figures = Table(
        title=title, box=None, header_style="bold", pad_edge=False, title_justify="left"
    )
    figures.add_column("")
    for name in ("value", "95 % by group", "95 % by picture"):
        figures.add_column(name, justify="right")
    for name, found in summary["metrics"].items():
        figures.add_row(
            name, number(found["value"]), *map(span, (found["by group"], found["by picture"]))
        )
    groups = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("group", "class", "right", "mean probability of its class"):
        groups.add_column(name, justify="left" if name in ("group", "class") else "right")
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
    else:
        lines.append(
            f"{whole} of {count} groups have no error; by that alone, the share of groups without "
            f"one lies between {low:.0%} and {high:.0%} (exact 95 % interval)"
        )
        if count < FEW_GROUPS:
            lines.append(
                f"{count} groups are few: the intervals by group are still too narrow, and those "
                "by picture are not to be trusted"
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


def number(value: float | None) -> str:
    """A figure, or that it is undefined."""
    return "undefined" if value is None else f"{value:.4f}"


def span(bounds: Sequence[float | None]) -> str:
    """An interval; nothing where it is not defined."""
    low, high = bounds
    return "" if low is None or high is None else f"{low:.4f} - {high:.4f}"


def draw(folder: Path, answers: Answers, title: str) -> None:
    """Write ``report.png``, six panels, and ``pictures.png``, the worst and least certain ones."""
    from horsehuman import plots  # matplotlib, for pictures alone

    names = answers.pictures.class_names
    figure = plots.report(
        answers.probabilities, answers.labels, answers.groups, answers.threshold, names, title
    )
    plots.save(figure, folder / "report.png")
    chosen = worst(answers, 24)
    figure = plots.contact_sheet(
        [read_picture(answers.records[index].path) for index in chosen],
        [
            f"{answers.records[index].path.stem[-22:]}\n{names[answers.labels[index]]} "
            f"{answers.of_truth[index]:.0%}"
            for index in chosen
        ],
        [not answers.right[index] for index in chosen],
        "Wrong (vermilion) and least certain answers: what is shown, and its probability",
    )
    plots.save(figure, folder / "pictures.png")


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
    run = None if data else run_of(model)
    default = run / f"evaluate-{split}" if run else Path("outputs/evaluate") / Path(model).stem
    folder = report_folder(out, default, force=force)
    if seen := seen_in_training(model, pictures.records):
        log.warning("%d of these pictures trained the classifier: its figures flatter", seen)
    answers = answer(classifier, pictures)
    summary = {"model": model, "data": str(pictures.root), "split": split, **summarise(answers)}
    summary["heat on the figure"] = heat_on_figures(classifier, answers.records)
    write_predictions(folder, answers)
    write_metrics(folder, summary)
    title = f"{model}: {summary['right']} of {summary['pictures']} right"
    title += f", {summary['groups']} groups" if pictures.grouped else ""
    if plot:
        draw(folder, answers, title)
    console = Console(highlight=False, soft_wrap=True)
    for table in tables(summary, title):
        console.print(table)
        console.print()
    for line in caveats(summary, grouped=pictures.grouped):
        console.print(line)
    console.print(f"report      {shown(folder)}")
    return not answers.errors
