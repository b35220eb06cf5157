"""A comparison as a person sees it: tables on the terminal, JSON and pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from horsehuman.checkpoint import load_classifier
from horsehuman.compare import (
    CURVES,
    Contender,
    choose_same,
    common,
    contend,
    differences,
    disagreements,
)
from horsehuman.errors import HorseHumanError, shown
from horsehuman.evaluate import check_classes, report_folder, summarise
from horsehuman.picture_set import seen_in_training
from horsehuman.pictures import read_picture
from horsehuman.report import FEW_GROUPS, number, span
from horsehuman.runs import write_whole

log = logging.getLogger(__name__)

#: Figures of each classifier that the table shows, of all that ``compare.json`` holds.
FIGURES = ("accuracy", "balanced accuracy", "ROC-AUC", "Brier score", "log loss")

#: Pictures on the sheet of disagreements.
SHOWN = 24


def compare_and_report(
    models: Sequence[str],
    data: str | None,
    split: str | None,
    group_pattern: str | None,
    out: Path | None,
    *,
    force: bool,
    plot: bool,
) -> bool:
    """What ``horsehuman compare`` does; returns whether all pictures could be read."""
    if len(models) < 2:
        raise HorseHumanError(f"compare {shown(models[0])} with what? Name two models or more")
    pictures = choose_same(models, data, split, group_pattern)
    classifiers = [load_classifier(model) for model in models]
    for classifier in classifiers:
        check_classes(classifier, pictures)
    folder = report_folder(out, Path("outputs/compare"), force=force, report="compare.json")
    for model in models:
        if seen := seen_in_training(model, pictures.records):
            log.warning("%d of these pictures trained %s: it is flattered", seen, shown(model))
    found = [contend(*each, pictures) for each in zip(models, classifiers, strict=True)]
    whole = not any(each.answers.errors for each in found)
    found = common(found)
    comparison = summary(found)
    text = json.dumps(comparison, indent=2, allow_nan=False) + "\n"
    write_whole(folder / "compare.json", lambda file: file.write(text.encode()))
    if plot:
        draw(folder, found, comparison)
    show(comparison, found, grouped=pictures.grouped)
    print(f"comparison  {shown(folder)}")
    return whole


def summary(found: Sequence[Contender]) -> dict[str, Any]:
    """All that ``compare.json`` says; what is not defined or not recorded is ``None``."""
    first, *others = found
    return {
        "data": str(first.answers.pictures.root),
        "pictures": len(first.answers.records),
        "groups": len(set(first.answers.groups)),
        "models": [
            {
                "model": each.name,
                "right": int(each.answers.right.sum()),
                "metrics": summarise(each.answers)["metrics"],
                "cost": each.cost,
                "accuracy over the epochs": each.curves,
            }
            for each in found
        ],
        "differences": [differences(first, other) for other in others],
    }


def show(comparison: dict[str, Any], found: Sequence[Contender], *, grouped: bool) -> None:
    """Print the tables and what a reader must know."""
    console = Console(highlight=False, soft_wrap=True)
    models = comparison["models"]
    count, groups = comparison["pictures"], comparison["groups"]
    title = f"{count} pictures" + (f", {groups} groups" if grouped else "")
    figures = _table(title, "", *(shown(model["model"]) for model in models))
    figures.add_row("right", *(str(model["right"]) for model in models))
    for name in FIGURES:
        figures.add_row(name, *(number(model["metrics"][name]["value"]) for model in models))
        figures.add_row(
            "  95 % by group", *(span(model["metrics"][name]["by group"]) for model in models)
        )
    for name in models[0]["cost"]:
        figures.add_row(name, *(_cost(model["cost"][name]) for model in models))
    console.print(figures)
    for pair in comparison["differences"]:
        _show_pair(console, pair)
    if not grouped:
        console.print("no groups are known: intervals may be too narrow (--group-pattern)")
    elif groups < FEW_GROUPS:
        console.print(f"{groups} groups are few: intervals by group are still too narrow")
    for each in found:
        if not each.curves.get(CURVES[0]):
            console.print(f"no log of {shown(each.name)}: its epochs are not drawn")


def _cost(value: float | None) -> str:
    if value is None:
        return "not recorded"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _show_pair(console: Console, pair: dict[str, Any]) -> None:
    title = f"\n{shown(pair['second'])} less {shown(pair['first'])}"
    table = _table(title, "", "difference", "95 % by group, paired", "95 % by picture, paired")
    for name, own in pair["second less first"].items():
        table.add_row(name, number(own["value"]), span(own["by group"]), span(own["by picture"]))
    console.print(table)
    only = pair["right in the first only"], pair["right in the second only"]
    p = pair["p of McNemar's exact test, frames taken for independent"]
    console.print(
        f"{only[0]} right in the first only, {only[1]} in the second only: McNemar's exact test "
        f"p = {p:.2g}, too small, since it takes frames of one figure for independent"
    )
    apart = pair["pictures with two answers"]
    names = ", ".join(map(shown, apart[:3])) + (", ..." if len(apart) > 3 else "")
    console.print(f"{len(apart)} pictures with two answers" + (f": {names}" if apart else ""))
    console.print()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def draw(folder: Path, found: Sequence[Contender], comparison: dict[str, Any]) -> None:
    """Write ``compare.png``, and ``disagreements.png`` where there are any."""
    from horsehuman import plots  # matplotlib, for pictures alone

    models = comparison["models"]
    plots.save(
        plots.comparison(
            [each.name for each in found],
            [each.curves for each in found],
            [model["metrics"]["accuracy"] for model in models],
            f"Accuracy on {comparison['pictures']} pictures, {comparison['groups']} groups",
        ),
        folder / "compare.png",
    )
    first, second = (each.answers for each in found[:2])
    chosen = disagreements(first, second)[:SHOWN]
    if not chosen:
        (folder / "disagreements.png").unlink(missing_ok=True)  # of an earlier report
        return
    names = first.pictures.class_names
    captions = [
        f"{first.records[index].path.stem[-22:]}\n{names[int(first.said[index])]} | "
        f"{names[int(second.said[index])]}"
        for index in chosen
    ]
    sheet = plots.contact_sheet(
        [read_picture(first.records[index].path) for index in chosen],
        captions,
        [not bool(second.right[index]) for index in chosen],
        f"Two answers: {found[0].name} | {found[1].name} (vermilion: the second is wrong)",
    )
    plots.save(sheet, folder / "disagreements.png")
