"""``horsehuman compare``: paired differences and costs of classifiers on the same images."""

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

#: TensorBoard tags of the accuracy after each epoch.
CURVES = ("train/acc", "val/acc")

#: Metrics that the printed table shows; ``compare.json`` contains all.
METRICS = ("accuracy", "balanced accuracy", "ROC-AUC", "Brier score", "log loss")

#: Names of the files that a comparison writes.
REPORT_FILES = ("compare.json", "compare.png", "disagreements.png")

#: Most images that ``disagreements.png`` shows.
MAX_DISAGREEMENTS = 24


@dataclass(frozen=True)
class Candidate:
    """One of the compared classifiers with its predictions.

    Attributes:
        name: The classifier as the user named it.
        preds: Its predictions.
        curves: For each of :data:`CURVES`, the values after each epoch, 0 to 1. A tag is missing if
            it was not logged.
        cost: Parameters, file size, time and memory under their names in ``compare.json``; ``None``
            if a value was not recorded.
    """

    name: str
    preds: LabelledPredictions
    curves: dict[str, list[float]]
    cost: dict[str, float | None]


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
    """Compare classifiers, print the tables and write the report.

    Args:
        models: Two or more runs, checkpoints or names of bundled classifiers. Each of the others is
            compared with the first.
        data: Value of ``--data``; if ``None``, the images of the runs, which must be the same, or
            the bundled ones.
        split: Value of ``--split``; if ``None``, ``test``, or ``all`` if there is no such split.
        group_pattern: Regular expression that extracts the group from a file name, for a folder of
            images only; ``None`` if no groups are defined.
        out: Folder of the report; ``outputs/compare`` if ``None``.
        force: Overwrite a report that the folder already contains.
        plot: Also draw ``compare.png`` and ``disagreements.png``.

    Returns:
        Whether all images could be read for all classifiers.

    Raises:
        HorseHumanError: If fewer than two classifiers are named, an option is invalid, the images
            or the classes differ, no image can be read, or the report cannot be written.
    """
    if len(models) < 2:
        raise HorseHumanError(
            f"compare needs two models or more: only {printable(models[0])} given"
        )
    image_set = shared_images(models, data, split, group_pattern)
    classifiers = [load_classifier(model) for model in models]
    for classifier in classifiers:
        check_classes(classifier, image_set)
    folder = create_report_dir(out, Path("outputs/compare"), force=force, report=REPORT_FILES)
    for model in models:
        warn_if_trained_on(model, image_set)
    pairs = zip(models, classifiers, strict=True)
    candidates = [evaluate_candidate(model, network, image_set) for model, network in pairs]
    complete = not any(candidate.preds.errors for candidate in candidates)
    candidates = keep_common_images(candidates)
    comparison = comparison_summary(candidates)
    write_json(folder / "compare.json", comparison)
    print_comparison(comparison, grouped=image_set.grouped)
    for name in REPORT_FILES[1:]:  # remove the plots of an earlier report
        (folder / name).unlink(missing_ok=True)
    if plot:
        draw_comparison(folder, candidates, comparison)
    print(f"comparison  {printable(folder)}")
    return complete


def shared_images(
    models: Sequence[str], data: str | None, split: str | None, group_pattern: str | None
) -> ImageSet:
    """Return the images on which all classifiers are compared.

    Args:
        models: The classifiers as the user named them.
        data: See :func:`compare_and_report`.
        split: See :func:`compare_and_report`.
        group_pattern: See :func:`compare_and_report`.

    Raises:
        HorseHumanError: If there are no images, or the runs differ in images, labels or groups.
    """
    if data is not None:
        return select_images(models[0], data, split, group_pattern)[0]
    sets = [select_images(model, None, split, group_pattern)[0] for model in models]
    contents = [
        {s.name(r): (file_digest(r.path), r.label, r.group) for r in s.records} for s in sets
    ]
    first = contents[0]
    for model, other in zip(models[1:], contents[1:], strict=True):
        names = first.keys() | other.keys()
        differ = sorted(name for name in names if first.get(name) != other.get(name))
        if differ:
            raise HorseHumanError(
                f"{printable(models[0])} and {printable(model)} were tested on different pictures, "
                f"labels or groups: {len(differ)} differ ({_first_names(differ)}); choose the same "
                "pictures for all with --data"
            )
    return sets[0]


