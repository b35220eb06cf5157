"""Every figure that is drawn, in one style."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray

from horsehuman.decision import CALIBRATION_BINS, Floats, calibration_bins
from horsehuman.errors import printable
from horsehuman.run_dir import write_atomic

#: Colours that the colour-blind tell apart (Okabe and Ito 2008): class 0, class 1, others.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

GREY = "#666666"

# Names in scripts that matplotlib's own font lacks are drawn as boxes; that is told by the picture.
warnings.filterwarnings("ignore", message="Glyph .* missing from font")

#: What all figures share.
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
}


def literal(text: str) -> str:
    """Foreign text, such as a file's name, as it is: no formula, and nothing that cannot print."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """A figure as a picture, ``(H, W, 3)``."""
    canvas = FigureCanvasAgg(figure)
    with mpl.rc_context(STYLE):
        canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]


def report(
    probabilities: Floats,
    labels: NDArray[np.int64],
    groups: Sequence[str],
    threshold: float,
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """Six panels: confusion matrix, ROC, precision-recall, reliability, histogram, groups.

    Args:
        probabilities: Of class 1, ``(N,)``.
        labels: 0 or 1, ``(N,)``.
        groups: Which pictures belong together.
        threshold: From this probability on a picture is of class 1.
        class_names: Of class 0 and class 1.
        title: Of the whole.
    """
    class_names = [literal(name) for name in class_names]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 7.4), layout="constrained")
        axes = figure.subplots(2, 3)
        figure.suptitle(literal(title))
        said = (probabilities >= threshold).astype(int)
        _confusion(axes[0, 0], labels, said, class_names)
        _curves(axes[0, 1], axes[0, 2], probabilities, labels, class_names)
        _reliability(axes[1, 0], probabilities, labels, class_names)
        _histogram(axes[1, 1], probabilities, labels, threshold, class_names)
        _groups(axes[1, 2], labels, said, groups)
    return figure


def _confusion(
    axes: Axes, labels: NDArray[np.int64], said: NDArray[np.int64], names: Sequence[str]
) -> None:
    counts = np.array([[((labels == t) & (said == s)).sum() for s in (0, 1)] for t in (0, 1)])
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in (0, 1):
        for column in (0, 1):
            text = f"{counts[row, column]}\n{shares[row, column]:.1%}"
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=12)
    axes.set_xticks([0, 1], names)
    axes.set_yticks([0, 1], names, rotation=90, va="center")
    axes.set(title=f"Confusion matrix, n = {len(labels)}", xlabel="answer", ylabel="picture shows")
    axes.spines[:].set_visible(False)


def _curves(
    roc: Axes, pr: Axes, probabilities: Floats, labels: NDArray[np.int64], names: Sequence[str]
) -> None:
    positives, negatives = int((labels == 1).sum()), int((labels == 0).sum())
    roc.set(title="ROC", xlabel=f"{names[0]} called {names[1]}", ylabel=f"{names[1]} found")
    pr.set(title="Precision and recall", xlabel=f"recall of {names[1]}", ylabel="precision")
    for axes in (roc, pr):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        if not positives or not negatives:
            axes.text(0.5, 0.5, "not defined:\none class only", ha="center", va="center")
    if not positives or not negatives:
        return
    thresholds = np.unique(probabilities)[::-1]
    ascending = (np.sort(probabilities[labels == label]) for label in (1, 0))
    tp, fp = (len(own) - np.searchsorted(own, thresholds) for own in ascending)
    roc.plot(np.append(0, fp / negatives), np.append(0, tp / positives), color=COLOURS[0], lw=2)
    roc.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    pr.step(np.append(0, tp / positives), np.append(1, tp / (tp + fp)), where="pre",
            color=COLOURS[0], lw=2)  # fmt: skip
    pr.axhline(positives / len(labels), color=GREY, lw=1, ls=":")


def _reliability(
    axes: Axes, probabilities: Floats, labels: NDArray[np.int64], names: Sequence[str]
) -> None:
    bins = calibration_bins(probabilities)
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    for index in np.unique(bins):
        there = bins == index
        x, y, count = probabilities[there].mean(), labels[there].mean(), int(there.sum())
        axes.scatter(x, y, s=20 + 180 * count / len(labels), color=COLOURS[0], alpha=0.8, zorder=2)
        axes.annotate(str(count), (x, y), (0, 9), textcoords="offset points", ha="center",
                      fontsize=7, color=GREY)  # fmt: skip
    axes.set(
        title=f"Reliability, {CALIBRATION_BINS} bins, pictures in each",
        xlabel=f"probability of {names[1]}",
        ylabel=f"share of {names[1]}",
        xlim=(-0.04, 1.04),
        ylim=(-0.08, 1.12),
    )


def _histogram(
    axes: Axes,
    probabilities: Floats,
    labels: NDArray[np.int64],
    threshold: float,
    names: Sequence[str],
) -> None:
    for label in (0, 1):
        own = probabilities[labels == label]
        axes.hist(own, np.linspace(0, 1, 21).tolist(), color=COLOURS[label], alpha=0.65,
                  label=f"{names[label]} (n = {len(own)})")  # fmt: skip
    axes.axvline(threshold, 0, 0.72, color=GREY, lw=1, ls="--", label=f"threshold {threshold:g}")
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(0, 4 * axes.get_ylim()[1])  # room for the legend
    axes.set(title="Answers", xlabel=f"probability of {names[1]}", ylabel="pictures (log above 10)")
    axes.legend(loc="upper center")


