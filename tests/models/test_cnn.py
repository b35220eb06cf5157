from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from horsehuman import CNNClassifier, HorseHumanError
from horsehuman.models.cnn import CNN
from horsehuman.training.build import build
from horsehuman.training.config import compose

NOTEBOOK: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
    compose("experiment=notebook_cnn").model
)
for name in ("_target_", "optimizer", "schedule", "label_smoothing"):
    del NOTEBOOK[name]


def test_the_network_of_the_book_has_its_parameters() -> None:
    model = build("model", compose("experiment=book_cnn"))
    assert sum(p.numel() for p in model.parameters()) == 10_641_441


def test_notebook_network_has_its_layers_and_parameters() -> None:
    model = CNN(**NOTEBOOK)
    assert sum(p.numel() for p in model.parameters()) == 8_863_041
    kinds = [type(layer).__name__ for layer in [*model.features, *model.head]]
    assert kinds == [
        *["Conv2d", "MaxPool2d", "ReLU"] * 4,  # The notebook's order is equivalent, see below.
        "Dropout",
        *["Linear", "ReLU"] * 2,
        "Linear",
    ]
    assert model.pool(model.features(torch.zeros(1, 3, 300, 300))).shape == (1, 65_536)
    image = torch.full((1, 3, 300, 300), 51, dtype=torch.uint8)
    torch.testing.assert_close(model.normalize(image), torch.full((1, 3, 300, 300), 0.2))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_pooling_before_relu_changes_no_bit(batch_norm: bool) -> None:
    torch.manual_seed(0)
    pool_first = CNN(image_size=64, channels=[8, 8], batch_norm=batch_norm, dropout=0)
    relu_first = copy.deepcopy(pool_first)
    for index, layer in enumerate(pool_first.features):
        if isinstance(layer, nn.MaxPool2d):
            relu_first.features[index] = nn.ReLU()
            relu_first.features[index + 1] = nn.MaxPool2d(2)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    logits = []
    for network in (pool_first, relu_first):
        logits.append(network(images))
        logits[-1].square().sum().backward()
    assert torch.equal(*logits)
    for first, second in zip(pool_first.parameters(), relu_first.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad)


def test_keras_initialisation() -> None:
    torch.manual_seed(0)
    for layer in CNN(**NOTEBOOK).modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            receptive = layer.weight[0, 0].numel() if layer.weight.ndim == 4 else 1
            fans = (layer.weight.shape[0] + layer.weight.shape[1]) * receptive
            bound = (6 / fans) ** 0.5
            assert layer.weight.abs().max() <= bound
            assert layer.weight.abs().max() > 0.95 * bound
            assert layer.bias.abs().max() == 0


def test_default_network_is_small() -> None:
    model = CNN()
    assert sum(p.numel() for p in model.parameters()) == 421_993
    assert model(torch.zeros(5, 3, 90, 40, dtype=torch.uint8)).shape == (5,)


@pytest.mark.parametrize(
    ("pool", "features"), [("avg", 8), ("max", 8), ("avgmax", 16), ("flatten", 8 * 16)]
)
def test_pools(pool: str, features: int) -> None:
    model = CNN(image_size=32, channels=[4, 8], pool=pool, convolutions=2)
    assert model.head[-1].in_features == features
    assert model.eval()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1,)


@pytest.mark.parametrize("padding", [True, False])
def test_the_head_fits_the_maps_of_every_size(padding: bool) -> None:
    """The size of the maps is computed without a forward pass."""
    fitting = 0
    for size, kernel, stride, convolutions in itertools.product(
        (17, 24, 31), (1, 4, 5, 7), (1, 2, 3), (1, 2)
    ):
        options: dict[str, Any] = {
            "channels": [2, 3],
            "convolutions": convolutions,
            "stem_kernel": kernel,
            "stem_stride": stride,
            "padding": padding,
            "pool": "flatten",
        }
        try:
            maps = CNN(image_size=200, **options).features(torch.zeros(2, 3, size, size))
        except RuntimeError:
            with pytest.raises(HorseHumanError, match="is too small"):
                CNN(image_size=size, **options)
        else:
            head = CNN(image_size=size, **options).head
            assert head[-1].in_features == maps[0].numel()
            fitting += 1
    assert fitting == 72 if padding else 0 < fitting < 72


def test_prediction_does_not_depend_on_which_way_the_subject_faces() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for mirror in (True, False):
        model = CNN(image_size=32, channels=[4], mirror=mirror, dropout=0.0).eval()
        same = torch.allclose(model(images), model(images.flip(3)), atol=1e-6)
        assert same == mirror
        if mirror:
            torch.testing.assert_close(model.embed(images), model.embed(images.flip(3)))
            model.train()  # Training does not mirror, and batch norm uses the batch's statistics.
            assert not torch.allclose(model(images), model(images.flip(3)), atol=1e-6)


def test_resizing_is_part_of_the_network() -> None:
    model = CNN(image_size=32, channels=[4]).eval()
    large = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    from horsehuman.data.transforms import resize

    assert torch.equal(model(large), model(resize(large, 32)))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": 16}, r"model\.image_size=16 is too small"),
        ({"channels": [0]}, "channels"),
        ({"dropout": 1}, "dropout"),
        ({"pool": "mean"}, "pool"),
        ({"initialisation": "he"}, "initialisation"),
        ({"optimizer": {"name": "Adam"}}, "lr"),
        ({"optimizer": {"lr": 0.1}}, "optimizer.name"),
        ({"schedule": "step"}, "schedule"),
        ({"threshold": 1.0}, "threshold"),
        ({"temperature": 0}, "temperature"),
        ({"label_smoothing": 1}, "label_smoothing"),
        ({"class_names": ["one"]}, "class_names"),
        ({"batch_norm": "no"}, "batch_norm"),
        ({"hidden": [-3]}, "hidden"),
        ({"hidden": 5}, "hidden"),
        ({"channels": []}, "channels"),
        ({"optimizer": None}, "optimizer"),
        ({"optimizer": {"name": "SGD", "lr": 0.1, "weight_decay": -1}}, "weight_decay"),
        ({"class_names": "ab"}, "class_names"),
    ],
)
def test_invalid_values_are_refused(arguments: dict, name: str) -> None:
    with pytest.raises(HorseHumanError, match=name):
        CNNClassifier(**arguments)
