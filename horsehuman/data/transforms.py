"""Augmentation of whole batches, drawn for each picture, on the device that holds them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from horsehuman.errors import HorseHumanError, check_choice, check_flag, check_number

# Rec. 601 luma, as in Pillow's conversion to grey.
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augment:
    """Random changes of place, shape and colour; the defaults change nothing.

    Geometry is one affine map for each picture, in the order of Keras's ``ImageDataGenerator``
    (rotation, shift, shear, zoom), sampled bilinearly. All draws come from torch's global
    generator of the device.

    Attributes:
        rotation: Largest angle in degrees, either way.
        shift: Largest shift along each axis as a share of the picture's size.
        shear: Largest shear angle in degrees.
        zoom_from: Smallest and ``zoom_to`` largest share of the picture's width that the frame
            shows: below 1 the picture is enlarged, above 1 it is shrunk. Drawn log-uniformly
            (``zoom_per_axis=False``) or, as Keras does, uniformly and for each axis by itself.
        zoom_to: See ``zoom_from``.
        zoom_per_axis: See ``zoom_from``.
        flip: Mirror every second picture.
        fill: What lies outside the picture: ``nearest`` repeats its edge; ``canvas`` is one
            colour, white for ``white`` of the pictures and random for the rest.
        white: Probability of a white canvas.
        spotlight: Probability that only a soft-edged ellipse of the picture is left on its
            canvas; needs ``fill="canvas"``.
        brightness: Largest relative change, as are ``contrast`` and ``saturation``.
        contrast: See ``brightness``.
        saturation: See ``brightness``.
        hue: Largest rotation of the hue in degrees.
        grey: Probability that a picture loses its colours.
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
        for name, highest in (("rotation", 180), ("shift", 1), ("shear", 80), ("hue", 180)):
            value = getattr(self, name)
            check_number(f"data.augment.{name}", value, float, at_least=0, at_most=highest)
        for name in ("white", "spotlight", "brightness", "contrast", "saturation", "grey"):
            value = getattr(self, name)
            check_number(f"data.augment.{name}", value, float, at_least=0, at_most=1)
        check_number("data.augment.zoom_from", self.zoom_from, float, above=0, at_most=10)
        check_number(
            "data.augment.zoom_to", self.zoom_to, float, at_least=self.zoom_from, at_most=10
        )
        check_flag("data.augment.flip", self.flip)
        check_flag("data.augment.zoom_per_axis", self.zoom_per_axis)
        check_choice("data.augment.fill", self.fill, ("nearest", "canvas"))
        for name in ("white", "spotlight"):
            if getattr(self, name) and self.fill != "canvas":
                raise HorseHumanError(
                    f"data.augment.{name}={getattr(self, name)} needs data.augment.fill=canvas"
                )

    def __call__(self, images: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: uint8 of shape ``(N, 3, S, S)``.

        Returns:
            uint8 of the same shape.
        """
        count, size, device = len(images), images.shape[-1], images.device
        pictures = self._recolour(images.float() / 255)
        grid = functional.affine_grid(
            self._affine_maps(count, device), [count, 3, size, size], align_corners=False
        )
        edge = 1 - 1 / size  # centres of the outermost pixels; MPS knows no border padding
        result = functional.grid_sample(pictures, grid.clamp(-edge, edge), align_corners=False)
        if self.fill == "canvas":
            colour = torch.rand(count, 3, 1, 1, device=device)
            colour[torch.rand(count, device=device) < self.white] = 1.0
            result = torch.lerp(colour, result, self._visible(grid))
        return (result * 255).round_().clamp_(0, 255).to(torch.uint8)

    def _affine_maps(self, count: int, device: torch.device) -> Tensor:
        """Draw affine maps ``(N, 2, 3)`` from places in the result to places in the picture.

        Places are (x, y) in [-1, 1], so a shift by the whole size is 2.
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

    def _visible(self, grid: Tensor) -> Tensor:
        """How much of the picture is seen at each place of the result: ``(N, 1, S, S)``, 0 to 1."""
        count, device = len(grid), grid.device
        printable = (grid.abs() <= 1).all(dim=3).float()
        if self.spotlight:
            lit = torch.rand(count, device=device) < self.spotlight
            printable[lit] *= _ellipses(grid[lit])
        return printable.unsqueeze(1)

    def _recolour(self, pictures: Tensor) -> Tensor:
        """Change colours by one linear map of RGB for each picture; values 0 to 1."""
        count, device = len(pictures), pictures.device
        if not any((self.brightness, self.contrast, self.saturation, self.hue, self.grey)):
            return pictures
        luma = torch.tensor(_LUMA, device=device)
        to_grey = luma.expand(3, 3)
        hue = _hue_rotation(_uniform(-self.hue, self.hue, (count,), device).deg2rad())
        saturation = 1 + _uniform(-self.saturation, self.saturation, (count, 1, 1), device)
        saturation[torch.rand(count, device=device) < self.grey] = 0.0
        brightness = 1 + _uniform(-self.brightness, self.brightness, (count, 1, 1), device)
        contrast = 1 + _uniform(-self.contrast, self.contrast, (count, 1, 1), device)
        colours = to_grey + saturation * (hue - to_grey)
        mean = (luma.view(3, 1, 1) * pictures).sum(1).mean((1, 2)).view(count, 1, 1)
        flat = torch.baddbmm(
            brightness * (1 - contrast) * mean.expand(-1, 3, 1),
            brightness * contrast * colours,
            pictures.flatten(2),
        )
        return flat.clamp_(0, 1).view_as(pictures)


def augment_each(augment: Augment, images: Tensor, key: str) -> Tensor:
    """Augment each picture as ``key`` and its own pixels say, whatever it stands beside.

    Args:
        augment: What to do.
        images: uint8 of shape ``(N, 3, S, S)``, on the CPU. Torch's generators are left as they
            were.
        key: Another key gives another view.

    Returns:
        uint8 of the same shape.
    """
    views = []
    with torch.random.fork_rng(devices=[]):
        for image in images:
            digest = hashlib.blake2b(image.numpy().tobytes(), key=key.encode(), digest_size=7)
            torch.manual_seed(int.from_bytes(digest.digest(), "big"))
            views.append(augment(image[None]))
    return torch.cat(views)


def make_augment(given: Mapping[str, Any] | None) -> Augment | None:
    """Build what ``data.augment`` asks for; raises :class:`HorseHumanError` where it cannot be."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise HorseHumanError(f"data.augment={given!r} does not work: give options, or null")
    names = [field.name for field in fields(Augment)]
    for name in given:
        check_choice("data.augment", name, names)
    return Augment(**given)


def _uniform(low: float, high: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return low + (high - low) * torch.rand(shape, device=device)


def _stack(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Matrices ``[[a, b], [c, d]]`` of shape ``(N, 2, 2)`` from four vectors of length N."""
    return torch.stack([a, b, c, d], dim=1).view(-1, 2, 2)


def _ellipses(grid: Tensor) -> Tensor:
    """Soft-edged ellipses about the middle of the pictures: ``(N, S, S)``, 0 to 1."""
    count, device = len(grid), grid.device
    centre = _uniform(-0.15, 0.15, (count, 1, 1, 2), device)
    radius = _uniform(0.45, 1.0, (count, 1, 1, 2), device)
    distance = ((grid - centre) / radius).square().sum(dim=3).sqrt()
    softness = _uniform(0.03, 0.3, (count, 1, 1), device)
    return torch.sigmoid((1 - distance) / softness)


def _hue_rotation(angle: Tensor) -> Tensor:
    """Rotations of RGB about the grey axis: ``(N, 3, 3)`` (Rodrigues' formula)."""
    third, root = 1 / 3, math.sqrt(1 / 3)
    cross = torch.tensor([[0, -root, root], [root, 0, -root], [-root, root, 0]]).to(angle.device)
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return cos * torch.eye(3, device=angle.device) + (1 - cos) * third + sin * cross


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
