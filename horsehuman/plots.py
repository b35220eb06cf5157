"""All figures of the package in one style: reports, comparisons, contact sheets, feature maps.

Functions take arrays and return matplotlib figures.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray

from horsehuman.decision import CALIBRATION_BINS, Floats, Ints, calibration_bins
from horsehuman.errors import printable
from horsehuman.run_dir import write_atomic

#: Colours of class 0, class 1 and further series, safe for colour-blind readers (Okabe and Ito
#: 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

#: Colour of reference lines and annotations.
GREY = "#666666"

#: matplotlib settings of all figures.
STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}

# matplotlib draws characters that its font lacks as rectangles; a warning for each adds nothing.
warnings.filterwarnings("ignore", message="Glyph .* missing from font")


Image = NDArray[np.uint8]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file atomically."""
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


@mpl.rc_context(STYLE)
def report(
    probabilities: Floats,
    labels: Ints,
    groups: Sequence[str],
    threshold: float,
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """Draw the six panels of an evaluation.

    They are the confusion matrix, the ROC curve, the precision-recall curve, the reliability
    diagram, the histogram of probabilities and the accuracy of each group.

    Args:
        probabilities: Probabilities of class 1, ``(N,)``, 0 to 1.
        labels: Labels, ``(N,)``, 0 or 1.
        groups: Name of each image's group, N of them.
        threshold: Smallest probability of class 1 at which an image is assigned to class 1.
        class_names: Names of class 0 and class 1.
        title: Title of the figure.
    """
    names = [_literal(name) for name in class_names]
    figure = Figure(figsize=(12, 7.4), layout="constrained")
    figure.suptitle(_literal(title))
    confusion, roc, pr, reliability, histogram, by_group = figure.subplots(2, 3).flat
    predicted = (probabilities >= threshold).astype(int)
    _confusion(confusion, labels, predicted, names)
    _curves(roc, pr, probabilities, labels, names)
    _reliability(reliability, probabilities, labels, names)
    _histogram(histogram, probabilities, labels, threshold, names)
    _groups(by_group, labels, predicted, groups)
    return figure


def _confusion(axes: Axes, labels: Ints, predicted: Ints, names: Sequence[str]) -> None:
    """Draw the confusion matrix: counts, and shares of each true class."""
    counts = np.bincount(2 * labels + predicted, minlength=4).reshape(2, 2)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        text = f"{counts[row, column]}\n{share:.1%}"
        colour = "white" if share > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=12)
    axes.set_xticks([0, 1], names)
    axes.set_yticks([0, 1], names, rotation=90, va="center")
    axes.set(title=f"Confusion matrix, n = {len(labels)}", xlabel="answer", ylabel="picture shows")
    axes.spines[:].set_visible(False)


def _curves(roc: Axes, pr: Axes, probabilities: Floats, labels: Ints, names: Sequence[str]) -> None:
    """Draw the ROC curve and the precision-recall curve; both need images of both classes."""
    roc.set(title="ROC", xlabel=f"{names[0]} called {names[1]}", ylabel=f"{names[1]} found")
    pr.set(title="Precision and recall", xlabel=f"recall of {names[1]}", ylabel="precision")
    for axes in (roc, pr):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    if len(np.unique(labels)) < 2:
        for axes in (roc, pr):
            axes.text(0.5, 0.5, "not defined:\none class only", ha="center", va="center")
        return
    thresholds = np.unique(probabilities)[::-1]
    ascending = (np.sort(probabilities[labels == label]) for label in (1, 0))
    tp, fp = (len(scores) - np.searchsorted(scores, thresholds) for scores in ascending)
    recall = np.append(0, tp / tp[-1])
    roc.plot(np.append(0, fp / fp[-1]), recall, color=COLOURS[0], lw=2)
    roc.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    pr.step(recall, np.append(1, tp / (tp + fp)), where="pre", color=COLOURS[0], lw=2)
    pr.axhline(labels.mean(), color=GREY, lw=1, ls=":")


