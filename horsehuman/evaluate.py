"""How good a classifier is on labelled pictures: figures with intervals, tables, a report."""

from __future__ import annotations

import logging
import math
from collections.abc import Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from horsehuman.data.folders import Record
from horsehuman.errors import HorseHumanError, shown
from horsehuman.intervals import Estimate, estimate, share_of_groups
from horsehuman.metrics import Floats
from horsehuman.models.network import Network
from horsehuman.picture_set import PictureSet
from horsehuman.prediction import predict
from horsehuman.runs import write_csv
from horsehuman.terminal import track

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """What a classifier said of labelled pictures; unreadable ones are left out.

    Attributes:
        pictures: The set that was asked about.
        records: Of it, the pictures that could be read, N of them.
        logits: Calibrated, float64 ``(N,)``.
        probabilities: Of class 1, float64 ``(N,)``: the sigmoid of the logits, in float32 as the
            network computes it.
        doubts: ``ok``, ``unsure`` or ``neither``, ``(N,)``; all figures take the classes that these
            answers would be, however unsure.
        threshold: From this probability on a picture is of class 1.
        errors: Why the others could not be read.
    """

    pictures: PictureSet
    records: list[Record]
    logits: Floats
    probabilities: Floats
    doubts: NDArray[np.str_]
    threshold: float
    errors: list[str]

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """0 or 1, ``(N,)``."""
        return np.array([record.label for record in self.records])

    @cached_property
    def said(self) -> NDArray[np.bool_]:
        """Whether each answer is class 1, ``(N,)``."""
        said: NDArray[np.bool_] = self.probabilities >= self.threshold
        return said

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Whether each answer is right, ``(N,)``."""
        right: NDArray[np.bool_] = self.said == (self.labels == 1)
        return right

    @cached_property
    def groups(self) -> list[str]:
        """The group of each picture."""
        return [record.group for record in self.records]

    @cached_property
    def of_truth(self) -> Floats:
        """Probability of the right class, ``(N,)``."""
        return np.where(self.labels == 1, self.probabilities, 1 - self.probabilities)

    def only(self, paths: Set[Path]) -> Answers:
        """The answers about some of the pictures."""
        keep = np.array([record.path in paths for record in self.records])
        return replace(
            self,
            records=[record for record in self.records if record.path in paths],
            logits=self.logits[keep],
            probabilities=self.probabilities[keep],
            doubts=self.doubts[keep],
        )


def check_classes(classifier: Network, pictures: PictureSet) -> None:
    """Raise :class:`HorseHumanError` where pictures are of other classes than a classifier's."""
    if pictures.class_names != classifier.class_names:
        raise HorseHumanError(
            f"{shown(pictures.root)} holds {shown(' and '.join(pictures.class_names))}, the "
            f"classifier tells {shown(' from '.join(classifier.class_names))}: name the folders so"
        )


def answer(classifier: Network, pictures: PictureSet) -> Answers:
    """Ask about all pictures of a set.

    Raises:
        HorseHumanError: The classes are others than the classifier's, or no picture can be read.
    """
    check_classes(classifier, pictures)
    records, logits, doubts, errors = [], [], [], []
    found = predict(classifier, (record.path for record in pictures.records))
    for record, said in zip(
        pictures.records, track(found, "answering", len(pictures.records)), strict=True
    ):
        if said.error:
            errors.append(said.error)
            continue
        records.append(record)
        logits.append(said.logit)
        doubts.append(said.status)
    for error in errors[:3]:
        log.warning("left out: %s", error)
    if not records:
        raise HorseHumanError(f"no picture in {shown(pictures.root)} can be read ({errors[0]})")
    probabilities = torch.tensor(logits, dtype=torch.float32).sigmoid().double().numpy()
    return Answers(
        pictures,
        records,
        np.array(logits),
        probabilities,
        np.array(doubts),
        classifier.threshold,
        errors,
    )


def by_group(answers: Answers) -> list[dict[str, Any]]:
    """Class, pictures, right ones and mean probability of the class of each group, worst first."""
    rows = []
    names, index = np.unique(answers.groups, return_inverse=True)
    by_index = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    for group, of in zip(names.tolist(), by_index, strict=True):
        labels = sorted({answers.pictures.class_names[label] for label in answers.labels[of]})
        rows.append(
            {
                "group": group,
                "class": " and ".join(labels),
                "pictures": len(of),
                "right": int(answers.right[of].sum()),
                "mean probability": float(answers.of_truth[of].mean()),
            }
        )
    return sorted(rows, key=lambda row: (row["right"] / row["pictures"], row["mean probability"]))


def worst(answers: Answers, count: int) -> list[int]:
    """Indices of pictures: the wrong ones, the worst first, then the least certain ones."""
    distance = np.abs(answers.probabilities - answers.threshold)
    order = np.lexsort((np.where(answers.right, distance, answers.of_truth), answers.right))
    return [int(index) for index in order[:count]]


def summarise(answers: Answers, draws: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """All that ``metrics.json`` says; what is not defined is ``None``."""
    estimates = estimate(
        answers.probabilities, answers.labels, answers.groups, answers.threshold, draws, seed
    )
    names = answers.pictures.class_names
    groups = by_group(answers)
    whole = sum(row["right"] == row["pictures"] for row in groups)
    low, high = share_of_groups(whole, len(groups))
    beyond = answers.logits - math.log(answers.threshold / (1 - answers.threshold))
    margins = np.where(answers.labels == 1, beyond, -beyond)
    return {
        "pictures": len(answers.records),
        "right": int(answers.right.sum()),
        "unreadable": answers.errors,
        "unsure": int((answers.doubts == "unsure").sum()),
        "neither": int((answers.doubts == "neither").sum()),
        "right of the others": int(answers.right[answers.doubts == "ok"].sum()),
        "groups": len(groups),
        "groups without an error": whole,
        "groups without an error, 95 % interval": [low, high],
        "smallest margin": float(margins.min()),
        "confusion": confusion(answers),
        "metrics": {_named(name, names): plain(value) for name, value in estimates.items()},
        "by group": groups,
    }


def confusion(answers: Answers) -> dict[str, dict[str, int]]:
    """Counts: what the pictures show, and what was said."""
    names = answers.pictures.class_names
    return {
        names[truth]: {
            names[answer]: int(((answers.labels == truth) & (answers.said == answer)).sum())
            for answer in (0, 1)
        }
        for truth in (0, 1)
    }


def _named(metric: str, names: tuple[str, str]) -> str:
    """``recall 0`` as ``recall of horses``."""
    stem, _, label = metric.rpartition(" ")
    return f"{stem} of {names[int(label)]}" if label in ("0", "1") else metric


def plain(found: Estimate) -> dict[str, Any]:
    """An estimate as ``metrics.json`` writes it; what is not defined is ``None``."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "value": number(found.value),
        "by group": [number(bound) for bound in found.by_group],
        "by picture": [number(bound) for bound in found.by_picture],
    }


def write_predictions(folder: Path, answers: Answers) -> None:
    """Write ``predictions.csv``; ``probability`` and ``logit`` are of class 1."""
    names = answers.pictures.class_names
    header = ("picture", "label", "group", "answer", "status", "probability", "logit", "right")
    columns = (
        [answers.pictures.name(record) for record in answers.records],
        [names[record.label] for record in answers.records],
        answers.groups,
        [names[int(said)] for said in answers.said],
        answers.doubts,
        answers.probabilities,
        answers.logits,
        answers.right.astype(int),
    )
    write_csv(folder / "predictions.csv", header, zip(*columns, strict=True))
