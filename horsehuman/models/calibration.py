"""How far to trust a classifier, learned from pictures of groups that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from horsehuman.data.records import group_folds, min_groups_per_class
from horsehuman.decision import Floats
from horsehuman.models.inception import class_mean_distance, class_means

#: Share of wrong answers among those that are not unsure, that is aimed at.
ERROR_RATE = 0.01

#: Within these a temperature is looked for.
TEMPERATURES = (0.25, 4.0)

#: Share of held-out pictures that lie nearer than the reach.
KEPT = 0.95

#: The reach of a class is the distance that :data:`KEPT` of the pictures of held-out groups keep,
#: times this: so much farther were photographs of people from a classifier that has seen rendered
#: figures alone, and some more. See docs/neither.md.
SLACK = 1.65


def group_weights(groups: Sequence[str]) -> Floats:
    """Weights of pictures, ``(N,)``, by which each group weighs the same; their sum is 1."""
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    weights: Floats = 1 / (len(counts) * counts[index])
    return weights


def fit_temperature(logits: Floats, labels: NDArray[np.int64], groups: Sequence[str]) -> float:
    """What to divide logits by (Guo et al. 2017): the least log loss, each group weighing the same.

    Without an error nothing bounds it from below: it is 1 then.

    Args:
        logits: Of pictures of groups that were held out, ``(N,)``; the threshold lies at 0.
        labels: 0 or 1.
        groups: Which pictures belong together.
    """
    margins = np.where(labels == 1, logits, -logits)
    if (margins > 0).all():
        return 1.0
    weights = group_weights(groups)

    def loss(logarithm: float) -> float:
        return float(weights @ np.logaddexp(0, -margins / np.exp(logarithm)))

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded")
    return round(float(np.exp(found.x)), 4)


def fit_confidence_threshold(
    logits: Floats, labels: NDArray[np.int64], groups: Sequence[str], rate: float = ERROR_RATE
) -> float:
    """Probability of an answer from which on at most a share of ``rate`` is wrong.

    Never below the least certain answer that was right: nothing is known of those. Each group
    weighs the same. At most 0.999.

    Args:
        logits: Calibrated, of pictures of groups that were held out, ``(N,)``.
        labels: 0 or 1.
        groups: Which pictures belong together.
        rate: Share of wrong answers.
    """
    sure = 1 / (1 + np.exp(-np.abs(logits)))
    wrong = (logits >= 0) != (labels == 1)
    weights = group_weights(groups)
    order = np.argsort(-sure, kind="stable")
    rates = np.cumsum((weights * wrong)[order]) / np.cumsum(weights[order])
    good = np.flatnonzero((rates <= rate) & ~wrong[order])
    if not len(good):
        return 0.999
    return float(np.clip(np.floor(sure[order][good[-1]] * 1e4) / 1e4, 0.5, 0.999))


def fit_neither_threshold(
    features: Tensor, labels: Tensor, groups: Sequence[str], folds: int = 5, seed: int = 0
) -> tuple[Tensor, float]:
    """Class means, and the distance from which on a picture is neither.

    Args:
        features: Of training pictures, ``(N, F)``, not negative.
        labels: 0 or 1, ``(N,)``.
        groups: Which pictures belong together.
        folds: Distances are measured to means of the other groups, in so many parts; each class
            has at least as many groups.
        seed: Of the parts.

    Returns:
        ``(2, F)``, and the distance.
    """
    part = torch.from_numpy(group_folds(labels.numpy(), groups, folds, seed))
    found = torch.empty(len(features))
    for fold in range(folds):
        out = part == fold
        found[out] = class_mean_distance(features[out], class_means(features[~out], labels[~out]))
    reach = SLACK * float(found.quantile(KEPT))
    return class_means(features, labels), round(reach, 6)


def cross_validated_probabilities(
    features: Tensor, own: NDArray[np.int64], groups: Sequence[str], folds: int = 5
) -> Floats | None:
    """Probability of class 1 for each picture by a linear classifier of other groups, ``(N,)``.

    ``None`` where a class has fewer groups than there are folds.
    """
    if min_groups_per_class(own, groups) < folds:
        return None
    part = group_folds(own, groups, folds)
    found = np.zeros(len(own))
    target = torch.from_numpy(own).float()
    for fold in range(folds):
        train, out = torch.from_numpy(part != fold), torch.from_numpy(part == fold)
        found[part == fold] = _fit(features[train], target[train], features[out])
    return found


def _fit(features: Tensor, target: Tensor, others: Tensor) -> Floats:
    """Probabilities of others by ridge-penalised logistic regression on standardised features."""
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / std
    weight = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weight[1:] + weight[0]
        value = functional.binary_cross_entropy_with_logits(logits, target)
        value = value + 0.01 * weight[1:].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    logits = ((others - mean) / std) @ weight[1:].detach() + weight[0].detach()
    found: Floats = logits.sigmoid().double().numpy()
    return found
