"""A frozen Inception-v3 trunk and a head of our own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.layers.conv_bn_act import ConvNormAct
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from horsehuman.data.transforms import resize
from horsehuman.errors import (
    HorseHumanError,
    check_choice,
    check_number,
    check_widths,
    closest,
    printable,
)
from horsehuman.models.base import Network, Normalize, Pool, dense_layers, initialise, to_plain
from horsehuman.models.feature_cache import FeatureCache, cache_key
from horsehuman.runtime import BACKBONE_FILE, asset, cache_dir

#: What ``weights`` becomes in a checkpoint: they are in it, and nothing else is read.
CHECKPOINT = "checkpoint"

#: Pictures that are embedded at a time. More are no faster on a CPU, and each takes some 20 MB.
CHUNK = 8

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

_UNUSED_LAYERS = {"AuxLogits", "fc"}

#: The tag whose preprocessing the weights in the box expect: they are Google's, as its are.
_BUNDLED_TAG = "tf_in1k"


class ConvReLU(nn.Module):
    """A convolution with a bias and its ReLU: what is left of timm's ``ConvNormAct``.

    Args:
        block: In eval mode its batch norm is an affine map, which is folded into the convolution.
    """

    def __init__(self, block: ConvNormAct) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(block.conv, block.bn)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C', H', W')``."""
        y: Tensor = self.conv(x)
        return y.relu_()