def evaluate_candidate(model: str, classifier: Network, image_set: ImageSet) -> Candidate:
    """Classify the images with one classifier and collect its costs.

    Args:
        model: The classifier as the user named it.
        classifier: The loaded classifier.
        image_set: The images.
    """
    first = image_set.records[:1]
    with contextlib.suppress(PictureError):  # warm up, so that set-up does not count as time
        classifier.score([classifier.preprocess(read_picture(record.path)) for record in first])
    started = time.perf_counter()
    preds = predict_labelled(classifier, image_set)
    seconds = time.perf_counter() - started
    run = find_run(model)
    parameters = list(classifier.parameters())
    recorded = read_json(run / "metrics.json") if run else {}
    cost: dict[str, float | None] = {
        "parameters": sum(p.numel() for p in parameters),
        "trained parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "weights, MB": sum(path.stat().st_size for path in weight_files(model)) / 1e6,
        "answer with reading, ms": 1000 * seconds / len(image_set.records),
        "epochs": recorded.get("epochs"),
        "training, s": recorded.get("seconds_training"),
        "training, peak memory, GB": recorded.get("peak_memory_gb"),
    }
    curves = read_curves(run, recorded.get("epochs")) if run else {}
    return Candidate(model, preds, curves, cost)


def read_curves(run: Path, epochs: float | None = None) -> dict[str, list[float]]:
    """Read the accuracies after each epoch from a run's TensorBoard log.

    A truncated log is read up to its end. If a step was logged twice, the later value counts. A
    missing, damaged or incomplete log is reported as a warning.

    Args:
        run: The run's folder.
        epochs: Number of epochs that the run was trained for; ``None`` if unknown.

    Returns:
        For each tag of :data:`CURVES` in the log, the values in the order of the steps.
    """
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about resumed runs
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    try:
        events.Reload()
        tags = set(events.Tags()["scalars"]) & set(CURVES)
        by_step = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}
    except Exception as error:  # a damaged file may fail anywhere in the reader
        log.warning("cannot read the log of %s: %s", printable(run), type(error).__name__)
        return {}
    curves = {
        tag: [by_step[tag][step] for step in sorted(by_step[tag])] for tag in CURVES if tag in tags
    }
    logged = len(curves.get(CURVES[0], ()))
    if not any(run.glob("events.out.tfevents.*")):
        log.warning("%s has no TensorBoard log: its accuracy is not drawn by epoch", printable(run))
    elif epochs is not None and logged < epochs:
        log.warning("the log of %s ends after %d of %d epochs", printable(run), logged, epochs)
    return curves


