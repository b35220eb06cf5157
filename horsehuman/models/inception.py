"""The transfer-learning network: a frozen Inception-v3 backbone and a trainable head."""

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

#: Value of ``weights`` in a checkpoint: the weights are in the checkpoint, nothing else is read.
CHECKPOINT = "checkpoint"

#: Images that are embedded at a time. A larger batch is no faster on a CPU, and each image takes
#: some 20 MB.
BATCH_SIZE = 8

#: Layers after which the backbone can be cut, in the order of timm's feature levels, and the
#: top-level layers between the previous cut and this one (Szegedy et al. 2016, names as in
#: torchvision).
CUTS = {
    "Conv2d_2b_3x3": ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    "Conv2d_4a_3x3": ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    "Mixed_5d": ("Mixed_5b", "Mixed_5c", "Mixed_5d"),
    "Mixed_6e": ("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    "Mixed_7c": ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}

# Layers of Inception-v3 after the last cut.
_UNUSED_LAYERS = {"AuxLogits", "fc"}

# timm's tag of the bundled weights. They are Google's and expect this tag's preprocessing.
_BUNDLED_TAG = "tf_in1k"

log = logging.getLogger(__name__)


class Inception(Network):
    """Frozen Inception-v3 at several scales, average of the pooled features, and a head.

    Args:
        image_size: Height and width in pixels of the canonical image, 8 to 4096.
        scales: Sizes in pixels, 75 to 2048, at which the backbone embeds the canonical image. The
            features are averaged over the scales, so that they depend less on a subject's size.
        weights: ``box`` (the bundled backbone), a timm tag such as ``tv_in1k``, a safetensors
            file, or ``random``. Every checkpoint contains the weights: it stores ``checkpoint``
            here and is loaded without the original source.
        cut: Last layer of the backbone, a key of :data:`CUTS`.
        pool: Kind of :class:`~horsehuman.models.base.Pool`: ``avg``, ``max``, ``avgmax`` or
            ``flatten``.
        hidden: Widths of dense layers before the last one.
        dropout: Probability of dropping a feature before the last layer, in [0, 1).
        initialisation: Of the head, ``torch`` or ``keras``; see
            :func:`~horsehuman.models.base.initialise`.
        mean: Mean of each channel, on the scale 0 to 1; ``None`` for what the weights expect.
        std: Standard deviation of each channel, on the scale 0 to 1; ``None`` for what the
            weights expect.
        class_names: Names of class 0 and class 1.
        threshold: Smallest probability of class 1, in (0, 1), at which an image is of class 1.
        temperature: Divisor of the logits, above 0.
        certain_from: Probability of the predicted class, in [0.5, 1), below which a prediction
            is unsure.
        far_from: Distance to the nearer class mean, above 0, from which on an image is of neither
            class; ``None`` to compute no such score. See :func:`class_mean_distance`.

    Attributes:
        width: Number of features F.
        class_means: Mean features of each class, ``(2, F)``; only if ``far_from`` is given.

    Raises:
        HorseHumanError: If a value is of the wrong type or out of range, or the weights cannot be
            read.
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
                "model.weights=checkpoint is reserved for saved checkpoints: use box, a timm tag, "
                "a safetensors file, or random"
            )
        pretrained = None if weights == CHECKPOINT else read_pretrained(weights)
        if pretrained is not None:
            mean = pretrained.mean if mean is None else mean
            std = pretrained.std if std is None else std
        self.backbone = FrozenBackbone(cut, pretrained)
        self.normalize = nn.ModuleList(Normalize(s, mean, std) for s in scales)
        self.settings.update(weights=CHECKPOINT, mean=to_plain(mean), std=to_plain(std))
        self.pool = Pool(pool)
        self.width = self._feature_width(scales[0])
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
        """Whether the backbone has weights: pretrained, random, or loaded from a checkpoint."""
        return not bool(next(self.backbone.parameters()).isnan().any())

    @property
    def heat_layer(self) -> str:
        """Name of the backbone, whose output is pooled."""
        return "backbone"

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps of the backbone at each scale, without gradients.

        Args:
            images: uint8 of shape ``(N, 3, H, W)``.

        Returns:
            One float32 tensor ``(N, C, H', W')`` for each scale.
        """
        images = resize(images, self.image_size)
        return [self.backbone(preprocess(images)) for preprocess in self.normalize]

    def embed(self, images: Tensor) -> Tensor:
        """Compute features ``(N, F)``, float32, of uint8 images ``(N, 3, H, W)``, in batches."""
        batches = torch.split(images, BATCH_SIZE)
        return torch.cat([self.pool_features(self.forward_features(batch)) for batch in batches])

    def neither_score(self, features: Tensor) -> Tensor:
        """Compute the distance to the nearer class mean, divided by ``far_from``.

        Args:
            features: float32 of shape ``(N, F)``, not negative.

        Returns:
            Scores ``(N,)``. An image with a score of 1 or more is of neither class. All are 0 if
            ``far_from`` is ``None``.
        """
        if self.settings["far_from"] is None:
            return super().neither_score(features)
        return class_mean_distance(features, self.class_means) / float(self.settings["far_from"])

    def feature_cache(self) -> FeatureCache:
        """Return a cache that embeds on the model's device and returns features on the CPU."""

        def embed(images: Tensor) -> Tensor:
            return self.embed(images.to(self.device)).cpu()

        return FeatureCache(embed, self.width, self.feature_file())

    def feature_file(self) -> Path:
        """Return the cache file for this backbone, preprocessing and pooling."""
        names = ("image_size", "scales", "cut", "pool", "mean", "std")
        key = cache_key(self.backbone, [self.settings[name] for name in names])
        return cache_dir() / "features" / f"{key}.sqlite"

    def _feature_width(self, scale: int) -> int:
        """Return the number of features F; with ``flatten`` it depends on the scale in pixels."""
        if self.settings["pool"] != "flatten":
            return self.backbone.width * (2 if self.settings["pool"] == "avgmax" else 1)
        maps = self.backbone(torch.zeros(1, 3, scale, scale))
        return int(self.pool(maps).shape[1])


def _check_scales(scales: Sequence[int], pool: str) -> None:
    """Check ``scales`` of :class:`Inception`; ``flatten`` needs exactly one."""
    check_widths("model.scales", scales, at_least=1)
    for scale in scales:
        check_number("model.scales", scale, int, at_least=75, at_most=2048)
    if pool == "flatten" and len(scales) > 1:
        raise HorseHumanError(
            f"model.scales={list(scales)} does not work with model.pool=flatten, which gives "
            "another number of features at each scale: give one scale, or use model.pool=avg"
        )


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean features of each class for :func:`class_mean_distance`.

    Args:
        features: float32 of shape ``(N, F)``, not negative.
        labels: 0 or 1, ``(N,)``.

    Returns:
        Means of the power-normalised features of class 0 and class 1, ``(2, F)``.
    """
    normalised = _power_normalize(features)
    return torch.stack([normalised[labels == label].mean(0) for label in (0, 1)])


def class_mean_distance(features: Tensor, means: Tensor) -> Tensor:
    """Compute the cosine distance of features to the nearer class mean.

    The fourth root of the features is taken first (power normalisation, Perronnin et al. 2010),
    so that a few large features do not dominate the many small ones. docs/neither.md compares
    this score with others.

    Args:
        features: float32 of shape ``(N, F)``, not negative.
        means: Output of :func:`class_means`, ``(2, F)``.

    Returns:
        Distances ``(N,)``, 0 to 1.
    """
    means = functional.normalize(means, dim=1)
    return 1 - (_power_normalize(features) @ means.T).amax(1)


def _power_normalize(features: Tensor) -> Tensor:
    """Return the fourth roots of features ``(N, F)``, each row scaled to length 1."""
    return functional.normalize(features.clamp_min(0).sqrt().sqrt(), dim=1)


class FrozenBackbone(nn.Module):
    """timm's ``inception_v3`` up to a cut, without gradients.

    Batch norms are folded into the convolutions. The output therefore does not depend on training
    or eval mode, and training changes nothing in it.

    Args:
        cut: Last layer, a key of :data:`CUTS`.
        weights: The weights to load; ``None`` fills the parameters with NaN until a checkpoint is
            loaded.

    Attributes:
        width: Output channels C.
        trunk: timm's model up to the cut. State dicts contain this name.

    Raises:
        HorseHumanError: If there is no such cut, or the weights do not match the architecture.
    """

    def __init__(self, cut: str, weights: PretrainedWeights | None = None) -> None:
        super().__init__()
        check_choice("model.cut", cut, list(CUTS))
        random = weights is not None and weights.tensors is None
        # Random initialisation takes a second: skip it for weights that are replaced.
        with torch.device("cpu" if random else "meta"):
            backbone: Any = timm.create_model(
                "inception_v3", features_only=True, out_indices=(list(CUTS).index(cut),)
            )
        self.width = int(backbone.feature_info.channels()[0])
        self.trunk: nn.Module = backbone
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
        """Map ``(N, 3, S, S)`` to ``(N, C, H, W)``; 299 px to 768 x 17 x 17 at ``Mixed_6e``."""
        maps: Tensor = self.trunk(x)[-1]
        return maps


class ConvReLU(nn.Module):
    """Convolution with a bias and a ReLU, equal to timm's ``ConvNormAct`` in eval mode.

    In eval mode a batch norm is an affine map, which is folded into the convolution.

    Args:
        block: The convolution and the batch norm to fold, both in eval mode.
    """

    def __init__(self, block: ConvNormAct) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(block.conv, block.bn)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C', H', W')``."""
        y: Tensor = self.conv(x)
        return y.relu_()


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights of an Inception-v3 and the preprocessing that they expect.

    Attributes:
        source: Name of the weights as the user gave it, for error messages.
        tensors: Tensors by timm's parameter names; ``None`` for random weights.
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the scale 0 to 1.
    """

    source: str
    tensors: Mapping[str, Tensor] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def bundled_backbone() -> Path:
    """Return the file of the bundled backbone (see ``assets/ASSETS.md``)."""
    return asset(BACKBONE_FILE)


def read_pretrained(source: str) -> PretrainedWeights:
    """Read weights from the package, a file, or timm's hub or cache.

    Args:
        source: ``box`` (the bundled backbone), ``random``, a timm tag of ``inception_v3``, or a
            safetensors file. A file is assumed to expect the preprocessing of Google's weights
            (mean and std 0.5).

    Raises:
        HorseHumanError: If there is no such source, or it cannot be read.
    """
    mean, std = _expected_mean_std(_BUNDLED_TAG)
    if source == "random":
        return PretrainedWeights(source, None, mean, std)
    if source == "box":
        return PretrainedWeights(source, _read_safetensors(bundled_backbone()), mean, std)
    if str(source).endswith(".safetensors"):
        log.info("model.weights=%s: assuming mean %s and std %s", source, mean, std)
        return PretrainedWeights(source, _read_safetensors(Path(source).expanduser()), mean, std)
    tags = [name.partition(".")[2] for name in timm.list_pretrained("inception_v3.*")]
    if source not in tags:
        near = closest(str(source), ["box", "random", *tags])
        raise HorseHumanError(
            f"model.weights={source!r} is not known{near}: use box | random | {' | '.join(tags)} | "
            "a file that ends in .safetensors"
        )
    log.info("model.weights=%s: loading from timm's cache or hub", source)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        model = timm.create_model(f"inception_v3.{source}", pretrained=True)
    except Exception as error:  # The hub's clients have no common class of errors.
        raise HorseHumanError(
            f"cannot download model.weights={source} ({type(error).__name__}): if offline, use "
            "model.weights=box or a local safetensors file"
        ) from error
    return PretrainedWeights(source, model.state_dict(), *_expected_mean_std(source))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file that the option ``model.weights`` names."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise HorseHumanError(
            f"model.weights={printable(path)} cannot be read as safetensors: {error}"
        ) from error


def _expected_mean_std(tag: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation of each channel that timm's weights of a tag expect."""
    config = timm.get_pretrained_cfg(f"inception_v3.{tag}")
    assert config is not None
    mean, std = config.mean, config.std
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def load_pretrained(network: nn.Module, weights: PretrainedWeights, cut: str) -> None:
    """Load weights into a backbone, and require that all keys and shapes match.

    Layers after the cut, ``fc`` and ``AuxLogits`` are ignored. Random weights change nothing.

    Args:
        network: timm's ``inception_v3`` up to the cut.
        weights: The weights, which become float32.
        cut: Last layer of the network, a key of :data:`CUTS`.

    Raises:
        HorseHumanError: If a key is missing, unknown, or of another shape.
    """
    if weights.tensors is None:
        return
    levels = list(CUTS)
    ignored = {name for level in levels[levels.index(cut) + 1 :] for name in CUTS[level]}
    ignored |= _UNUSED_LAYERS
    state = network.state_dict()
    given = {key: t for key, t in weights.tensors.items() if key.split(".")[0] not in ignored}
    faults = {
        "missing": [key for key in state if key not in given],
        "unknown": [key for key in given if key not in state],
        "of wrong shape": [k for k in state if k in given and given[k].shape != state[k].shape],
    }
    for fault, keys in faults.items():
        if keys:
            raise HorseHumanError(
                f"model.weights={weights.source} does not match inception_v3 up to {cut}: "
                f"{len(keys)} keys {fault} (first: {keys[0]}); use weights of that architecture, "
                "or another model.cut"
            )
    float_tensors = {key: t.float() if t.is_floating_point() else t for key, t in given.items()}
    network.load_state_dict(float_tensors, assign=True)
