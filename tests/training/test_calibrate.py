from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from horsehuman import HorseHumanError, load_classifier
from horsehuman.data.records import SUBJECT_PATTERN
from horsehuman.inference.predict import predict
from horsehuman.models.checkpoint import read_checkpoint
from horsehuman.training import calibrate
from horsehuman.training.config import compose
from horsehuman.training.run import train
from tests import commands


@pytest.mark.slow
def test_a_run_is_calibrated_and_stays_loadable(tree: Path, tmp_path: Path) -> None:
    overrides = ["model.image_size=96", "model.scales=[80]", "trainer.max_epochs=3"]
    overrides += ["data=folder", f"data.root={tree}", f'data.group_pattern="{SUBJECT_PATTERN}"']
    config = compose(*overrides)
    run = tmp_path / "run"
    train(config, run)
    before = load_classifier(run)
    with pytest.raises(HorseHumanError, match=r"4 groups of horses .* are fewer than 5"):
        calibrate.calibrate(run)
    calibrate.FOLDS, folds = 2, calibrate.FOLDS
    try:
        assert commands.run("calibrate", str(run))[0] == 0
    finally:
        calibrate.FOLDS = folds
    after = load_classifier(run)
    assert torch.equal(before.head[-1].weight, after.head[-1].weight)
    paths = sorted((tree / "train").rglob("*.webp"))
    assert all(p.status in ("ok", "unsure") for p in predict(after, paths))
    origin = read_checkpoint(run / "checkpoints" / "final.ckpt")["horsehuman"]
    assert origin["calibration"]["temperature"] == after.settings["temperature"]


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
    monkeypatch.setattr(calibrate, "FOLDS", 2)
    report = calibrate.calibrate(run)
    assert (report["pictures"], report["groups"]) == (12, 4)
    temperature = load_classifier(run).settings["temperature"]
    assert temperature == report["temperature"] == calibrate.calibrate(run)["temperature"]


def test_wrong_options_of_a_run_are_refused() -> None:
    config = OmegaConf.create(OmegaConf.to_container(compose("model=cnn")) | {"ema": 5})
    with pytest.raises(HorseHumanError, match="ema=5 does not work"):
        calibrate.cross_validated_logits(config)
