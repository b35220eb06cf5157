"""Metrics of binary predictions, with bootstrap intervals by group and exact tests; no torch."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, betaincinv

from horsehuman.data.records import classes_of_groups
from horsehuman.decision import CALIBRATION_BINS, Floats, calibration_bins

#: Labels, or indices of groups: int64.
Ints = NDArray[np.int64]

#: A metric with its uncertainty, as in the reports: ``value`` on the given images; ``by group``,
#: both bounds of the 95 % interval from resampling groups; and ``by picture``, those from
#: resampling images as if they were independent. A number that is undefined is ``None``.
Estimate = dict[str, Any]

#: A function that computes M values of D resamplings, ``(M, D)``; see :func:`_estimates`.
Resample = Callable[[Floats, Ints], Floats]

#: Number of bootstrap resamplings.
DRAWS = 10_000

# Smallest probability of which a logarithm is taken (about float32's resolution).
_TINY = 1e-7

# Most weights (resamplings times images) that are held at a time; bounds memory.
_CHUNK = 1_000_000


def point_metrics(probabilities: Floats, labels: Ints, threshold: float) -> dict[str, float]:
    """Compute all metrics on the given images; NaN if a metric needs a class that is missing.

    The values equal those of torchmetrics. This module does not use it because its import alone
    takes longer than the whole computation, and because the bootstrap needs sums over images that
    it can resample.

    Accuracies, precision, recall and F1 compare thresholded predictions with the labels; ``0`` or
    ``1`` at the end of a name is the class. The Brier score is the mean squared error of the
    probability (Brier 1950). The calibration error uses 15 bins of equal width over the probability
    of class 1 (Guo et al. 2017). Log loss is in nats.

    Args:
        probabilities: Probabilities of class 1, ``(N,)``, 0 to 1.
        labels: 0 or 1, ``(N,)``.
        threshold: An image is predicted as class 1 if its probability is at least this.

    Returns:
        The value of each metric by name.
    """
    sums = metric_sums(probabilities, labels, threshold).sum(0, keepdims=True)
    metrics = metrics_from_sums(sums)
    weights = np.ones((1, len(labels)))
    metrics |= ranking_metrics(*rank_order(probabilities), labels.astype(float), weights)
    return {name: float(values[0]) for name, values in metrics.items()}


def bootstrap_metrics(
    probabilities: Floats, labels: Ints, groups: Sequence[str], threshold: float, draws: int = DRAWS
) -> dict[str, Estimate]:
    """Compute all metrics with 95 % intervals by group and by image.

    The interval by group is the percentile interval of a cluster bootstrap: whole groups are drawn
    with replacement, separately among groups of class 0, groups of class 1, and groups with both
    (Field and Welsh 2007; Davison and Hinkley 1997, section 3.8). If a class has only one group,
    there is no interval, since one group contains no information about others. With few groups, say
    fewer than 20, such intervals are too narrow, and if every image is right, they have no width at
    all; :func:`clopper_pearson_interval` gives a bound that holds then.

    Args:
        probabilities: Probabilities of class 1, ``(N,)``, 0 to 1.
        labels: 0 or 1, ``(N,)``.
        groups: Group of each image, N names.
        threshold: An image is predicted as class 1 if its probability is at least this.
        draws: Number of resamplings.

    Returns:
        The estimate of each metric of :func:`point_metrics` by name.
    """
    sums = metric_sums(probabilities, labels, threshold)
    order = rank_order(probabilities)

    def resample(counts: Floats, index: Ints) -> Floats:
        group_sums = np.zeros((counts.shape[1], sums.shape[1]))
        np.add.at(group_sums, index, sums)
        metrics = metrics_from_sums(counts @ group_sums)
        metrics |= ranking_metrics(*order, labels.astype(float), counts[:, index])
        return np.stack(list(metrics.values()))

    values = point_metrics(probabilities, labels, threshold)
    estimates = _estimates(list(values.values()), labels, groups, draws, resample)
    return dict(zip(values, estimates, strict=True))


def bootstrap_mean(
    values: Floats, labels: Ints, groups: Sequence[str], draws: int = DRAWS
) -> Estimate:
    """Compute a mean over images with 95 % intervals by group and by image.

    For differences between two classifiers on the same images, the intervals are paired. They are
    those of :func:`bootstrap_metrics` and have the same limits.

    Args:
        values: One value for each image, ``(N,)``; an image with NaN is left out.
        labels: 0 or 1, ``(N,)``; groups are drawn separately by class.
        groups: Group of each image, N names.
        draws: Number of resamplings.

    Returns:
        The estimate of the mean; all ``None`` if there are no images.
    """
    names, defined = np.array(groups), ~np.isnan(values)
    values, labels, names = values[defined], labels[defined], names[defined]
    if not len(values):
        return {"value": None, "by group": [None, None], "by picture": [None, None]}

    def resample(counts: Floats, index: Ints) -> Floats:
        sums, sizes = np.bincount(index, values), np.bincount(index)
        return (counts @ sums)[None] / (counts @ sizes)

    return _estimates([float(values.mean())], labels, names, draws, resample)[0]


def clopper_pearson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a proportion (Clopper and Pearson 1934).

    For the share of groups without an error it is exact if groups are independent, however few
    they are: with 11 of 11, a share of 72 % is still possible.

    Args:
        successes: Number of successes, 0 to ``trials``.
        trials: Number of independent trials, at least 1.

    Returns:
        Lower and upper bound, 0 to 1.
    """
    low = betaincinv(successes, trials - successes + 1, 0.025) if successes else 0.0
    high = betaincinv(successes + 1, trials - successes, 0.975) if successes < trials else 1.0
    return float(low), float(high)


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Compute McNemar's exact test of two classifiers on the same images (McNemar 1947).

    The test assumes independent images. Frames of one subject are not independent, and for them its
    p-value tends to be too small.

    Args:
        first: Whether the first classifier is right, ``(N,)``.
        second: Whether the second classifier is right, ``(N,)``.

    Returns:
        The number of images that only the first classifies correctly, the number that only the
        second does, and the two-sided p-value of the hypothesis that both are equally accurate.
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    total = only_first + only_second
    p = 2 * bdtr(min(only_first, only_second), total, 0.5)
    return only_first, only_second, min(1.0, float(p))


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of several tests for their number (Holm 1979).

    If hypotheses with a corrected p-value of at most alpha are rejected, the probability that a
    true one is among them is at most alpha.

    Args:
        p_values: One p-value for each of K tests, 0 to 1; the tests may depend on each other.

    Returns:
        The corrected p-values, K numbers from 0 to 1 in the order of the tests.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(factors * np.array(p_values)[order]).clip(max=1)
    return [float(p_value) for p_value in corrected]


