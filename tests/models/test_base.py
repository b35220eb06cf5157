from __future__ import annotations

import pytest
import timm
import torch

from horsehuman import HorseHumanError, load_classifier
from horsehuman.data.transforms import resize
from horsehuman.models.base import Normalize


def test_normalize_resizes_and_normalises_like_timm() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    expected = (resize(images, 32) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
        std
    ).view(3, 1, 1)
    normalised = Normalize(32, mean, std)(images)
    torch.testing.assert_close(normalised, expected)
    assert normalised.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.1, 0.2, 0.7), (0.3, 1 / 3, 1e-3)),
    ],
)
def test_constants_equal_those_of_tensor_arithmetic_to_the_bit(mean: tuple, std: tuple) -> None:
    with torch.device("meta"):  # The constants are real wherever a network is built.
        normalize = Normalize(32, mean, std)
    expected = 1 / (255 * torch.tensor(std)), -torch.tensor(mean) / torch.tensor(std)
    for buffer, values in zip((normalize.scale, normalize.shift), expected, strict=True):
        assert torch.equal(buffer.view(torch.int32), values.view(3, 1, 1).view(torch.int32))


def test_bundled_weights_expect_bicubic_interpolation() -> None:
    config = timm.get_pretrained_cfg("inception_v3.tf_in1k")
    assert config is not None
    assert config.interpolation == "bicubic"  # as in horsehuman.data.transforms.resize


@pytest.mark.parametrize(
    ("mean", "std", "name"),
    [
        ([0.5], [0.5] * 3, "model.mean"),
        ([0.5] * 3, [0.5, 0, 0.5], "model.std=0"),
        (None, [1.0] * 3, "model.mean=None"),
    ],
)
def test_invalid_values_are_refused(mean: list, std: list, name: str) -> None:
    with pytest.raises(HorseHumanError, match=name):
        Normalize(32, mean, std)


@pytest.mark.parametrize("name", ["cnn", "inception"])
def test_images_of_another_type_or_shape_are_refused(name: str) -> None:
    """Pixels divided by 255, for instance, would be read as a black picture."""
    classifier, pixels = load_classifier(name), torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    for images in (pixels / 255, pixels[0], pixels.permute(0, 2, 3, 1), pixels.numpy()):
        with pytest.raises(HorseHumanError, match=r"give a tensor, uint8 \(N, 3, H, W\)"):
            classifier(images)
