"""Aggregate runs by recipe: test accuracy of each seed, smallest margin, time; optionally a plot.

    python scripts/train.py -m model=cnn,inception seed=0,1,2,3,4
    python scripts/results.py outputs                          # all runs, a line for each recipe
    python scripts/results.py outputs/cnn/sweep_* --plot results.png

Runs that differ only by their seed are one line. Every run was tested once, after its last epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
    """The runs of a recipe: they differ only by their seed.

    Attributes:
        model: ``cnn`` or ``inception``.
        data: Source of the images, and whether all of them were trained on.
        folder: Folder of the run that ended last.
        metrics: ``metrics.json`` of each run, by seed.
    """

    model: str
    data: str
    folder: Path
    metrics: dict[int, dict[str, Any]]

    @property
    def accuracies(self) -> list[float]:
        """Accuracy on the test images in per cent, in the order of the seeds."""
        return [100 * self.metrics[seed]["test/acc"] for seed in sorted(self.metrics)]


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
        show(results)
        if options.plot:
            draw(results, options.plot)
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def collect(folders: Sequence[Path]) -> list[Result]:
    """Find all tested runs below the folders and group them by recipe.

    Args:
        folders: Folders of runs, or above them.

    Returns:
        The recipes, sorted by the folder of the last run. Of two runs with the same recipe and
        seed, the one that ended later counts.

    Raises:
        HorseHumanError: There are no tested runs, or a file of one cannot be read.
    """
    results: dict[str, Result] = {}
    paths = {p.resolve() for folder in folders for p in folder.rglob("metrics.json")}
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        try:
            metrics = json.loads(path.read_text())
            if "test/acc" not in metrics:  # an untested run, or a report of horsehuman evaluate
                continue
        except (OSError, ValueError) as error:
            raise HorseHumanError(
                f"{printable(path)} cannot be read ({first_line(error)}): leave it out"
            ) from error
        config = OmegaConf.create(read_config(path.parent / "config.yaml"))
        seed = int(metrics["seed"])
        config.seed = 0
        kind = str(config.get("model", {}).get("_target_"))
        model = "cnn" if kind.endswith("CNNClassifier") else "inception"
        key = OmegaConf.to_yaml(config)
        source = str(config.data.source)
        if config.data.get("validation") == "test":
            source += ", validated on the test set"
        elif config.data.get("val_fraction") == 0 and config.data.get("fold") is None:
            source += ", nothing held out"
        result = results.setdefault(key, Result(model, source, path.parent, {}))
        if seed in result.metrics:
            print(
                f"{printable(path.parent)}: replaces an earlier run with seed {seed}",
                file=sys.stderr,
            )
        result.metrics[seed] = metrics
        result.folder = path.parent
    if not results:
        names = ", ".join(printable(folder) for folder in folders)
        raise HorseHumanError(f"no tested run below {names}: train some with scripts/train.py")
    return sorted(results.values(), key=lambda result: result.folder)


def show(results: Sequence[Result]) -> None:
    """Print a line for each recipe."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", no_wrap=True)
    for title in ("pictures", "seeds", "right", "mean", "least", "smallest margin", "seconds"):
        table.add_column(title, justify="right")
    table.add_column("for instance")
    for result in results:
        runs = [result.metrics[seed] for seed in sorted(result.metrics)]
        accuracies = result.accuracies
        table.add_row(
            result.model,
            result.data,
            " ".join(str(seed) for seed in sorted(result.metrics)),
            " ".join(f"{run['test/right']}" for run in runs) + f" of {runs[0]['test/pictures']}",
            f"{sum(accuracies) / len(accuracies):.2f} %",
            f"{min(accuracies):.2f} %",
            f"{min(run['test/margin'] for run in runs):+.2f}",
            f"{sum(run['seconds'] for run in runs) / len(runs):.0f}",
            str(os.path.relpath(result.folder)),
        )
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
            mean = sum(values) / len(values)
            axis.scatter(values, [row] * len(values), color="#0072B2", alpha=0.6, s=36, zorder=3)
            axis.plot([mean, mean], [row - 0.3, row + 0.3], color="#0072B2", linewidth=2)
            place: Any = ((min(values), row), (-8, 0), "data", "offset points")
            axis.annotate(f"mean {mean:.1f} %", *place, ha="right", va="center", fontsize=9)
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