def log_losses(probabilities: Floats, labels: Ints) -> Floats:
    """Return the log loss of each image in nats, ``(N,)``.

    Args:
        probabilities: Probabilities of class 1, ``(N,)``, 0 to 1.
        labels: 0 or 1, ``(N,)``.
    """
    of_label = np.where(labels == 1, probabilities, 1 - probabilities)
    losses: Floats = -np.log(of_label.clip(_TINY))
    return losses


def metric_sums(probabilities: Floats, labels: Ints, threshold: float) -> Floats:
    """Return each image's terms of the sums from which :func:`metrics_from_sums` computes metrics.

    Args:
        probabilities: Probabilities of class 1, ``(N,)``, 0 to 1.
        labels: 0 or 1, ``(N,)``.
        threshold: An image is predicted as class 1 if its probability is at least this.

    Returns:
        ``(N, 6 + BINS)`` with ``BINS`` = :data:`~horsehuman.decision.CALIBRATION_BINS`: true
        positive, false positive, false negative, true negative (0 or 1), squared error, log loss,
        and probability less label in the column of the image's calibration bin.
    """
    predicted, actual = probabilities >= threshold, labels == 1
    terms = [predicted & actual, predicted & ~actual, ~predicted & actual, ~predicted & ~actual]
    terms += [(probabilities - labels) ** 2, log_losses(probabilities, labels)]
    excess = np.zeros((len(labels), CALIBRATION_BINS))
    excess[np.arange(len(labels)), calibration_bins(probabilities)] = probabilities - labels
    return np.concatenate([np.stack(terms, 1).astype(float), excess], axis=1)


def metrics_from_sums(sums: Floats) -> dict[str, Floats]:
    """Compute the metrics that depend on sums over images alone.

    Args:
        sums: Sums of the columns of :func:`metric_sums`, ``(..., 6 + BINS)``.

    Returns:
        The values of each metric by name, ``(...)``; NaN if a denominator is 0.
    """
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


