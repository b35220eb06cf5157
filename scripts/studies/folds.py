"""Evaluate a recipe on held-out subjects, as they are and cut out on white.

    python scripts/studies/cutouts.py --out cutouts
    python scripts/studies/folds.py cutouts model=cnn trainer.max_epochs=30

Trains one run for each fold, as scripts/train.py does with the same options and data.fold=0, 1 and
so on. The test set is not used. Prints, over all held-out images, the accuracy of each class and
the log loss with both classes weighing the same, and writes them to folds.json beside the runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from horsehuman import load_classifier
from horsehuman.data.image_sets import read_run_images
from horsehuman.errors import HorseHumanError, first_line, one_line
from horsehuman.evaluation.evaluate import LabelledPredictions, predict_labelled
from horsehuman.evaluation.metrics import log_losses
from horsehuman.runtime import log_to_stderr, tune_process
from horsehuman.training.config import compose
from horsehuman.training.run import train

CUTOUTS = "scripts/studies/cutouts.py"

#: What is predicted of each fold: the images as they are, and their cut-outs.
KINDS = ("plain", "framed", "reframed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and predict the folds, print and write the metrics."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cutouts", type=Path, help=f"folder that {CUTOUTS} wrote")
    parser.add_argument("overrides", nargs="*", help="options of scripts/train.py")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", metavar="FOLD", help="only these folds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the runs")
    options = parser.parse_args(arguments)
    log_to_stderr()
    tune_process()
    try:
        evaluate_folds(options)
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def evaluate_folds(options: argparse.Namespace) -> None:
    """Train and predict each fold; after each one, print and write the metrics of all so far.

    Raises:
        HorseHumanError: There are no cut-outs, or a fold cannot be trained.
    """
    if not (options.cutouts / "framed").is_dir():
        raise HorseHumanError(f"{options.cutouts} holds no cut-outs: run {CUTOUTS}")
    out = options.out or Path("outputs") / "folds" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folds = []
    for fold in options.only or range(options.folds):
        overrides = [*options.overrides, f"data.fold={fold}", f"data.folds={options.folds}"]
        folds.append(predict_fold(options.cutouts, out / f"fold_{fold}", overrides))
        metrics = {kind: summarize([fold[kind] for fold in folds]) for kind in KINDS}
        result = {**metrics, "overrides": options.overrides}
        (out / "folds.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"after fold {fold}")
        for kind, values in metrics.items():
            print(f"  {kind:<9} " + "  ".join(f"{k} {v:.3f}" for k, v in values.items()))


def predict_fold(
    cutouts: Path, run_dir: Path, overrides: Sequence[str]
) -> dict[str, LabelledPredictions]:
    """Train without one fold and predict its images of each of :data:`KINDS`.

    Args:
        cutouts: Folder of the cut-outs. Images without one are left out.
        run_dir: Folder of the run.
        overrides: Options of the run.
    """
    train(compose(*overrides, "test=false"), run_dir)
    classifier, held_out = load_classifier(run_dir), read_run_images(run_dir).split("validation")
    sets: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for record in held_out.records:
        name = Path(held_out.class_names[record.label]) / f"{record.path.stem}.png"
        if (cutouts / "framed" / name).is_file():
            sets["plain"].append(record)
            for kind in KINDS[1:]:
                sets[kind].append(replace(record, path=cutouts / kind / name))
    if not sets["plain"]:
        raise HorseHumanError(f"{cutouts} holds no cut-out of this fold: run {CUTOUTS}")
    return {
        kind: predict_labelled(classifier, replace(held_out, records=records))
        for kind, records in sets.items()
    }


def summarize(folds: Sequence[LabelledPredictions]) -> dict[str, float]:
    """Return the accuracy of each class, their mean, and the balanced log loss, over all folds."""
    labels = np.concatenate([fold.labels for fold in folds])
    probabilities = np.concatenate([fold.probabilities for fold in folds])
    correct = (probabilities >= 0.5) == labels
    loss = log_losses(probabilities, labels)
    first, second = labels == 0, labels == 1
    return {
        "class 0": float(correct[first].mean()),
        "class 1": float(correct[second].mean()),
        "balanced": float(correct[first].mean() + correct[second].mean()) / 2,
        "log loss": float(loss[first].mean() + loss[second].mean()) / 2,
    }


if __name__ == "__main__":
    sys.exit(main())
