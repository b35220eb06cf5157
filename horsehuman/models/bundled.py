"""What the package learned from photographs of horses, people and other things.

The photographs themselves are not bundled: ``assets/ASSETS.md`` says whose they are. Both files fit
one backbone and preprocessing only, whose key is part of their metadata.
"""

import json
from typing import NamedTuple

import numpy as np
import safetensors
from torch import Tensor

from horsehuman.decision import Ints
from horsehuman.models.feature_cache import cache_key
from horsehuman.models.inception import Inception
from horsehuman.runtime import asset

#: File of the features, and of the probes that find horses and humans in regions of an image.
PHOTOGRAPHS_FILE, PRESENCE_FILE = "photographs.safetensors", "presence.safetensors"


class Photographs(NamedTuple):
    """Features of photographs.

    Attributes:
        features: float32 ``(N, F)``.
        labels: 0 for horses, 1 for humans, 2 for other things, ``(N,)``.
        groups: The breed of each horse, and the file name of each other photograph.
    """

    features: Tensor
    labels: Ints
    groups: list[str]


def backbone_key(network: Inception) -> str:
    """Return a digest of the backbone's weights and all settings that its features depend on."""
    names = ("image_size", "scales", "cut", "pool", "mean", "std")
    return cache_key(network.backbone, [network.settings[name] for name in names])


def bundled_photographs(network: Inception) -> Photographs | None:
    """Return the bundled features; ``None`` if they are of another backbone or preprocessing."""
    found = _read(PHOTOGRAPHS_FILE, network)
    if found is None:
        return None
    tensors, metadata = found
    labels = tensors["labels"].numpy().astype(np.int64)
    return Photographs(tensors["features"].float(), labels, json.loads(metadata["groups"]))


def bundled_presence(network: Inception) -> tuple[dict[str, Tensor], float] | None:
    """Return the layer ``presence`` by state dict names, and the threshold of *both*.

    Returns:
        Both, or ``None`` if they are of another backbone or preprocessing.
    """
    found = _read(PRESENCE_FILE, network)
    return (found[0], float(found[1]["threshold"])) if found else None


def _read(name: str, network: Inception) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return tensors and metadata of a file if its key is that of the network's backbone."""
    with safetensors.safe_open(asset(name), "pt") as file:
        metadata = file.metadata()
        if metadata["backbone"] != backbone_key(network):
            return None
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
