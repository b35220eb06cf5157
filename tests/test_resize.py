from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from horsehuman.data.transforms import resize


def cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys's cubic kernel with a = -0.5 (Keys 1981)."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def matrix(before: int, after: int) -> torch.Tensor:
    """Resampling with antialiasing as a matrix ``(after, before)``, in float64."""
    ratio = before / after
    support = max(ratio, 1.0)
    centres = (torch.arange(after, dtype=torch.float64) + 0.5) * ratio
    places = torch.arange(before, dtype=torch.float64) + 0.5
    weights = cubic((places[None] - centres[:, None]) / support)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(("height", "width", "size"), [(300, 300, 128), (90, 200, 128), (5, 7, 64)])
def test_resize_is_two_matrix_products(height: int, width: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
    expected = matrix(height, size) @ pictures.double() @ matrix(width, size).T
    found = resize(pictures, size)
    assert found.dtype == torch.uint8
    assert (found.double() - expected.round().clamp(0, 255)).abs().max() <= 1


def test_resize_agrees_with_pillow() -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)
    noise = np.asarray(Image.fromarray(coarse).resize((200, 300), Image.Resampling.BILINEAR))
    expected = np.asarray(Image.fromarray(noise).resize((128, 128), Image.Resampling.BICUBIC))
    found = resize(torch.from_numpy(noise.copy()).permute(2, 0, 1), 128).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_same_size_changes_nothing() -> None:
    picture = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert torch.equal(resize(picture, 64), picture)


def test_one_pixel_and_overshoot() -> None:
    assert resize(torch.full((3, 1, 1), 7, dtype=torch.uint8), 8).unique().tolist() == [7]
    edge = torch.zeros(3, 8, 8, dtype=torch.uint8)
    edge[:, :, 4:] = 255
    found = resize(edge, 64)  # bicubic overshoots: it is clamped, not wrapped around
    assert found[0, 0, 0] == 0
    assert found[0, 0, -1] == 255
    assert (found[0, 0].int().diff() >= 0).all()
