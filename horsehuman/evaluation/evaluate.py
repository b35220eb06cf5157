"""How good a classifier is on labelled pictures: figures with intervals, tables, a report."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from horsehuman.data.image_sets import ImageSet, count_training_images, select_images
from horsehuman.data.images import PictureError, read_picture
from horsehuman.data.records import Record
from horsehuman.decision import Floats
from horsehuman.errors import HorseHumanError, printable
from horsehuman.evaluation.metrics import Estimate, bootstrap_metrics, clopper_pearson_interval
from horsehuman.inference.explain import heat_on_subject
from horsehuman.inference.predict import predict
from horsehuman.models.base import Network
from horsehuman.models.checkpoint import load_classifier
from horsehuman.run_dir import (
    EVALUATION_FILES,
    create_report_dir,
    evaluation_dir,
    write_csv,
    write_metrics,
)
from horsehuman.runtime import console, format_interval, format_number, table, track

log = logging.getLogger(__name__)

#: Below this number of groups the intervals are said to be too narrow.
FEW_GROUPS = 20


@dataclass(frozen=True)
class LabelledPredictions:
    """What a classifier said of labelled pictures; unreadable ones are left out.

    Attributes:
        pictures: The set that was asked about.
        records: Of it, the pictures that could be read, N of them.
        logits: Calibrated, float64 ``(N,)``.
        probabilities: Of class 1, float64 ``(N,)``: the sigmoid of the logits, in float32 as the
            network computes it.
        doubts: ``ok``, ``unsure`` or ``neither``, ``(N,)``; all figures take the classes that these
            answers would be, however unsure.
        threshold: From this probability on a picture is of class 1.
        errors: Why the others could not be read.
    """

    pictures: ImageSet
    records: list[Record]
    logits: Floats
    probabilities: Floats
    statuses: NDArray[np.str_]
    threshold: float
    errors: list[str]

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """0 or 1, ``(N,)``."""
        return np.array([record.label for record in self.records])

    @cached_property
    def predicted(self) -> NDArray[np.bool_]:
        """Whether each answer is class 1, ``(N,)``."""
        said: NDArray[np.bool_] = self.probabilities >= self.threshold
        return said

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each answer is right, ``(N,)``."""
        right: NDArray[np.bool_] = self.predicted == (self.labels == 1)
        return right

    @cached_property
    def groups(self) -> list[str]:
        """The group of each picture."""
        return [record.group for record in self.records]

    @cached_property
    def true_class_probabilities(self) -> Floats:
        """Probability of the right class, ``(N,)``."""
        return np.where(self.labels == 1, self.probabilities, 1 - self.probabilities)

    def subset(self, paths: Set[Path]) -> LabelledPredictions:
        """The answers about some of the pictures."""
        keep = np.array([record.path in paths for record in self.records])
        return replace(
            self,
            records=[record for record in self.records if record.path in paths],
            logits=self.logits[keep],
            probabilities=self.probabilities[keep],
            statuses=self.statuses[keep],
        )


def check_classes(classifier: Network, pictures: ImageSet) -> None:
    """Raise :class:`HorseHumanError` where pictures are of other classes than a classifier's."""
    if pictures.class_names != classifier.class_names:
        raise HorseHumanError(
            f"{printable(pictures.root)} holds {printable(' and '.join(pictures.class_names))}, the "
            f"classifier tells {printable(' from '.join(classifier.class_names))}: name the folders so"
        )


def predict_labelled(classifier: Network, pictures: ImageSet) -> LabelledPredictions:
    """Ask about all pictures of a set.

    Raises:
        HorseHumanError: The classes are others than the classifier's, or no picture can be read.
    """
    check_classes(classifier, pictures)
    records, logits, statuses, errors = [], [], [], []
    found = predict(classifier, (record.path for record in pictures.records))
    for record, said in zip(
        pictures.records, track(found, "answering", len(pictures.records)), strict=True
    ):
        if said.error:
            errors.append(said.error)
            continue
        records.append(record)
        logits.append(said.logit)
        statuses.append(said.status)
    for error in errors[:3]:
        log.warning("left out: %s", error)
    if not records:
        raise HorseHumanError(f"no picture in {printable(pictures.root)} can be read ({errors[0]})")
    probabilities = torch.tensor(logits, dtype=torch.float32).sigmoid().double().numpy()
    return LabelledPredictions(
        pictures,
        records,
        np.array(logits),
        probabilities,
        np.array(statuses),
        classifier.threshold,
        errors,
    )