def _reliability(axes: Axes, probabilities: Floats, labels: Ints, names: Sequence[str]) -> None:
    """Draw the share of class 1 over the mean probability of each bin that is not empty."""
    bins = calibration_bins(probabilities)
    style: Any = {"ha": "center", "fontsize": 7, "color": GREY}
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    for index in np.unique(bins):
        inside = bins == index
        x, y, count = probabilities[inside].mean(), labels[inside].mean(), int(inside.sum())
        axes.scatter(x, y, s=20 + 180 * count / len(labels), color=COLOURS[0], alpha=0.8, zorder=2)
        axes.annotate(str(count), (x, y), (0, 9), textcoords="offset points", **style)
    axes.set(xlabel=f"probability of {names[1]}", ylabel=f"share of {names[1]}")
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.08, 1.12))
    axes.set_title(f"Reliability, {CALIBRATION_BINS} bins, pictures in each")


def _histogram(
    axes: Axes, probabilities: Floats, labels: Ints, threshold: float, names: Sequence[str]
) -> None:
    """Draw the distribution of the probability of class 1 for the images of each class."""
    edges = np.linspace(0, 1, 21).tolist()
    for label, name in enumerate(names):
        values = probabilities[labels == label]
        text = f"{name} (n = {len(values)})"
        axes.hist(values, edges, color=COLOURS[label], alpha=0.65, label=text)
    axes.axvline(threshold, 0, 0.72, color=GREY, lw=1, ls="--", label=f"threshold {threshold:g}")
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(0, 4 * axes.get_ylim()[1])  # leaves room for the legend
    axes.set(title="Answers", xlabel=f"probability of {names[1]}", ylabel="pictures (log above 10)")
    axes.legend(loc="upper center")


def _groups(axes: Axes, labels: Ints, predicted: Ints, groups: Sequence[str]) -> None:
    """Draw the accuracy of each group, or of the worst 20 if there are more."""
    names, index = np.unique(groups, return_inverse=True)
    counts = np.bincount(index)
    accuracy = np.bincount(index, predicted == labels) / counts
    order = np.argsort(accuracy, kind="stable")[:20][::-1]
    colour = {group: COLOURS[label] for group, label in zip(groups, labels, strict=True)}
    axes.barh(range(len(order)), accuracy[order], color=[colour[names[g]] for g in order])
    ticks = [_literal(f"{names[g][-24:]} ({counts[g]})") for g in order]
    axes.set_yticks(range(len(order)), ticks, fontsize=8)
    which = f"all {len(names)}" if len(order) == len(names) else f"worst 20 of {len(names)}"
    axes.set(title=f"Right by group, {which}", xlabel="share of its pictures", xlim=(0, 1))


@mpl.rc_context(STYLE)
def comparison(
    names: Sequence[str],
    curves: Sequence[Mapping[str, Sequence[float]]],
    accuracies: Sequence[Mapping[str, Any]],
    title: str,
) -> Figure:
    """Draw accuracy over the epochs and final accuracies with their confidence intervals.

    Args:
        names: Names of the classifiers.
        curves: For each classifier, ``train/acc`` and ``val/acc``, one value per epoch, 0 to 1;
            empty if they are unknown. Without any curve only the last panel is drawn.
        accuracies: For each classifier, the accuracy ``value``, and its 95 % intervals ``by group``
            and ``by picture``, each a lower and an upper bound, ``None`` if undefined.
        title: Title of the last panel.
    """
    logged = any(curves)
    labels = [_literal(name[-32:]) for name in names]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(names))]
    figure = Figure(figsize=(13 if logged else 6, 3.6), layout="constrained")
    *panels, last = figure.subplots(1, 3 if logged else 1, squeeze=False)[0]
    tags = {"train/acc": "Training", "val/acc": "Validation"}
    for axes, (tag, part) in zip(panels, tags.items(), strict=False):
        series = [curve.get(tag) or [] for curve in curves]
        for values, colour, label in zip(series, colours, labels, strict=True):
            marker = "-" if len(values) > 1 else "o"
            if values:
                axes.plot(range(1, len(values) + 1), values, marker, color=colour, label=label)
        axes.set(title=f"{part} accuracy", xlabel="epoch")
        axes.set_ylim(min([0.4, *(min(values) - 0.02 for values in series if values)]), 1.02)
        if axes.lines:
            axes.legend(loc="lower right")
    for index, (row, colour) in enumerate(zip(accuracies, colours, strict=True)):
        for bounds, width, y in ((row["by picture"], 1.5, -0.12), (row["by group"], 4, 0.12)):
            if None not in bounds:
                last.plot(bounds, [index + y] * 2, color=colour, lw=width)
        last.plot(row["value"], index, "o", color=colour, markeredgecolor="white", ms=9)
    last.set(title=title, xlabel="thick: 95 % by group, thin: by picture")
    last.set_yticks(range(len(names)), labels)
    last.set_ylim(len(names) - 0.5, -0.5)
    return figure


