from __future__ import annotations

import shutil
from pathlib import Path

import calibrate as script
import numpy as np
import pytest
import torch
from hydra_config import compose
from omegaconf import OmegaConf

from horsehuman import HorseHumanError, InceptionClassifier, load_classifier, read_picture
from horsehuman.data.records import SUBJECT_PATTERN
from horsehuman.inference.predict import predict
from horsehuman.models.calibration import (
    SLACK,
    fit_confidence_threshold,
    fit_neither_threshold,
    fit_temperature,
    group_weights,
)
from horsehuman.models.inception import Inception, class_mean_distance, class_means
from horsehuman.training.run import train


def answers(scale: float, count: int = 4000) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Logits that are ``scale`` times what they should be, labels, groups of unequal size."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, count)
    labels = (generator.random(count) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    groups = [f"g{int(k)}" for k in 200 * generator.random(count) ** 2]
    return scale * logits, labels, groups


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_temperature_undoes_what_scaled_the_logits(scale: float) -> None:
    assert fit_temperature(*answers(scale)) == pytest.approx(scale, rel=0.15)


def test_without_an_error_the_temperature_stays() -> None:
    assert fit_temperature(np.array([-3.0, 0.1]), np.array([0, 1]), ["a", "b"]) == 1


def test_groups_weigh_the_same() -> None:
    weights = group_weights(["a", "b", "b", "b"])
    assert weights.tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])


def test_certain_answers_are_as_often_wrong_as_is_aimed_at() -> None:
    logits, labels, groups = answers(1.0)
    for rate in (0.01, 0.05):
        least = fit_confidence_threshold(logits, labels, groups, rate)
        sure = 1 / (1 + np.exp(-np.abs(logits))) >= least
        wrong = (logits >= 0) != (labels == 1)
        weights = group_weights(groups)
        assert (weights * wrong)[sure].sum() / weights[sure].sum() <= rate + 1e-3
        assert 0.5 < least < 0.999
    perfect = fit_confidence_threshold(np.array([-3.0, 0.4]), np.array([0, 1]), ["a", "b"])
    assert perfect == pytest.approx(1 / (1 + np.exp(-0.4)), abs=1e-3)  # less was never seen
    assert fit_confidence_threshold(np.array([-3.0, 2.0]), np.array([1, 0]), ["a", "b"]) == 0.999


def test_reach_holds_what_is_alike_and_not_what_is_strange() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    centres = torch.rand(2, 64, generator=generator) ** 4
    features = centres[labels] * (1 + 0.2 * torch.rand(400, 64, generator=generator))
    groups = [f"g{index // 20}-{index % 2}" for index in range(400)]
    means, reach = fit_neither_threshold(features, labels, groups)
    torch.testing.assert_close(means, class_means(features, labels))
    found = class_mean_distance(features, means)
    assert float((found < reach).float().mean()) > 0.99
    assert float(found.quantile(0.95)) * SLACK == pytest.approx(reach, rel=0.1)
    strange = class_mean_distance(torch.rand(50, 64, generator=generator) ** 4, means)
    assert bool((strange > reach).all())


@pytest.mark.slow
def test_a_run_is_calibrated_and_stays_loadable(tree: Path, tmp_path: Path) -> None:
    overrides = ["model.image_size=96", "model.scales=[80]", "trainer.max_epochs=3"]
    overrides += ["data=folder", f"data.root={tree}", f'data.group_pattern="{SUBJECT_PATTERN}"']
    config = compose(*overrides)
    run = tmp_path / "run"
    train(config, run)
    before = load_classifier(run)
    with pytest.raises(HorseHumanError, match=r"4 groups of horses .* are fewer than 5"):
        script.calibrate(run, config)
    script.FOLDS, folds = 2, script.FOLDS
    try:
        assert script.main([str(run)]) == 0
    finally:
        script.FOLDS = folds
    after = load_classifier(run)
    assert torch.equal(before.head[-1].weight, after.head[-1].weight)
    assert after.settings["far_from"] > 0
    paths = sorted((tree / "train").rglob("*.webp"))
    assert all(p.status in ("ok", "unsure") for p in predict(after, paths))
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
    (strange,) = after.answer([after.read(noise)])
    known = after.answer([after.read(read_picture(path)) for path in paths])
    assert strange.neither_score > max(answer.neither_score for answer in known) > 0
    model = InceptionClassifier.load_from_checkpoint(run / "checkpoints" / "final.ckpt")
    assert torch.equal(model.network.class_means, after.class_means)
    assert OmegaConf.load(run / "config.yaml").model.get("far_from") is None


def test_a_validation_folder_is_what_a_run_is_calibrated_on(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(tree, tmp_path / "set")
    for path in sorted((root / "train").rglob("*0[34]-*")):
        target = root / "validation" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    overrides = ["model=cnn", "model.image_size=32", "model.channels=[4]", "trainer.max_epochs=1"]
    overrides += ["data=folder", f"data.root={root}", f'data.group_pattern="{SUBJECT_PATTERN}"']
    config = compose(*overrides)
    run = tmp_path / "run"
    train(config, run)
    monkeypatch.setattr(script, "FOLDS", 2)
    found = script.calibrate(run, config)
    assert (found["pictures"], found["groups"]) == (12, 4)
    temperature = load_classifier(run).settings["temperature"]
    assert temperature == found["temperature"] == script.calibrate(run, config)["temperature"]


def test_a_network_that_cannot_tell_calls_nothing_strange() -> None:
    network = Inception(scales=[75], weights="random", image_size=80)
    assert network.neither_score(torch.rand(3, 768)).tolist() == [0, 0, 0]


def test_inception_in_the_box_knows_what_is_neither(tree: Path) -> None:
    strange = [
        np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8),
        np.full((100, 100, 3), 255, np.uint8),
    ]
    classifier = load_classifier("inception")
    assert [answer.status for answer in predict(classifier, strange)] == ["neither"] * 2
    paths = sorted((tree / "train").rglob("*.webp"))[::3]
    assert all(p.status == "ok" for p in predict(classifier, paths))
