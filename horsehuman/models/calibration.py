"""Fit temperature and thresholds to predictions for groups that the model was not fitted to.

Images of one group resemble each other. Values that are fitted to predictions for the model's own
training groups would therefore be too optimistic about new images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.classification import binary_auroc

from horsehuman.data.records import group_folds, min_groups_per_class
from horsehuman.decision import Floats, Ints

#: Target error rate among the predictions that are not unsure.
ERROR_RATE = 0.01

#: Lower and upper bound of the temperature.
TEMPERATURE_BOUNDS = (0.25, 4.0)

#: Number of folds of cross-validation.
FOLDS = 5

#: Share of known images that the threshold of *neither* keeps in cross-validation, groups weighing
#: the same.
KNOWN_KEPT = 0.98

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


class NeitherProbe(NamedTuple):
    """A linear output for *neither*, and its rates on held-out images.

    Attributes:
        weight: float32 ``(F,)``.
        bias: float32 scalar. The logit of features ``x`` is ``weight @ x + bias``; from 0 on an
            image is of neither class.
        kept: Share of known images with a logit below 0; all groups weigh the same.
        refused: Share of outliers with a logit of at least 0.
        auroc: Area under the ROC curve of outliers against known images.
    """

    weight: Tensor
    bias: Tensor
    kept: float
    refused: float
    auroc: float


def fit_neither(
    features: Tensor, labels: Ints, groups: Sequence[str], outliers: Tensor
) -> NeitherProbe | None:
    """Fit a linear probe of outliers against the images of both classes.

    The bias is set so that :data:`KNOWN_KEPT` of the known images are kept in cross-validation, in
    which no group and no outlier is in two folds.

    Args:
        features: Features of known images, float32 ``(N, F)``.
        labels: Their labels, 0 or 1, ``(N,)``.
        groups: Their groups.
        outliers: Features of images that are of neither class, float32 ``(M, F)``.

    Returns:
        The probe, fitted to all images; ``None`` if a class has a single group.
    """
    folds = min(FOLDS, min_groups_per_class(labels, groups))
    if folds < 2:
        return None
    count = len(outliers)
    known_folds = group_folds(labels, groups, folds)
    outlier_folds = np.random.default_rng(0).permutation(count) % folds
    fold_index = torch.from_numpy(np.concatenate([known_folds, outlier_folds]))
    x = torch.cat([features, outliers])
    targets = torch.cat([torch.zeros(len(features)), torch.ones(count)])
    logits = torch.zeros(len(x))
    for fold in range(folds):
        weight, bias = fit_probe(x[fold_index != fold], targets[fold_index != fold], balanced=True)
        logits[fold_index == fold] = x[fold_index == fold] @ weight + bias
    known, others = np.split(logits.double().numpy(), [len(features)])
    highest_kept = known_quantile(known, groups)
    threshold = float(np.nextafter(np.float32(highest_kept), np.float32("inf")))
    weight, bias = fit_probe(x, targets, balanced=True)
    kept, refused = group_weights(groups)[known < threshold].sum(), (others >= threshold).mean()
    auroc = binary_auroc(logits, targets.int())
    return NeitherProbe(weight, bias - threshold, float(kept), float(refused), float(auroc))


def known_quantile(scores: Floats, groups: Sequence[str]) -> float:
    """Return the :data:`KNOWN_KEPT` quantile of the scores of known images, groups weighing alike.

    Args:
        scores: ``(N,)``; a higher score means *neither*.
        groups: Group of each image.
    """
    order = np.argsort(scores)
    position = np.searchsorted(group_weights(groups)[order].cumsum(), KNOWN_KEPT)
    return float(scores[order[position]])


def cross_validated_probabilities(
    features: Tensor, labels: Ints, groups: Sequence[str], folds: int = FOLDS
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
    fold_index = torch.from_numpy(group_folds(labels, groups, folds))
    for fold in range(folds):
        held_out = fold_index == fold
        weight, bias = fit_probe(features[~held_out], targets[~held_out])
        probabilities[held_out] = (features[held_out] @ weight + bias).sigmoid()
    return probabilities.double().numpy()


def fit_probe(
    features: Tensor, targets: Tensor, *, balanced: bool = False
) -> tuple[Tensor, Tensor]:
    """Fit ridge-penalised logistic regression to standardised features.

    Args:
        features: float32 of shape ``(N, F)``.
        targets: float32 of shape ``(N,)``, 0 or 1.
        balanced: Whether both classes weigh the same; otherwise all images do.

    Returns:
        Weight ``(F,)`` and bias, a scalar, of the logit of features that are not standardised.
    """
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / deviation
    positive = targets.mean() if balanced else 0.5
    weights = torch.where(targets == 1, 0.5 / positive, 0.5 / (1 - positive))
    parameters = torch.zeros(x.shape[1] + 1, requires_grad=True)  # entry 0 is the bias
    optimizer = torch.optim.LBFGS([parameters], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = x @ parameters[1:] + parameters[0]
        value = functional.binary_cross_entropy_with_logits(logits, targets, weights)
        value = value + RIDGE_PENALTY * parameters[1:].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    weight = parameters.detach()[1:] / deviation
    return weight, parameters.detach()[0] - weight @ mean
