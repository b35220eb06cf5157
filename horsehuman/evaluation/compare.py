"""``horsehuman compare``: paired differences and costs of classifiers on the same images."""

import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from horsehuman.data.image_sets import ImageQuery, ImageSet, select_images
from horsehuman.data.records import file_digest
from horsehuman.errors import HorseHumanError, printable
from horsehuman.evaluation import evaluate
from horsehuman.evaluation.evaluate import LabelledPredictions
from horsehuman.evaluation.metrics import bootstrap_mean, holm_correction, log_losses, mcnemar
from horsehuman.models.base import Network
from horsehuman.models.checkpoint import load_classifier, weight_files
from horsehuman.run_dir import ReportOptions, find_run, read_json, write_json
from horsehuman.runtime import format_interval, format_number, table

log = logging.getLogger(__name__)

#: TensorBoard tags of the accuracy after each epoch.
ACCURACY_TAGS = ("train/acc", "val/acc")

#: Metrics that the printed table shows; ``compare.json`` contains all.
METRICS = ("accuracy", "balanced accuracy", "ROC-AUC", "Brier score", "log loss")

#: Keys of the p-values of a pair in ``compare.json``.
MCNEMAR_KEY = "p of McNemar's exact test, frames taken for independent"
HOLM_KEY = "p, Holm-corrected"

#: Names of the files that a comparison writes.
REPORT_FILES = ("compare.json", "compare.png", "disagreements.png")

#: Most images that ``disagreements.png`` shows.
MAX_DISAGREEMENTS = 24


def compare_and_report(
    models: Sequence[str], query: ImageQuery, options: ReportOptions, precision: str = "float32"
) -> bool:
    """Compare classifiers, print the tables and write the report.

    Args:
        models: Two or more runs, checkpoints or names of bundled classifiers. Each is compared with
            each.
        query: The images. By default the test split of the runs' data, which must be identical for
            all runs; for bundled classifiers, that of the bundled set.
        options: The report's folder, by default ``outputs/compare``, and what the report consists
            of.
        precision: See :func:`~horsehuman.models.checkpoint.load_classifier`.

    Returns:
        Whether all images could be read for all classifiers.

    Raises:
        HorseHumanError: If fewer than two classifiers are named, an option is invalid, the images
            or the classes differ, no image can be read, or the report cannot be written.
    """
    if len(models) < 2:
        raise HorseHumanError(f"compare needs two models or more, not only {printable(models[0])}")
    image_set = shared_images(models, query)
    classifiers = [load_classifier(model, precision) for model in models]
    for classifier in classifiers:
        evaluate.check_classes(classifier, image_set)
    with options.replace_report(Path("outputs/compare"), REPORT_FILES) as folder:
        pairs = zip(models, classifiers, strict=True)
        results = [evaluate_model(model, classifier, image_set) for model, classifier in pairs]
        predictions, entries = zip(*results, strict=True)
        if any(other.records != predictions[0].records for other in predictions):
            raise HorseHumanError("pictures changed during the comparison: run it again")
    # The block has removed the earlier report, as nothing failed; the new one is written now.
    comparison = {
        "data": str(image_set.root),
        "pictures": len(predictions[0].records),
        "groups": len(set(predictions[0].groups)),
        "models": entries,
        "differences": compare_pairs(models, predictions),
    }
    write_json(folder / "compare.json", comparison)
    title = f"{comparison['pictures']} pictures"
    title += f", {comparison['groups']} groups" if image_set.grouped else ""
    if options.plot:
        draw_comparison(folder, predictions, comparison, f"Accuracy on {title}")
    lines = comparison_lines(comparison, title, image_set.grouped)
    options.print(comparison, lines, "comparison", folder)
    return not any(answers.errors for answers in predictions)


def shared_images(models: Sequence[str], query: ImageQuery) -> ImageSet:
    """Return the images on which all classifiers are compared.

    Args:
        models: The classifiers as the user named them.
        query: See :func:`compare_and_report`.

    Raises:
        HorseHumanError: If there are no images, or the runs differ in images, labels or groups.
    """
    if query.data is not None:
        return select_images(models[0], query)[0]
    sets = [select_images(model, query)[0] for model in models]
    first, *others = [
        {s.name(r): (file_digest(r.path), r.label, r.group) for r in s.records} for s in sets
    ]
    for model, other in zip(models[1:], others, strict=True):
        if mismatched_names := sorted({name for name, _ in first.items() ^ other.items()}):
            runs = f"{printable(models[0])} and {printable(model)}"
            differ = f"{len(mismatched_names)} differ ({_first_names(mismatched_names)})"
            reason = f"were tested on different pictures, labels or groups: {differ}"
            raise HorseHumanError(f"{runs} {reason}; choose the same pictures for all with --data")
    return sets[0]