def keep_common_images(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Restrict the candidates to the images that could be read for all of them.

    Raises:
        HorseHumanError: If there is no such image.
    """
    paths = [{record.path for record in candidate.preds.records} for candidate in candidates]
    common = set.intersection(*paths)
    if not common:
        raise HorseHumanError("no picture could be read for all models")
    return [replace(candidate, preds=candidate.preds.subset(common)) for candidate in candidates]


def comparison_summary(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Return the content of ``compare.json``; an undefined or unrecorded value is ``None``."""
    first, *others = candidates
    return {
        "data": str(first.preds.image_set.root),
        "pictures": len(first.preds.records),
        "groups": len(set(first.preds.groups)),
        "models": [
            {
                "model": candidate.name,
                "right": int(candidate.preds.correct.sum()),
                "metrics": summarize(candidate.preds)["metrics"],
                "cost": candidate.cost,
                "accuracy over the epochs": candidate.curves,
            }
            for candidate in candidates
        ],
        "differences": [differences(first, other) for other in others],
    }


def differences(first: Candidate, second: Candidate) -> dict[str, Any]:
    """Compute the second candidate's metrics less the first's, with paired intervals.

    Args:
        first: The first candidate.
        second: The second candidate, with predictions for the same images.

    Returns:
        One entry of ``differences`` in ``compare.json``.
    """
    a, b = first.preds, second.preds
    names, groups = a.image_set.class_names, np.array(a.groups)
    correct = b.correct.astype(float) - a.correct
    values = {
        "accuracy": correct,
        f"accuracy on {names[0]}": np.where(a.labels == 0, correct, np.nan),
        f"accuracy on {names[1]}": np.where(a.labels == 1, correct, np.nan),
        "Brier score": (b.probabilities - b.labels) ** 2 - (a.probabilities - a.labels) ** 2,
        "log loss": log_losses(b.probabilities, b.labels) - log_losses(a.probabilities, a.labels),
    }
    estimates = {}
    for name, value in values.items():
        mask = ~np.isnan(value)
        estimates[name] = estimate_to_json(
            bootstrap_mean(value[mask], a.labels[mask], groups[mask].tolist())
        )
    only_first, only_second, p = mcnemar(a.correct, b.correct)
    return {
        "first": first.name,
        "second": second.name,
        "second less first": estimates,
        "right in the first only": only_first,
        "right in the second only": only_second,
        "p of McNemar's exact test, frames taken for independent": p,
        "pictures with two answers": [
            a.image_set.name(a.records[index]) for index in disagreements(a, b)
        ],
    }


def disagreements(first: LabelledPredictions, second: LabelledPredictions) -> list[int]:
    """Return the indices of images with different predicted classes.

    Those with the largest difference in probability come first.
    """
    distances = np.abs(first.probabilities - second.probabilities)
    indices = np.flatnonzero(first.predicted != second.predicted)
    return [int(index) for index in indices[np.argsort(-distances[indices], kind="stable")]]


def print_comparison(comparison: dict[str, Any], *, grouped: bool) -> None:
    """Print the table of metrics and costs, a table for each pair, and the caveats.

    Args:
        comparison: Content of ``compare.json``.
        grouped: Whether groups are defined; otherwise each image is a group.
    """
    out = console(stderr=False)
    models = comparison["models"]
    count, groups = comparison["pictures"], comparison["groups"]
    title = f"{count} pictures" + (f", {groups} groups" if grouped else "")
    lines = table("", *short_names([model["model"] for model in models]), title=title)
    lines.add_row("right", *(str(model["right"]) for model in models))
    for name in METRICS:
        estimates = [model["metrics"][name] for model in models]
        lines.add_row(name, *(format_number(estimate["value"]) for estimate in estimates))
        intervals = (format_interval(estimate["by group"]) for estimate in estimates)
        lines.add_row("  95 % by group", *intervals)
    for name in models[0]["cost"]:
        lines.add_row(name, *(_format_cost(model["cost"][name]) for model in models))
    out.print(lines)
    for pair in comparison["differences"]:
        _print_pair(out, pair, grouped)
    if not grouped:
        out.print("no groups are defined: intervals may be too narrow (see --group-pattern)")
    elif groups < FEW_GROUPS:
        out.print(f"few groups ({groups}): intervals by group are still too narrow")


def _print_pair(out: Console, pair: dict[str, Any], grouped: bool) -> None:
    """Print one entry of ``differences`` in ``compare.json``."""
    first, second = short_names([pair["first"], pair["second"]])
    title = f"\n{second} less {first}"
    columns = ("", "difference", "95 % by group, paired", "95 % by picture, paired")
    lines = table(*columns, title=title)
    for name, estimate in pair["second less first"].items():
        intervals = map(format_interval, (estimate["by group"], estimate["by picture"]))
        lines.add_row(name, format_number(estimate["value"]), *intervals)
    out.print(lines)
    counts = pair["right in the first only"], pair["right in the second only"]
    p = pair["p of McNemar's exact test, frames taken for independent"]
    caveat = ", too small because pictures of one group are not independent" if grouped else ""
    test = f": McNemar's exact test p = {p:.2g}{caveat}" if any(counts) else ""
    out.print(f"{counts[0]} right in the first only, {counts[1]} in the second only{test}")
    names = pair["pictures with two answers"]
    examples = f" ({_first_names(names)})" if names else ""
    out.print(f"pictures with two answers: {len(names)}{examples}")
    out.print()


def _first_names(names: Sequence[str]) -> str:
    """Join the first three names; three dots stand for the others."""
    return ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")


def _format_cost(value: float | None) -> str:
    """Write a cost with thousands separators: an int in full, a float with one decimal."""
    if value is None:
        return "not recorded"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def short_names(names: Sequence[str]) -> list[str]:
    """Remove the parent folders that all names share, and number equal names."""
    parts = [Path(name).parts for name in names]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    short = [printable("/".join(p[shared:])) for p in parts]
    return [
        f"{name} ({short[:index].count(name) + 1})" if short.count(name) > 1 else name
        for index, name in enumerate(short)
    ]


def draw_comparison(folder: Path, candidates: Sequence[Candidate], summary: dict[str, Any]) -> None:
    """Draw ``compare.png``, and ``disagreements.png`` if the first two candidates disagree.

    Args:
        folder: Folder of the report.
        candidates: The candidates.
        summary: Content of ``compare.json``.
    """
    from horsehuman import plots  # imports matplotlib, which only plots need

    names = short_names([candidate.name for candidate in candidates])
    figure = plots.comparison(
        names,
        [candidate.curves for candidate in candidates],
        [model["metrics"]["accuracy"] for model in summary["models"]],
        f"Accuracy on {summary['pictures']} pictures, {summary['groups']} groups",
    )
    plots.save(figure, folder / "compare.png")
    first, second = (candidate.preds for candidate in candidates[:2])
    indices = disagreements(first, second)[:MAX_DISAGREEMENTS]
    if not indices:
        return
    classes = first.image_set.class_names
    captions = [
        f"{printable(first.records[index].path.stem)[-22:]}\n"
        f"{classes[int(first.predicted[index])]} | {classes[int(second.predicted[index])]}"
        for index in indices
    ]
    pair = " | ".join(short_names([candidate.name for candidate in candidates[:2]]))
    figure = plots.contact_sheet(
        [read_for_drawing(first.records[index].path) for index in indices],
        captions,
        [not bool(second.correct[index]) for index in indices],
        f"Different answers: {pair} (red: the second is wrong)",
    )
    plots.save(figure, folder / "disagreements.png")
