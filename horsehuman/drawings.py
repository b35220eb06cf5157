"""Figures made of pictures: contact sheets, heat, maps of layers."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from horsehuman.plots import COLOURS, STYLE, literal


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
