"""``horsehuman calibrate``: fit temperature and decision thresholds on folds of a run's recipe."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from horsehuman.data.image_sets import read_run_images
from horsehuman.data.records import Record, scan_folder
from horsehuman.decision import Floats
from horsehuman.errors import HorseHumanError, printable
from horsehuman.evaluation.evaluate import predict_labelled
from horsehuman.evaluation.metrics import clopper_pearson_interval, point_metrics
from horsehuman.models import calibration, checkpoint
from horsehuman.models.base import Network
from horsehuman.models.calibration import FOLDS
from horsehuman.models.checkpoint import find_checkpoint, load_classifier
from horsehuman.training.config import load_config
from horsehuman.training.run import train

log = logging.getLogger(__name__)


def calibrate_and_report(run_dir: Path) -> None:
    """Calibrate a run's final checkpoint and print the values; see :func:`calibrate`."""
    report = calibrate(run_dir)
    print(f"written into {printable(find_checkpoint(run_dir))}:")
    for name, value in report.items():
        print(f"{name:<55}{value if isinstance(value, int) else f'{value:.4f}'}")


def calibrate(run_dir: Path) -> dict[str, Any]:
    """Fit temperature and thresholds on held-out predictions, into a run's final checkpoint.

    The run's recipe is trained again on all but one fold of the training groups, for each fold. A
    run on a folder with a validation split of its own is asked about that split instead. The test
    set is not used.

    Args:
        run_dir: The run folder.

    Returns:
        The values that the checkpoint keeps under ``calibration``, plain numbers.

    Raises:
        HorseHumanError: A class has fewer than :data:`FOLDS` groups, or a fold cannot be trained.
    """
    config = load_config(run_dir)
    path = find_checkpoint(run_dir)
    network = load_classifier(path)
    images = read_run_images(run_dir)
    records = [record for record in images.records if record.split != "test"]
    if has_validation_folder(config):
        held_out = images.split("validation")
        check_groups(run_dir, held_out.records, network)
        network.settings["temperature"] = 1.0
        predictions = predict_labelled(network, held_out)
        predicted, logits = predictions.records, predictions.logits
    else:
        check_groups(run_dir, records, network)
        predicted, logits = cross_validated_logits(config)
    settings, report = fit_thresholds(predicted, logits, network.threshold)
    saved = checkpoint.read_checkpoint(path)
    saved["hyper_parameters"].update(settings)
    saved["horsehuman"]["calibration"] = report
    checkpoint.write_checkpoint(path, saved)
    return report


def has_validation_folder(config: DictConfig) -> bool:
    """Return whether a run's images came with a validation split of their own."""
    if config.data.source != "folder":
        return False
    records = scan_folder(Path(config.data.root), config.data.group_pattern)[1]
    return any(record.split == "validation" for record in records)


def check_groups(run_dir: Path, records: Sequence[Record], network: Network) -> None:
    """Raise :class:`HorseHumanError` if a class has fewer groups than there are folds."""
    for label, name in enumerate(network.class_names):
        count = len({record.group for record in records if record.label == label})
        if count < FOLDS:
            few = f"{count} groups of {printable(name)} outside the test set are fewer than {FOLDS}"
            raise HorseHumanError(f"{printable(run_dir)}: {few}: too few to calibrate on")


def cross_validated_logits(config: DictConfig) -> tuple[list[Record], Floats]:
    """Return the training records and their uncalibrated logits, each from a held-out fold."""
    records: list[Record] = []
    logits: list[Floats] = []
    for fold in range(FOLDS):
        changes = {
            "test": False,
            "precision": "float32",
            "data": {"fold": fold, "folds": FOLDS, "validation": "held_out"},
            "model": {"temperature": 1.0, "confidence_threshold": 0.5},
            "trainer": {"strategy": "auto", "devices": 1, "num_nodes": 1},
        }
        fold_config: Any = OmegaConf.merge(config, changes)
        log.info("fold %d of %d", fold + 1, FOLDS)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            run_dir = Path(folder) / "run"
            train(fold_config, run_dir)  # prints paths of a folder that is removed
            held_out = read_run_images(run_dir).split("validation")
            predictions = predict_labelled(load_classifier(run_dir), held_out)
        records += predictions.records
        logits.append(predictions.logits)
    return records, np.concatenate(logits)


def fit_thresholds(
    records: Sequence[Record], logits: Floats, threshold: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit temperature and confidence threshold to held-out predictions.

    Args:
        records: N images.
        logits: Their uncalibrated logits, ``(N,)``.
        threshold: Smallest probability of class 1, in (0, 1), at which an image is of class 1.

    Returns:
        Both values by the names of the classifier's settings, and the metrics before and after
        calibration, plain numbers.
    """
    labels = np.array([record.label for record in records])
    groups = [record.group for record in records]
    temperature = calibration.fit_temperature(logits, labels, groups, threshold)
    scaled = calibration.scale_logits(logits, temperature, threshold)
    confidence = calibration.fit_confidence_threshold(scaled, labels, groups, threshold)
    report: dict[str, Any] = {
        "pictures": len(labels),
        "groups": len(set(groups)),
        "temperature": temperature,
        "certain from": confidence,
    }
    for when, values in (("before", logits), ("after", scaled)):
        probabilities = 1 / (1 + np.exp(-values))
        metrics = point_metrics(probabilities, labels, threshold)
        for name in ("accuracy", "log loss", "calibration error", "Brier score"):
            report[f"{name} {when}"] = metrics[name]
    predicted = probabilities >= threshold
    wrong = predicted != (labels == 1)
    certain = np.where(predicted, probabilities, 1 - probabilities) >= confidence
    report["share of pictures that are not unsure"] = float(certain.mean())
    report["share of errors among them"] = float(wrong[certain].mean()) if certain.any() else 0.0
    report["share of errors that is aimed at"] = calibration.ERROR_RATE
    count = len({group for group, error in zip(groups, wrong, strict=True) if error})
    report["groups with an error"] = count
    bound = clopper_pearson_interval(count, report["groups"])[1]
    report["share of groups with an error, upper 97.5 % bound"] = bound
    return {"temperature": temperature, "confidence_threshold": confidence}, report
