"""The base class of the networks, the layers they share, and the checkpoint format they use."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from horsehuman.data.transforms import check_images, resize
from horsehuman.decision import Scores
from horsehuman.errors import HorseHumanError, check_choice, check_number, check_widths

log = logging.getLogger(__name__)

#: Version of the checkpoint format. It increases when older code cannot read newer files.
FORMAT = 3


#: Precisions of a frozen backbone. With ``auto`` it is ``bfloat16`` if the device supports that.
PRECISIONS = ("auto", "float32", "bfloat16")


class Network(nn.Module, ABC):
    """Base class of the image classifiers: preprocessing, network and decision settings.

    A network takes uint8 RGB images of any size and returns one logit per image. It does not
    depend on Lightning, so that inference imports no training framework. A subclass defines
    :meth:`forward_features`, ``heat_layer``, ``pool`` and ``head``.

    Args:
        settings: The constructor arguments of the subclass by name. The base class reads
            ``image_size`` (pixels, 8 to 4096), ``hidden`` (widths of the dense layers before the
            last one), ``dropout`` (probability of dropping an input of a dense layer, in [0, 1)),
            ``class_names`` (names of class 0 and class 1), ``threshold`` (an image is of class 1
            if its probability of class 1 is at least this, in (0, 1)), ``temperature`` (see
            :meth:`calibrate`, above 0) and ``confidence_threshold`` (a prediction with a smaller
            probability is unsure, in [0.5, 1)).

    Attributes:
        settings: The same arguments as plain values, as they are stored in a checkpoint.
        image_size: Height and width in pixels of the canonical image, the size to store data at.
        heat_layer: Name of the module from whose output
            :func:`~horsehuman.inference.explain.explain` computes its heat map by default.
        precision: One of :data:`PRECISIONS`, for a frozen backbone; it is never saved.
        batch_size: Largest number of images that :meth:`score` computes at a time.
        pool: Module that maps ``(N, C, H', W')`` to features ``(N, F)``.
        head: Layers that map features ``(N, F)`` to logits ``(N, 1)``.

    Raises:
        HorseHumanError: If a value is of the wrong type or out of range.
    """

    heat_layer: str
    precision = "float32"
    batch_size = 256
    pool: "Pool"
    head: nn.Sequential

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = plain = to_plain(settings)
        self.image_size: int = plain["image_size"]
        names = plain["class_names"]
        if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != 2:
            raise HorseHumanError(f"model.class_names={names!r} does not work: give two names")
        check_number("model.image_size", self.image_size, int, at_least=8, at_most=4096)
        check_widths("model.hidden", plain["hidden"])
        check_number("model.dropout", plain["dropout"], float, at_least=0, below=1)
        check_number("model.threshold", plain["threshold"], float, above=0, below=1)
        check_number("model.temperature", plain["temperature"], float, above=0)
        confidence = plain["confidence_threshold"]
        check_number("model.confidence_threshold", confidence, float, at_least=0.5, below=1)

    @property
    def class_names(self) -> tuple[str, str]:
        """Names of class 0 and class 1."""
        first, second = self.settings["class_names"]
        return first, second

    @property
    def threshold(self) -> float:
        """Smallest probability of class 1, in (0, 1), at which an image is of class 1."""
        return float(self.settings["threshold"])

    @property
    def confidence_threshold(self) -> float:
        """Probability of the predicted class, in [0.5, 1), below which a prediction is unsure."""
        return float(self.settings["confidence_threshold"])

    def compute_dtype(self, device: torch.device | None = None) -> torch.dtype:
        """Return the data type in which a frozen backbone computes; float32 without one.

        Args:
            device: Device of the computation; by default that of the network.
        """
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @abstractmethod
    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps before pooling.

        Args:
            images: uint8 of shape ``(N, 3, H, W)``.

        Returns:
            One float32 tensor ``(N, C, H', W')`` for each variant of the images, such as a scale
            or the mirror image. H' and W' may differ between variants.
        """

    def pool_features(self, maps: Sequence[Tensor]) -> Tensor:
        """Pool the feature maps of each variant and average over variants.

        Args:
            maps: Output of :meth:`forward_features`.

        Returns:
            Features ``(N, F)``.
        """
        return torch.stack([self.pool(variant) for variant in maps]).mean(0)

    def embed(self, images: Tensor) -> Tensor:
        """Compute features ``(N, F)``, float32, of uint8 images ``(N, 3, H, W)``."""
        check_images(images)
        return self.pool_features(self.forward_features(images))

    def forward(self, images: Tensor) -> Tensor:
        """Compute uncalibrated logits ``(N,)`` of uint8 images ``(N, 3, H, W)``."""
        return self.forward_head(self.embed(images))

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute uncalibrated logits ``(N,)`` of features ``(N, F)``."""
        logits: Tensor = self.head(features)  # N x 1
        return logits.squeeze(1)

    def calibrate(self, logits: Tensor) -> Tensor:
        """Divide the distance of logits from the decision boundary by the temperature.

        The sigmoid of the result is a probability of class 1. Because the boundary, the logit of
        the threshold, does not move, no temperature changes a class.
        """
        boundary = math.log(self.threshold / (1 - self.threshold))
        return boundary + (logits - boundary) / float(self.settings["temperature"])

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Compute calibrated logits in eval mode, without gradients.

        Args:
            images: uint8 of shape ``(N, 3, H, W)`` on the model's device.

        Returns:
            float32 of shape ``(N,)``; the sigmoid is the probability of class 1.
        """
        return self.eval().calibrate(self(images))

    def score_maps(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the four scores of :class:`~horsehuman.decision.Scores`.

        Args:
            maps: Output of :meth:`forward_features`.

        Returns:
            Calibrated logits, probabilities of class 1, neither scores and both scores, each
            ``(N,)``.
        """
        features = self.pool_features(maps)
        logits = self.calibrate(self.forward_head(features))
        return logits, logits.sigmoid(), self.neither_score(features), self.both_score(maps)

    def neither_score(self, features: Tensor) -> Tensor:
        """Compute the neither scores ``(N,)`` of features ``(N, F)``.

        An image with a score of 0 or more is of neither class. The base class returns -1 for all.
        """
        return torch.full_like(features[:, 0], -1)

    def both_score(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute the both scores ``(N,)`` of the output of :meth:`forward_features`.

        An image with a score of 0 or more shows both classes. The base class returns -1 for all.
        """
        return torch.full_like(maps[0][:, 0, 0, 0], -1)

    def preprocess(self, picture: NDArray[np.uint8]) -> Tensor:
        """Resize an image, uint8 ``(H, W, 3)``, to the canonical image, uint8 ``(3, S, S)``."""
        return resize(torch.from_numpy(picture).permute(2, 0, 1), self.image_size)

    @torch.inference_mode()
    def score(self, pictures: Sequence[Tensor]) -> list[Scores]:
        """Score a batch of images in eval mode.

        Args:
            pictures: Output of :meth:`preprocess` for each image, uint8 ``(3, S, S)``.
        """
        images = torch.stack(list(pictures)).to(self.device)
        batches = torch.split(images, self.batch_size)
        scores = [self.eval().score_maps(self.forward_features(batch)) for batch in batches]
        return to_scores([torch.cat(parts) for parts in zip(*scores, strict=True)])


def to_scores(tensors: Sequence[Tensor]) -> list[Scores]:
    """Convert the output of :meth:`Network.score_maps` to one ``Scores`` per image."""
    return [Scores(*values) for values in zip(*(t.tolist() for t in tensors), strict=True)]


class Normalize(nn.Module):
    """Resize images and normalise their channels.

    Args:
        size: Height and width of the output in pixels.
        mean: Mean of each of the three channels, on the scale 0 to 1.
        std: Standard deviation of each channel, on the scale 0 to 1, above 0.

    Raises:
        HorseHumanError: If a value is of the wrong type or out of range.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        lowest = {"mean": {"at_least": -1000}, "std": {"above": 0}}
        for name, values in (("mean", mean), ("std", std)):
            if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 3:
                raise HorseHumanError(f"model.{name}={values!r} does not work: give three numbers")
            for value in values:
                check_number(f"model.{name}", value, float, **lowest[name], at_most=1000)
        self.size = size
        # In NumPy: tensor arithmetic under ``torch.device("meta")`` would import torch's compiler.
        deviation = np.array(std, np.float32).reshape(3, 1, 1)
        shift = (-np.array(mean)).astype(np.float32).reshape(3, 1, 1) / deviation
        self.register_buffer("scale", torch.from_numpy(1 / (255 * deviation)), persistent=False)
        self.register_buffer("shift", torch.from_numpy(shift), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``(N, 3, H, W)`` to ``(N, 3, size, size)``: ``(x / 255 - mean) / std``."""
        images = resize(images, self.size).contiguous(memory_format=torch.channels_last)
        return images.to(self.scale.dtype) * self.scale + self.shift


class Pool(nn.Module):
    """Pool feature maps to one feature vector per image.

    Args:
        kind: ``avg`` or ``max`` over all positions, ``avgmax`` (both, concatenated), or
            ``flatten`` (no pooling).

    Raises:
        HorseHumanError: If there is no such kind.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        check_choice("model.pool", kind, ("avg", "max", "avgmax", "flatten"))
        self.kind = kind

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C)``; ``avgmax``: ``(N, 2 C)``; ``flatten``: all values."""
        if self.kind == "flatten":
            return maps.flatten(1)
        if self.kind == "avg":
            return maps.mean((2, 3))
        if self.kind == "max":
            return maps.amax((2, 3))
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)

    def width(self, channels: int, size: int) -> int:
        """Return the number of features of maps ``(N, channels, size, size)``."""
        return channels * {"avg": 1, "max": 1, "avgmax": 2, "flatten": size**2}[self.kind]


