"""``horsehuman evaluate``: metrics of a classifier with intervals, printed and as a report."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.table import Table

from horsehuman.data.image_sets import (
    ImageQuery,
    ImageSet,
    count_images_seen_in_training,
    select_images,
)
from horsehuman.data.images import PictureError, read_picture
from horsehuman.data.records import file_digest, is_unbalanced
from horsehuman.decision import Floats, Prediction
from horsehuman.errors import HorseHumanError, printable
from horsehuman.evaluation.metrics import Estimate, bootstrap_metrics, clopper_pearson_interval
from horsehuman.inference.predict import predict
from horsehuman.models.base import Network
from horsehuman.models.checkpoint import find_checkpoint, load_classifier
from horsehuman.run_dir import ReportOptions, evaluation_dir, write_csv, write_json
from horsehuman.runtime import format_interval, format_number, table, track

log = logging.getLogger(__name__)

#: Names of the files that an evaluation writes.
REPORT_FILES = ("metrics.json", "predictions.csv", "report.png", "pictures.png")

#: Number of groups below which the report warns that intervals by group are too narrow.
FEW_GROUPS = 20


class LabelledPredictions:
    """A classifier's predictions for labelled images, without the images that cannot be read.

    Args:
        image_set: The set that was classified.
        answers: The prediction for each image.
        threshold: An image is predicted as class 1 if its probability is at least this.

    Attributes:
        records: The N images that could be read.
        groups: Group of each image, N names.
        labels: True classes, 0 or 1, ``(N,)``.
        statuses: ``ok``, ``unsure``, ``neither`` or ``both``, ``(N,)``. Metrics ignore them: each
            image counts as the class that its probability and the threshold give.
        logits: Calibrated logits, float64 ``(N,)``.
        probabilities: Probabilities of class 1, float64 ``(N,)``: the sigmoid of the logits,
            computed in float32 like in the network.
        predicted: Whether each image is predicted as class 1, ``(N,)``.
        correct: Whether each prediction is correct, ``(N,)``.
        true_class_probabilities: Probability of each image's true class, ``(N,)``, 0 to 1.
        errors: One line for each image that could not be read.
    """

    def __init__(
        self, image_set: ImageSet, answers: Sequence[Prediction], threshold: float
    ) -> None:
        self.image_set, self.threshold = image_set, threshold
        readable = [answer for answer in answers if not answer.error]
        self.errors = [answer.error for answer in answers if answer.error]
        pairs = zip(image_set.records, answers, strict=True)
        self.records = [record for record, answer in pairs if not answer.error]
        self.groups = [record.group for record in self.records]
        self.labels = np.array([record.label for record in self.records])
        self.statuses = np.array([answer.status for answer in readable])
        self.logits = np.array([answer.logit for answer in readable])
        logits = torch.tensor(self.logits, dtype=torch.float32)
        self.probabilities: Floats = logits.sigmoid().double().numpy()
        self.predicted: NDArray[np.bool_] = self.probabilities >= threshold
        self.correct: NDArray[np.bool_] = self.predicted == (self.labels == 1)
        inverse = 1 - self.probabilities
        self.true_class_probabilities = np.where(self.labels == 1, self.probabilities, inverse)


def evaluate_and_report(
    model: str, query: ImageQuery, options: ReportOptions, precision: str = "float32"
) -> bool:
    """Evaluate a classifier, print the tables and write the report.

    Args:
        model: Value of ``--model``: a run, a checkpoint, or the name of a bundled classifier.
        query: The images. By default the test split of the run's data; for a bundled classifier,
            that of the bundled set.
        options: The report's folder, by default one in the run or in ``outputs/evaluate``, and what
            the report consists of.
        precision: See :func:`~horsehuman.models.checkpoint.load_classifier`.

    Returns:
        Whether all images could be read.

    Raises:
        HorseHumanError: If an option is invalid, the classes differ, no image can be read, or the
            report cannot be written.
    """
    classifier = load_classifier(model, precision)
    image_set, split = select_images(model, query)
    with options.replace_report(evaluation_dir(model, split, query.data), REPORT_FILES) as folder:
        seen = warn_if_trained_on(model, image_set)
        predictions = predict_labelled(classifier, image_set)
    summary: dict[str, Any] = {"model": model, "data": str(image_set.root), "split": split}
    summary |= {"checkpoint": file_digest(find_checkpoint(model)).hex(), "seen in training": seen}
    summary["precision"] = str(classifier.compute_dtype()).removeprefix("torch.")
    summary |= summarize(predictions)
    write_predictions(folder, predictions)
    write_json(folder / "metrics.json", summary, sort_keys=True)
    title = f"{model}: {summary['right']} of {summary['pictures']} right"
    title += f", {summary['groups']} groups" if image_set.grouped else ""
    if options.plot:
        draw_report(folder, predictions, title)
    options.print(summary, report_lines(summary, title, image_set.grouped), "report", folder)
    return not predictions.errors


def warn_if_trained_on(model: str, image_set: ImageSet) -> int | None:
    """Log and return how many of the images the classifier was trained on; ``None``: unknown."""
    count, name = count_images_seen_in_training(model, image_set.records), printable(model)
    if count is None:
        log.warning("the training pictures of %s are unknown: they may be among these", name)
    elif count:
        text = "%s was trained on %d of these pictures: its metrics are too optimistic"
        log.warning(text, name, count)
    return count


def check_classes(classifier: Network, image_set: ImageSet) -> None:
    """Raise :class:`HorseHumanError` if the set's class names differ from the classifier's."""
    if image_set.class_names != classifier.class_names:
        given, known = (printable(" and ".join(x.class_names)) for x in (image_set, classifier))
        root = printable(image_set.root)
        fix = "name pictures of these with --data"
        raise HorseHumanError(f"{root} holds {given}, the classifier knows {known}: {fix}")


def predict_labelled(classifier: Network, image_set: ImageSet) -> LabelledPredictions:
    """Classify all images of a set.

    Args:
        classifier: The network; its class names must equal those of the set.
        image_set: The images; one that cannot be read is logged and left out.

    Raises:
        HorseHumanError: If the class names differ, or no image can be read.
    """
    check_classes(classifier, image_set)
    stream = predict(classifier, (record.path for record in image_set.records))
    answers = list(track(stream, "predicting", len(image_set.records)))
    predictions = LabelledPredictions(image_set, answers, classifier.threshold)
    for error in predictions.errors[:3]:
        log.warning("skipped: %s", error)
    if not predictions.records:
        place, reason = printable(image_set.root), predictions.errors[0]
        raise HorseHumanError(f"no picture in {place} can be read ({reason})")
    return predictions


def summarize(predictions: LabelledPredictions) -> dict[str, Any]:
    """Compute the content of ``metrics.json``, as values that JSON can represent.

    Returns:
        The content without the model, the data and the split; an undefined value is ``None``.
    """
    labels, correct, statuses = predictions.labels, predictions.correct, predictions.statuses
    names, threshold = predictions.image_set.class_names, predictions.threshold
    estimates = bootstrap_metrics(predictions.probabilities, labels, predictions.groups, threshold)
    first = ("balanced accuracy", "recall 0", "recall 1") if is_unbalanced(labels.tolist()) else ()
    order = dict.fromkeys((*first, *estimates))
    groups = group_rows(predictions)
    error_free = sum(row["right"] == row["pictures"] for row in groups)
    interval = clopper_pearson_interval(error_free, len(groups))
    distances = predictions.logits - math.log(threshold / (1 - threshold))
    counts = Counter(zip(labels.tolist(), predictions.predicted.tolist(), strict=True))
    return {
        "pictures": len(labels),
        "right": int(correct.sum()),
        "unreadable": predictions.errors,
        **{status: int((statuses == status).sum()) for status in ("unsure", "neither", "both")},
        "right of the others": int(correct[statuses == "ok"].sum()),
        "groups": len(groups),
        "groups without an error": error_free,
        "groups without an error, 95 % interval": list(interval),
        "smallest margin": float(np.where(labels == 1, distances, -distances).min()),
        "confusion": {
            name: {other: counts[label, answer] for answer, other in enumerate(names)}
            for label, name in enumerate(names)
        },
        "metrics": {_metric_name(key, names): estimates[key] for key in order},
        "by group": groups,
    }


def group_rows(predictions: LabelledPredictions) -> list[dict[str, Any]]:
    """Summarize the predictions of each group, the group with the lowest accuracy first.

    Returns:
        For each group its name, its class or classes, the number of its images, the number of
        correct ones, and the mean probability of the true class.
    """
    class_names = predictions.image_set.class_names
    names, counts = np.unique(predictions.groups, return_counts=True)
    members = np.split(np.argsort(predictions.groups, kind="stable"), counts.cumsum()[:-1])
    rows = [
        {
            "group": group,
            "class": " and ".join(class_names[i] for i in np.unique(predictions.labels[indices])),
            "pictures": len(indices),
            "right": int(predictions.correct[indices].sum()),
            "mean probability": float(predictions.true_class_probabilities[indices].mean()),
        }
        for group, indices in zip(names.tolist(), members, strict=True)
    ]
    return sorted(rows, key=lambda row: (row["right"] / row["pictures"], row["mean probability"]))


def _metric_name(metric: str, class_names: tuple[str, str]) -> str:
    """Replace a class at the end of a name by its name: ``recall 0`` by ``recall of horses``."""
    stem, _, label = metric.rpartition(" ")
    return f"{stem} of {class_names[int(label)]}" if label in ("0", "1") else metric


def write_predictions(folder: Path, predictions: LabelledPredictions) -> None:
    """Write ``predictions.csv``; the columns ``probability`` and ``logit`` are of class 1."""
    names = predictions.image_set.class_names
    columns = {
        "picture": map(predictions.image_set.name, predictions.records),
        "label": (names[label] for label in predictions.labels),
        "group": predictions.groups,
        "answer": (names[int(answer)] for answer in predictions.predicted),
        "status": predictions.statuses,
        "probability": predictions.probabilities,
        "logit": predictions.logits,
        "right": predictions.correct.astype(int),
    }
    write_csv(folder / "predictions.csv", list(columns), zip(*columns.values(), strict=True))


def report_lines(summary: dict[str, Any], title: str, grouped: bool) -> list[RenderableType]:
    """Return the tables of the metrics and of the 20 groups with most errors, and the caveats.

    Args:
        summary: Content of ``metrics.json``.
        title: Title of the first table.
        grouped: Whether groups are defined; otherwise each image is a group.
    """
    groups = table("group", "class", "right", "mean probability of its class", left=2)
    for row in summary["by group"][:20]:
        names = printable(row["group"]), printable(row["class"])
        right = f"{row['right']} of {row['pictures']}"
        groups.add_row(*names, right, f"{row['mean probability']:.3f}")
    columns = ("value", "95 % by group", "95 % by picture")
    metrics = estimates_table(summary["metrics"], *columns, title=title)
    return [metrics, "", groups, "", *caveats(summary, grouped)]


def estimates_table(estimates: Mapping[str, Estimate], *columns: str, title: str) -> Table:
    """Return a table with value and intervals of metrics.

    Args:
        estimates: The metrics by name.
        columns: Headers of the value, the interval by group and the interval by picture.
        title: Title of the table.
    """
    lines = table("", *columns, title=title)
    for name, estimate in estimates.items():
        intervals = map(format_interval, (estimate["by group"], estimate["by picture"]))
        lines.add_row(name, format_number(estimate["value"]), *intervals)
    return lines


def caveats(summary: dict[str, Any], grouped: bool) -> list[str]:
    """Return the lines below the tables: the limits of the metrics, and what they leave out.

    Args:
        summary: Content of ``metrics.json``.
        grouped: Whether groups are defined; otherwise each image is a group.
    """
    noun = "groups" if grouped else "pictures"
    count, error_free = summary["groups"], summary["groups without an error"]
    low, high = summary["groups without an error, 95 % interval"]
    lines = few_groups_caveats(count, grouped)
    share = f"{low:.0%} to {high:.0%} (exact 95 % interval from these counts alone)"
    lines.append(f"{error_free} of {count} {noun} have no error; the share may be {share}")
    unsure, neither, both = (summary[status] for status in ("unsure", "neither", "both"))
    if others := unsure + neither + both:
        counts = f"{unsure} answers are unsure, {neither} are neither class and {both} are both"
        rest = f"{summary['right of the others']} of the other {summary['pictures'] - others}"
        lines.append(f"{counts}; {rest} are right")
    undefined = [name for name, value in summary["metrics"].items() if value["value"] is None]
    if undefined:
        lines.append(f"undefined because a class or an answer is missing: {', '.join(undefined)}")
    return lines


def few_groups_caveats(count: int, grouped: bool) -> list[str]:
    """Return a line if the intervals are too narrow, otherwise nothing.

    Args:
        count: Number of groups.
        grouped: Whether groups are defined; otherwise each image is a group.
    """
    if not grouped:
        text = "no groups are defined: intervals are too narrow if pictures share a subject"
        return [f"{text} (define groups with --group-pattern)"]
    few = f"few groups ({count}): all intervals are rough, and too narrow rather than too wide"
    return [few] if count < FEW_GROUPS else []


def draw_report(folder: Path, predictions: LabelledPredictions, title: str) -> None:
    """Draw ``report.png`` with six panels, and ``pictures.png`` with the worst predictions."""
    from horsehuman import plots  # imports matplotlib, which only plots need

    names, labels = predictions.image_set.class_names, predictions.labels
    groups, threshold = predictions.groups, predictions.threshold
    figure = plots.report(predictions.probabilities, labels, groups, threshold, names, title)
    plots.save(figure, folder / "report.png")
    captions = {
        index: f"{names[labels[index]]} {predictions.true_class_probabilities[index]:.0%}"
        for index in most_wrong(predictions, 24)
    }
    title = "Wrong (red) and least certain answers: true class and its probability"
    draw_pictures(folder / "pictures.png", predictions, captions, title)


def most_wrong(predictions: LabelledPredictions, count: int) -> list[int]:
    """Return the indices of the worst predictions, at most ``count``.

    Wrong predictions come first, those with the lowest probability of the true class at the front;
    then correct ones, those nearest to the threshold at the front.
    """
    distances = np.abs(predictions.probabilities - predictions.threshold)
    keys = np.where(predictions.correct, distances, predictions.true_class_probabilities)
    return [int(index) for index in np.lexsort((keys, predictions.correct))[:count]]


def draw_pictures(
    path: Path, predictions: LabelledPredictions, captions: Mapping[int, str], title: str
) -> None:
    """Draw some of the classified images, with red captions for wrong predictions.

    Args:
        path: The PNG file.
        predictions: The predictions.
        captions: Index of each image to draw, and its caption, which is shown below the name of its
            file.
        title: Title of the figure.
    """
    from horsehuman import plots

    records = predictions.records
    images = [_read_or_grey(records[index].path) for index in captions]
    texts = [f"{printable(records[i].path.stem)[-22:]}\n{text}" for i, text in captions.items()]
    wrong = [not predictions.correct[index] for index in captions]
    plots.save(plots.contact_sheet(images, texts, wrong, title), path)


def _read_or_grey(path: Path) -> NDArray[np.uint8]:
    """Read an image; one that has vanished since it was classified is grey."""
    try:
        return read_picture(path)
    except PictureError as error:
        log.warning("not drawn: %s", error)
        return np.full((64, 64, 3), 128, np.uint8)
