"""Evaluate a recipe on held-out figures, as they are and cut out on white.

    python scripts/cutouts.py --out cutouts
    python scripts/folds.py cutouts model=cnn trainer.max_epochs=30

Trains one run for each fold, as scripts/train.py does with the same options and data.fold=0, 1 and
so on, and never looks at the test set. Prints, over all figures, which share of each class is right
and the log loss with both classes weighing the same; writes them to folds.json beside the runs.
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
from hydra_config import explain
from omegaconf.errors import OmegaConfBaseException

from horsehuman import load_classifier
from horsehuman.errors import HorseHumanError, one_line
from horsehuman.evaluation.metrics import log_losses
from horsehuman.inference.predict import predict
from horsehuman.models.base import Network
from horsehuman.runtime import keep_freed_memory, log_to_stderr
from horsehuman.training.build import build
from horsehuman.training.config import compose
from horsehuman.training.run import train

#: Label, and probability of class 1, of each picture.
LabelledPredictions = list[tuple[int, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, answer, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cutouts", type=Path, help="folder that scripts/cutouts.py wrote")
    parser.add_argument("overrides", nargs="*", help="options of scripts/train.py")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", metavar="FOLD", help="some folds alone")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the runs")
    given = parser.parse_args(arguments)
    log_to_stderr()
    keep_freed_memory()
    out = given.out or Path("outputs") / "folds" / time.strftime("%Y-%m-%d_%H-%M-%S")
    answers: dict[str, LabelledPredictions] = {"plain": [], "framed": [], "reframed": []}
    try:
        if not (given.cutouts / "framed").is_dir():
            raise HorseHumanError(f"{given.cutouts} holds no cut-outs: run scripts/cutouts.py")
        for fold in given.only or range(given.folds):
            options = [*given.overrides, f"data.fold={fold}", f"data.folds={given.folds}"]
            for kind, found in answer_fold(given.cutouts, out / f"fold_{fold}", options).items():
                answers[kind] += found
            result = {kind: summarize(found) for kind, found in answers.items()}
            result |= {"overrides": given.overrides}
            (out / "folds.json").write_text(json.dumps(result, indent=2) + "\n")
            print(f"after fold {fold}")
            for kind in answers:
                print(f"  {kind:<9} " + "  ".join(f"{k} {v:.3f}" for k, v in result[kind].items()))
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def answer_fold(
    cutouts: Path, run: Path, overrides: Sequence[str]
) -> dict[str, LabelledPredictions]:
    """Train without one fold and ask about its figures, plain and cut out."""
    config = compose(*overrides, "test=false")
    train(config, run)
    data = build("data", config, image_size=config.model.image_size, seed=config.seed)
    data.prepare_data()
    with (run / "splits.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "validation"]
    names = [Path(row["label"]) / f"{Path(row['picture']).stem}.png" for row in rows]
    framed = [cutouts / "framed" / name for name in names]
    usable = [index for index, path in enumerate(framed) if path.is_file()]
    if not usable:
        raise HorseHumanError(f"{cutouts} holds no cut-out of this fold: run scripts/cutouts.py")
    classifier = load_classifier(run)
    sources = {
        "plain": [data.root / rows[index]["picture"] for index in usable],
        "framed": [framed[index] for index in usable],
        "reframed": [cutouts / "reframed" / names[index] for index in usable],
    }
    labels = [classifier.class_names.index(rows[index]["label"]) for index in usable]
    return {kind: ask(classifier, paths, labels) for kind, paths in sources.items()}


def ask(classifier: Network, paths: Sequence[Path], labels: Sequence[int]) -> LabelledPredictions:
    """Probabilities of class 1 beside the labels."""
    found = []
    for answer, label in zip(predict(classifier, paths), labels, strict=True):
        if answer.error:
            raise HorseHumanError(answer.error)
        second = answer.class_name == classifier.class_names[1]
        found.append((label, answer.probability if second else 1 - answer.probability))
    return found


def summarize(answers: LabelledPredictions) -> dict[str, float]:
    """Share of right answers for each class, their mean, and the balanced log loss."""
    labels, probabilities = map(np.array, zip(*answers, strict=True))
    right = (probabilities >= 0.5) == labels
    loss = log_losses(probabilities, labels)
    first, second = labels == 0, labels == 1
    return {
        "class 0": float(right[first].mean()),
        "class 1": float(right[second].mean()),
        "balanced": float(right[first].mean() + right[second].mean()) / 2,
        "log loss": float(loss[first].mean() + loss[second].mean()) / 2,
    }


if __name__ == "__main__":
    sys.exit(main())
