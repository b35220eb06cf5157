"""What both networks share: from pictures to one logit, and from that to an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from horsehuman.data.transforms import resize
from horsehuman.decision import Scores
from horsehuman.errors import HorseHumanError, check_choice, check_number

#: Format of our part of a checkpoint; grows when older code could not read a newer file.
FORMAT = 2


class Network(nn.Module, ABC):
    """A network that eats pictures, with all that belongs to its answers.

    It knows nothing of training, so that predicting imports no training framework. A subclass
    defines :meth:`forward_features`, ``pool`` and ``head``.

    Args:
        settings: The arguments of the subclass, with ``class_names`` (of class 0 and class 1),
            ``threshold`` (from this probability on a picture is of class 1), ``temperature``
            (logits are divided by it before they become probabilities) and ``certain_from``
            (answers with a smaller probability are unsure) among them.

    Attributes:
        settings: The same as plain values: what a checkpoint says of the network.

    Raises:
        HorseHumanError: A value does not work.
    """

    head: nn.Sequential

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings: dict[str, Any] = to_plain(settings)
        names = self.settings["class_names"]
        if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != 2:
            raise HorseHumanError(f"model.class_names={names!r} does not work: give two")
        check_number("model.threshold", self.settings["threshold"], float, above=0, below=1)
        check_number("model.temperature", self.settings["temperature"], float, above=0)
        check_number(
            "model.certain_from", self.settings["certain_from"], float, at_least=0.5, below=1
        )

    @property
    def class_names(self) -> tuple[str, str]:
        """Names of class 0 and class 1."""
        first, second = self.settings["class_names"]
        return first, second

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the canonical picture, which data should be kept at."""
        return int(self.settings["image_size"])

    @property
    def threshold(self) -> float:
        """Probability from which on a picture is of class 1."""
        return float(self.settings["threshold"])

    @property
    def confidence_threshold(self) -> float:
        """Probability of an answer, at least 0.5, below which it is unsure."""
        return float(self.settings["certain_from"])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    pool: nn.Module

    @property
    @abstractmethod
    def heat_layer(self) -> str:
        """The module whose maps :func:`~horsehuman.explain.explain` makes heat of."""

    @abstractmethod
    def forward_features(self, images: Tensor) -> list[Tensor]:
        """What the last layer before pooling sees of pictures, uint8 ``(N, 3, H, W)``.

        Returns:
            For each way of looking at a picture ``(N, C, H', W')``, float32.
        """

    def pool_features(self, maps: Sequence[Tensor]) -> Tensor:
        """Features ``(N, F)`` of maps: pooled, and averaged over the ways of looking."""
        return torch.stack([self.pool(own) for own in maps]).mean(0)

    def embed(self, images: Tensor) -> Tensor:
        """Features ``(N, F)``, float32, of pictures, uint8 ``(N, 3, H, W)``."""
        return self.pool_features(self.forward_features(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N,)`` of pictures, uint8 ``(N, 3, H, W)``."""
        return self.forward_head(self.embed(images))

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits ``(N,)`` of features ``(N, F)``."""
        logits: Tensor = self.head(features)  # N x 1
        return logits.squeeze(1)

    def calibrate(self, logits: Tensor) -> Tensor:
        """Divide logits by the temperature; the sigmoid of what comes out is a probability."""
        return logits / float(self.settings["temperature"])

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Calibrated logits of pictures, in eval mode.

        Args:
            images: uint8 of shape ``(N, 3, H, W)`` on the model's device.

        Returns:
            float32 of shape ``(N,)``; the sigmoid is the probability of class 1.
        """
        self.eval()
        return self.calibrate(self(images))

    def probabilities(self, images: Tensor) -> Tensor:
        """Probability of class 1, float32 ``(N,)``, 0 to 1; see :meth:`logits`."""
        return self.logits(images).sigmoid()

    def score_features(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Calibrated logits, probabilities of class 1 and strangeness, ``(N,)`` each, of features.

        See :class:`~horsehuman.prediction.Scores` for what they mean.
        """
        logits = self.calibrate(self.forward_head(features))
        return logits, logits.sigmoid(), self.neither_score(features)

    def neither_score(self, features: Tensor) -> Tensor:
        """How far features ``(N, F)`` are from all training pictures, ``(N,)``; 1 is too far.

        It is 0 for a network that cannot tell.
        """
        return torch.zeros_like(features[:, 0])

    def preprocess(self, picture: NDArray[np.uint8]) -> Tensor:
        """The canonical picture, uint8 ``(3, S, S)``, of one that is uint8 ``(H, W, 3)``."""
        return resize(torch.from_numpy(picture).permute(2, 0, 1), self.image_size)

    @torch.inference_mode()
    def score(self, pictures: Sequence[Tensor]) -> list[Scores]:
        """Answer a batch of what :meth:`preprocess` gives, in eval mode."""
        features = self.eval().embed(torch.stack(list(pictures)).to(self.device))
        return to_scores(self.score_features(features))


def to_scores(found: Sequence[Tensor]) -> list[Scores]:
    """What :meth:`Network.score_features` gives, picture by picture."""
    return [Scores(*each) for each in zip(*(t.tolist() for t in found), strict=True)]


def to_plain(value: Any) -> Any:
    """Copy a value as str, int, float, bool, list, dict or None; NumPy's become Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Sequence):
        return [to_plain(item) for item in value]
    return value


def check_origin(checkpoint: Mapping[str, Any], classifier: str | None = None) -> str:
    """Check that this code can read a checkpoint.

    Args:
        checkpoint: The loaded file.
        classifier: Name of the class that wants it; ``None`` for any.

    Returns:
        Name of the class that it belongs to.

    Raises:
        HorseHumanError: It is another program's, another class's, or of another format.
    """
    origin = checkpoint.get("horsehuman")
    if not isinstance(origin, dict) or not {"format", "classifier"} <= origin.keys():
        raise HorseHumanError("this checkpoint was not written by horsehuman")
    if origin["format"] != FORMAT:
        remedy = "upgrade horsehuman" if origin["format"] > FORMAT else "train it again"
        raise HorseHumanError(
            f"this checkpoint has format {origin['format']}, this code reads {FORMAT}: {remedy}"
        )
    name = str(origin["classifier"])
    if classifier not in (None, name):
        raise HorseHumanError(f"this checkpoint holds a {name}, no {classifier}")
    return name


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


class Normalize(nn.Module):
    """Pictures of any size as normalised tensors.

    Args:
        size: Height and width in pixels of the canonical picture.
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the scale 0 to 1.

    Raises:
        HorseHumanError: A value does not work.
    """

    def __init__(
        self, size: int, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> None:
        super().__init__()
        check_number("model.image_size", size, int, at_least=8, at_most=4096)
        for name, values, above in (("mean", mean, None), ("std", std, 0)):
            if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 3:
                raise HorseHumanError(f"model.{name}={values!r} does not work: give three numbers")
            for value in values:
                check_number(f"model.{name}", value, float, above=above)
        self.size = size
        self.scale: Tensor
        self.shift: Tensor
        scale = 1 / (255 * torch.tensor(std))
        shift = -torch.tensor(mean) / torch.tensor(std)
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``(N, 3, H, W)`` to ``(N, 3, size, size)``, ``(x / 255 - mean) / std``."""
        images = resize(images, self.size).contiguous(memory_format=torch.channels_last)
        return images.to(self.scale.dtype) * self.scale + self.shift
