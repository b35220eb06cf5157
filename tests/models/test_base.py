from __future__ import annotations

import pytest
import timm
import torch

from horsehuman import HorseHumanError
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


def test_bundled_weights_expect_bicubic_interpolation() -> None:
    config = timm.get_pretrained_cfg("inception_v3.tf_in1k")
    assert config is not None
    assert config.interpolation == "bicubic"  # as in horsehuman.data.transforms.resize


@pytest.mark.parametrize(
    ("size", "mean", "std"),
    [(0, [0.5] * 3, [0.5] * 3), (32, [0.5], [0.5] * 3), (32, [0.5] * 3, [0.5, 0, 0.5]),
     (32, None, [1.0] * 3)],
)  # fmt: skip
def test_invalid_values_are_refused(size: int, mean: list, std: list) -> None:
    with pytest.raises(HorseHumanError):
        Normalize(size, mean, std)
