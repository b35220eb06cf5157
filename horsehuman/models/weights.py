"""Pretrained weights of the Inception-v3 trunk, from wherever the user names, loaded strictly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import timm
from safetensors import SafetensorError
from torch import Tensor, nn

from horsehuman.errors import HorseHumanError, closest, shown
from horsehuman.runtime import TRUNK, asset

log = logging.getLogger(__name__)

#: Where the backbone can be cut, in the order of timm's feature levels, and which top-level
#: layers lie between the cut before and this one (Szegedy et al. 2016, names as in torchvision).
CUTS = {
    "Conv2d_2b_3x3": ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    "Conv2d_4a_3x3": ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    "Mixed_5d": ("Mixed_5b", "Mixed_5c", "Mixed_5d"),
    "Mixed_6e": ("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    "Mixed_7c": ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}

_BEHIND_ALL_CUTS = {"AuxLogits", "fc"}

#: The tag whose preprocessing the weights in the box expect: they are Google's, as its are.
_BOX_TAG = "tf_in1k"


@dataclass(frozen=True)
class Trunk:
    """Weights and what they expect.

    Attributes:
        source: The name that the user gave.
        tensors: timm's parameter names to tensors; ``None`` for random weights.
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the scale 0 to 1.
    """

    source: str
    tensors: Mapping[str, Tensor] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def box_trunk() -> Path:
    """The trunk in the package (see ``assets/ASSETS.md``)."""
    return asset(TRUNK)


def read_trunk(source: str) -> Trunk:
    """Read weights.

    Args:
        source: ``box``, ``random``, a timm tag of ``inception_v3``, or a safetensors file, which is
            taken to expect what Google's weights expect (mean and std 0.5).

    Raises:
        HorseHumanError: There is no such source, or it cannot be read.
    """
    if source == "random":
        return Trunk(source, None, *_expected(_BOX_TAG))
    if source == "box":
        return Trunk(source, _read_file(box_trunk()), *_expected(_BOX_TAG))
    if str(source).endswith(".safetensors"):
        mean, std = _expected(_BOX_TAG)
        log.info("model.weights=%s: taken to expect mean %s and std %s", source, mean, std)
        return Trunk(source, _read_file(Path(source).expanduser()), mean, std)
    tags = [name.partition(".")[2] for name in timm.list_pretrained("inception_v3.*")]
    if source not in tags:
        near = closest(str(source), ["box", "random", *tags])
        raise HorseHumanError(
            f"model.weights={source!r} is not known{near}: use box | random | {' | '.join(tags)} | "
            "a file that ends in .safetensors"
        )
    log.info("model.weights=%s: asking timm's hub or cache", source)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        model = timm.create_model(f"inception_v3.{source}", pretrained=True)
    except Exception as error:  # the hub's clients raise whatever they like
        raise HorseHumanError(
            f"model.weights={source} cannot be fetched ({type(error).__name__}): offline, use "
            "model.weights=box, or a safetensors file fetched elsewhere"
        ) from error
    return Trunk(source, model.state_dict(), *_expected(source))


def load_trunk(network: nn.Module, trunk: Trunk, cut: str) -> None:
    """Load weights into a backbone, every key with its shape.

    Layers behind the cut (and ``fc``, ``AuxLogits``) are left aside by name.

    Args:
        network: timm's ``inception_v3`` up to the cut.
        trunk: The weights.
        cut: A key of :data:`CUTS`.

    Raises:
        HorseHumanError: A key is missing, is of another shape, or belongs to no Inception-v3.
    """
    if trunk.tensors is None:
        return
    levels = list(CUTS)
    aside = {name for level in levels[levels.index(cut) + 1 :] for name in CUTS[level]}
    aside |= _BEHIND_ALL_CUTS
    wanted = network.state_dict()
    given = {key: t for key, t in trunk.tensors.items() if key.split(".")[0] not in aside}
    faults = {
        "missing": [key for key in wanted if key not in given],
        "unknown": [key for key in given if key not in wanted],
        "of another shape": [k for k in wanted if k in given and given[k].shape != wanted[k].shape],
    }
    for fault, keys in faults.items():
        if keys:
            raise HorseHumanError(
                f"model.weights={trunk.source} does not fit inception_v3 up to {cut}: {len(keys)} "
                f"keys {fault} (first: {keys[0]}); name weights of that architecture, or another "
                "model.cut"
            )
    exact = {key: t.float() if t.is_floating_point() else t for key, t in given.items()}
    network.load_state_dict(exact, assign=True)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise HorseHumanError(
            f"model.weights={shown(path)} cannot be read as safetensors: {error}"
        ) from error


def _expected(tag: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    config = timm.get_pretrained_cfg(f"inception_v3.{tag}")
    assert config is not None
    mean, std = config.mean, config.std
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