def dense_layers(features: int, widths: Sequence[int]) -> Sequence[nn.Module]:
    """Build fully connected layers with ReLU between them.

    Args:
        features: Input features F.
        widths: Output features of each layer. The layers map ``(N, F)`` to ``(N, widths[-1])``.
    """
    pairs = pairwise([features, *widths])
    return [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())][:-1]


def initialise(network: nn.Module, scheme: str) -> None:
    """Initialise the weights of every convolution and dense layer in place.

    Args:
        network: The module that contains the layers.
        scheme: ``torch`` keeps the weights that PyTorch has drawn; ``keras`` is Keras's default,
            Glorot uniform weights (Glorot and Bengio 2010) and zero biases.

    Raises:
        HorseHumanError: If there is no such scheme.
    """
    check_choice("model.initialisation", scheme, ("torch", "keras"))
    for layer in network.modules():
        if scheme == "keras" and isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def to_plain(value: Any) -> Any:
    """Copy a value as str, int, float, bool, list, dict or None, so that it can be stored.

    NumPy scalars and arrays become Python numbers and lists, mappings become dicts with string
    keys, and other sequences become lists.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(item) for item in value]
    return value


def check_origin(checkpoint: Mapping[str, Any]) -> str:
    """Check that this version can read a checkpoint, and return its classifier's class name.

    Format 2 is readable; see :func:`upgrade_settings`.

    Args:
        checkpoint: The loaded checkpoint.

    Raises:
        HorseHumanError: If the checkpoint was written by another program or has another format.
    """
    origin = checkpoint.get("horsehuman")
    if not isinstance(origin, dict) or not {"format", "classifier"} <= origin.keys():
        raise HorseHumanError("this checkpoint was not written by horsehuman")
    if type(origin["format"]) is not int:
        raise HorseHumanError("this checkpoint has no valid format: copy or train it again")
    if origin["format"] not in (2, FORMAT):
        remedy = "upgrade horsehuman" if origin["format"] > FORMAT else "train it again"
        found = f"this checkpoint has format {origin['format']}"
        raise HorseHumanError(f"{found}, this code reads 2 and {FORMAT}: {remedy}")
    return str(origin["classifier"])


def upgrade_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint of an earlier version under their present names.

    Format 2 had another score for *neither* (``far_from``), which is dropped and logged.
    """
    upgraded = {key: value for key, value in settings.items() if key not in ("far_from", "views")}
    if "certain_from" in upgraded:
        upgraded["confidence_threshold"] = upgraded.pop("certain_from")
    if settings.get("far_from") is not None:
        log.warning("this checkpoint has format 2: it cannot say neither or both; train it again")
    return upgraded