class FrozenBackbone(nn.Module):
    """timm's ``inception_v3`` up to a cut, which training cannot change.

    It has no gradients and no batch norms, which are folded into the convolutions: nothing in it
    depends on the mode or on what it has seen.

    Args:
        cut: The last layer, a key of :data:`~horsehuman.models.weights.CUTS`.
        weights: What to load; ``None`` leaves NaN in their place, for a checkpoint to fill in.

    Attributes:
        width: Channels of the maps.

    Raises:
        HorseHumanError: The cut is not known, or the weights do not fit.
    """

    def __init__(self, cut: str, weights: PretrainedWeights | None = None) -> None:
        super().__init__()
        check_choice("model.cut", cut, list(CUTS))
        draw = weights is not None and weights.tensors is None
        with torch.device("cpu" if draw else "meta"):  # drawing weights takes a second
            trunk: Any = timm.create_model(
                "inception_v3", features_only=True, out_indices=(list(CUTS).index(cut),)
            )
        self.width = int(trunk.feature_info.channels()[0])
        self.trunk: nn.Module = trunk
        if weights is not None:
            load_pretrained(self.trunk, weights, cut)
        self.eval()
        for name, block in list(self.trunk.named_modules()):
            if isinstance(block, ConvNormAct):
                parent, _, child = name.rpartition(".")
                setattr(self.trunk.get_submodule(parent), child, ConvReLU(block))
        if weights is None:
            self.trunk.to_empty(device="cpu")
            for tensor in self.trunk.state_dict().values():
                tensor.fill_(float("nan"))
        self.train()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` to maps; at ``Mixed_6e`` and 299 px ``(N, 768, 17, 17)``."""
        maps: Tensor = self.trunk(x)[-1]
        return maps


class Inception(Network):
    """``head(mean of pool(maps) over the scales)`` on a frozen Inception-v3.

    Args:
        image_size: Height and width in pixels of the canonical picture.
        scales: Sizes in pixels, at least 75, that the trunk sees the canonical picture at; their
            features are averaged. Figures of different size are then seen alike.
        weights: ``box`` (the trunk in this package), a timm tag such as ``tv_in1k``, a safetensors
            file, or ``random``. They are read here and go into every checkpoint, which therefore
            says ``checkpoint`` in this place and is loaded without them.
        cut: Last layer of the backbone.
        pool: See :class:`~horsehuman.models.layers.Pool`.
        hidden: Widths of dense layers before the last one.
        dropout: Probability with which features are dropped before the last layer, in [0, 1).
        initialisation: Of the head, ``torch`` or ``keras``.
        mean: Mean of each channel on the scale 0 to 1; by default what the weights expect.
        std: Standard deviation of each channel; by default what the weights expect.
        class_names: Names of the two classes.
        threshold: Probability from which on a picture is of class 1.
        temperature: Divides the logits.
        certain_from: Probability of an answer, at least 0.5, below which it is unsure.
        far_from: Distance to the nearer class mean from which on a picture is neither, above 0;
            ``None`` where there is no such score. See :func:`class_mean_distance`.

    Raises:
        HorseHumanError: A value does not work, or the weights cannot be read.
    """

    def __init__(
        self,
        image_size: int = 300,
        scales: Sequence[int] = (224, 299),
        weights: str = "box",
        cut: str = "Mixed_6e",
        pool: str = "avg",
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        initialisation: str = "torch",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] = ("horses", "humans"),
        threshold: float = 0.5,
        temperature: float = 1.0,
        certain_from: float = 0.5,
        far_from: float | None = None,
    ) -> None:
        super().__init__({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        check_number("model.image_size", image_size, int, at_least=8, at_most=4096)
        _check_scales(scales, pool)
        check_widths("model.hidden", hidden)
        check_number("model.dropout", dropout, float, at_least=0, below=1)
        if weights == CHECKPOINT and (mean is None or std is None):
            raise HorseHumanError(
                "model.weights=checkpoint is what a checkpoint says of itself: use box, a timm "
                "tag, a safetensors file, or random"
            )
        trunk = None if weights == CHECKPOINT else read_pretrained(weights)
        if trunk is not None:
            mean = trunk.mean if mean is None else mean
            std = trunk.std if std is None else std
        self.backbone = FrozenBackbone(cut, trunk)
        self.normalize = nn.ModuleList(Normalize(s, mean, std) for s in scales)
        self.settings.update(weights=CHECKPOINT, mean=to_plain(mean), std=to_plain(std))
        self.pool = Pool(pool)
        self.width = self._width(scales[0])
        *before, last = dense_layers(self.width, [*hidden, 1])
        self.head = nn.Sequential(*before, nn.Dropout(dropout), last)
        initialise(self.head, initialisation)
        if far_from is not None:
            check_number("model.far_from", far_from, float, above=0)
            self.class_means: Tensor
            self.register_buffer("class_means", torch.zeros(2, self.width))
        self.to(memory_format=torch.channels_last)

    @property
    def has_weights(self) -> bool:
        """Whether the backbone has weights, from wherever."""
        return not bool(next(self.backbone.parameters()).isnan().any())

    @property
    def heat_layer(self) -> str:
        """The backbone: nothing of ours stands between it and the pooling."""
        return "backbone"

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """What the frozen backbone sees of pictures, uint8 ``(N, 3, H, W)``.

        Returns:
            For each scale ``(N, C, H', W')``, float32, without gradients.
        """
        images = resize(images, self.image_size)
        return [self.backbone(preprocess(images)) for preprocess in self.normalize]

    def embed(self, images: Tensor) -> Tensor:
        """Features ``(N, F)``, float32, of pictures, uint8 ``(N, 3, H, W)``."""
        chunks = torch.split(images, CHUNK)
        return torch.cat([self.pool_features(self.forward_features(chunk)) for chunk in chunks])

    def neither_score(self, features: Tensor) -> Tensor:
        """:func:`class_mean_distance` of features ``(N, F)`` to the nearer class mean, by ``far_from``."""
        if self.settings["far_from"] is None:
            return super().neither_score(features)
        return class_mean_distance(features, self.class_means) / float(self.settings["far_from"])

    def feature_cache(self) -> FeatureCache:
        """:meth:`embed`, on the model's device and back on the CPU, that remembers in the cache."""

        def embed(images: Tensor) -> Tensor:
            return self.embed(images.to(self.device)).cpu()

        return FeatureCache(embed, self.width, self.feature_file())

    def feature_file(self) -> Path:
        """Where features of this backbone, seen through this preprocessing, are kept."""
        names = ("image_size", "scales", "cut", "pool", "mean", "std")
        key = cache_key(self.backbone, [self.settings[name] for name in names])
        return cache_dir() / "features" / f"{key}.sqlite"

    def _width(self, scale: int) -> int:
        if self.settings["pool"] != "flatten":
            return self.backbone.width * (2 if self.settings["pool"] == "avgmax" else 1)
        maps = self.backbone(torch.zeros(1, 3, scale, scale))
        return int(self.pool(maps).shape[1])


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """What :func:`class_mean_distance` measures from: ``(2, F)`` of features ``(N, F)``, labels 0 or 1."""
    damped = _power_normalize(features)
    return torch.stack([damped[labels == label].mean(0) for label in (0, 1)])


def class_mean_distance(features: Tensor, means: Tensor) -> Tensor:
    """Cosine distance, 0 to 1, to the nearer class mean: ``(N,)`` of ``(N, F)`` and ``(2, F)``.

    Features are not negative. Their fourth root is taken first (power normalisation, Perronnin et
    al. 2010), so that a few large ones do not drown which of the many are there at all. See
    docs/neither.md for what else was tried.
    """
    means = functional.normalize(means, dim=1)
    return 1 - (_power_normalize(features) @ means.T).amax(1)


def _power_normalize(features: Tensor) -> Tensor:
    return functional.normalize(features.clamp_min(0).sqrt().sqrt(), dim=1)


def _check_scales(scales: Sequence[int], pool: str) -> None:
    check_widths("model.scales", scales, at_least=1)
    for scale in scales:
        check_number("model.scales", scale, int, at_least=75, at_most=2048)
    if pool == "flatten" and len(scales) > 1:
        raise HorseHumanError(
            f"model.scales={list(scales)} does not go with model.pool=flatten, whose features have "
            "another length at each scale: give one scale, or use model.pool=avg"
        )


@dataclass(frozen=True)
class PretrainedWeights:
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


def bundled_backbone() -> Path:
    """The trunk in the package (see ``assets/ASSETS.md``)."""
    return asset(BACKBONE_FILE)


def read_pretrained(source: str) -> PretrainedWeights:
    """Read weights.

    Args:
        source: ``box``, ``random``, a timm tag of ``inception_v3``, or a safetensors file, which is
            taken to expect what Google's weights expect (mean and std 0.5).

    Raises:
        HorseHumanError: There is no such source, or it cannot be read.
    """
    if source == "random":
        return PretrainedWeights(source, None, *_expected(_BUNDLED_TAG))
    if source == "box":
        return PretrainedWeights(source, _read_file(bundled_backbone()), *_expected(_BUNDLED_TAG))
    if str(source).endswith(".safetensors"):
        mean, std = _expected(_BUNDLED_TAG)
        log.info("model.weights=%s: taken to expect mean %s and std %s", source, mean, std)
        return PretrainedWeights(source, _read_file(Path(source).expanduser()), mean, std)
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
    return PretrainedWeights(source, model.state_dict(), *_expected(source))


def load_pretrained(network: nn.Module, trunk: PretrainedWeights, cut: str) -> None:
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
    aside |= _UNUSED_LAYERS
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
            f"model.weights={printable(path)} cannot be read as safetensors: {error}"
        ) from error


def _expected(tag: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    config = timm.get_pretrained_cfg(f"inception_v3.{tag}")
    assert config is not None
    mean, std = config.mean, config.std
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