@mpl.rc_context(STYLE)
def contact_sheet(
    images: Sequence[Image], captions: Sequence[str], wrong: Sequence[bool], title: str
) -> Figure:
    """Draw images with captions in rows of eight.

    Args:
        images: At least one RGB image, uint8 ``(H, W, 3)``, of any size each.
        captions: Caption of each image.
        wrong: For each image, whether its prediction is wrong; its caption is then vermilion.
        title: Title of the figure.
    """
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(max(1.5 * columns, 5), 1.9 * rows + 0.5), layout="constrained")
    figure.suptitle(_literal(title))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption, is_wrong in zip(figure.axes, images, captions, wrong, strict=False):
        axes.imshow(image)
        axes.set_title(_literal(caption), fontsize=7, color=COLOURS[1] if is_wrong else "black")
    return figure


@mpl.rc_context(STYLE)
def layers(
    panel: tuple[Image, Image, str], rows: Sequence[tuple[str, NDArray[np.float32]]], title: str
) -> Figure:
    """Draw an image, its heat map, and a row of feature maps for each layer.

    Args:
        panel: RGB image as the network receives it, uint8 ``(S, S, 3)``; the image with the heat
            map laid over it, of the same kind; and the caption of the latter.
        rows: For each layer, its name and feature maps ``(K, H, W)``, K at most 10, at least 0.
            Colours range from 0 to the maximum of each map.
        title: Title of the figure.
    """
    figure = Figure(figsize=(12, 3.4 + 1.15 * len(rows)), layout="constrained")
    figure.suptitle(_literal(title))
    (top,), (below,) = figure.subfigures(2, 1, False, height_ratios=[3, 1.15 * len(rows)])
    shown = (panel[0], "as the model gets it"), (panel[1], _literal(panel[2]))
    for axes, (pixels, text) in zip(top.subplots(1, 2), shown, strict=True):
        axes.imshow(pixels)
        axes.set_title(text)
        axes.axis("off")
    below.suptitle("What layers see: the maps that differ most from place to place", fontsize=10)
    grid = below.subplots(len(rows), 10, squeeze=False)
    for line, (name, maps) in zip(grid, rows, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, feature_map in zip(line, maps, strict=False):
            axes.imshow(feature_map, cmap="viridis", vmin=0, interpolation="nearest")
    return figure


@mpl.rc_context(STYLE)
def sheet(rows: Sequence[tuple[str, Image]], columns: int, title: str) -> Figure:
    """Draw rows of square images side by side, with a label beside each row.

    Args:
        rows: For each row, its label and at most ``columns`` RGB images, uint8 ``(N, S, S, 3)``.
        columns: Number of columns.
        title: Title of the figure.
    """
    side = rows[0][1].shape[1]
    cells = np.full((len(rows), columns, side + 2, side + 2, 3), 255, np.uint8)
    for row, (_, images) in zip(cells, rows, strict=True):
        row[: len(images), :side, :side] = images
    image = cells.swapaxes(1, 2).reshape(len(rows) * (side + 2), -1, 3)
    height, width = image.shape[:2]
    figure = Figure(figsize=(9.6, 8 * height / width + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image)
    axes.set(title=_literal(title), xticks=[])
    middles = (np.arange(len(rows)) + 0.5) * height / len(rows)
    axes.set_yticks(middles, [_literal(label) for label, _ in rows], fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _literal(text: str) -> str:
    """Escape text, such as a file's name, for matplotlib: no formula, no control characters."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")
