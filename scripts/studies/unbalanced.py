"""Compare data.balance and data.prior where one class has ten times the images of the other.

    python scripts/studies/unbalanced.py               # the official training subjects
    python scripts/studies/unbalanced.py PHOTOS        # a folder with photographs of breeds

Trains the InceptionV3 head on five random splits of each pair of classes. Prints recall of both
classes, and log loss and calibration error in the proportions of training, on held-out groups:
subjects, or single photographs. The official test set is not used.
"""

import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from horsehuman import HorseHumanDataModule, InceptionClassifier
from horsehuman.data.archives import image_root
from horsehuman.data.records import SUBJECT_PATTERN, scan_folder
from horsehuman.decision import calibration_bins
from horsehuman.evaluation.metrics import bootstrap_mean, log_losses
from horsehuman.training import build

#: Pairs of breeds; the first of each keeps all its images.
PAIRS = (
    ("Akhal-Teke", "Arabian"),
    ("Friesian", "Percheron"),
    ("Orlov-Trotter", "Akhal-Teke"),
    ("Appaloosa", "Friesian"),
    ("Arabian", "Appaloosa"),
)

SETTINGS: tuple[dict[str, Any], ...] = (
    {"balance": "none"},
    {"balance": "loss"},
    {"balance": "none", "prior": 0.5},
    {"balance": "loss", "prior": 0.5},
)


def read_pairs(photos: Path | None) -> Iterator[list[list[list[Path]]]]:
    """Yield the groups of image files of both classes of each pair, the larger class first."""
    if photos is not None:
        for pair in PAIRS:
            yield [[[path] for path in sorted(photos.rglob(f"*_{name}_*"))] for name in pair]
        return
    groups: Any = (defaultdict(list), defaultdict(list))
    for record in scan_folder(image_root("box", None, None), SUBJECT_PATTERN)[1]:
        if record.split == "train":
            groups[record.label][record.group].append(record.path)
    horses, humans = (list(by_name.values()) for by_name in groups)
    yield from ([horses, humans], [humans, horses])


def link_files(root: Path, pair: list[list[list[Path]]], seed: int) -> None:
    """Link images to train on, a tenth as many of the second class, and 30 % of both for a test."""
    wanted = 0.0
    for name, groups in zip(("0 large", "1 small"), pair, strict=True):
        shuffled = random.Random(seed).sample(groups, len(groups))
        held_out = round(0.3 * len(groups))
        train = shuffled[held_out:]
        while wanted and len(train) > 1 and sum(map(len, train[:-1])) >= wanted:
            train.pop()
        wanted = sum(map(len, train)) / 10
        for split, part in (("train", train), ("test", shuffled[:held_out])):
            folder = root / split / name
            folder.mkdir(parents=True)
            for path in (path for group in part for path in group):
                (folder / path.name).symlink_to(path.absolute())


def predict(root: Path, pattern: str | None, setting: dict[str, Any]) -> tuple[Any, Any]:
    """Train on ``root/train``; return records and probabilities of class 1 of ``root/test``."""
    L.seed_everything(0, verbose=False)
    data = HorseHumanDataModule(
        300, "folder", str(root), group_pattern=pattern, val_fraction=0, **setting
    )
    model = InceptionClassifier()
    data.setup()
    options = {"logger": False, "enable_checkpointing": False, **build.QUIET}
    epochs = build.epochs_for(data, build.STEPS, build.EPOCHS, build.MAX_EPOCHS)
    trainer = L.Trainer(max_epochs=epochs, **options)
    trainer.fit(model, data)
    cache = model.network.feature_cache()
    with torch.no_grad():
        logits = torch.cat([model(cache(images)) for images, _ in data.test_dataloader()])
    records = [record for record in data.records if record.split == "test"]
    return records, logits.double().sigmoid().numpy()


def main(photos: Path | None) -> None:
    """Train and print the metrics of each setting."""
    build.silence_lightning()
    pattern = SUBJECT_PATTERN if photos is None else None
    results: Any = defaultdict(list)
    for pair in read_pairs(photos):
        for seed in range(5):
            with tempfile.TemporaryDirectory() as folder:
                link_files(Path(folder), pair, seed)
                for index, setting in enumerate(SETTINGS):
                    results[index].append(predict(Path(folder), pattern, setting))
    for index, runs in results.items():
        print(SETTINGS[index], summarize(runs))


def summarize(runs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return mean and 95 % interval of each metric over all held-out images."""
    labels = np.array([record.label for records, _ in runs for record in records])
    groups = [record.group for records, _ in runs for record in records]
    probabilities = np.concatenate([values for _, values in runs])
    right = (probabilities >= 0.5) == labels
    weights = np.where(labels, 1 / 11 / labels.mean(), 10 / 11 / (1 - labels.mean()))
    errors = np.bincount(calibration_bins(probabilities), weights * (probabilities - labels))
    metrics = {
        "recall of the large class": np.where(labels, np.nan, right),
        "recall of the small class": np.where(labels, right, np.nan),
        "log loss": weights * log_losses(probabilities, labels),
    }
    estimates = {name: bootstrap_mean(values, labels, groups) for name, values in metrics.items()}
    rounded = {name: np.round([e["value"], *e["by group"]], 4) for name, e in estimates.items()}
    return {**rounded, "calibration error": round(float(abs(errors).sum() / len(labels)), 4)}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
