"""Layers that both networks are built from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from horsehuman.errors import check_choice


class Pool(nn.Module):
    """From maps to features.

    Args:
        kind: ``avg`` or ``max`` over all places, ``avgmax`` (both, side by side), or ``flatten``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        check_choice("model.pool", kind, ("avg", "max", "avgmax", "flatten"))
        self.kind = kind

    def forward(self, maps: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C)``, ``(N, 2 C)`` for ``avgmax``, ``(N, C H W)`` flat."""
        if self.kind == "flatten":
            return maps.flatten(1)
        if self.kind == "avg":
            return maps.mean((2, 3))
        if self.kind == "max":
            return maps.amax((2, 3))
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)

    def extra_repr(self) -> str:
        """Name the kind in the module's text."""
        return self.kind


def dense_layers(features: int, widths: Sequence[int]) -> list[nn.Module]:
    """Fully connected layers with ReLU between them: ``(N, features)`` to ``(N, widths[-1])``."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return layers[:-1]


def initialise(network: nn.Module, scheme: str) -> None:
    """Draw the first weights of every convolution and dense layer.

    Args:
        network: The layers.
        scheme: ``torch`` leaves torch's own; ``keras`` is Keras's default, Glorot uniform
            weights (Glorot and Bengio 2010) and zero biases.
    """
    check_choice("model.initialisation", scheme, ("torch", "keras"))
    if scheme == "torch":
        return
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
