"""A comparison as a person sees it: tables on the terminal, JSON and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from horsehuman.checkpoint import load_classifier
from horsehuman.compare import (
    Contender,
    choose_same,
    common,
    contend,
    differences,
    disagreements,
)
from horsehuman.errors import HorseHumanError, shown
from horsehuman.evaluate import check_classes, summarise
from horsehuman.evaluate_report import FEW_GROUPS, read_again, tell_if_seen
from horsehuman.report_folders import report_folder
from horsehuman.runs import write_json
from horsehuman.terminal import console, number, span, table

#: Figures of each classifier that the table shows, of all that ``compare.json`` holds.
FIGURES = ("accuracy", "balanced accuracy", "ROC-AUC", "Brier score", "log loss")

#: The files of a comparison.
REPORT = ("compare.json", "compare.png", "disagreements.png")

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
    folder = report_folder(out, Path("outputs/compare"), force=force, report=REPORT)
    for model in models:
        tell_if_seen(model, pictures)
    found = [contend(*each, pictures) for each in zip(models, classifiers, strict=True)]
    whole = not any(each.answers.errors for each in found)
    found = common(found)
    comparison = summary(found)
    write_json(folder / "compare.json", comparison)
    show(comparison, grouped=pictures.grouped)
    for drawing in REPORT[1:]:  # of an earlier report
        (folder / drawing).unlink(missing_ok=True)
    if plot:
        draw(folder, found, comparison)
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


def show(comparison: dict[str, Any], *, grouped: bool) -> None:
    """Print the tables and what a reader must know."""
    out = console(stderr=False)
    models = comparison["models"]
    count, groups = comparison["pictures"], comparison["groups"]
    title = f"{count} pictures" + (f", {groups} groups" if grouped else "")
    figures = table("", *short_names([model["model"] for model in models]), title=title)
    figures.add_row("right", *(str(model["right"]) for model in models))
    for name in FIGURES:
        figures.add_row(name, *(number(model["metrics"][name]["value"]) for model in models))
        figures.add_row(
            "  95 % by group", *(span(model["metrics"][name]["by group"]) for model in models)
        )
    for name in models[0]["cost"]:
        figures.add_row(name, *(_cost(model["cost"][name]) for model in models))
    out.print(figures)
    for pair in comparison["differences"]:
        _show_pair(out, pair, grouped)
    if not grouped:
        out.print("no groups are known: intervals may be too narrow (--group-pattern)")
    elif groups < FEW_GROUPS:
        out.print(f"few groups ({groups}): intervals by group are still too narrow")


def short_names(names: Sequence[str]) -> list[str]:
    """Names of models without the folders that all of them share; alike ones are numbered."""
    parts = [Path(name).parts for name in names]
    shared = 0
    while all(len(own) > shared + 1 for own in parts) and len({own[shared] for own in parts}) == 1:
        shared += 1
    found = [shown("/".join(own[shared:])) for own in parts]
    return [
        f"{name} ({found[:index].count(name) + 1})" if found.count(name) > 1 else name
        for index, name in enumerate(found)
    ]


def _cost(value: float | None) -> str:
    if value is None:
        return "not recorded"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _show_pair(out: Console, pair: dict[str, Any], grouped: bool) -> None:
    first, second = short_names([pair["first"], pair["second"]])
    title = f"\n{second} less {first}"
    columns = ("", "difference", "95 % by group, paired", "95 % by picture, paired")
    lines = table(*columns, title=title)
    for name, own in pair["second less first"].items():
        lines.add_row(name, number(own["value"]), span(own["by group"]), span(own["by picture"]))
    out.print(lines)
    only = pair["right in the first only"], pair["right in the second only"]
    p = pair["p of McNemar's exact test, frames taken for independent"]
    doubt = ", too small: it takes pictures of one group for independent" if grouped else ""
    test = f": McNemar's exact test p = {p:.2g}{doubt}" if any(only) else ""
    out.print(f"{only[0]} right in the first only, {only[1]} in the second only{test}")
    apart = pair["pictures with two answers"]
    names = ", ".join(map(shown, apart[:3])) + (", ..." if len(apart) > 3 else "")
    out.print(f"pictures with two answers: {len(apart)}" + (f" ({names})" if apart else ""))
    out.print()


def draw(folder: Path, found: Sequence[Contender], comparison: dict[str, Any]) -> None:
    """Write ``compare.png``, and ``disagreements.png`` where there are any."""
    from horsehuman import drawings, plots  # matplotlib, for pictures alone

    models = comparison["models"]
    plots.save(
        plots.comparison(
            short_names([each.name for each in found]),
            [each.curves for each in found],
            [model["metrics"]["accuracy"] for model in models],
            f"Accuracy on {comparison['pictures']} pictures, {comparison['groups']} groups",
        ),
        folder / "compare.png",
    )
    first, second = (each.answers for each in found[:2])
    chosen = disagreements(first, second)[:SHOWN]
    if not chosen:
        return
    names = first.pictures.class_names
    captions = [
        f"{shown(first.records[index].path.stem)[-22:]}\n{names[int(first.said[index])]} | "
        f"{names[int(second.said[index])]}"
        for index in chosen
    ]
    sheet = drawings.contact_sheet(
        [read_again(first.records[index].path) for index in chosen],
        captions,
        [not bool(second.right[index]) for index in chosen],
        f"Two answers: {' | '.join(short_names([each.name for each in found[:2]]))} "
        "(vermilion: the second is wrong)",
    )
    plots.save(sheet, folder / "disagreements.png")