def rank_order(probabilities: Floats) -> tuple[Ints, NDArray[np.bool_]]:
    """Sort images from the highest probability to the lowest.

    Args:
        probabilities: ``(N,)``.

    Returns:
        The images' indices in this order, ``(N,)``, and whether each image, in this order, is the
        last with its probability, ``(N,)``.
    """
    order = np.argsort(-probabilities, kind="stable")
    return order, np.append(np.diff(probabilities[order]) != 0, True)


def ranking_metrics(
    order: Ints, last: NDArray[np.bool_], labels: Floats, weights: Floats
) -> dict[str, Floats]:
    """Compute ROC-AUC and average precision of weighted images.

    Args:
        order: Indices of the images from the highest probability to the lowest, ``(N,)``.
        last: Whether each image, in that order, is the last with its probability, ``(N,)``.
        labels: 0 or 1, ``(N,)``.
        weights: How often each of D resamplings contains each image, ``(D, N)``.

    Returns:
        The values of both metrics by name, ``(D,)``; NaN if a class is missing.
    """
    weights, labels = weights[:, order], labels[order]
    tp = np.cumsum(weights * labels, axis=1)[:, last]
    fp = np.cumsum(weights * (1 - labels), axis=1)[:, last]
    start = np.zeros((len(weights), 1))
    tp_steps, fp_steps = np.diff(tp, prepend=start, axis=1), np.diff(fp, prepend=start, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(tp + fp > 0, tp / (tp + fp), 0)
        area = (fp_steps * (tp - tp_steps / 2)).sum(1) / (tp[:, -1] * fp[:, -1])
        average = (tp_steps * precision).sum(1) / tp[:, -1]
        return {"ROC-AUC": area, "average precision": np.where(fp[:, -1] > 0, average, np.nan)}


def _resamplings(labels: Ints, groups: Ints, draws: int) -> Iterator[Floats]:
    """Yield how often each resampling contains each group, ``(some draws, G)``.

    Groups are drawn with replacement within their stratum; see :func:`_strata`. The count is NaN
    for a group that is alone in its stratum.
    """
    strata = _strata(labels, groups)
    count = len(strata)
    generator = np.random.default_rng(0)
    step = max(1, _CHUNK // len(labels))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        counts = np.zeros((size, count))
        for stratum in np.unique(strata):
            members = np.flatnonzero(strata == stratum)
            if len(members) == 1:
                counts[:, members] = np.nan  # makes every metric that depends on it NaN
                continue
            drawn = members[generator.integers(0, len(members), (size, len(members)))]
            flat = drawn + count * np.arange(size)[:, None]
            counts += np.bincount(flat.ravel(), minlength=size * count).reshape(size, count)
        yield counts


def _strata(labels: Ints, groups: Ints) -> Ints:
    """Return the stratum of each group, ``(G,)``: 1 for class 0, 2 for class 1, 3 for both.

    A stratum of one group is merged with another, unless no other group contains its class.
    """
    strata = classes_of_groups(labels, groups)
    for stratum in (1, 2):
        if (strata == stratum).sum() == 1 and (strata == 3).any():
            strata[strata == stratum] = 3
    sizes = [int((strata == stratum).sum()) for stratum in (1, 2)]
    if (strata == 3).sum() == 1 and all(sizes):
        strata[strata == 3] = 1 + int(np.argmax(sizes))
    return strata


def _estimates(
    values: Sequence[float], labels: Ints, groups: ArrayLike, draws: int, resample: Resample
) -> list[Estimate]:
    """Add 95 % intervals by group and by image to each of M values.

    Args:
        values: M values on the given images.
        labels: 0 or 1, ``(N,)``.
        groups: Group of each image, N names.
        draws: Number of resamplings.
        resample: Computes the M values of D resamplings, ``(M, D)``, from how often each of them
            contains each group, ``(D, G)``, and the group of each image as an index, ``(N,)``.
    """
    intervals = []
    for index in (np.unique(groups, return_inverse=True)[1], np.arange(len(labels))):
        parts = [resample(counts, index) for counts in _resamplings(labels, index, draws)]
        intervals.append(map(_percentiles, np.concatenate(parts, axis=1)))
    finite = [value if math.isfinite(value) else None for value in values]
    keys = ("value", "by group", "by picture")
    return [dict(zip(keys, row, strict=True)) for row in zip(finite, *intervals, strict=True)]


def _percentiles(values: Floats) -> Sequence[float | None]:
    """Return the 2.5 % and 97.5 % percentiles of the finite values; ``None`` if there are none."""
    values = values[np.isfinite(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else [None, None]
