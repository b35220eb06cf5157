"""``horsehuman evaluate``: metrics of a classifier with intervals, printed and as a report."""

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

#: Number of groups below which the report warns that intervals by group are too narrow.
FEW_GROUPS = 20


@dataclass(frozen=True)
class LabelledPredictions:
    """A classifier's predictions for an image set, without the images that cannot be read.

    Attributes:
        image_set: The set that was classified.
        records: The N images of the set that could be read.
        logits: Calibrated logits, float64 ``(N,)``.
        probabilities: Probabilities of class 1, float64 ``(N,)``: the sigmoid of the logits,
            computed in float32 like in the network.
        statuses: ``ok``, ``unsure`` or ``neither``, ``(N,)``. Metrics ignore them: each image
            counts as the class that its probability and the threshold give.
        threshold: An image is predicted as class 1 if its probability is at least this.
        errors: One line for each image of the set that could not be read.
    """

    image_set: ImageSet
    records: list[Record]
    logits: Floats
    probabilities: Floats
    statuses: NDArray[np.str_]
    threshold: float
    errors: list[str]

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """True classes, 0 or 1, ``(N,)``."""
        return np.array([record.label for record in self.records])

    @cached_property
    def predicted(self) -> NDArray[np.bool_]:
        """Whether each image is predicted as class 1, ``(N,)``."""
        predicted: NDArray[np.bool_] = self.probabilities >= self.threshold
        return predicted

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each prediction is correct, ``(N,)``."""
        correct: NDArray[np.bool_] = self.predicted == (self.labels == 1)
        return correct

    @cached_property
    def groups(self) -> list[str]:
        """Group of each image, N names."""
        return [record.group for record in self.records]

    @cached_property
    def true_class_probabilities(self) -> Floats:
        """Probability of each image's true class, ``(N,)``, 0 to 1."""
        return np.where(self.labels == 1, self.probabilities, 1 - self.probabilities)

    def subset(self, paths: Set[Path]) -> LabelledPredictions:
        """Return the predictions for the images with these paths, in the same order."""
        mask = np.array([record.path in paths for record in self.records])
        return replace(
            self,
            records=[record for record in self.records if record.path in paths],
            logits=self.logits[mask],
            probabilities=self.probabilities[mask],
            statuses=self.statuses[mask],
        )


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
    """Evaluate a classifier, print the tables and write the report.

    Args:
        model: Value of ``--model``: a run, a checkpoint, or the name of a bundled classifier.
        data: Value of ``--data``; if ``None``, the images of the run, or the bundled ones.
        split: Value of ``--split``; if ``None``, ``test``, or ``all`` if there is no such split.
        group_pattern: Regular expression that extracts the group from a file name, for a folder of
            images only; ``None`` if no groups are defined.
        out: Folder of the report; if ``None``, a new one in the run or in ``outputs/evaluate``.
        force: Overwrite a report that the folder already contains.
        plot: Also draw ``report.png`` and ``pictures.png``.

    Returns:
        Whether all images could be read.

    Raises:
        HorseHumanError: If an option is invalid, the classes differ, no image can be read, or the
            report cannot be written.
    """
    classifier = load_classifier(model)
    image_set, split = select_images(model, data, split, group_pattern)
    check_classes(classifier, image_set)
    default = evaluation_dir(model, split, data)
    folder = create_report_dir(out, default, force=force, report=EVALUATION_FILES)
    warn_if_trained_on(model, image_set)
    try:
        preds = predict_labelled(classifier, image_set)
    except HorseHumanError:
        with contextlib.suppress(OSError):  # rmdir fails if the folder held other files before
            folder.rmdir()
        raise
    summary = {"model": model, "data": str(image_set.root), "split": split, **summarize(preds)}
    summary["heat on the figure"] = heat_on_subject(classifier, preds.records)
    write_predictions(folder, preds)
    write_metrics(folder, summary)
    title = f"{model}: {summary['right']} of {summary['pictures']} right"
    title += f", {summary['groups']} groups" if image_set.grouped else ""
    print_report(summary, title, grouped=image_set.grouped)
    if plot:
        draw_report(folder, preds, title)
    else:
        for name in ("report.png", "pictures.png"):  # remove the plots of an earlier report
            (folder / name).unlink(missing_ok=True)
    print(f"report      {printable(folder)}")
    return not preds.errors


def check_classes(classifier: Network, image_set: ImageSet) -> None:
    """Raise :class:`HorseHumanError` if the set's class names differ from the classifier's."""
    if image_set.class_names != classifier.class_names:
        given, known = (printable(" and ".join(x.class_names)) for x in (image_set, classifier))
        raise HorseHumanError(
            f"{printable(image_set.root)} contains the classes {given}, but the classifier's are "
            f"{known}: rename the folders"
        )


def warn_if_trained_on(model: str, image_set: ImageSet) -> None:
    """Log how many of the images the classifier was trained on, or that this is unknown."""
    count = count_training_images(model, image_set.records)
    name = printable(model)
    if count is None:
        log.warning("the training pictures of %s are unknown: they may be among these", name)
    elif count:
        log.warning(
            "%s was trained on %d of these pictures: its metrics are too optimistic", name, count
        )


