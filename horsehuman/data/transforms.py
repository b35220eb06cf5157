"""Transforms of image tensors: ``resize`` to the canonical image, and augmentation of batches.

Both run on the device of the images. Augmentation draws separate parameters for each image.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from horsehuman.errors import HorseHumanError, check_choice, check_flag, check_number

#: Weights of red, green and blue in Rec. 601 luma, which Pillow uses for conversion to grey.
_LUMA = (0.299, 0.587, 0.114)


def check_images(images: Tensor) -> None:
    """Raise :class:`HorseHumanError` for images that are not uint8 ``(N, 3, H, W)``.

    Scaled images, for instance, would be read as black ones.
    """
    is_tensor = isinstance(images, Tensor)
    if not is_tensor or images.dtype != torch.uint8 or images.shape[1:-2] != (3,):
        got = f"{images.dtype} {tuple(images.shape)}" if is_tensor else type(images).__name__
        fix = "give a tensor, uint8 (N, 3, H, W), with values of 0 to 255"
        raise HorseHumanError(f"images are {got}: {fix}")


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images to ``size`` x ``size`` pixels, as Keras's ``target_size`` does.

    Images are neither cropped nor padded, so the aspect ratio is lost. Interpolation is bicubic
    (a = -0.5) with antialiasing, computed in float32, rounded and clamped. Images of this size are
    returned unchanged.

    Args:
        images: Images of shape ``(..., 3, H, W)``, uint8, values 0 to 255.
        size: Height and width of the result in pixels.

    Returns:
        Images of shape ``(..., 3, size, size)``, uint8.
    """
    # An exported graph takes images of any size and must not contain this branch.
    if not torch.compiler.is_exporting() and images.shape[-2:] == (size, size):
        return images
    batch = images.reshape(-1, *images.shape[-3:]).float()
    batch = functional.interpolate(batch, (size, size), mode="bicubic", antialias=True)
    batch = batch.round_().clamp_(0, 255).to(torch.uint8)
    return batch.reshape(*images.shape[:-2], size, size)


