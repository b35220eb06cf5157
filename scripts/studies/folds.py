"""Evaluate a recipe on held-out subjects, as they are and cut out on white.

    python scripts/studies/cutouts.py --out cutouts
    python scripts/studies/folds.py cutouts model=cnn trainer.max_epochs=30

Trains one run for each fold, as scripts/train.py does with the same options and data.fold=0, 1 and
so on. The test set is not used. Prints, over all held-out images, the accuracy of each class and
the log loss with both classes weighing the same, and writes them to folds.json beside the runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from horsehuman import load_classifier
from horsehuman.errors import HorseHumanError, first_line, one_line
from horsehuman.evaluation.metrics import log_losses
from horsehuman.inference.predict import predict
from horsehuman.models.base import Network
from horsehuman.runtime import log_to_stderr, tune_process
from horsehuman.training.build import build
from horsehuman.training.config import compose
from horsehuman.training.run import train

CUTOUTS = "scripts/studies/cutouts.py"

#: Label, and probability of class 1, of each image.
LabelledPredictions = list[tuple[int, float]]


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
    predictions: dict[str, LabelledPredictions] = {"plain": [], "framed": [], "reframed": []}
    for fold in options.only or range(options.folds):
        overrides = [*options.overrides, f"data.fold={fold}", f"data.folds={options.folds}"]
        for kind, new in predict_fold(options.cutouts, out / f"fold_{fold}", overrides).items():
            predictions[kind] += new
        metrics = {kind: summarize(labelled) for kind, labelled in predictions.items()}
        result = {**metrics, "overrides": options.overrides}
        (out / "folds.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"after fold {fold}")
        for kind, values in metrics.items():
            print(f"  {kind:<9} " + "  ".join(f"{k} {v:.3f}" for k, v in values.items()))


def predict_fold(
    cutouts: Path, run_dir: Path, overrides: Sequence[str]
) -> dict[str, LabelledPredictions]:
    """Train without one fold and predict its images: plain, framed and reframed.

    Args:
        cutouts: Folder of the cut-outs. Images without one are left out.
        run_dir: Folder of the run.
        overrides: Options of the run.
    """
    config = compose(*overrides, "test=false")
    train(config, run_dir)
    data = build("data", config, image_size=config.model.image_size, seed=config.seed)
    data.prepare_data()
    with (run_dir / "splits.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "validation"]
    names = [Path(row["label"]) / f"{Path(row['picture']).stem}.png" for row in rows]
    usable = [k for k, name in enumerate(names) if (cutouts / "framed" / name).is_file()]
    if not usable:
        raise HorseHumanError(f"{cutouts} holds no cut-out of this fold: run {CUTOUTS}")
    classifier = load_classifier(run_dir)
    labels = [classifier.class_names.index(rows[k]["label"]) for k in usable]
    sources = {
        "plain": [data.root / rows[k]["picture"] for k in usable],
        "framed": [cutouts / "framed" / names[k] for k in usable],
        "reframed": [cutouts / "reframed" / names[k] for k in usable],
    }
    return {kind: predict_labelled(classifier, paths, labels) for kind, paths in sources.items()}


def predict_labelled(
    classifier: Network, paths: Sequence[Path], labels: Sequence[int]
) -> LabelledPredictions:
    """Return the label and the probability of class 1 of each image.

    Raises:
        HorseHumanError: An image cannot be read.
    """
    result = []
    for prediction, label in zip(predict(classifier, paths), labels, strict=True):
        if prediction.error:
            raise HorseHumanError(prediction.error)
        second = prediction.class_name == classifier.class_names[1]
        result.append((label, prediction.probability if second else 1 - prediction.probability))
    return result


def summarize(predictions: LabelledPredictions) -> dict[str, float]:
    """Return the accuracy of each class, their mean, and the balanced log loss."""
    labels, probabilities = map(np.array, zip(*predictions, strict=True))
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
