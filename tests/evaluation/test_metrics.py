from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as reference

from horsehuman.decision import CALIBRATION_BINS
from horsehuman.evaluation import metrics

NAMES = {
    "accuracy": reference.binary_accuracy,
    "precision 1": reference.binary_precision,
    "recall 1": reference.binary_recall,
    "recall 0": reference.binary_specificity,
    "F1 1": reference.binary_f1_score,
    "ROC-AUC": reference.binary_auroc,
    "average precision": reference.binary_average_precision,
    "calibration error": partial(reference.binary_calibration_error, n_bins=CALIBRATION_BINS),
}


def sample(count: int = 240, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities with ties, labels, and groups of 20 similar images."""
    generator = np.random.default_rng(seed)
    groups = np.arange(count) // 20
    labels = (groups % 2).astype(np.int64)
    effect = generator.normal(0, 0.25, groups.max() + 1)[groups]
    p = 0.35 + 0.3 * labels + effect + generator.normal(0, 0.05, count)
    return p.clip(0, 1).round(2) * 0.99 + 0.003, labels, [f"g{group}" for group in groups]


def test_metrics_equal_those_of_torchmetrics() -> None:
    p, labels, _ = sample()
    values = metrics.point_metrics(p, labels, 0.5)
    for name, function in NAMES.items():
        expected = float(function(torch.tensor(p), torch.tensor(labels)))
        assert values[name] == pytest.approx(expected, abs=1e-6), name
    assert values["Brier score"] == pytest.approx(((p - labels) ** 2).mean())
    loss = torch.nn.functional.binary_cross_entropy(torch.tensor(p), torch.tensor(labels).double())
    assert values["log loss"] == pytest.approx(float(loss))
    mean_recall = (values["recall 0"] + values["recall 1"]) / 2
    assert values["balanced accuracy"] == pytest.approx(mean_recall)


def test_similar_images_widen_the_interval_by_group() -> None:
    p, labels, groups = sample()
    estimates = metrics.bootstrap_metrics(p, labels, groups, 0.5, draws=1000)
    for name, estimate in estimates.items():
        for low, high in (estimate["by group"], estimate["by picture"]):
            assert low <= high
        low, high = estimate["by picture"]
        assert name == "calibration error" or low <= estimate["value"] <= high
    width = [np.ptp(estimates["accuracy"][name]) for name in ("by group", "by picture")]
    assert width[0] > 1.5 * width[1]
    again = metrics.bootstrap_metrics(p, labels, groups, 0.5, draws=1000)
    assert again == estimates
    assert metrics.bootstrap_metrics(p, labels, groups, 0.5, draws=1001) != estimates


@pytest.mark.slow
def test_intervals_by_group_have_about_their_nominal_coverage() -> None:
    hits, hits_of_half_width = [], []
    samples = [sample(4000, seed)[:2] for seed in range(50)]
    truth = np.mean([metrics.point_metrics(*s, 0.5)["accuracy"] for s in samples])
    for seed in range(100, 180):
        p, labels, groups = sample(1200, seed)  # 60 groups
        estimates = metrics.bootstrap_metrics(p, labels, groups, 0.5, draws=400)
        low, high = estimates["accuracy"]["by group"]
        hits.append(low <= truth <= high)
        hits_of_half_width.append(abs(truth - (low + high) / 2) <= (high - low) / 4)
    assert np.mean(hits) >= 0.86
    assert np.mean(hits_of_half_width) < 0.86


def test_undefined_metrics_are_nan() -> None:
    p = np.array([0.2, 0.9, 0.7])
    estimates = metrics.bootstrap_metrics(p, np.array([1, 1, 1]), ["a", "a", "b"], 0.5, draws=50)
    for name in ("ROC-AUC", "average precision", "recall 0", "balanced accuracy"):
        assert estimates[name]["value"] is None, name
        assert estimates[name]["by group"] == estimates[name]["by picture"] == [None, None], name
    assert estimates["accuracy"]["value"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("one_per_class", [False, True])
def test_a_single_group_has_no_interval(one_per_class: bool) -> None:
    p, labels, _ = sample()
    groups = [f"g{label}" if one_per_class else "one" for label in labels]
    for estimate in (
        metrics.bootstrap_metrics(p, labels, groups, 0.5, draws=50)["accuracy"],
        metrics.bootstrap_mean(p, labels, groups, draws=50),
    ):
        assert estimate["by group"] == [None, None]
        assert None not in estimate["by picture"]


@pytest.mark.parametrize("mixed", [1, 2])
def test_groups_with_both_classes_have_intervals(mixed: int) -> None:
    p, labels, groups = sample(1200)
    unmixed = metrics.bootstrap_metrics(p, labels, groups, 0.5, draws=500)["accuracy"]
    for number in range(mixed):
        members = np.array(groups) == groups[20 * number]
        labels[np.flatnonzero(members)[0]] ^= 1
    estimates = metrics.bootstrap_metrics(p, labels, groups, 0.5, draws=500)
    low, high = estimates["accuracy"]["by group"]
    assert [low, high] == pytest.approx(unmixed["by group"], abs=0.05)
    assert None not in estimates["recall 0"]["by group"]


def test_the_only_group_of_a_class_has_no_interval_even_if_it_contains_both() -> None:
    p, labels, groups = sample()
    labels[:] = 1
    labels[0] = 0
    estimates = metrics.bootstrap_metrics(p, labels, groups, 0.5, draws=50)
    assert estimates["accuracy"]["by group"] == [None, None]


def test_clopper_pearson_interval() -> None:
    """For n of n, the lower bound is 0.025 ** (1 / n)."""
    low, high = metrics.clopper_pearson_interval(11, 11)
    assert low == pytest.approx(0.025 ** (1 / 11))
    assert high == 1


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # p.adjust(..., "holm") of R
        ([0.04, 0.01], [0.04, 0.02]),
        ([0.5, 0.4, 0.9], [1.0, 1.0, 1.0]),
        ([0.02, 0.02, 0.001], [0.04, 0.04, 0.003]),
        ([0.2], [0.2]),
    ],
)
def test_holm_correction(p_values: list[float], corrected: list[float]) -> None:
    assert metrics.holm_correction(p_values) == pytest.approx(corrected)


def test_a_mean_leaves_out_undefined_values() -> None:
    p, labels, groups = sample()
    values = np.where(labels == 1, p, np.nan)
    kept = labels == 1
    expected = metrics.bootstrap_mean(p[kept], labels[kept], list(np.array(groups)[kept]), draws=50)
    assert metrics.bootstrap_mean(values, labels, groups, draws=50) == expected
    nothing = metrics.bootstrap_mean(np.full(len(p), np.nan), labels, groups, draws=50)
    assert nothing == {"value": None, "by group": [None, None], "by picture": [None, None]}
