"""What the package learned from photographs of horses, people and other things.

The photographs themselves are not bundled: ``assets/ASSETS.md`` says whose they are. Both files fit
one backbone and preprocessing only, whose key is part of their metadata.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
from torch import Tensor

from horsehuman.decision import Ints
from horsehuman.models.feature_cache import cache_key
from horsehuman.models.inception import Inception
from horsehuman.runtime import asset

#: File of the features, and of the probes that find horses and humans in regions of an image.
PHOTOGRAPHS_FILE, PRESENCE_FILE = "photographs.safetensors", "presence.safetensors"

# Key of the metadata in the files.
_METADATA = "horsehuman"


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
    return Photographs(tensors["features"].float(), labels, metadata["groups"])


def bundled_presence(network: Inception) -> tuple[dict[str, Tensor], float] | None:
    """Return the layer ``presence`` by state dict names, and the threshold of *both*.

    Returns:
        Both, or ``None`` if they are of another backbone or preprocessing.
    """
    found = _read(PRESENCE_FILE, network)
    return (found[0], found[1]["threshold"]) if found else None


def write_bundled(
    path: Path, network: Inception, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Write one of the two files.

    The metadata are one JSON text: safetensors writes several in random order.

    Args:
        path: The file.
        network: The network whose features the tensors are of, or apply to.
        tensors: Tensors by name.
        metadata: Values that JSON can represent.
    """
    text = json.dumps(metadata | {"backbone": backbone_key(network)})
    safetensors.torch.save_file(tensors, path, {_METADATA: text})
    path.chmod(0o644)


def _read(name: str, network: Inception) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return tensors and metadata of a file if its key is that of the network's backbone."""
    with safetensors.safe_open(asset(name), "pt") as file:
        metadata = json.loads(file.metadata()[_METADATA])
        if metadata["backbone"] != backbone_key(network):
            return None
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
