from __future__ import annotations

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from horsehuman import CNNClassifier, HorseHumanError

TINY = {"image_size": 16, "channels": [4], "dropout": 0.0}


def loader(count: int = 12, batch: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.randint(0, 128, (count, 3, 16, 16), generator=generator)
    images += 127 * labels.view(-1, 1, 1, 1)
    pairs = list(zip(images.to(torch.uint8), labels.float(), strict=True))
    return DataLoader(pairs, batch_size=batch)  # type: ignore[arg-type]


def fit(model: CNNClassifier, **options: object) -> L.Trainer:
    given = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        **{**given, **options},  # type: ignore[arg-type]
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, loader(), loader())
    return trainer


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_schedules_end_where_they_should(schedule: str) -> None:
    model = CNNClassifier(**TINY, schedule=schedule, optimizer={"name": "SGD", "lr": 0.1})
    rates: list[float] = []
    model.optimizer_step = lambda epoch, batch, optimizer, closure: (  # type: ignore[method-assign]
        rates.append(optimizer.param_groups[0]["lr"]),
        optimizer.step(closure=closure),
    )
    assert fit(model).global_step == len(rates) == 6
    if schedule == "constant":
        assert rates == [0.1] * 6
    else:
        assert max(rates) == pytest.approx(0.1, rel=0.01)
        assert rates[-1] < 0.01


def test_schedule_of_a_single_step() -> None:
    fit(CNNClassifier(**TINY), max_epochs=1, limit_train_batches=1)


def test_schedule_without_end() -> None:
    with pytest.raises(HorseHumanError, match=r"one_cycle needs an end: set trainer\.max_epochs"):
        fit(CNNClassifier(**TINY), max_epochs=-1)


def test_keras_rmsprop_step() -> None:
    """One step of Keras's RMSprop: rho 0.9, epsilon 1e-7 beside the root, no momentum."""
    model = CNNClassifier(
        **TINY,
        schedule="constant",
        label_smoothing=0.0,
        optimizer={"name": "RMSprop", "lr": 1e-4, "alpha": 0.9, "eps": 1e-7},
    )
    weight = model.network.head[-1].weight
    before = weight.detach().clone()
    images, labels = next(iter(loader()))
    torch.nn.functional.binary_cross_entropy_with_logits(model.train()(images), labels).backward()
    gradient = weight.grad.clone()
    model.zero_grad()
    fit(model, max_epochs=1, limit_train_batches=1)
    expected = before - 1e-4 * gradient / ((0.1 * gradient**2).sqrt() + 1e-7)
    torch.testing.assert_close(weight.detach(), expected)


def test_weight_decay_spares_biases_and_norms() -> None:
    model = CNNClassifier(**TINY, schedule="constant")
    fit(model, max_epochs=1)
    decayed, spared = model.configure_optimizers()["optimizer"].param_groups
    assert all(p.ndim > 1 for p in decayed["params"])
    assert decayed["weight_decay"] == 0.05
    assert all(p.ndim == 1 for p in spared["params"])
    assert spared["weight_decay"] == 0
    counted = sum(p.numel() for group in (decayed, spared) for p in group["params"])
    assert counted == sum(p.numel() for p in model.parameters())


def test_arguments_that_an_optimizer_does_not_take() -> None:
    model = CNNClassifier(**TINY, optimizer={"name": "Adam", "lr": 0.1, "mass": 2})
    with pytest.raises(HorseHumanError, match=r"Adam does not take this: .*mass"):
        fit(model)


def test_logged_figures_are_those_of_the_data() -> None:
    torch.manual_seed(0)
    model = CNNClassifier(**TINY, schedule="constant", label_smoothing=0.0)
    trainer = fit(model, max_epochs=5)
    model.eval()
    images = torch.cat([images for images, _ in loader()])
    labels = torch.cat([labels for _, labels in loader()])
    with torch.no_grad():
        logits = model(images)
    right = ((logits > 0).float() == labels).float().mean()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert float(trainer.callback_metrics["val/acc"]) == pytest.approx(float(right))
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert set(trainer.callback_metrics) >= {"train/loss", "train/acc", "val/loss", "val/acc"}


def test_probabilities_are_calibrated_logits() -> None:
    model = CNNClassifier(**TINY, temperature=2.0)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    probabilities = model.network.logits(images).sigmoid()
    for probability, logit in zip(probabilities.tolist(), model(images).tolist(), strict=True):
        assert probability == pytest.approx(1 / (1 + math.exp(-logit / 2)), rel=1e-5)
    assert model.network.training is False


def test_a_loss_that_is_no_number_ends_training() -> None:
    model = CNNClassifier(**TINY, optimizer={"name": "SGD", "lr": 1e30}, schedule="constant")
    with pytest.raises(HorseHumanError, match=r"epoch [0-9]+: the loss is not finite"):
        fit(model, max_epochs=20)


def test_a_last_step_that_blows_up_is_seen_before_it_is_saved() -> None:
    model = CNNClassifier(**TINY, optimizer={"name": "SGD", "lr": 1e38}, schedule="constant")
    with pytest.raises(HorseHumanError, match="epoch 1: the loss is not finite"):
        fit(model, max_epochs=1, limit_train_batches=1, limit_val_batches=0)


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_at_the_threshold_a_picture_is_of_class_1(threshold: float) -> None:
    model = CNNClassifier(**TINY, threshold=threshold)
    with torch.no_grad():
        for parameter in model.network.head.parameters():
            parameter.zero_()
    logits = torch.tensor([math.log(threshold / (1 - threshold)), -20.0, 20.0])
    model.network.calibrate = lambda _: logits  # type: ignore[method-assign, assignment]
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    labels = torch.tensor([1.0, 0.0, 1.0])
    batches = DataLoader(
        list(zip(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), labels, strict=True)),  # type: ignore[arg-type]
        batch_size=3,
    )
    metrics = trainer.test(model, batches, verbose=False)[0]
    assert metrics["test/acc"] == 1
    assert metrics["test/margin"] == pytest.approx(0, abs=1e-6)


def test_values_of_numpy_become_plain() -> None:
    model = CNNClassifier(
        **TINY,
        class_names=np.array(["a", "b"]),  # type: ignore[arg-type]
        threshold=np.float64(0.4),
        optimizer={"name": "SGD", "lr": np.float64(0.1)},
    )
    assert model.hparams["class_names"] == ["a", "b"]
    assert {type(name) for name in model.network.class_names} == {str}
    assert type(model.hparams["threshold"]) is float
    assert type(model.hparams["optimizer"]["lr"]) is float


def test_hyper_parameters_are_plain_and_not_shared() -> None:
    first, second = CNNClassifier(**TINY), CNNClassifier(**TINY)
    for value in first.hparams.values():
        assert type(value) in (str, int, float, bool, list, dict)
    first.hparams["optimizer"]["lr"] = 9.0
    assert second.hparams["optimizer"]["lr"] == 0.002
    assert CNNClassifier(**TINY).hparams["optimizer"]["lr"] == 0.002
