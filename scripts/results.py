"""Aggregate runs by recipe: test or held-out accuracy, smallest margin, time; optionally a plot.

    python scripts/train.py -m model=cnn,inception seed=0,1,2,3,4
    python scripts/results.py outputs                          # all runs, a line for each recipe
    python scripts/results.py outputs/cnn/sweep_* --plot results.png

Runs that differ only by their seed are one line. Every run was tested once, after its last epoch.
Runs with test=false have a table of their own, with a line for all folds, splits and seeds:

    python scripts/train.py -m test=false data.fold=0,1,2,3,4 data.split_seed=0,1
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from horsehuman.data.image_sets import read_config
from horsehuman.errors import HorseHumanError, first_line, one_line, printable

#: Published accuracies on the official 256 validation images, in per cent; of several epochs, the
#: best one. The names are owners of public repositories; "notebook" is the original.
PUBLISHED = {
    "from scratch": {
        "mslawsky": 91.8,
        "Shirmerely99": 91.0,
        "ZeynepBehsi": 87.1,
        "paulmcd": 86.7,
        "DevilUpperCase": 86.3,
        "jasonepaul": 83.6,
        "notebook, last epoch": 57.4,
    },
    "transfer learning": {
        "lorenzofdo": 100.0,
        "DevilUpperCase": 100.0,
        "eudestheo": 99.6,
        "akalakheti": 99.6,
        "jasonepaul": 99.6,
        "notebook, last epoch": 98.8,
    },
}


@dataclass
class Result:
    """The runs of a recipe: they differ only by their seed, or by seed, split and fold.

    Attributes:
        model: ``cnn`` or ``inception``.
        data: Source of the images, and whether all of them were trained on.
        folder: Folder of the run that ended last.
        metrics: ``metrics.json`` of each run, by seed, or by seed, split seed and fold.
        tested: Whether the runs were tested; otherwise their metrics are of held-out groups.
    """

    model: str
    data: str
    folder: Path
    metrics: dict[tuple[int, ...], dict[str, Any]]
    tested: bool

    @property
    def accuracies(self) -> list[float]:
        """Accuracy on the test or held-out images in per cent, in the order of the runs."""
        return [100 * value for value in self.values("acc")]

    def values(self, name: str) -> list[float]:
        """Return a metric of all runs on the test or held-out images."""
        split = "test" if self.tested else "val"
        return [self.metrics[run][f"{split}/{name}"] for run in sorted(self.metrics)]


#: Columns of the table of tested runs.
TESTED: dict[str, Callable[[Result], str]] = {
    "seeds": lambda result: " ".join(str(seed) for (seed,) in sorted(result.metrics)),
    "right": lambda result: (
        " ".join(str(right) for right in result.values("right"))
        + f" of {result.values('pictures')[0]}"
    ),
    "mean": lambda result: f"{mean(result.accuracies):.2f} %",
    "least": lambda result: f"{min(result.accuracies):.2f} %",
    "smallest margin": lambda result: f"{min(result.values('margin')):+.2f}",
    "seconds": lambda result: f"{mean(run['seconds'] for run in result.metrics.values()):.0f}",
}

#: Columns of the table of runs that were evaluated on held-out groups.
HELD_OUT: dict[str, Callable[[Result], str]] = {
    "runs": lambda result: str(len(result.metrics)),
    "held out": lambda result: f"{mean(result.accuracies):.2f} %",
    "loss": lambda result: f"{mean(result.values('loss')):.4f}",
    "least margin": lambda result: f"{min(result.values('margin')):+.2f}",
    "median margin": lambda result: f"{median(result.values('margin')):+.2f}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="run, or folder of runs"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the accuracies, as PNG")
    options = parser.parse_args(arguments)
    try:
        results = collect(options.folders)
        tested = [result for result in results if result.tested]
        held_out = [result for result in results if not result.tested]
        for kind, columns in ((tested, TESTED), (held_out, HELD_OUT)):
            if kind:
                show(kind, columns)
        if options.plot and not tested:
            raise HorseHumanError("--plot draws tested runs, and there are none")
        if options.plot:
            draw(tested, options.plot)
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def collect(folders: Sequence[Path]) -> list[Result]:
    """Find all runs below the folders and group them by recipe.

    Args:
        folders: Folders of runs, or above them.

    Returns:
        The recipes, sorted by the folder of the last run. Of two runs with the same recipe, seed
        and fold, the one that ended later counts.

    Raises:
        HorseHumanError: There are no runs with metrics, or a file of one cannot be read.
    """
    results: dict[str, Result] = {}
    paths = {p.resolve() for folder in folders for p in folder.rglob("metrics.json")}
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        try:
            metrics = json.loads(path.read_text())
            tested = "test/acc" in metrics
            if not tested and not {"val/acc", "val/loss", "val/margin"} <= metrics.keys():
                continue  # for instance a report of horsehuman evaluate
        except (OSError, ValueError) as error:
            raise HorseHumanError(
                f"{printable(path)} cannot be read ({first_line(error)}): leave it out"
            ) from error
        config = OmegaConf.create(read_config(path.parent / "config.yaml"))
        run = [int(metrics["seed"])]
        config.seed = 0
        if not tested:
            run += [int(config.data.get("split_seed") or 0), int(config.data.get("fold") or 0)]
            config.data.split_seed, config.data.fold = 0, None
        kind = str(config.get("model", {}).get("_target_"))
        model = "cnn" if kind.endswith("CNNClassifier") else "inception"
        key = OmegaConf.to_yaml(config)
        source = str(config.data.source)
        if config.data.get("validation") == "test":
            source += ", validated on the test set"
        elif config.data.get("val_fraction") == 0 and config.data.get("fold") is None:
            source += ", nothing held out"
        result = results.setdefault(key, Result(model, source, path.parent, {}, tested))
        if tuple(run) in result.metrics:
            text = f"{printable(path.parent)}: replaces an earlier run with the same seed and fold"
            print(text, file=sys.stderr)
        result.metrics[tuple(run)] = metrics
        result.folder = path.parent
    if not results:
        names = ", ".join(printable(folder) for folder in folders)
        raise HorseHumanError(f"no run that ended below {names}: train some with scripts/train.py")
    return sorted(results.values(), key=lambda result: result.folder)


def show(results: Sequence[Result], columns: Mapping[str, Callable[[Result], str]]) -> None:
    """Print a line for each recipe, with :data:`TESTED` or :data:`HELD_OUT` columns."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", no_wrap=True)
    for title in ("pictures", *columns):
        table.add_column(title, justify="right")
    table.add_column("for instance")
    for result in results:
        values = (column(result) for column in columns.values())
        table.add_row(result.model, result.data, *values, str(os.path.relpath(result.folder)))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def draw(results: Sequence[Result], target: Path) -> None:
    """Draw each seed's accuracy and the published ones, by kind of classifier.

    Args:
        results: The recipes. Those that were validated on the test set are left out.
        target: PNG file to write.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(8, 6.4), sharex=True, layout="constrained")
    for axis, model, kind in zip(axes, ("cnn", "inception"), PUBLISHED, strict=True):
        published = dict(sorted(PUBLISHED[kind].items(), key=lambda item: item[1]))
        ours = [r for r in results if r.model == model and "test set" not in r.data]
        rows = [*published, *(f"horsehuman, {r.data}" for r in ours)]
        axis.scatter([*published.values()], range(len(published)), marker="D", color="0.55", s=28)
        for row, result in enumerate(ours, start=len(published)):
            values = result.accuracies
            middle = mean(values)
            axis.scatter(values, [row] * len(values), color="#0072B2", alpha=0.6, s=36, zorder=3)
            axis.plot([middle, middle], [row - 0.3, row + 0.3], color="#0072B2", linewidth=2)
            place: Any = ((min(values), row), (-8, 0), "data", "offset points")
            axis.annotate(f"mean {middle:.1f} %", *place, ha="right", va="center", fontsize=9)
        axis.axvline(50, color="0.8", linewidth=1, zorder=0)
        axis.set_yticks(range(len(rows)), rows, fontsize=9)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_title(kind.capitalize(), loc="left", fontsize=11)
        axis.set_axisbelow(True)
        axis.grid(axis="x", color="0.92")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[-1].set_xlabel(
        "accuracy in % on the official 256 validation images (11 subjects)\n"
        "blue: each seed, last epoch, tested once; grey: published, mostly the best epoch"
    )
    axes[-1].set_xlim(48, 101.5)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