@dataclass(frozen=True)
class Augment:
    """Random geometry and colour for each image of a batch; the defaults change nothing.

    Geometry is one affine map per image, composed in the order of Keras's ``ImageDataGenerator``
    (rotation, shift, shear, zoom) and sampled bilinearly. All parameters are drawn from torch's
    global generator of the device.

    Attributes:
        rotation: Largest rotation in degrees in either direction, 0 to 180.
        shift: Largest shift along each axis as a fraction of the image size, 0 to 1.
        shear: Largest shear angle in degrees, 0 to 80.
        zoom_from: Smallest width of the visible frame as a fraction of the image width, above 0
            and at most 10: below 1 the image is enlarged, above 1 it is shrunk.
        zoom_to: Largest width of the frame, ``zoom_from`` to 10.
        zoom_per_axis: Draw the zoom uniformly and separately for each axis, as Keras does; by
            default it is drawn log-uniformly and is the same for both axes.
        flip: Mirror each image horizontally with probability 0.5.
        fill: Pixels outside the image: ``nearest`` repeats its edge; ``canvas`` is one colour,
            which is white with probability ``white`` and random otherwise.
        white: Probability of a white canvas, 0 to 1; needs ``fill="canvas"``.
        spotlight: Probability that all but a soft-edged ellipse of the image is replaced by the
            canvas, 0 to 1; needs ``fill="canvas"``.
        brightness: Largest relative change of brightness, 0 to 1.
        contrast: Largest relative change of contrast, 0 to 1.
        saturation: Largest relative change of saturation, 0 to 1.
        hue: Largest rotation of the hue in degrees, 0 to 180.
        grey: Probability of conversion to grey, 0 to 1.

    Raises:
        HorseHumanError: If a value is out of range, or the options contradict each other.
    """

    rotation: float = 0.0
    shift: float = 0.0
    shear: float = 0.0
    zoom_from: float = 1.0
    zoom_to: float = 1.0
    zoom_per_axis: bool = False
    flip: bool = False
    fill: str = "nearest"
    white: float = 0.0
    spotlight: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        highest = {"rotation": 180, "shear": 80, "zoom_from": 10, "zoom_to": 10, "hue": 180}
        for field in fields(self):
            name, value = f"data.augment.{field.name}", getattr(self, field.name)
            if field.type is bool:
                check_flag(name, value)
            elif field.type is float:
                check_number(name, value, float, at_least=0, at_most=highest.get(field.name, 1))
        check_number("data.augment.zoom_from", self.zoom_from, float, above=0, at_most=self.zoom_to)
        check_choice("data.augment.fill", self.fill, ("nearest", "canvas"))
        if self.fill != "canvas" and (self.white or self.spotlight):
            raise HorseHumanError(f"data.augment.fill={self.fill}: white and spotlight need canvas")

    def __call__(self, images: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: Images of shape ``(N, 3, S, S)``, uint8, values 0 to 255.

        Returns:
            Augmented images, same shape and dtype.
        """
        count, size, device = len(images), images.shape[-1], images.device
        recoloured = self._recolour(images.float() / 255)
        maps = self._affine_maps(count, device)
        grid = functional.affine_grid(maps, [count, 3, size, size], align_corners=False)
        # Clamp to the centres of the outermost pixels: the MPS backend has no border padding.
        edge = 1 - 1 / size
        result = functional.grid_sample(recoloured, grid.clamp(-edge, edge), align_corners=False)
        if self.fill == "canvas":
            colour = torch.rand(count, 3, 1, 1, device=device)
            colour[torch.rand(count, device=device) < self.white] = 1.0
            visibility = (grid.abs() <= 1).all(dim=3).float()
            if self.spotlight:
                lit = torch.rand(count, device=device) < self.spotlight
                visibility[lit] *= _ellipses(grid[lit])
            result = torch.lerp(colour, result, visibility.unsqueeze(1))
        return (result * 255).round_().clamp_(0, 255).to(torch.uint8)

    def _affine_maps(self, count: int, device: torch.device) -> Tensor:
        """Draw affine maps ``(N, 2, 3)`` from coordinates of the result to those of the image.

        Coordinates are (x, y) in [-1, 1], so a shift by the image size is 2.
        """
        angle = _uniform(-self.rotation, self.rotation, (count,), device).deg2rad()
        rotation = _stack(angle.cos(), angle.sin(), -angle.sin(), angle.cos())
        shift = 2 * _uniform(-self.shift, self.shift, (count, 2, 1), device)
        shear = _uniform(-self.shear, self.shear, (count,), device).deg2rad()
        one, zero = torch.ones_like(shear), torch.zeros_like(shear)
        shearing = _stack(shear.cos(), zero, -shear.sin(), one)
        if self.zoom_per_axis:
            zoom = _uniform(self.zoom_from, self.zoom_to, (count, 2), device)
        else:
            low, high = math.log(self.zoom_from), math.log(self.zoom_to)
            zoom = _uniform(low, high, (count, 1), device).exp().expand(-1, 2).clone()
        if self.flip:
            zoom[:, 0] *= 1 - 2 * (torch.rand(count, device=device) < 0.5).float()
        linear = rotation @ shearing @ torch.diag_embed(zoom)
        return torch.cat([linear, rotation @ shift], dim=2)

    def _recolour(self, images: Tensor) -> Tensor:
        """Change colours by one affine map of RGB per image, ``(N, 3, S, S)``, values 0 to 1."""
        count, device = len(images), images.device
        if not any((self.brightness, self.contrast, self.saturation, self.hue, self.grey)):
            return images
        luma = torch.tensor(_LUMA, device=device)
        to_grey = luma.expand(3, 3)
        hue = _hue_rotation(_uniform(-self.hue, self.hue, (count,), device).deg2rad())
        saturation = 1 + _uniform(-self.saturation, self.saturation, (count, 1, 1), device)
        saturation[torch.rand(count, device=device) < self.grey] = 0.0
        brightness = 1 + _uniform(-self.brightness, self.brightness, (count, 1, 1), device)
        contrast = 1 + _uniform(-self.contrast, self.contrast, (count, 1, 1), device)
        colours = to_grey + saturation * (hue - to_grey)
        mean = (luma.view(3, 1, 1) * images).sum(1).mean((1, 2)).view(count, 1, 1)
        offset = brightness * (1 - contrast) * mean.expand(-1, 3, 1)
        flat = torch.baddbmm(offset, brightness * contrast * colours, images.flatten(2))
        return flat.clamp_(0, 1).view_as(images)


def make_augment(options: Mapping[str, Any] | None) -> Augment | None:
    """Build the augmentation that ``data.augment`` describes.

    Args:
        options: Arguments of :class:`Augment`; ``None`` for no augmentation.

    Raises:
        HorseHumanError: If an option is unknown or its value is invalid.
    """
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise HorseHumanError(f"data.augment={options!r} does not work: give options, or null")
    for name in options:
        check_choice("data.augment", name, [field.name for field in fields(Augment)])
    return Augment(**options)


def _uniform(low: float, high: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw from the uniform distribution on [low, high)."""
    return low + (high - low) * torch.rand(shape, device=device)


def _stack(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Stack four vectors of length N to matrices ``[[a, b], [c, d]]``, ``(N, 2, 2)``."""
    return torch.stack([a, b, c, d], dim=1).view(-1, 2, 2)


def _ellipses(grid: Tensor) -> Tensor:
    """Draw soft-edged ellipses near the centres of the images, ``(N, S, S)``, 0 to 1."""
    count, device = len(grid), grid.device
    centre = _uniform(-0.15, 0.15, (count, 1, 1, 2), device)
    radius = _uniform(0.45, 1.0, (count, 1, 1, 2), device)
    distance = ((grid - centre) / radius).square().sum(dim=3).sqrt()
    softness = _uniform(0.03, 0.3, (count, 1, 1), device)
    return torch.sigmoid((1 - distance) / softness)


def _hue_rotation(angle: Tensor) -> Tensor:
    """Return rotations of RGB about the grey axis, ``(N, 3, 3)``, by Rodrigues' formula.

    Args:
        angle: Angles in radians, ``(N,)``.
    """
    third, root = 1 / 3, math.sqrt(1 / 3)
    cross = torch.tensor([[0, -root, root], [root, 0, -root], [-root, root, 0]]).to(angle.device)
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return cos * torch.eye(3, device=angle.device) + (1 - cos) * third + sin * cross