def predict_labelled(classifier: Network, image_set: ImageSet) -> LabelledPredictions:
    """Classify all images of a set.

    Args:
        classifier: The network; its class names must equal those of the set.
        image_set: The images; one that cannot be read is logged and left out.

    Raises:
        HorseHumanError: If the class names differ, or no image can be read.
    """
    check_classes(classifier, image_set)
    records, logits, statuses, errors = [], [], [], []
    predictions = predict(classifier, (record.path for record in image_set.records))
    bar = track(predictions, "predicting", len(image_set.records))
    for record, prediction in zip(image_set.records, bar, strict=True):
        if prediction.error:
            errors.append(prediction.error)
            continue
        records.append(record)
        logits.append(prediction.logit)
        statuses.append(prediction.status)
    for error in errors[:3]:
        log.warning("skipped: %s", error)
    if not records:
        raise HorseHumanError(
            f"no picture in {printable(image_set.root)} can be read ({errors[0]})"
        )
    return LabelledPredictions(
        image_set,
        records,
        np.array(logits),
        torch.tensor(logits, dtype=torch.float32).sigmoid().double().numpy(),
        np.array(statuses),
        classifier.threshold,
        errors,
    )


def summarize(preds: LabelledPredictions, draws: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Compute the content of ``metrics.json``, as values that JSON can represent.

    Args:
        preds: The predictions.
        draws: Number of bootstrap resamplings.
        seed: Seed of the resampling.

    Returns:
        The content without the model, the data, the split and the heat map metric; an undefined
        value is ``None``.
    """
    estimates = bootstrap_metrics(
        preds.probabilities, preds.labels, preds.groups, preds.threshold, draws, seed
    )
    names = preds.image_set.class_names
    groups = group_rows(preds)
    error_free = sum(row["right"] == row["pictures"] for row in groups)
    low, high = clopper_pearson_interval(error_free, len(groups))
    distances = preds.logits - math.log(preds.threshold / (1 - preds.threshold))
    margins = np.where(preds.labels == 1, distances, -distances)
    return {
        "pictures": len(preds.records),
        "right": int(preds.correct.sum()),
        "unreadable": preds.errors,
        "unsure": int((preds.statuses == "unsure").sum()),
        "neither": int((preds.statuses == "neither").sum()),
        "right of the others": int(preds.correct[preds.statuses == "ok"].sum()),
        "groups": len(groups),
        "groups without an error": error_free,
        "groups without an error, 95 % interval": [low, high],
        "smallest margin": float(margins.min()),
        "confusion": confusion_matrix(preds),
        "metrics": {
            _metric_name(name, names): estimate_to_json(value) for name, value in estimates.items()
        },
        "by group": groups,
    }


def confusion_matrix(preds: LabelledPredictions) -> dict[str, dict[str, int]]:
    """Count the images of each true class, the outer key, by predicted class, the inner key."""
    names = preds.image_set.class_names
    return {
        names[label]: {
            names[answer]: int(((preds.labels == label) & (preds.predicted == answer)).sum())
            for answer in (0, 1)
        }
        for label in (0, 1)
    }


def group_rows(preds: LabelledPredictions) -> list[dict[str, Any]]:
    """Summarize the predictions of each group, the group with the lowest accuracy first.

    Returns:
        For each group its name, its class or classes, the number of its images, the number of
        correct ones, and the mean probability of the true class.
    """
    rows = []
    names, index = np.unique(preds.groups, return_inverse=True)
    by_group = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    for group, members in zip(names.tolist(), by_group, strict=True):
        labels = sorted({preds.image_set.class_names[label] for label in preds.labels[members]})
        rows.append(
            {
                "group": group,
                "class": " and ".join(labels),
                "pictures": len(members),
                "right": int(preds.correct[members].sum()),
                "mean probability": float(preds.true_class_probabilities[members].mean()),
            }
        )
    return sorted(rows, key=lambda row: (row["right"] / row["pictures"], row["mean probability"]))


def _metric_name(metric: str, class_names: tuple[str, str]) -> str:
    """Replace a class at the end of a name by its name: ``recall 0`` by ``recall of horses``."""
    stem, _, label = metric.rpartition(" ")
    return f"{stem} of {class_names[int(label)]}" if label in ("0", "1") else metric


def estimate_to_json(estimate: Estimate) -> dict[str, Any]:
    """Convert an estimate to the content of ``metrics.json``; NaN becomes ``None``."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "value": finite(estimate.value),
        "by group": [finite(bound) for bound in estimate.by_group],
        "by picture": [finite(bound) for bound in estimate.by_image],
    }


def write_predictions(folder: Path, preds: LabelledPredictions) -> None:
    """Write ``predictions.csv``; the columns ``probability`` and ``logit`` are of class 1."""
    names = preds.image_set.class_names
    header = ("picture", "label", "group", "answer", "status", "probability", "logit", "right")
    columns = (
        [preds.image_set.name(record) for record in preds.records],
        [names[record.label] for record in preds.records],
        preds.groups,
        [names[int(answer)] for answer in preds.predicted],
        preds.statuses,
        preds.probabilities,
        preds.logits,
        preds.correct.astype(int),
    )
    write_csv(folder / "predictions.csv", header, zip(*columns, strict=True))


