"""How good answers are on the pictures as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, betaincinv

from horsehuman.data.records import classes_of_groups
from horsehuman.decision import CALIBRATION_BINS, Floats, calibration_bins

#: Probabilities are kept this far from 0 and 1 before a logarithm is taken (float32's resolution).
_TINY = 1e-7

#: Resamplings that are worked on at a time; bounds memory.
_CHUNK = 1_000_000


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
    sums = metric_sums(probabilities, labels, threshold).sum(0, keepdims=True)
    found = metrics_from_sums(sums)
    found |= ranking_metrics(
        *rank_order(probabilities), labels.astype(float), np.ones((1, len(labels)))
    )
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


def rank_order(probabilities: Floats) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Order from the highest probability to the lowest, and which is the last of its ties."""
    order = np.argsort(-probabilities, kind="stable")
    return order, np.append(np.diff(probabilities[order]) != 0, True)


def metric_sums(probabilities: Floats, labels: NDArray[np.int64], threshold: float) -> Floats:
    """What each picture adds to the sums that most figures are made of: ``(N, 6 + BINS)``."""
    said, truth = probabilities >= threshold, labels == 1
    parts = [said & truth, said & ~truth, ~said & truth, ~said & ~truth]
    parts += [(probabilities - labels) ** 2, log_losses(probabilities, labels)]
    excess = np.zeros((len(labels), CALIBRATION_BINS))
    excess[np.arange(len(labels)), calibration_bins(probabilities)] = probabilities - labels
    return np.concatenate([np.stack(parts, 1).astype(float), excess], axis=1)


def metrics_from_sums(sums: Floats) -> dict[str, Floats]:
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


def ranking_metrics(
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


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty.

    Attributes:
        value: The figure on the pictures as they are; NaN where it is not defined.
        by_group: 95 % interval where groups are resampled; NaN where it is not defined.
        by_picture: The naive one, as if all pictures were independent.
    """

    value: float
    by_group: tuple[float, float]
    by_picture: tuple[float, float]


def bootstrap_metrics(
    probabilities: Floats,
    labels: NDArray[np.int64],
    groups: Sequence[str],
    threshold: float,
    draws: int = 10_000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """All figures with 95 % intervals by group and by picture.

    The interval by group is the percentile interval of a cluster bootstrap: whole groups are drawn
    with replacement, those of one class apart from those of the other and from those with both
    (Field and Welsh 2007; Davison and Hinkley 1997, section 3.8). Where a class has one group alone
    nothing is known of others, and there is no interval. With few groups, say fewer than 20, such
    intervals are too narrow, and they have no width at all where every picture is right; see
    :func:`clopper_pearson_interval` for a bound that holds then.

    Args:
        probabilities: Of class 1, ``(N,)``, 0 to 1.
        labels: 0 or 1, ``(N,)``.
        groups: Which pictures belong together, N names.
        threshold: From this probability on a picture is of class 1.
        draws: Resamplings.
        seed: Of the resampling.
    """
    found = point_metrics(probabilities, labels, threshold)
    intervals = [
        _intervals(probabilities, labels, index, threshold, draws, seed)
        for index in (np.unique(groups, return_inverse=True)[1], np.arange(len(labels)))
    ]
    nothing = (math.nan, math.nan)
    return {
        name: Estimate(value, intervals[0][name], intervals[1][name])
        if math.isfinite(value)
        else Estimate(value, nothing, nothing)
        for name, value in found.items()
    }


def bootstrap_mean(
    values: Floats,
    labels: NDArray[np.int64],
    groups: Sequence[str],
    draws: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """A mean over pictures with 95 % intervals; of differences of two classifiers, paired ones.

    Args:
        values: Of each picture, ``(N,)``.
        labels: 0 or 1, ``(N,)``; resampled as in :func:`bootstrap_metrics`, which is also about limits.
        groups: Which pictures belong together, N names.
        draws: Resamplings.
        seed: Of the resampling.
    """
    if not len(values):
        return Estimate(math.nan, (math.nan, math.nan), (math.nan, math.nan))
    intervals = []
    for index in (np.unique(groups, return_inverse=True)[1], np.arange(len(labels))):
        sums, sizes = np.bincount(index, values), np.bincount(index)
        means = [
            (counts @ sums) / (counts @ sizes)
            for counts in _resamplings(labels, index, draws, seed)
        ]
        intervals.append(_percentiles(np.concatenate(means)))
    return Estimate(float(values.mean()), intervals[0], intervals[1])


def clopper_pearson_interval(right: int, groups: int) -> tuple[float, float]:
    """95 % interval for the share of groups that are right throughout (Clopper and Pearson 1934).

    It is exact where groups are independent, however few they are: 11 of 11 leave 72 % possible.
    """
    low = betaincinv(right, groups - right + 1, 0.025) if right else 0.0
    high = betaincinv(right + 1, groups - right, 0.975) if right < groups else 1.0
    return float(low), float(high)


def _intervals(
    probabilities: Floats,
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    threshold: float,
    draws: int,
    seed: int,
) -> dict[str, tuple[float, float]]:
    sums = metric_sums(probabilities, labels, threshold)
    of_groups = np.zeros((groups.max() + 1, sums.shape[1]))
    np.add.at(of_groups, groups, sums)
    order, last = rank_order(probabilities)
    found: dict[str, list[Floats]] = {}
    for counts in _resamplings(labels, groups, draws, seed):
        parts = metrics_from_sums(counts @ of_groups)
        parts |= ranking_metrics(order, last, labels.astype(float), counts[:, groups])
        for name, values in parts.items():
            found.setdefault(name, []).append(values)
    return {name: _percentiles(np.concatenate(values)) for name, values in found.items()}


def _percentiles(values: Floats) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _strata(labels: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which groups are drawn among each other: those of a kind, ``(G,)``.

    A kind that has one group joins another, unless there is no other group of its class.
    """
    kinds = classes_of_groups(labels, groups)
    for kind in (1, 2):
        if (kinds == kind).sum() == 1 and (kinds == 3).any():
            kinds[kinds == kind] = 3
    pure = [int((kinds == kind).sum()) for kind in (1, 2)]
    if (kinds == 3).sum() == 1 and all(pure):
        kinds[kinds == 3] = 1 + int(np.argmax(pure))
    return kinds


def _resamplings(
    labels: NDArray[np.int64], groups: NDArray[np.int64], draws: int, seed: int
) -> Iterator[Floats]:
    """How often each group is drawn, ``(some draws, G)``; one class apart from the other.

    It is NaN for a group that is the only one of its class.
    """
    kinds = _strata(labels, groups)
    count = len(kinds)
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(labels))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        counts = np.zeros((size, count))
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            if len(members) == 1:
                counts[:, members] = np.nan  # and so is whatever is made of it
                continue
            drawn = members[generator.integers(0, len(members), (size, len(members)))]
            flat = drawn + count * np.arange(size)[:, None]
            counts += np.bincount(flat.ravel(), minlength=size * count).reshape(size, count)
        yield counts
