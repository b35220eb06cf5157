"""The first layers of every model: from a picture to the tensor that a network expects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from horsehuman.errors import HorseHumanError, check_number
from horsehuman.resize import resize


class Preprocess(nn.Module):
    """Pictures of any size as normalised tensors.

    Args:
        size: Height and width in pixels of the canonical picture.
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the scale 0 to 1.

    Raises:
        HorseHumanError: A value does not work.
    """

    def __init__(
        self, size: int, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> None:
        super().__init__()
        check_number("model.image_size", size, int, at_least=8, at_most=4096)
        for name, values, above in (("mean", mean, None), ("std", std, 0)):
            if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 3:
                raise HorseHumanError(f"model.{name}={values!r} does not work: give three numbers")
            for value in values:
                check_number(f"model.{name}", value, float, above=above)
        self.size = size
        self.scale: Tensor
        self.shift: Tensor
        scale = 1 / (255 * torch.tensor(std))
        shift = -torch.tensor(mean) / torch.tensor(std)
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``(N, 3, H, W)`` to ``(N, 3, size, size)``, ``(x / 255 - mean) / std``."""
        images = resize(images, self.size).contiguous(memory_format=torch.channels_last)
        return images.to(self.scale.dtype) * self.scale + self.shift