def print_report(summary: dict[str, Any], title: str, *, grouped: bool) -> None:
    """Print the tables and the caveats.

    Args:
        summary: Content of ``metrics.json``.
        title: Title of the first table.
        grouped: Whether groups are defined; otherwise each image is a group.
    """
    out = console(stderr=False)
    for lines in report_tables(summary, title):
        out.print(lines)
        out.print()
    for line in caveats(summary, grouped=grouped):
        out.print(line)


def report_tables(summary: dict[str, Any], title: str) -> list[Table]:
    """Return a table of the metrics with intervals, and one of the 20 groups with most errors.

    Args:
        summary: Content of ``metrics.json``.
        title: Title of the first table.
    """
    metrics = table("", "value", "95 % by group", "95 % by picture", title=title)
    for name, estimate in summary["metrics"].items():
        intervals = map(format_interval, (estimate["by group"], estimate["by picture"]))
        metrics.add_row(name, format_number(estimate["value"]), *intervals)
    groups = table("group", "class", "right", "mean probability of its class", left=2)
    for row in summary["by group"][:20]:
        groups.add_row(
            printable(row["group"]),
            printable(row["class"]),
            f"{row['right']} of {row['pictures']}",
            f"{row['mean probability']:.3f}",
        )
    return [metrics, groups]


def caveats(summary: dict[str, Any], *, grouped: bool) -> list[str]:
    """Return the lines below the tables: the limits of the metrics, and what they leave out.

    Args:
        summary: Content of ``metrics.json``.
        grouped: Whether groups are defined; otherwise each image is a group.
    """
    lines = []
    count, error_free = summary["groups"], summary["groups without an error"]
    low, high = summary["groups without an error, 95 % interval"]
    if not grouped:
        lines.append(
            "no groups are defined: if several pictures show the same subject, all intervals are "
            "too narrow (define groups with --group-pattern)"
        )
    noun = "groups" if grouped else "pictures"
    lines.append(
        f"{error_free} of {count} {noun} have no error; from these counts alone, the share of "
        f"{noun} without an error is {low:.0%} to {high:.0%} (exact 95 % interval)"
    )
    if grouped and count < FEW_GROUPS:
        lines.append(
            f"few groups ({count}): intervals by group, where there are any, are still too narrow; "
            "do not rely on those by picture"
        )
    if summary["unsure"] or summary["neither"]:
        others = summary["pictures"] - summary["unsure"] - summary["neither"]
        lines.append(
            f"{summary['unsure']} answers are unsure and {summary['neither']} are neither class; "
            f"of the other {others}, {summary['right of the others']} are right"
        )
    if heat := summary["heat on the figure"]:
        lines.append(
            f"{heat['share of heat']:.0%} of the evidence for the answers lies on the subject, "
            f"which covers {heat['share of area']:.0%} of the picture (mean of {heat['pictures']} "
            "cut-outs on white; horsehuman explain draws the evidence)"
        )
    undefined = [name for name, value in summary["metrics"].items() if value["value"] is None]
    if undefined:
        lines.append(f"undefined because a class or an answer is missing: {', '.join(undefined)}")
    return lines


def draw_report(folder: Path, preds: LabelledPredictions, title: str) -> None:
    """Draw ``report.png`` with six panels, and ``pictures.png`` with the worst predictions."""
    from horsehuman import plots  # imports matplotlib, which only plots need

    names = preds.image_set.class_names
    figure = plots.report(
        preds.probabilities, preds.labels, preds.groups, preds.threshold, names, title
    )
    plots.save(figure, folder / "report.png")
    worst = most_wrong(preds, 24)
    figure = plots.contact_sheet(
        [read_for_drawing(preds.records[index].path) for index in worst],
        [
            f"{printable(preds.records[index].path.stem)[-22:]}\n{names[preds.labels[index]]} "
            f"{preds.true_class_probabilities[index]:.0%}"
            for index in worst
        ],
        [not preds.correct[index] for index in worst],
        "Wrong (red) and least certain answers: true class and its probability",
    )
    plots.save(figure, folder / "pictures.png")


def most_wrong(preds: LabelledPredictions, count: int) -> list[int]:
    """Return the indices of the worst predictions, at most ``count``.

    Wrong predictions come first, those with the lowest probability of the true class at the front;
    then correct ones, those nearest to the threshold at the front.
    """
    distances = np.abs(preds.probabilities - preds.threshold)
    keys = np.where(preds.correct, distances, preds.true_class_probabilities)
    return [int(index) for index in np.lexsort((keys, preds.correct))[:count]]


def read_for_drawing(path: Path) -> NDArray[np.uint8]:
    """Read an image, uint8 ``(H, W, 3)``; grey if the file has vanished since its prediction."""
    try:
        return read_picture(path)
    except PictureError as error:
        log.warning("not drawn: %s", error)
        return np.full((64, 64, 3), 128, np.uint8)