def group_rows(answers: LabelledPredictions) -> list[dict[str, Any]]:
    """Class, pictures, right ones and mean probability of the class of each group, worst first."""
    rows = []
    names, index = np.unique(answers.groups, return_inverse=True)
    by_index = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    for group, of in zip(names.tolist(), by_index, strict=True):
        labels = sorted({answers.pictures.class_names[label] for label in answers.labels[of]})
        rows.append(
            {
                "group": group,
                "class": " and ".join(labels),
                "pictures": len(of),
                "right": int(answers.correct[of].sum()),
                "mean probability": float(answers.true_class_probabilities[of].mean()),
            }
        )
    return sorted(rows, key=lambda row: (row["right"] / row["pictures"], row["mean probability"]))


def most_wrong(answers: LabelledPredictions, count: int) -> list[int]:
    """Indices of pictures: the wrong ones, the worst first, then the least certain ones."""
    distance = np.abs(answers.probabilities - answers.threshold)
    order = np.lexsort(
        (np.where(answers.correct, distance, answers.true_class_probabilities), answers.correct)
    )
    return [int(index) for index in order[:count]]


def summarize(answers: LabelledPredictions, draws: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """All that ``metrics.json`` says; what is not defined is ``None``."""
    estimates = bootstrap_metrics(
        answers.probabilities, answers.labels, answers.groups, answers.threshold, draws, seed
    )
    names = answers.pictures.class_names
    groups = group_rows(answers)
    whole = sum(row["right"] == row["pictures"] for row in groups)
    low, high = clopper_pearson_interval(whole, len(groups))
    beyond = answers.logits - math.log(answers.threshold / (1 - answers.threshold))
    margins = np.where(answers.labels == 1, beyond, -beyond)
    return {
        "pictures": len(answers.records),
        "right": int(answers.correct.sum()),
        "unreadable": answers.errors,
        "unsure": int((answers.statuses == "unsure").sum()),
        "neither": int((answers.statuses == "neither").sum()),
        "right of the others": int(answers.correct[answers.statuses == "ok"].sum()),
        "groups": len(groups),
        "groups without an error": whole,
        "groups without an error, 95 % interval": [low, high],
        "smallest margin": float(margins.min()),
        "confusion": confusion_matrix(answers),
        "metrics": {
            _named(name, names): estimate_to_json(value) for name, value in estimates.items()
        },
        "by group": groups,
    }


def confusion_matrix(answers: LabelledPredictions) -> dict[str, dict[str, int]]:
    """Counts: what the pictures show, and what was said."""
    names = answers.pictures.class_names
    return {
        names[truth]: {
            names[answer]: int(((answers.labels == truth) & (answers.predicted == answer)).sum())
            for answer in (0, 1)
        }
        for truth in (0, 1)
    }


def _named(metric: str, names: tuple[str, str]) -> str:
    """``recall 0`` as ``recall of horses``."""
    stem, _, label = metric.rpartition(" ")
    return f"{stem} of {names[int(label)]}" if label in ("0", "1") else metric


def estimate_to_json(found: Estimate) -> dict[str, Any]:
    """An estimate as ``metrics.json`` writes it; what is not defined is ``None``."""

    def format_number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "value": format_number(found.value),
        "by group": [format_number(bound) for bound in found.by_group],
        "by picture": [format_number(bound) for bound in found.by_picture],
    }


