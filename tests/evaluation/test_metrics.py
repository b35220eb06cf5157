from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as reference

from horsehuman.evaluation import metrics

NAMES = {
    "accuracy": reference.binary_accuracy,
    "precision 1": reference.binary_precision,
    "recall 1": reference.binary_recall,
    "recall 0": reference.binary_specificity,
    "F1 1": reference.binary_f1_score,
    "ROC-AUC": reference.binary_auroc,
    "average precision": reference.binary_average_precision,
    "calibration error": partial(
        reference.binary_calibration_error, n_bins=metrics.CALIBRATION_BINS
    ),
}


def some(count: int = 240, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities with ties, labels, groups of 20 whose pictures are much alike."""
    generator = np.random.default_rng(seed)
    groups = np.arange(count) // 20
    labels = (groups % 2).astype(np.int64)
    of_group = generator.normal(0, 0.25, groups.max() + 1)[groups]
    p = 0.35 + 0.3 * labels + of_group + generator.normal(0, 0.05, count)
    return p.clip(0, 1).round(2) * 0.99 + 0.003, labels, [f"g{group}" for group in groups]


def test_figures_are_those_of_torchmetrics() -> None:
    p, labels, _ = some()
    found = metrics.point_metrics(p, labels, 0.5)
    for name, function in NAMES.items():
        expected = float(function(torch.tensor(p), torch.tensor(labels)))
        assert found[name] == pytest.approx(expected, abs=1e-6), name
    assert found["Brier score"] == pytest.approx(((p - labels) ** 2).mean())
    loss = torch.nn.functional.binary_cross_entropy(torch.tensor(p), torch.tensor(labels).double())
    assert found["log loss"] == pytest.approx(float(loss))
    assert found["balanced accuracy"] == pytest.approx((found["recall 0"] + found["recall 1"]) / 2)


def test_alike_pictures_make_the_interval_by_group_wider() -> None:
    p, labels, groups = some()
    found = metrics.estimate(p, labels, groups, 0.5, draws=1000)
    for name, estimate in found.items():
        for low, high in (estimate.by_group, estimate.by_picture):
            assert low <= high
        assert name == "calibration error" or (
            estimate.by_picture[0] <= estimate.value <= estimate.by_picture[1]
        )
    width = [np.ptp(found["accuracy"].by_group), np.ptp(found["accuracy"].by_picture)]
    assert width[0] > 1.5 * width[1]
    again = metrics.estimate(p, labels, groups, 0.5, draws=1000)
    assert again == found
    assert metrics.estimate(p, labels, groups, 0.5, draws=1000, seed=1) != found


def test_intervals_by_group_hold_the_truth_about_as_often_as_they_say() -> None:
    hits, of_half_the_width = [], []
    truth = np.mean([metrics.point_metrics(*some(4000, s)[:2], 0.5)["accuracy"] for s in range(50)])
    for seed in range(100, 180):
        p, labels, groups = some(1200, seed)  # 60 groups
        low, high = metrics.estimate(p, labels, groups, 0.5, draws=400)["accuracy"].by_group
        hits.append(low <= truth <= high)
        of_half_the_width.append(abs(truth - (low + high) / 2) <= (high - low) / 4)
    assert np.mean(hits) >= 0.86
    assert np.mean(of_half_the_width) < 0.86


def test_what_is_not_defined_is_said_to_be_so() -> None:
    p = np.array([0.2, 0.9, 0.7])
    found = metrics.estimate(p, np.array([1, 1, 1]), ["a", "a", "b"], 0.5, draws=50)
    for name in ("ROC-AUC", "average precision", "recall 0", "balanced accuracy"):
        assert math.isnan(found[name].value), name
        assert all(math.isnan(bound) for bound in found[name].by_group), name
    assert found["accuracy"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize("one_a_class", [False, True])
def test_one_group_alone_has_no_interval(one_a_class: bool) -> None:
    p, labels, _ = some()
    groups = [f"g{label}" if one_a_class else "one" for label in labels]
    for found in (
        metrics.estimate(p, labels, groups, 0.5, draws=50)["accuracy"],
        metrics.bootstrap_mean(p, labels, groups, draws=50),
    ):
        assert all(math.isnan(bound) for bound in found.by_group)
        assert all(math.isfinite(bound) for bound in found.by_picture)


@pytest.mark.parametrize("mixed", [1, 2])
def test_groups_with_both_classes_have_intervals(mixed: int) -> None:
    p, labels, groups = some(1200)
    plain = metrics.estimate(p, labels, groups, 0.5, draws=500)["accuracy"].by_group
    for number in range(mixed):
        of = np.array(groups) == groups[20 * number]
        labels[np.flatnonzero(of)[0]] ^= 1
    found = metrics.estimate(p, labels, groups, 0.5, draws=500)
    low, high = found["accuracy"].by_group
    assert (low, high) == pytest.approx(plain, abs=0.05)
    assert np.isfinite(found["recall 0"].by_group).all()


def test_the_only_group_of_a_class_has_no_interval_though_it_shows_the_other_too() -> None:
    p, labels, groups = some()
    labels[:] = 1
    labels[0] = 0
    found = metrics.estimate(p, labels, groups, 0.5, draws=50)
    assert not np.isfinite(found["accuracy"].by_group).any()


def test_share_of_groups() -> None:
    """Clopper and Pearson: the lower bound of n of n is (0.025) ** (1 / n)."""
    low, high = metrics.clopper_pearson_interval(11, 11)
    assert low == pytest.approx(0.025 ** (1 / 11))
    assert high == 1