def evaluate_model(
    model: str, classifier: Network, image_set: ImageSet
) -> tuple[LabelledPredictions, dict[str, Any]]:
    """Classify the images with one classifier, and compute its metrics and costs.

    Args:
        model: The classifier as the user named it.
        classifier: The loaded classifier.
        image_set: The images.

    Returns:
        The predictions, and the classifier's entry of ``models`` in ``compare.json``; a cost that
        was not recorded is ``None``.
    """
    evaluate.warn_if_trained_on(model, image_set)
    # Warm up, so that set-up does not count as time.
    classifier.score([classifier.preprocess(np.zeros((64, 64, 3), np.uint8))])
    started = time.perf_counter()
    predictions = evaluate.predict_labelled(classifier, image_set)
    seconds = time.perf_counter() - started
    run = find_run(model)
    recorded = read_json(run / "metrics.json") if run else {}
    parameters = list(classifier.parameters())
    return predictions, {
        "model": model,
        "right": int(predictions.correct.sum()),
        "metrics": evaluate.summarize(predictions)["metrics"],
        "cost": {
            "parameters": sum(p.numel() for p in parameters),
            "trained parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "weights, MB": sum(path.stat().st_size for path in weight_files(model)) / 1e6,
            "answer with reading, ms": 1000 * seconds / len(image_set.records),
            "epochs": recorded.get("epochs"),
            "training, s": recorded.get("seconds_training"),
            "training, peak memory, GB": recorded.get("peak_memory_gb"),
        },
        "accuracy over the epochs": read_curves(run, recorded.get("epochs")) if run else {},
    }


def read_curves(run: Path, epochs: float | None = None) -> dict[str, list[float]]:
    """Read the accuracies after each epoch from a run's TensorBoard log.

    A damaged log is read up to the damage. If a step was logged twice, the later value counts. An
    incomplete or missing log is reported as a warning.

    Args:
        run: The run's folder.
        epochs: Number of epochs that the run was trained for; ``None`` if unknown.

    Returns:
        For each tag of :data:`ACCURACY_TAGS` in the log, the values in the order of the steps.
    """
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about resumed runs
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in sorted(set(ACCURACY_TAGS) & set(events.Tags()["scalars"])):
        by_step = {event.step: event.value for event in events.Scalars(tag)}
        curves[tag] = [value for _, value in sorted(by_step.items())]
    logged = len(curves.get(ACCURACY_TAGS[0], ()))
    if epochs is not None and logged < epochs:
        log.warning("the log of %s ends after %d of %d epochs", printable(run), logged, epochs)
    return curves


def compare_pairs(models: Sequence[str], predictions: Sequence[LabelledPredictions]) -> list[Any]:
    """Compare each pair of classifiers.

    Args:
        models: The classifiers as the user named them.
        predictions: Their predictions for the same images.

    Returns:
        The content of ``differences`` in ``compare.json``.
    """
    pairs = [
        {"first": models[i], "second": models[j], **compare_pair(predictions[i], predictions[j])}
        for i, j in itertools.combinations(range(len(models)), 2)
    ]
    for pair, p in zip(pairs, holm_correction([pair[MCNEMAR_KEY] for pair in pairs]), strict=True):
        pair[HOLM_KEY] = p
    return pairs


def compare_pair(first: LabelledPredictions, second: LabelledPredictions) -> dict[str, Any]:
    """Compute the second classifier's metrics less the first's, with paired intervals.

    Args:
        first: Predictions of the first classifier.
        second: Predictions of the second classifier for the same images.

    Returns:
        One entry of ``differences`` in ``compare.json``, without names and :data:`HOLM_KEY`.
    """
    names, labels = first.image_set.class_names, first.labels
    correct = second.correct.astype(float) - first.correct
    squares = [(each.probabilities - labels) ** 2 for each in (first, second)]
    losses = [log_losses(each.probabilities, labels) for each in (first, second)]
    values = {
        "accuracy": correct,
        f"accuracy on {names[0]}": np.where(labels == 0, correct, np.nan),
        f"accuracy on {names[1]}": np.where(labels == 1, correct, np.nan),
        "Brier score": squares[1] - squares[0],
        "log loss": losses[1] - losses[0],
    }
    groups = first.groups
    means = {name: bootstrap_mean(value, labels, groups) for name, value in values.items()}
    only_first, only_second, p_value = mcnemar(first.correct, second.correct)
    disagreements = [first.records[index] for index in disagreement_indices(first, second)]
    return {
        "second less first": means,
        "right in the first only": only_first,
        "right in the second only": only_second,
        MCNEMAR_KEY: p_value,
        "pictures with two answers": list(map(first.image_set.name, disagreements)),
    }


