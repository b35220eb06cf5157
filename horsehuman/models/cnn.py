"""The hand-built convolutional network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from horsehuman.errors import HorseHumanError, check_flag, check_number, check_widths
from horsehuman.models.base import Network, Normalize, Pool, dense_layers, initialise


class CNN(Network):
    """Convolutional network: blocks of 3x3 convolutions with max pooling, then a dense head.

    The defaults are a small modern network. ``configs/experiment/notebook_cnn.yaml`` holds the
    arguments of the original notebook's network.

    Args:
        image_size: Height and width in pixels that images are resized to, 8 to 4096.
        channels: Output channels of each block, at least one block. Each block ends with 2x2 max
            pooling, which halves the maps; the first one also has the stem's stride.
        convolutions: Convolutions in each block, 1 to 64.
        stem_kernel: Kernel size of the first convolution in pixels, 1 to ``image_size``.
        stem_stride: Stride of the first convolution in pixels, at least 1.
        padding: Pad convolutions by half their kernel size, rounded down: those with an odd kernel
            and stride 1 keep the size. Without padding, every kernel above 1 shrinks the maps.
        batch_norm: Add batch norm after each convolution, before the ReLU.
        pool: Kind of :class:`~horsehuman.models.base.Pool`: ``avg``, ``max``, ``avgmax`` or
            ``flatten``.
        hidden: Widths of dense layers before the last one.
        dropout: Probability of dropping an input of the first dense layer, in [0, 1).
        mirror: Outside training, average the features of an image and its mirror image. A
            prediction takes twice the time and does not depend on which way the subject faces.
        initialisation: ``torch`` or ``keras``; see :func:`~horsehuman.models.base.initialise`.
        mean: Mean of each channel, on the scale 0 to 1; it is subtracted.
        std: Standard deviation of each channel, on the scale 0 to 1; channels are divided by it.
        class_names: Names of class 0 and class 1.
        threshold: Smallest probability of class 1, in (0, 1), at which an image is of class 1.
        temperature: See :meth:`~horsehuman.models.base.Network.calibrate`, above 0.
        confidence_threshold: Probability of the predicted class, in [0.5, 1), below which a
            prediction is unsure.

    Raises:
        HorseHumanError: If a value is of the wrong type or out of range, or ``image_size`` is too
            small for the number of blocks.
    """

    def __init__(
        self,
        image_size: int = 96,
        channels: Sequence[int] = (24, 48, 96, 128),
        convolutions: int = 2,
        stem_kernel: int = 5,
        stem_stride: int = 2,
        padding: bool = True,
        batch_norm: bool = True,
        pool: str = "avgmax",
        hidden: Sequence[int] = (),
        dropout: float = 0.3,
        mirror: bool = True,
        initialisation: str = "torch",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        class_names: Sequence[str] = ("horses", "humans"),
        threshold: float = 0.5,
        temperature: float = 1.0,
        confidence_threshold: float = 0.5,
    ) -> None:
        # The arguments by name: no other local variables than the excluded ones exist yet.
        super().__init__({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        self.normalize = Normalize(image_size, mean, std)
        check_widths("model.channels", channels, at_least=1)
        check_number("model.convolutions", convolutions, int, at_least=1, at_most=64)
        check_number("model.stem_kernel", stem_kernel, int, at_least=1, at_most=image_size)
        check_number("model.stem_stride", stem_stride, int, at_least=1)
        for name in ("padding", "mirror", "batch_norm"):
            check_flag(f"model.{name}", self.settings[name])
        self.features, size = self._build_layers()
        if size < 1:
            reason = f"is too small for {len(channels)} blocks: increase it, or use fewer channels"
            raise HorseHumanError(f"model.image_size={image_size} {reason}")
        # The layer before the last max pooling, whose maps are twice as large.
        self.heat_layer = f"features.{len(self.features) - 3}"
        self.pool = Pool(pool)
        width = self.pool.width(channels[-1], size)
        self.head = nn.Sequential(nn.Dropout(dropout), *dense_layers(width, [*hidden, 1]))
        initialise(self, initialisation)
        self.to(memory_format=torch.channels_last)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps of the last block.

        Args:
            images: uint8 of shape ``(N, 3, H, W)``.

        Returns:
            One float32 tensor ``(N, C, H', W')``. Outside training and with ``mirror``, a second
            one follows: the maps of the mirrored images, which are not mirrored back.
        """
        x = self.normalize(images)  # N x 3 x S x S
        add_mirrored = self.settings["mirror"] and not self.training
        return [self.features(x), self.features(x.flip(3))] if add_mirrored else [self.features(x)]

    def _build_layers(self) -> tuple[nn.Sequential, int]:
        """Return the layers of all blocks, and the size of their output; below 1 if it is empty."""
        settings = self.settings
        stem = settings["stem_kernel"], settings["stem_stride"]
        layers: list[nn.Module] = []
        in_channels, size = 3, self.image_size
        for block, channels in enumerate(settings["channels"]):
            for index in range(settings["convolutions"]):
                kernel, stride = stem if block == index == 0 else (3, 1)
                padding = kernel // 2 if settings["padding"] else 0
                bias = not settings["batch_norm"]
                layers.append(nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=bias))
                if settings["batch_norm"]:
                    layers.append(nn.BatchNorm2d(channels))
                # Pooling before ReLU gives the same result, and ReLU gets a quarter of the values.
                if index == settings["convolutions"] - 1:
                    layers.append(nn.MaxPool2d(2))
                layers.append(nn.ReLU(inplace=True))
                in_channels, size = channels, (size + 2 * padding - kernel) // stride + 1
            size //= 2
        return nn.Sequential(*layers), size
