from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from horsehuman.data.transforms import Augment, resize
from horsehuman.errors import HorseHumanError


def make_images(count: int = 4, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def test_defaults_change_nothing() -> None:
    assert torch.equal(Augment()(make_images()), make_images())


def test_each_image_has_its_own_parameters_and_a_seed_repeats_them() -> None:
    same = make_images(1).repeat(6, 1, 1, 1)
    augment = Augment(rotation=30, shift=0.2, flip=True, brightness=0.3, hue=40)
    torch.manual_seed(3)
    first = augment(same)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 6
    torch.manual_seed(3)
    assert torch.equal(augment(same), first)


def test_geometry_is_keras_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose the map in (row, column) as documented for Keras's ``apply_affine_transform``."""
    angle, shear, move, zoom = 0.3, 0.1, (5.0, -3.0), (0.9, 1.2)  # radians, pixels, factors
    size = 40
    draws = iter(
        [
            torch.tensor([math.degrees(angle)]),
            torch.tensor([[[move[1] / size], [move[0] / size]]]),
            torch.tensor([math.degrees(shear)]),
            torch.tensor([[zoom[1], zoom[0]]]),
        ]
    )
    monkeypatch.setattr("horsehuman.data.transforms._uniform", lambda *args: next(draws))
    actual = Augment(zoom_per_axis=True)._affine_maps(1, torch.device("cpu"))[0]

    rotate = torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1.0]]
    )
    shift = torch.tensor([[1, 0, move[0]], [0, 1, move[1]], [0, 0, 1.0]])
    sheared = torch.tensor([[1, -math.sin(shear), 0], [0, math.cos(shear), 0], [0, 0, 1.0]])
    zoomed = torch.diag(torch.tensor([zoom[0], zoom[1], 1.0]))
    rows_columns = rotate @ shift @ sheared @ zoomed  # pixels from the centre
    swap = torch.tensor([[0, 1.0, 0], [1, 0, 0], [0, 0, 1]])
    expected = (swap @ rows_columns @ swap)[:2]
    expected[:, 2] *= 2 / size
    torch.testing.assert_close(actual, expected)


def test_flip_mirrors_about_half_of_the_images() -> None:
    torch.manual_seed(0)
    images = make_images(1).repeat(64, 1, 1, 1)
    augmented = Augment(flip=True)(images)
    mirrored = (augmented == images.flip(3)).flatten(1).all(1)
    unchanged = (augmented == images).flatten(1).all(1)
    assert (mirrored | unchanged).all()
    assert 16 < mirrored.sum() < 48


def test_canvas_is_white_and_edges_repeat() -> None:
    torch.manual_seed(0)
    grey = torch.full((8, 3, 32, 32), 100, dtype=torch.uint8)
    shrunk = Augment(zoom_from=2, zoom_to=2, fill="canvas", white=1.0)(grey)
    assert shrunk[:, :, 0, 0].unique().tolist() == [255]
    assert shrunk[:, :, 16, 16].unique().tolist() == [100]
    assert (shrunk[0, 0] == 100).float().mean() == pytest.approx(0.25, abs=0.02)
    assert Augment(zoom_from=2, zoom_to=2)(grey).unique().tolist() == [100]


def test_spotlight_hides_the_border() -> None:
    torch.manual_seed(0)
    black = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)
    lit = Augment(fill="canvas", white=1.0, spotlight=1.0)(black)
    assert lit[:, :, 0, 0].float().mean() > 200
    assert lit[:, :, 16, 16].float().mean() < 20


def test_grey_keeps_luma_and_loses_colour() -> None:
    augmented = Augment(grey=1.0)(make_images())
    assert (augmented.amax(1) - augmented.amin(1)).max() <= 1
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    expected = (luma * make_images().float()).sum(1)
    assert (augmented[:, 0].float() - expected).abs().max() <= 1


def test_colours_stay_in_range_and_grey_has_no_hue() -> None:
    torch.manual_seed(0)
    augmented = Augment(brightness=1, contrast=1, saturation=1, hue=180)(make_images(16))
    assert augmented.dtype == torch.uint8
    grey = torch.full((4, 3, 8, 8), 90, dtype=torch.uint8)
    assert (Augment(hue=180)(grey).int() - 90).abs().max() <= 1


@pytest.mark.parametrize(
    "options",
    [{"rotation": -1}, {"shift": 2}, {"zoom_from": 0}, {"zoom_from": 1.2, "zoom_to": 1.0},
     {"fill": "mirror"}, {"flip": 1}, {"grey": 1.5},
     {"spotlight": 1.5}],
)  # fmt: skip
def test_invalid_values_are_refused(options: dict) -> None:
    with pytest.raises(HorseHumanError, match=r"^data\.augment\."):
        Augment(**options)


def cubic(x: torch.Tensor) -> torch.Tensor:
    """Evaluate Keys's cubic kernel with a = -0.5 (Keys 1981)."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def matrix(before: int, after: int) -> torch.Tensor:
    """Return resampling with antialiasing as a matrix ``(after, before)``, in float64."""
    ratio = before / after
    support = max(ratio, 1.0)
    centres = (torch.arange(after, dtype=torch.float64) + 0.5) * ratio
    positions = torch.arange(before, dtype=torch.float64) + 0.5
    weights = cubic((positions[None] - centres[:, None]) / support)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(("height", "width", "size"), [(300, 300, 128), (90, 200, 128), (5, 7, 64)])
def test_resize_is_two_matrix_products(height: int, width: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
    expected = matrix(height, size) @ images.double() @ matrix(width, size).T
    resized = resize(images, size)
    assert resized.dtype == torch.uint8
    assert (resized.double() - expected.round().clamp(0, 255)).abs().max() <= 1


def test_resize_agrees_with_pillow() -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)
    noise = np.asarray(Image.fromarray(coarse).resize((200, 300), Image.Resampling.BILINEAR))
    expected = np.asarray(Image.fromarray(noise).resize((128, 128), Image.Resampling.BICUBIC))
    image = torch.from_numpy(noise.copy()).permute(2, 0, 1)
    resized = resize(image, 128).permute(1, 2, 0).numpy()
    assert np.abs(resized.astype(int) - expected.astype(int)).max() <= 1


def test_same_size_changes_nothing() -> None:
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert torch.equal(resize(image, 64), image)


def test_one_pixel_and_overshoot() -> None:
    assert resize(torch.full((3, 1, 1), 7, dtype=torch.uint8), 8).unique().tolist() == [7]
    edge = torch.zeros(3, 8, 8, dtype=torch.uint8)
    edge[:, :, 4:] = 255
    resized = resize(edge, 64)  # bicubic interpolation overshoots and must be clamped
    assert resized[0, 0, 0] == 0
    assert resized[0, 0, -1] == 255
    assert (resized[0, 0].int().diff() >= 0).all()
