"""The canonical picture: the one way in which this project changes a picture's size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def resize(pictures: Tensor, size: int) -> Tensor:
    """Squash pictures to ``size`` x ``size`` pixels, as Keras's ``target_size`` does.

    Nothing is cropped and nothing padded, so the aspect ratio is lost. Bicubic (a = -0.5) with
    antialiasing, computed in float32, rounded and clamped; at the same size nothing changes.

    Args:
        pictures: uint8 of shape ``(..., 3, H, W)``, values 0 to 255.
        size: Height and width of the result in pixels.

    Returns:
        uint8 of shape ``(..., 3, size, size)``.
    """
    if not torch.compiler.is_exporting() and pictures.shape[-2:] == (size, size):
        return pictures  # an exported graph is for any size, so it has no such branch
    batch = pictures.reshape(-1, *pictures.shape[-3:]).float()
    batch = functional.interpolate(batch, (size, size), mode="bicubic", antialias=True)
    batch = batch.round_().clamp_(0, 255).to(torch.uint8)
    return batch.reshape(*pictures.shape[:-2], size, size)
