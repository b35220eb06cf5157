"""Fit temperature and thresholds to predictions for groups that the model was not fitted to.

Images of one group resemble each other. Values that are fitted to predictions for the model's own
training groups would therefore be too optimistic about new images.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from horsehuman.data.records import group_folds, min_groups_per_class
from horsehuman.decision import Floats, Ints
from horsehuman.models.inception import class_mean_distance, class_means

#: Target error rate among the predictions that are not unsure.
ERROR_RATE = 0.01

#: Lower and upper bound of the temperature.
TEMPERATURE_BOUNDS = (0.25, 4.0)

#: Quantile of the distances of held-out images that the neither threshold is derived from.
DISTANCE_QUANTILE = 0.95

#: Factor between that quantile and the neither threshold. The photographs of people in scikit-image
#: (``astronaut`` and ``camera``), which must not be refused, reached 1.51 times the quantile for a
#: classifier of rendered subjects. The factor is about a tenth above that (1.65 / 1.51 = 1.09).
NEITHER_THRESHOLD_FACTOR = 1.65

#: Factor of the sum of squared weights in the loss of the linear probe.
RIDGE_PENALTY = 0.01


def group_weights(groups: Sequence[str]) -> Floats:
    """Compute one weight per image, ``(N,)``, so that all groups weigh the same; the sum is 1.

    Args:
        groups: Group of each image.
    """
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return 1 / (len(counts) * counts[index])


def scale_logits(logits: Floats, temperature: float, threshold: float) -> Floats:
    """Calibrate logits ``(N,)`` as :meth:`~horsehuman.models.base.Network.calibrate` does."""
    boundary: float = np.log(threshold / (1 - threshold))
    return boundary + (logits - boundary) / temperature


def fit_temperature(logits: Floats, labels: Ints, groups: Sequence[str], threshold: float) -> float:
    """Fit the temperature (Guo et al. 2017) of :func:`scale_logits`.

    It minimises the log loss of the calibrated probabilities, in which each group weighs the same,
    within :data:`TEMPERATURE_BOUNDS`. If no prediction is wrong, the optimum would be as small a
    temperature as allowed; return 1 instead.

    Args:
        logits: Uncalibrated logits of images of held-out groups, ``(N,)``.
        labels: 0 or 1, ``(N,)``.
        groups: Group of each image.
        threshold: Smallest probability of class 1, in (0, 1), at which an image is of class 1.
    """
    predicted = 1 / (1 + np.exp(-logits)) >= threshold
    if (predicted == (labels == 1)).all():
        return 1.0
    signs, weights = np.where(labels == 1, -1, 1), group_weights(groups)

    def loss(log_temperature: float) -> float:
        scaled = scale_logits(logits, np.exp(log_temperature), threshold)
        return float(weights @ np.logaddexp(0, signs * scaled))

    minimum = minimize_scalar(loss, bounds=np.log(TEMPERATURE_BOUNDS), method="bounded")
    return round(float(np.exp(minimum.x)), 4)


def fit_confidence_threshold(
    logits: Floats, labels: Ints, groups: Sequence[str], threshold: float, rate: float = ERROR_RATE
) -> float:
    """Fit the probability of the predicted class below which a prediction is unsure.

    The threshold is the smallest probability of a correct prediction at which the error rate of
    the predictions at or above it is at most about ``rate``: ties and rounding may exceed it. Each
    group weighs the same.

    Args:
        logits: Calibrated logits of images of held-out groups, ``(N,)``.
        labels: 0 or 1, ``(N,)``.
        groups: Group of each image.
        threshold: Smallest probability of class 1, in (0, 1), at which an image is of class 1.
        rate: Target error rate of the predictions that are not unsure, 0 to 1.

    Returns:
        The threshold in [0.5, 0.999], rounded down to 4 decimals; 0.999 if every cut-off has a
        higher error rate.
    """
    predicted = 1 / (1 + np.exp(-logits)) >= threshold
    confidences = 1 / (1 + np.exp(np.where(predicted, -logits, logits)))
    wrong, weights = predicted != (labels == 1), group_weights(groups)
    order = np.argsort(-confidences, kind="stable")
    rates = np.cumsum((weights * wrong)[order]) / np.cumsum(weights[order])
    smallest = confidences[order][(rates <= rate) & ~wrong[order]].min(initial=1)
    return float(np.clip(np.floor(smallest * 1e4) / 1e4, 0.5, 0.999))


def fit_neither_threshold(
    features: Tensor, labels: Tensor, groups: Sequence[str], folds: int = 5
) -> tuple[Tensor, float]:
    """Compute class means and fit the neither threshold.

    The threshold is :data:`NEITHER_THRESHOLD_FACTOR` times the :data:`DISTANCE_QUANTILE` quantile
    of the distances of all images to the nearer class mean of the other folds.

    Args:
        features: Features of the training images, ``(N, F)``.
        labels: 0 or 1, ``(N,)``.
        groups: Group of each image.
        folds: Number of folds, at most the number of groups of the class with fewer groups.

    Returns:
        Class means ``(2, F)`` of all images, and the neither threshold, rounded to 6 decimals.
    """
    distances = torch.empty(len(features))
    for held_out in _held_out_masks(labels.numpy(), groups, folds):
        means = class_means(features[~held_out], labels[~held_out])
        distances[held_out] = class_mean_distance(features[held_out], means)
    threshold = NEITHER_THRESHOLD_FACTOR * float(distances.quantile(DISTANCE_QUANTILE))
    return class_means(features, labels), round(threshold, 6)


def cross_validated_probabilities(
    features: Tensor, labels: Ints, groups: Sequence[str], folds: int = 5
) -> Floats | None:
    """Predict each image with a linear probe that was fitted to the other folds' groups.

    Args:
        features: float32 of shape ``(N, F)``.
        labels: 0 or 1, ``(N,)``.
        groups: Group of each image; a group is in one fold.
        folds: Number of folds.

    Returns:
        Probability of class 1 for each image, ``(N,)``; ``None`` if a class has fewer groups than
        there are folds.
    """
    if min_groups_per_class(labels, groups) < folds:
        return None
    probabilities, targets = torch.zeros(len(labels)), torch.from_numpy(labels).float()
    for held_out in _held_out_masks(labels, groups, folds):
        probabilities[held_out] = _fit_probe(features, targets, held_out)
    return probabilities.double().numpy()


def _held_out_masks(labels: Ints, groups: Sequence[str], folds: int) -> Iterator[Tensor]:
    """Return for each fold a mask of the images in it, bool of shape ``(N,)``."""
    fold_index = torch.from_numpy(group_folds(labels, groups, folds))
    return (fold_index == fold for fold in range(folds))


def _fit_probe(features: Tensor, targets: Tensor, held_out: Tensor) -> Tensor:
    """Fit ridge-penalised logistic regression to standardised features, and apply it.

    Args:
        features: float32 of shape ``(N, F)``.
        targets: Labels, float32 of shape ``(N,)``, 0 or 1.
        held_out: Mask of the images to predict, bool of shape ``(N,)``; the others are fitted.

    Returns:
        Probability of class 1 for each of the M held-out images, float32 of shape ``(M,)``.
    """
    train = features[~held_out]
    x = (features - train.mean(0)) / train.std(0).clamp_min(1e-6)
    weight = torch.zeros(x.shape[1] + 1, requires_grad=True)  # entry 0 is the bias
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")
    fitted, labels = x[~held_out], targets[~held_out]

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = fitted @ weight[1:] + weight[0]
        value = functional.binary_cross_entropy_with_logits(logits, labels)
        value = value + RIDGE_PENALTY * weight[1:].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return (x[held_out] @ weight[1:] + weight[0]).detach().sigmoid()
