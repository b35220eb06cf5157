"""Two or more classifiers on the same pictures: how they differ, and what each costs."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from horsehuman.data.image_sets import ImageSet, file_digest, select_images
from horsehuman.data.images import PictureError, read_picture
from horsehuman.errors import HorseHumanError, printable
from horsehuman.evaluation.evaluate import (
    FEW_GROUPS,
    LabelledPredictions,
    check_classes,
    estimate_to_json,
    predict_labelled,
    read_for_drawing,
    summarize,
    warn_if_trained_on,
)
from horsehuman.evaluation.metrics import bootstrap_mean, log_losses, mcnemar
from horsehuman.models.base import Network
from horsehuman.models.checkpoint import load_classifier, weight_files
from horsehuman.run_dir import create_report_dir, find_run, read_json, write_json
from horsehuman.runtime import console, format_interval, format_number, table

log = logging.getLogger(__name__)

#: Accuracy over the epochs, as a run's log names it.
CURVES = ("train/acc", "val/acc")

#: Figures of each classifier that the table shows, of all that ``compare.json`` holds.
FIGURES = ("accuracy", "balanced accuracy", "ROC-AUC", "Brier score", "log loss")

#: The files of a comparison.
REPORT = ("compare.json", "compare.png", "disagreements.png")

#: Pictures on the sheet of disagreements.
SHOWN = 24


@dataclass(frozen=True)
class Candidate:
    """One of the classifiers.

    Attributes:
        name: As the user named it.
        answers: What it said.
        curves: For each of :data:`CURVES` the values after each epoch; empty where no log is.
        cost: What ``compare.json`` says of time, memory and size; ``None`` where not recorded.
    """

    name: str
    answers: LabelledPredictions
    curves: dict[str, list[float]]
    cost: dict[str, float | None]


def shared_images(
    models: Sequence[str], data: str | None, split: str | None, group_pattern: str | None
) -> ImageSet:
    """The pictures that all classifiers are asked about.

    Raises:
        HorseHumanError: There are none, or the runs have different ones.
    """
    if data is not None:
        return select_images(models[0], data, split, group_pattern)[0]
    sets = [select_images(model, None, split, group_pattern)[0] for model in models]
    contents = [
        {own.name(r): (file_digest(r.path), r.label, r.group) for r in own.records} for own in sets
    ]
    first = contents[0]
    for model, other in zip(models[1:], contents[1:], strict=True):
        names = first.keys() | other.keys()
        differ = sorted(name for name in names if first.get(name) != other.get(name))
        if differ:
            some = ", ".join(map(printable, differ[:3])) + (", ..." if len(differ) > 3 else "")
            raise HorseHumanError(
                f"{printable(models[0])} and {printable(model)} were tested on different pictures, labels "
                f"or groups: {len(differ)} differ ({some}); name the same for all with --data"
            )
    return sets[0]


def evaluate_candidate(model: str, classifier: Network, pictures: ImageSet) -> Candidate:
    """Ask one classifier, and collect what is known of its training."""
    first = pictures.records[:1]
    with contextlib.suppress(PictureError):  # what the first answer takes is no picture's time
        classifier.score([classifier.preprocess(read_picture(record.path)) for record in first])
    started = time.perf_counter()
    answers = predict_labelled(classifier, pictures)
    seconds = time.perf_counter() - started
    run = find_run(model)
    parameters = list(classifier.parameters())
    recorded = read_json(run / "metrics.json") if run else {}
    cost: dict[str, float | None] = {
        "parameters": sum(p.numel() for p in parameters),
        "trained parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "weights, MB": sum(path.stat().st_size for path in weight_files(model)) / 1e6,
        "answer with reading, ms": 1000 * seconds / len(pictures.records),
        "epochs": recorded.get("epochs"),
        "training, s": recorded.get("seconds_training"),
        "training, peak memory, GB": recorded.get("peak_memory_gb"),
    }
    curves = read_curves(run, recorded.get("epochs")) if run else {}
    return Candidate(model, answers, curves, cost)


def read_curves(run: Path, epochs: float | None = None) -> dict[str, list[float]]:
    """Accuracies after each epoch from a run's TensorBoard log, as far as it goes.

    A log that broke off counts up to there; of a step that stands in it twice the later counts.
    What is missing is said.

    Args:
        run: Its folder.
        epochs: That it had, where that is known.
    """
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of runs that went on
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    try:
        events.Reload()
        tags = set(events.Tags()["scalars"]) & set(CURVES)
        by_step = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}
    except Exception as error:  # a damaged file may fail anywhere in the reader
        log.warning("the log of %s cannot be read (%s)", printable(run), type(error).__name__)
        return {}
    found = {
        tag: [by_step[tag][step] for step in sorted(by_step[tag])] for tag in CURVES if tag in tags
    }
    there = len(found.get(CURVES[0], ()))
    if not any(run.glob("events.out.tfevents.*")):
        log.warning("%s has no log: its epochs are not drawn", printable(run))
    elif epochs is not None and there < epochs:
        log.warning("the log of %s ends after %d of %d epochs", printable(run), there, epochs)
    return found


def keep_common_images(contenders: Sequence[Candidate]) -> list[Candidate]:
    """The contenders with the pictures alone that all of them could read."""
    read = [{record.path for record in contender.answers.records} for contender in contenders]
    shared = set.intersection(*read)
    if not shared:
        raise HorseHumanError("no picture could be read by all of them")
    return [replace(each, answers=each.answers.subset(shared)) for each in contenders]


def differences(first: Candidate, second: Candidate) -> dict[str, Any]:
    """How the second differs from the first, with paired intervals; plain values."""
    a, b = first.answers, second.answers
    names, groups = a.pictures.class_names, np.array(a.groups)
    right = b.correct.astype(float) - a.correct
    values = {
        "accuracy": right,
        f"accuracy on {names[0]}": np.where(a.labels == 0, right, np.nan),
        f"accuracy on {names[1]}": np.where(a.labels == 1, right, np.nan),
        "Brier score": (b.probabilities - b.labels) ** 2 - (a.probabilities - a.labels) ** 2,
        "log loss": log_losses(b.probabilities, b.labels) - log_losses(a.probabilities, a.labels),
    }
    found = {}
    for name, own in values.items():
        there = ~np.isnan(own)
        found[name] = estimate_to_json(
            bootstrap_mean(own[there], a.labels[there], groups[there].tolist())
        )
    only_first, only_second, p = mcnemar(a.correct, b.correct)
    return {
        "first": first.name,
        "second": second.name,
        "second less first": found,
        "right in the first only": only_first,
        "right in the second only": only_second,
        "p of McNemar's exact test, frames taken for independent": p,
        "pictures with two answers": [
            a.pictures.name(a.records[index]) for index in disagreements(a, b)
        ],
    }


def disagreements(first: LabelledPredictions, second: LabelledPredictions) -> list[int]:
    """Indices of pictures with two answers, those with the most different probabilities first."""
    apart = np.abs(first.probabilities - second.probabilities)
    there = np.flatnonzero(first.predicted != second.predicted)
    return [int(index) for index in there[np.argsort(-apart[there], kind="stable")]]


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
        raise HorseHumanError(f"compare {printable(models[0])} with what? Name two models or more")
    pictures = shared_images(models, data, split, group_pattern)
    classifiers = [load_classifier(model) for model in models]
    for classifier in classifiers:
        check_classes(classifier, pictures)
    folder = create_report_dir(out, Path("outputs/compare"), force=force, report=REPORT)
    for model in models:
        warn_if_trained_on(model, pictures)
    found = [evaluate_candidate(*each, pictures) for each in zip(models, classifiers, strict=True)]
    whole = not any(each.answers.errors for each in found)
    found = keep_common_images(found)
    comparison = comparison_summary(found)
    write_json(folder / "compare.json", comparison)
    print_comparison(comparison, grouped=pictures.grouped)
    for drawing in REPORT[1:]:  # of an earlier report
        (folder / drawing).unlink(missing_ok=True)
    if plot:
        draw_comparison(folder, found, comparison)
    print(f"comparison  {printable(folder)}")
    return whole


def comparison_summary(found: Sequence[Candidate]) -> dict[str, Any]:
    """All that ``compare.json`` says; what is not defined or not recorded is ``None``."""
    first, *others = found
    return {
        "data": str(first.answers.pictures.root),
        "pictures": len(first.answers.records),
        "groups": len(set(first.answers.groups)),
        "models": [
            {
                "model": each.name,
                "right": int(each.answers.correct.sum()),
                "metrics": summarize(each.answers)["metrics"],
                "cost": each.cost,
                "accuracy over the epochs": each.curves,
            }
            for each in found
        ],
        "differences": [differences(first, other) for other in others],
    }


def print_comparison(comparison: dict[str, Any], *, grouped: bool) -> None:
    """Print the tables and what a reader must know."""
    out = console(stderr=False)
    models = comparison["models"]
    count, groups = comparison["pictures"], comparison["groups"]
    title = f"{count} pictures" + (f", {groups} groups" if grouped else "")
    figures = table("", *short_names([model["model"] for model in models]), title=title)
    figures.add_row("right", *(str(model["right"]) for model in models))
    for name in FIGURES:
        figures.add_row(name, *(format_number(model["metrics"][name]["value"]) for model in models))
        figures.add_row(
            "  95 % by group",
            *(format_interval(model["metrics"][name]["by group"]) for model in models),
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
    found = [printable("/".join(own[shared:])) for own in parts]
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
        lines.add_row(
            name,
            format_number(own["value"]),
            format_interval(own["by group"]),
            format_interval(own["by picture"]),
        )
    out.print(lines)
    only = pair["right in the first only"], pair["right in the second only"]
    p = pair["p of McNemar's exact test, frames taken for independent"]
    doubt = ", too small: it takes pictures of one group for independent" if grouped else ""
    test = f": McNemar's exact test p = {p:.2g}{doubt}" if any(only) else ""
    out.print(f"{only[0]} right in the first only, {only[1]} in the second only{test}")
    apart = pair["pictures with two answers"]
    names = ", ".join(map(printable, apart[:3])) + (", ..." if len(apart) > 3 else "")
    out.print(f"pictures with two answers: {len(apart)}" + (f" ({names})" if apart else ""))
    out.print()


def draw_comparison(folder: Path, found: Sequence[Candidate], comparison: dict[str, Any]) -> None:
    """Write ``compare.png``, and ``disagreements.png`` where there are any."""
    from horsehuman import plots  # matplotlib, for pictures alone

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
        f"{printable(first.records[index].path.stem)[-22:]}\n{names[int(first.predicted[index])]} | "
        f"{names[int(second.predicted[index])]}"
        for index in chosen
    ]
    sheet = plots.contact_sheet(
        [read_for_drawing(first.records[index].path) for index in chosen],
        captions,
        [not bool(second.correct[index]) for index in chosen],
        f"Two answers: {' | '.join(short_names([each.name for each in found[:2]]))} "
        "(vermilion: the second is wrong)",
    )
    plots.save(sheet, folder / "disagreements.png")