def write_predictions(folder: Path, answers: LabelledPredictions) -> None:
    """Write ``predictions.csv``; ``probability`` and ``logit`` are of class 1."""
    names = answers.pictures.class_names
    header = ("picture", "label", "group", "answer", "status", "probability", "logit", "right")
    columns = (
        [answers.pictures.name(record) for record in answers.records],
        [names[record.label] for record in answers.records],
        answers.groups,
        [names[int(said)] for said in answers.predicted],
        answers.statuses,
        answers.probabilities,
        answers.logits,
        answers.correct.astype(int),
    )
    write_csv(folder / "predictions.csv", header, zip(*columns, strict=True))


def report_tables(summary: dict[str, Any], title: str) -> list[Table]:
    """The tables that a person reads: figures with intervals, and the groups by trouble."""
    figures = table("", "value", "95 % by group", "95 % by picture", title=title)
    for name, found in summary["metrics"].items():
        figures.add_row(
            name,
            format_number(found["value"]),
            *map(format_interval, (found["by group"], found["by picture"])),
        )
    groups = table("group", "class", "right", "mean probability of its class", left=2)
    for row in summary["by group"][:20]:
        groups.add_row(
            printable(row["group"]),
            printable(row["class"]),
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


def draw_report(folder: Path, answers: LabelledPredictions, title: str) -> None:
    """Write ``report.png``, six panels, and ``pictures.png``, the worst and least certain ones."""
    from horsehuman import plots  # matplotlib, for pictures alone

    names = answers.pictures.class_names
    figure = plots.report(
        answers.probabilities, answers.labels, answers.groups, answers.threshold, names, title
    )
    plots.save(figure, folder / "report.png")
    chosen = most_wrong(answers, 24)
    figure = plots.contact_sheet(
        [read_for_drawing(answers.records[index].path) for index in chosen],
        [
            f"{printable(answers.records[index].path.stem)[-22:]}\n{names[answers.labels[index]]} "
            f"{answers.true_class_probabilities[index]:.0%}"
            for index in chosen
        ],
        [not answers.correct[index] for index in chosen],
        "Wrong (vermilion) and least certain answers: what is shown, and its probability",
    )
    plots.save(figure, folder / "pictures.png")


def read_for_drawing(path: Path) -> NDArray[np.uint8]:
    """A picture to be drawn; a grey one where it vanished since it was answered."""
    try:
        return read_picture(path)
    except PictureError as error:
        log.warning("not drawn: %s", error)
        return np.full((64, 64, 3), 128, np.uint8)


def warn_if_trained_on(model: str, pictures: ImageSet) -> None:
    """Say how many of the pictures trained a classifier, or that nobody knows."""
    seen = count_training_images(model, pictures.records)
    if seen is None:
        log.warning("it is not known which pictures trained %s", printable(model))
    elif seen:
        log.warning("%d of these pictures trained %s: it is flattered", seen, printable(model))


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
    pictures, split = select_images(model, data, split, group_pattern)
    check_classes(classifier, pictures)
    default = evaluation_dir(model, split, data)
    folder = create_report_dir(out, default, force=force, report=EVALUATION_FILES)
    warn_if_trained_on(model, pictures)
    try:
        answers = predict_labelled(classifier, pictures)
    except HorseHumanError:
        with contextlib.suppress(OSError):  # it is empty, unless it was there before
            folder.rmdir()
        raise
    summary = {"model": model, "data": str(pictures.root), "split": split, **summarize(answers)}
    summary["heat on the figure"] = heat_on_subject(classifier, answers.records)
    write_predictions(folder, answers)
    write_metrics(folder, summary)
    title = f"{model}: {summary['right']} of {summary['pictures']} right"
    title += f", {summary['groups']} groups" if pictures.grouped else ""
    print_report(summary, title, grouped=pictures.grouped)
    if plot:
        draw_report(folder, answers, title)
    else:
        for drawing in ("report.png", "pictures.png"):  # of an earlier report
            (folder / drawing).unlink(missing_ok=True)
    print(f"report      {printable(folder)}")
    return not answers.errors


def print_report(summary: dict[str, Any], title: str, *, grouped: bool) -> None:
    """Print the tables and what a reader must know."""
    out = console(stderr=False)
    for each in report_tables(summary, title):
        out.print(each)
        out.print()
    for line in caveats(summary, grouped=grouped):
        out.print(line)
