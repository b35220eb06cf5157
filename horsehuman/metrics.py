"""How good answers are on the pictures as they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

Floats = NDArray[np.float64]

#: Bins of the calibration error, of equal width.
BINS = 15

#: Probabilities are kept this far from 0 and 1 before a logarithm is taken (float32's resolution).
_TINY = 1e-7


def point_metrics(
    probabilities: Floats, labels: NDArray[np.int64], threshold: float
) -> dict[str, float]:
    """All figures on the pictures as they are; NaN where a class that one needs is missing.

    They equal those of torchmetrics, whose import alone takes longer than all this, and are made of
    sums that can be resampled.

    Accuracies, precision, recall and F1 are of answers at the threshold; ``0`` and ``1`` at the end
    of a name are the class. The Brier score is the mean squared error of the probability (Brier
    1950); the calibration error has 15 bins of equal width over the probability of class 1 (Guo et
    al. 2017); log loss is in nats.

    Args:
        probabilities: Of class 1, ``(N,)``, 0 to 1.
        labels: 0 or 1, ``(N,)``.
        threshold: From this probability on a picture is of class 1.
    """
    sums = sums_of(probabilities, labels, threshold).sum(0, keepdims=True)
    found = figures_from(sums)
    found |= areas(*ranked(probabilities), labels.astype(float), np.ones((1, len(labels))))
    return {name: float(values[0]) for name, values in found.items()}


def log_losses(probabilities: Floats, labels: NDArray[np.int64]) -> Floats:
    """Log loss of each picture in nats, ``(N,)``."""
    right = np.where(labels == 1, probabilities, 1 - probabilities)
    losses: Floats = -np.log(right.clip(_TINY))
    return losses


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[int, int, float]:
    """McNemar's exact test of two classifiers on the same pictures (McNemar 1947).

    It takes pictures for independent; frames of one figure are not, and its p is then too small.

    Args:
        first: Where the first is right, ``(N,)``.
        second: Where the second is.

    Returns:
        Pictures that only the first has right, those that only the second has right, and the
        two-sided p that this would be by chance alone.
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    total = only_first + only_second
    p = 2 * bdtr(min(only_first, only_second), total, 0.5)
    return only_first, only_second, min(1.0, float(p))


def ranked(probabilities: Floats) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Order from the highest probability to the lowest, and which is the last of its ties."""
    order = np.argsort(-probabilities, kind="stable")
    return order, np.append(np.diff(probabilities[order]) != 0, True)


def bins_of(probabilities: Floats) -> NDArray[np.int64]:
    """Which of :data:`BINS` bins of equal width each probability falls into."""
    return np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)


def sums_of(probabilities: Floats, labels: NDArray[np.int64], threshold: float) -> Floats:
    """What each picture adds to the sums that most figures are made of: ``(N, 6 + BINS)``."""
    said, truth = probabilities >= threshold, labels == 1
    parts = [said & truth, said & ~truth, ~said & truth, ~said & ~truth]
    parts += [(probabilities - labels) ** 2, log_losses(probabilities, labels)]
    excess = np.zeros((len(labels), BINS))
    excess[np.arange(len(labels)), bins_of(probabilities)] = probabilities - labels
    return np.concatenate([np.stack(parts, 1).astype(float), excess], axis=1)


def figures_from(sums: Floats) -> dict[str, Floats]:
    """Figures ``(...)`` from sums ``(..., 6 + BINS)``."""
    tp, fp, fn, tn, brier, log_loss = np.moveaxis(sums[..., :6], -1, 0)
    total = tp + fp + fn + tn
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = tn / (tn + fp), tp / (tp + fn)
        return {
            "accuracy": (tp + tn) / total,
            "balanced accuracy": (recall[0] + recall[1]) / 2,
            "precision 0": tn / (tn + fn),
            "precision 1": tp / (tp + fp),
            "recall 0": recall[0],
            "recall 1": recall[1],
            "F1 0": 2 * tn / (2 * tn + fn + fp),
            "F1 1": 2 * tp / (2 * tp + fn + fp),
            "Brier score": brier / total,
            "log loss": log_loss / total,
            "calibration error": np.abs(sums[..., 6:]).sum(-1) / total,
        }


def areas(
    order: NDArray[np.int64], last: NDArray[np.bool_], labels: Floats, weights: Floats
) -> dict[str, Floats]:
    """ROC-AUC and average precision of weighted pictures; weights ``(D, N)``, results ``(D,)``.

    Args:
        order: Pictures from the highest probability to the lowest.
        last: Whether a picture, in that order, is the last with its probability.
        labels: 0 or 1.
        weights: How often each picture was drawn.
    """
    weights, labels = weights[:, order], labels[order]
    tp = np.cumsum(weights * labels, axis=1)[:, last]
    fp = np.cumsum(weights * (1 - labels), axis=1)[:, last]
    start = np.zeros((len(weights), 1))
    gained, lost = np.diff(tp, prepend=start, axis=1), np.diff(fp, prepend=start, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(tp + fp > 0, tp / (tp + fp), 0)
        area = (lost * (tp - gained / 2)).sum(1) / (tp[:, -1] * fp[:, -1])
        found = (gained * precision).sum(1) / tp[:, -1]
        return {"ROC-AUC": area, "average precision": np.where(fp[:, -1] > 0, found, np.nan)}
