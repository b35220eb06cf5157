"""What a linear classifier of some groups says of the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from horsehuman.data.splits import fewest_groups, parts_by_group
from horsehuman.metrics import Floats


def out_of_group(
    features: Tensor, own: NDArray[np.int64], groups: Sequence[str], folds: int = 5
) -> Floats | None:
    """Probability of class 1 for each picture by a linear classifier of other groups, ``(N,)``.

    ``None`` where a class has fewer groups than there are folds.
    """
    if fewest_groups(own, groups) < folds:
        return None
    part = parts_by_group(own, groups, folds)
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