def disagreement_indices(first: LabelledPredictions, second: LabelledPredictions) -> list[int]:
    """Return the indices of images with different predicted classes.

    Those with the largest difference in probability come first.
    """
    distances = np.abs(first.probabilities - second.probabilities)
    indices = np.flatnonzero(first.predicted != second.predicted)
    return [int(index) for index in indices[np.argsort(-distances[indices], kind="stable")]]


def comparison_lines(comparison: dict[str, Any], title: str, grouped: bool) -> list[RenderableType]:
    """Return the table of metrics and costs, a table for each pair, and the caveats.

    Args:
        comparison: Content of ``compare.json``.
        title: Title of the first table.
        grouped: Whether groups are defined; otherwise each image is a group.
    """
    models = comparison["models"]
    names = short_names([model["model"] for model in models])
    overview = table("", *names, title=title)
    overview.add_row("right", *(str(model["right"]) for model in models))
    for metric in METRICS:
        estimates = [model["metrics"][metric] for model in models]
        overview.add_row(metric, *(format_number(estimate["value"]) for estimate in estimates))
        intervals = (format_interval(estimate["by group"]) for estimate in estimates)
        overview.add_row("  95 % by group", *intervals)
    for cost in models[0]["cost"]:
        overview.add_row(cost, *(_format_cost(model["cost"][cost]) for model in models))
    lines: list[RenderableType] = [overview, ""]
    columns = ("difference", "95 % by group, paired", "95 % by picture, paired")
    pairs = zip(comparison["differences"], itertools.combinations(names, 2), strict=True)
    for pair, (first, second) in pairs:
        heading, different = f"{second} less {first}", pair["pictures with two answers"]
        examples = f" ({_first_names(different)})" if different else ""
        lines += [
            evaluate.estimates_table(pair["second less first"], *columns, title=heading),
            f"{pair['right in the first only']} right in the first only, "
            f"{pair['right in the second only']} in the second only: McNemar's exact test "
            f"p = {pair[MCNEMAR_KEY]:.2g}, Holm-corrected {pair[HOLM_KEY]:.2g}",
            f"pictures with two answers: {len(different)}{examples}",
            "",
        ]
    if grouped:
        reason = "p values ignore that pictures of one group are correlated"
        lines.append(f"{reason}, so they tend to be too small")
    return lines + evaluate.few_groups_caveats(comparison["groups"], grouped)


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
    folders = zip(*(path[:-1] for path in parts), strict=False)
    shared = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, folders)))
    short = [printable("/".join(path[shared:])) for path in parts]
    return [
        f"{name} ({short[:index].count(name) + 1})" if short.count(name) > 1 else name
        for index, name in enumerate(short)
    ]


def draw_comparison(
    folder: Path, predictions: Sequence[LabelledPredictions], comparison: dict[str, Any], title: str
) -> None:
    """Draw ``compare.png``, and ``disagreements.png`` if the first two classifiers disagree.

    Args:
        folder: Folder of the report.
        predictions: The predictions of each classifier.
        comparison: Content of ``compare.json``.
        title: Title of the accuracies.
    """
    from horsehuman import plots  # imports matplotlib, which only plots need

    models = comparison["models"]
    names = short_names([model["model"] for model in models])
    curves = [model["accuracy over the epochs"] for model in models]
    accuracies = [model["metrics"]["accuracy"] for model in models]
    plots.save(plots.comparison(names, curves, accuracies, title), folder / "compare.png")
    first, second = predictions[:2]
    classes = first.image_set.class_names
    captions = {
        index: f"{classes[int(first.predicted[index])]} | {classes[int(second.predicted[index])]}"
        for index in disagreement_indices(first, second)[:MAX_DISAGREEMENTS]
    }
    if captions:
        title = f"Different answers: {names[0]} | {names[1]} (red: the second is wrong)"
        evaluate.draw_pictures(folder / "disagreements.png", second, captions, title)
