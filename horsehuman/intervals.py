"""Intervals around figures: a bootstrap that knows which pictures belong together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from horsehuman.data.splits import kinds_of_groups
from horsehuman.metrics import Floats, areas, figures_from, point_metrics, ranked, sums_of

#: Resamplings that are worked on at a time; bounds memory.
_CHUNK = 1_000_000


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


def estimate(
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
    :func:`share_of_groups` for a bound that holds then.

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


def estimate_mean(
    values: Floats,
    labels: NDArray[np.int64],
    groups: Sequence[str],
    draws: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """A mean over pictures with 95 % intervals; of differences of two classifiers, paired ones.

    Args:
        values: Of each picture, ``(N,)``.
        labels: 0 or 1, ``(N,)``; resampled as in :func:`estimate`, which is also about limits.
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


def share_of_groups(right: int, groups: int) -> tuple[float, float]:
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
    sums = sums_of(probabilities, labels, threshold)
    of_groups = np.zeros((groups.max() + 1, sums.shape[1]))
    np.add.at(of_groups, groups, sums)
    order, last = ranked(probabilities)
    found: dict[str, list[Floats]] = {}
    for counts in _resamplings(labels, groups, draws, seed):
        parts = figures_from(counts @ of_groups)
        parts |= areas(order, last, labels.astype(float), counts[:, groups])
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
    kinds = kinds_of_groups(labels, groups)
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
