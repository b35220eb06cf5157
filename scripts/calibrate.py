"""Teach a trained run how far to trust itself: temperature, unsure, neither.

    python scripts/calibrate.py outputs/cnn/latest

Trains the run's recipe again for each of five folds of the training groups, asks about the groups
that were held out (where the folder of pictures names a validation split: asks the run about that
one instead), and writes what follows from their answers into the run's final checkpoint: a
temperature, the probability below which an answer is unsure, and for InceptionV3 the distance from
which a picture is neither class. The test set is not looked at. What was found is printed, and
kept in the checkpoint for the model card.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from horsehuman.data.datasets import decode
from horsehuman.data.image_sets import read_run_images
from horsehuman.data.records import Record, scan_folder
from horsehuman.decision import Floats
from horsehuman.errors import HorseHumanError, one_line, printable
from horsehuman.evaluation.evaluate import predict_labelled
from horsehuman.evaluation.metrics import clopper_pearson_interval, point_metrics
from horsehuman.models.base import Network
from horsehuman.models.calibration import (
    ERROR_RATE,
    fit_confidence_threshold,
    fit_neither_threshold,
    fit_temperature,
)
from horsehuman.models.checkpoint import (
    find_checkpoint,
    load_classifier,
    read_checkpoint,
    write_checkpoint,
)
from horsehuman.models.inception import Inception
from horsehuman.runtime import keep_freed_memory, log_to_stderr, track
from horsehuman.training.config import load_config
from horsehuman.training.run import train

log = logging.getLogger("horsehuman.calibrate")

FOLDS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate a run and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    given = parser.parse_args(arguments)
    log_to_stderr()
    keep_freed_memory()
    try:
        found = calibrate(given.run, load_config(given.run))
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    print(f"written into {printable(find_checkpoint(given.run))}:")
    for name, value in found.items():
        print(f"{name:<55}{value if isinstance(value, int) else f'{value:.4f}'}")
    return 0


def calibrate(run: Path, config: DictConfig) -> dict[str, Any]:
    """Write what held-out groups teach into the final checkpoint of a run.

    Returns:
        What is kept in the checkpoint under ``calibration``, plain numbers.

    Raises:
        HorseHumanError: A class has fewer groups than there are folds, or a fold cannot be trained.
    """
    path = find_checkpoint(run)
    network = load_classifier(path)
    pictures = read_run_images(run)
    records = [r for r in pictures.records if r.split != "test"]
    if names_validation(config):
        held_out = pictures.split("validation")
        check_groups(run, held_out.records, network)
        found_there = predict_labelled(network, held_out)
        asked, logits = found_there.records, found_there.logits * network.settings["temperature"]
    else:
        check_groups(run, records, network)
        asked, logits = held_out_logits(config)
    labels = np.array([record.label for record in asked])
    groups_of = [record.group for record in asked]
    threshold = np.log(network.threshold / (1 - network.threshold))
    temperature = fit_temperature(logits - threshold, labels, groups_of)
    certain = fit_confidence_threshold((logits - threshold) / temperature, labels, groups_of)
    found = summarize(logits, temperature, certain, labels, groups_of, network.threshold)
    settings: dict[str, Any] = {"temperature": temperature, "certain_from": certain}
    checkpoint = read_checkpoint(path)
    if isinstance(network, Inception) and network.settings["pool"] != "flatten":
        features = features_of(network, records)
        own = torch.tensor([record.label for record in records])
        means, reach = fit_neither_threshold(
            features, own, [record.group for record in records], FOLDS
        )
        checkpoint["state_dict"]["network.class_means"] = means
        settings["far_from"] = found["distance from which a picture is neither"] = reach
    checkpoint["hyper_parameters"].update(settings)
    checkpoint["horsehuman"]["calibration"] = found
    write_checkpoint(path, checkpoint)
    return found


def names_validation(config: DictConfig) -> bool:
    """Whether a run's pictures came with a validation split of their own."""
    data = config.data
    if data.source != "folder":
        return False
    return any(r.split == "validation" for r in scan_folder(Path(data.root), data.group_pattern)[1])


def check_groups(run: Path, records: Sequence[Record], network: Network) -> None:
    """Raise :class:`HorseHumanError` where a class has fewer groups than there are folds."""
    for label, name in enumerate(network.class_names):
        groups = len({record.group for record in records if record.label == label})
        if groups < FOLDS:
            raise HorseHumanError(
                f"{printable(run)}: {groups} groups of {printable(name)} that are not the test's are fewer "
                f"than {FOLDS}, and tell nothing of others"
            )


def held_out_logits(config: DictConfig) -> tuple[list[Record], Floats]:
    """Records and uncalibrated logits of all training pictures, each asked about by a stranger."""
    config = config.copy()
    OmegaConf.set_struct(config, False)
    records: list[Record] = []
    logits: list[Floats] = []
    for fold in range(FOLDS):
        own = OmegaConf.merge(
            config,
            {
                "test": False,
                "data": {"fold": fold, "folds": FOLDS, "validation": "held_out"},
                "model": {"temperature": 1.0, "certain_from": 0.5},
                "trainer": {"strategy": "auto", "devices": 1, "num_nodes": 1},
            },
        )
        assert isinstance(own, DictConfig)
        log.info("fold %d of %d", fold + 1, FOLDS)
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            with contextlib.redirect_stdout(io.StringIO()):  # its report, of what is removed
                train(own, run)
            found = predict_labelled(load_classifier(run), read_run_images(run).split("validation"))
        records += found.records
        logits.append(found.logits)
    return records, np.concatenate(logits)


def features_of(network: Inception, records: Sequence[Record]) -> torch.Tensor:
    """Features of pictures, ``(N, F)``; out of the cache where they are known."""
    cache = network.feature_cache()
    found = []
    with torch.inference_mode():
        for start in track(range(0, len(records), 32), "features", -(-len(records) // 32)):
            batch = [decode(r.path, network.image_size) for r in records[start : start + 32]]
            found.append(cache(torch.stack(batch)))
    return torch.cat(found)


def summarize(
    logits: Floats,
    temperature: float,
    certain_from: float,
    labels: NDArray[np.int64],
    groups: Sequence[str],
    threshold: float,
) -> dict[str, Any]:
    """Before and after, on the held-out pictures; all of it plain numbers."""
    found: dict[str, Any] = {
        "pictures": len(labels),
        "groups": len(set(groups)),
        "temperature": temperature,
        "certain from": certain_from,
    }
    for when, divisor in (("before", 1.0), ("after", temperature)):
        probabilities = 1 / (1 + np.exp(-logits / divisor))
        metrics = point_metrics(probabilities, labels, threshold)
        for name in ("accuracy", "log loss", "calibration error", "Brier score"):
            found[f"{name} {when}"] = metrics[name]
    said = probabilities >= threshold
    wrong = said != (labels == 1)
    sure = np.where(said, probabilities, 1 - probabilities) >= certain_from
    found["share of pictures that are not unsure"] = float(sure.mean())
    found["share of errors among them"] = float(wrong[sure].mean()) if sure.any() else 0.0
    found["share of errors that is aimed at"] = ERROR_RATE
    bad = len({group for group, error in zip(groups, wrong, strict=True) if error})
    found["groups with an error"] = bad
    found["share of groups with an error, upper 97.5 % bound"] = clopper_pearson_interval(
        bad, found["groups"]
    )[1]
    return found


if __name__ == "__main__":
    sys.exit(main())
