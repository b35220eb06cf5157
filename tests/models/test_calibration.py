from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from horsehuman import load_classifier
from horsehuman.decision import Scores, decide
from horsehuman.inference.predict import predict
from horsehuman.models.calibration import (
    fit_confidence_threshold,
    fit_neither,
    fit_temperature,
    group_weights,
    scale_logits,
)
from horsehuman.models.cnn import CNN
from horsehuman.models.inception import Inception


def answers(scale: float, count: int = 4000) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Logits that are ``scale`` times what they should be, labels, groups of unequal size."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, count)
    labels = (generator.random(count) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    groups = [f"g{int(k)}" for k in 200 * generator.random(count) ** 2]
    return scale * logits, labels, groups


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_temperature_undoes_what_scaled_the_logits(scale: float) -> None:
    assert fit_temperature(*answers(scale), threshold=0.5) == pytest.approx(scale, rel=0.15)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_calibration_changes_no_class_and_is_applied_as_it_is_fitted(threshold: float) -> None:
    """For any threshold: no prediction flips, and *unsure* is measured as it is applied."""
    logits, labels, groups = answers(3.0)
    boundary = np.log(threshold / (1 - threshold))
    temperature = fit_temperature(logits, labels, groups, threshold)
    assert temperature > 1.5
    network = CNN(image_size=16, channels=[4], threshold=threshold, temperature=temperature)
    calibrated = network.calibrate(torch.from_numpy(logits)).numpy()
    assert ((calibrated >= boundary) == (logits >= boundary)).all()
    np.testing.assert_allclose(calibrated, scale_logits(logits, temperature, threshold))
    confidence = fit_confidence_threshold(calibrated, labels, groups, threshold, rate=0.05)
    network.settings["confidence_threshold"] = confidence
    predictions = [
        decide(network, "", Scores(logit, 1 / (1 + np.exp(-logit)))) for logit in calibrated
    ]
    certain = np.array([prediction.status == "ok" for prediction in predictions])
    wrong = (calibrated >= boundary) != (labels == 1)
    weights = group_weights(groups)
    # The threshold is rounded down, so that a few more are certain than were counted.
    assert 0 < (weights * wrong)[certain].sum() / weights[certain].sum() <= 0.05 + 3e-3
    probabilities = np.array([prediction.probability for prediction in predictions])
    reached = [
        least
        for least in probabilities[~wrong]
        if (weights * wrong)[probabilities >= least].sum()
        <= 0.05 * weights[probabilities >= least].sum()
    ]
    assert confidence == np.floor(min(reached) * 1e4) / 1e4


def test_without_an_error_the_temperature_is_1() -> None:
    assert fit_temperature(np.array([-3.0, 0.1]), np.array([0, 1]), ["a", "b"], 0.5) == 1


def test_groups_weigh_the_same() -> None:
    weights = group_weights(["a", "b", "b", "b"])
    assert weights.tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])


def test_certain_answers_are_as_often_wrong_as_is_aimed_at() -> None:
    logits, labels, groups = answers(1.0)
    for rate in (0.01, 0.05):
        least = fit_confidence_threshold(logits, labels, groups, 0.5, rate)
        sure = 1 / (1 + np.exp(-np.abs(logits))) >= least
        wrong = (logits >= 0) != (labels == 1)
        weights = group_weights(groups)
        assert (weights * wrong)[sure].sum() / weights[sure].sum() <= rate + 1e-3
        assert 0.5 < least < 0.999
    perfect = fit_confidence_threshold(np.array([-3.0, 0.4]), np.array([0, 1]), ["a", "b"], 0.5)
    assert perfect == pytest.approx(1 / (1 + np.exp(-0.4)), abs=1e-3)  # less was never seen
    assert (
        fit_confidence_threshold(np.array([-3.0, 2.0]), np.array([1, 0]), ["a", "b"], 0.5) == 0.999
    )


def test_neither_keeps_known_and_refuses_other_features() -> None:
    """The rates are those of pictures that the probe was not fitted to."""
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(1200) % 2
    centres = torch.rand(3, 16, generator=generator)
    known = centres[labels] + 0.3 * torch.randn(1200, 16, generator=generator)
    others = centres[2] + 0.3 * torch.randn(1000, 16, generator=generator)
    groups = [f"g{index // 10}-{index % 2}" for index in range(1200)]
    probe = fit_neither(known[:400], labels[:400], groups[:400], others[:300])
    assert probe is not None
    assert probe.kept == pytest.approx(0.98, abs=0.005)
    new = torch.cat([known[400:], others[300:]]) @ probe.weight + probe.bias
    assert float((new[:800] < 0).float().mean()) == pytest.approx(probe.kept, abs=0.03)
    assert float((new[800:] >= 0).float().mean()) == pytest.approx(probe.refused, abs=0.05)
    assert 0.9 < probe.auroc < 1


def test_neither_needs_two_groups_in_each_class() -> None:
    features, groups = torch.rand(40, 4), ["a" if index % 2 else str(index) for index in range(40)]
    assert fit_neither(features, np.arange(40) % 2, groups, torch.rand(20, 4)) is None


def test_without_outputs_for_them_an_image_is_never_neither_or_both() -> None:
    network = Inception(scales=[75], weights="random", image_size=80)
    (scores,) = network.score([torch.zeros(3, 80, 80, dtype=torch.uint8)])
    assert scores.neither_score == scores.both_score == -1


def test_bundled_inception_says_neither_and_both(tree: Path) -> None:
    others = [
        np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8),
        np.full((100, 100, 3), 255, np.uint8),
    ]
    classifier = load_classifier("inception")
    assert [answer.status for answer in predict(classifier, others)] == ["neither"] * 2
    paths = sorted((tree / "train").rglob("*.webp"))[::3]
    assert all(p.status == "ok" for p in predict(classifier, paths))
    halves = [np.asarray(Image.open(p).resize((150, 300))) for p in (paths[0], paths[-1])]
    (answer,) = predict(classifier, np.concatenate(halves, axis=1))
    assert (answer.status, answer.class_name) == ("both", "")
    assert 0.5 <= answer.probability <= 1