def _groups(
    axes: Axes, labels: NDArray[np.int64], said: NDArray[np.int64], groups: Sequence[str]
) -> None:
    """Share of right answers of each group; of many groups the worst."""
    names, index = np.unique(groups, return_inverse=True)
    right = np.bincount(index, said == labels) / np.bincount(index)
    order = np.argsort(right, kind="stable")[:20][::-1]
    label = np.zeros(len(names), int)
    label[index] = labels
    axes.barh(range(len(order)), right[order], color=[COLOURS[label[g]] for g in order])
    counts = np.bincount(index)
    axes.set_yticks(range(len(order)), [literal(f"{names[g][-24:]} ({counts[g]})") for g in order],
                    fontsize=8)  # fmt: skip
    which = f"all {len(names)}" if len(order) == len(names) else f"worst 20 of {len(names)}"
    axes.set(title=f"Right by group, {which}", xlabel="share of its pictures", xlim=(0, 1))


def comparison(
    names: Sequence[str],
    curves: Sequence[Mapping[str, Sequence[float]]],
    accuracies: Sequence[Mapping[str, Any]],
    title: str,
) -> Figure:
    """Training and held-out accuracy over the epochs, and accuracy with its intervals.

    Args:
        names: Of the classifiers.
        curves: ``train/acc`` and ``val/acc`` of each, a value for each epoch, where known.
        accuracies: ``value``, ``by group`` and ``by picture`` of each.
        title: Of the last panel.
    """
    with mpl.rc_context(STYLE):
        logged = any(curves)
        figure = Figure(figsize=(12 if logged else 5.5, 3.6), layout="constrained")
        *panels, last = figure.subplots(1, 3 if logged else 1, squeeze=False)[0]
        for axes, tag, what in zip(
            panels, ("train/acc", "val/acc"), ("training", "held-out"), strict=False
        ):
            for index, own in enumerate(curves):
                values = own.get(tag)
                if not values:
                    continue
                axes.plot(range(1, len(values) + 1), values, "-" if len(values) > 1 else "o",
                          color=COLOURS[index % len(COLOURS)],
                          label=literal(names[index][-28:]))  # fmt: skip
            least = min((value for own in curves for value in own.get(tag, ())), default=1.0)
            axes.set(title=f"Accuracy on {what} pictures", xlabel="epoch")
            axes.set_ylim(min(0.4, least - 0.02), 1.02)
            if axes.lines:
                axes.legend(loc="lower right")
        for index, own in enumerate(accuracies):
            colour = COLOURS[index % len(COLOURS)]
            for bounds, width, y in ((own["by picture"], 1.5, -0.12), (own["by group"], 4, 0.12)):
                if None not in bounds:
                    last.plot(bounds, [index + y] * 2, color=colour, lw=width)
            last.plot(own["value"], index, "o", color=colour, markeredgecolor="white", ms=9,
                      label=literal(names[index][-28:]))  # fmt: skip
        if not logged:
            last.legend(loc="best")
        last.set(title=title, ylim=(len(names) - 0.5, -0.5), yticks=[])
        last.set_xlabel("thick: 95 % by group, thin: by picture")
    return figure


def contact_sheet(
    pictures: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
    wrong: Sequence[bool],
    title: str,
) -> Figure:
    """Pictures in rows of eight; the caption of a wrong one is in vermilion."""
    with mpl.rc_context(STYLE):
        columns = min(8, len(pictures))
        rows = -(-len(pictures) // columns)
        figure = Figure(figsize=(max(1.5 * columns, 5), 1.9 * rows + 0.5), layout="constrained")
        figure.suptitle(literal(title))
        for axes in figure.subplots(rows, columns, squeeze=False).flat:
            axes.axis("off")
        for axes, picture, caption, bad in zip(
            figure.axes, pictures, captions, wrong, strict=False
        ):
            axes.imshow(picture)
            axes.set_title(literal(caption), fontsize=7, color=COLOURS[1] if bad else "black")
    return figure


def layers(
    picture: NDArray[np.uint8],
    heat: NDArray[np.uint8],
    caption: str,
    rows: Sequence[tuple[str, NDArray[np.float32]]],
    title: str,
) -> Figure:
    """A picture, the same with its heat, and a row of maps for each layer.

    Args:
        picture: ``(S, S, 3)``.
        heat: The same with heat laid over it.
        caption: Of the second.
        rows: Name and maps ``(K, H, W)``, K at most 10, each drawn from its own 0 to its highest.
        title: Of the whole.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.4 + 1.15 * len(rows)), layout="constrained")
        figure.suptitle(literal(title))
        parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[3, 1.15 * len(rows)])
        top, below = parts[:, 0]
        for axes, drawn, text in zip(
            top.subplots(1, 2), (picture, heat), ("as the model gets it", caption), strict=True
        ):
            axes.imshow(drawn)
            axes.set_title(literal(text))
            axes.axis("off")
        below.suptitle("What layers see: the maps that differ most from place to place",
                       fontsize=10)  # fmt: skip
        grid = below.subplots(len(rows), 10, squeeze=False)
        for line, (name, maps) in zip(grid, rows, strict=True):
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
            for axes in line:
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            for axes, own in zip(line, maps, strict=False):
                axes.imshow(own, cmap="viridis", vmin=0, interpolation="nearest")
    return figure


def sheet(picture: NDArray[np.uint8], labels: Sequence[str], title: str) -> Figure:
    """One large picture, ``(H, W, 3)``, of rows of equal height with a label each."""
    with mpl.rc_context(STYLE):
        height, width = picture.shape[:2]
        wide = 8.0
        figure = Figure(figsize=(wide + 1.6, wide * height / width + 0.5), layout="constrained")
        axes = figure.subplots()
        axes.imshow(picture)
        axes.set_title(literal(title))
        step = height / len(labels)
        axes.set_yticks([step * (row + 0.5) for row in range(len(labels))],
                        [literal(label) for label in labels], fontsize=7)  # fmt: skip
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure
