"""Runs that fine-tune the last blocks of the backbone after the head."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch

from horsehuman import HorseHumanError, load_classifier
from horsehuman.data import datamodule
from horsehuman.data.image_sets import read_run_images
from horsehuman.evaluation.evaluate import predict_labelled
from horsehuman.evaluation.metrics import log_losses
from horsehuman.models.inception import Inception
from horsehuman.training import module
from horsehuman.training.config import compose
from horsehuman.training.run import train
from tests.conftest import small_data
from tests.training.test_resume import (
    INCEPTION,
    check_alike,
    check_same_checkpoints,
    printed_by,
    start,
)


def fine_tuned(tree: Path, folder: Path, *overrides: str) -> dict[str, float]:
    """Train a head for two epochs, fine-tune a block, and return the metrics."""
    options = [*INCEPTION, *small_data(tree), "model.finetune=1", "test=false", *overrides]
    return train(compose(*options), folder)


def changed_layers(run: Path) -> set[str]:
    """Return the layers of a run's backbone that differ from the bundled one."""
    tuned = load_classifier(run).state_dict()
    bundled = Inception(image_size=96, scales=[80]).backbone.state_dict()
    return {
        name.split(".")[1]
        for name, tensor in bundled.items()
        if not torch.equal(tensor, tuned[f"backbone.{name}"])
    }


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_better_model_is_kept(
    blocks: int, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEAD_LR", 10)  # the head has hardly been trained before
    few = ["model.optimizer.lr=0.0003", f"model.finetune={blocks}"]
    metrics = fine_tuned(tree, tmp_path / "run", *few)
    assert metrics["finetune/kept"] == 1
    assert metrics["finetune/after_loss"] < metrics["finetune/before_loss"]
    assert metrics["val/loss"] == metrics["finetune/after_loss"]
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert changed_layers(tmp_path / "run") == set(["Mixed_6e", "Mixed_6d"][:blocks])
    held_out = read_run_images(tmp_path / "run").split("validation")
    predicted = predict_labelled(load_classifier(tmp_path / "run"), held_out)
    losses = log_losses(predicted.probabilities, predicted.labels)
    assert math.isclose(losses.mean(), metrics["val/loss"], rel_tol=1e-3)


@pytest.mark.slow
def test_a_worse_model_is_discarded(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEAD_LR", 1000)
    metrics = fine_tuned(tree, tmp_path / "run")
    assert metrics["finetune/kept"] == 0
    assert metrics["val/loss"] == metrics["finetune/before_loss"]
    assert not changed_layers(tmp_path / "run")


@pytest.mark.slow
def test_maps_that_do_not_fit_into_memory_are_computed_anew(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = fine_tuned(tree, tmp_path / "kept")
    monkeypatch.setattr(datamodule, "MAPS_MEMORY", 0)
    computed = fine_tuned(tree, tmp_path / "computed")
    assert "computed anew in each epoch" in caplog.text
    assert math.isclose(kept["finetune/after_loss"], computed["finetune/after_loss"], rel_tol=0.01)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_is_fine_tuned_is_resumed_to_the_bit(
    tree: Path, tmp_path: Path
) -> None:
    options = [*INCEPTION, *small_data(tree), "model.finetune=1", "ema=0.9", "test=false"]
    uninterrupted = start(tmp_path, *options, "hydra.run.dir=uninterrupted")
    text = printed_by(uninterrupted)
    assert uninterrupted.returncode == 0, text
    process = start(tmp_path, *options, "hydra.run.dir=run")
    last = tmp_path / "run" / "finetune" / "checkpoints" / "last.ckpt"
    while not last.is_file() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert "epoch   1/10" in printed_by(process)
    resumed = start(tmp_path, "resume=run")
    text = printed_by(resumed)
    assert resumed.returncode == 0, text
    check_alike(tmp_path / "uninterrupted", tmp_path / "run")
    check_same_checkpoints(*(tmp_path / name / "finetune" for name in ("uninterrupted", "run")))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["model.finetune=3"], "model.finetune=3"),
        (["model.finetune=1", "model.cache_features=false"], "cache_features=true"),
        (["model.finetune=1", "model.weights=random"], "pretrained weights"),
        (["model.finetune=1", "data.val_fraction=0"], "needs data.validation=held_out"),
        (["model.finetune=1", "data.validation=test"], "needs data.validation=held_out"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(
    options: list[str], text: str, tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(HorseHumanError, match=text):
        train(compose(*INCEPTION, *small_data(tree), *options), tmp_path / "run")
