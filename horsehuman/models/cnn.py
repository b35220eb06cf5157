"""The hand-built network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from horsehuman.errors import HorseHumanError, check_flag, check_number, check_widths
from horsehuman.models.base import Network, Normalize, Pool, dense_layers, initialise


class CNN(Network):
    """Blocks of 3x3 convolutions, each block halved by max pooling, and a dense head.

    The defaults are a small modern network; the original notebook's is another setting of the
    same (``configs/experiment/notebook_cnn.yaml``).

    Args:
        image_size: Height and width in pixels that pictures are resized to.
        channels: Output channels of each block.
        convolutions: Convolutions in each block.
        stem_kernel: Kernel size of the very first convolution.
        stem_stride: Stride of the very first convolution.
        padding: Keep the size in convolutions (``same``); otherwise they shrink it (``valid``).
        batch_norm: Batch norm between each convolution and its ReLU.
        pool: See :class:`~horsehuman.models.layers.Pool`.
        hidden: Widths of dense layers before the last one.
        dropout: Probability with which features are dropped before the dense layers, in [0, 1).
        mirror: Outside training, average the features of a picture and of its mirror image: twice
            the time for an answer that does not depend on where a figure looks.
        initialisation: ``torch`` or ``keras``; see
            :func:`~horsehuman.models.layers.initialise`.
        mean: Mean of each channel, subtracted; pictures are on the scale 0 to 1.
        std: Standard deviation of each channel, divided by.
        class_names: Names of the two classes.
        threshold: Probability from which on a picture is of class 1.
        temperature: Divides the logits.
        certain_from: Probability of an answer, at least 0.5, below which it is unsure.

    Raises:
        HorseHumanError: A value does not work.
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
        certain_from: float = 0.5,
    ) -> None:
        super().__init__({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        self.normalize = Normalize(image_size, mean, std)
        check_widths("model.channels", channels, at_least=1)
        check_widths("model.hidden", hidden)
        check_number("model.convolutions", convolutions, int, at_least=1, at_most=64)
        check_number("model.stem_kernel", stem_kernel, int, at_least=1, at_most=image_size)
        check_number("model.stem_stride", stem_stride, int, at_least=1)
        check_flag("model.padding", padding)
        check_flag("model.mirror", mirror)
        check_flag("model.batch_norm", batch_norm)
        check_number("model.dropout", dropout, float, at_least=0, below=1)
        self.features = self._blocks()
        self.pool = Pool(pool)
        width = self._width()
        self.head = nn.Sequential(nn.Dropout(dropout), *dense_layers(width, [*hidden, 1]))
        initialise(self, initialisation)
        self.to(memory_format=torch.channels_last)

    @property
    def heat_layer(self) -> str:
        """What the last block has before its pooling, which halves the maps, and its ReLU."""
        return f"features.{len(self.features) - 3}"

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The last maps of pictures, uint8 ``(N, 3, H, W)``: ``(N, C, H', W')``, float32.

        Outside training, and with ``mirror``, those of the mirrored pictures come second, mirrored
        as these are.
        """
        x = self.normalize(images)  # N x 3 x S x S
        both = self.settings["mirror"] and not self.training
        return [self.features(x), self.features(x.flip(3))] if both else [self.features(x)]

    def _blocks(self) -> nn.Sequential:
        own = self.settings
        layers: list[nn.Module] = []
        before = 3
        for block, width in enumerate(own["channels"]):
            for repeat in range(own["convolutions"]):
                stem = block == repeat == 0
                kernel = own["stem_kernel"] if stem else 3
                layers.append(
                    nn.Conv2d(
                        before,
                        width,
                        kernel,
                        stride=own["stem_stride"] if stem else 1,
                        padding=kernel // 2 if own["padding"] else 0,
                        bias=not own["batch_norm"],
                    )
                )
                layers += [nn.BatchNorm2d(width)] if own["batch_norm"] else []
                # ReLU and maximum commute: ReLU last has a quarter of the values to do.
                layers += [nn.MaxPool2d(2)] if repeat == own["convolutions"] - 1 else []
                layers.append(nn.ReLU(inplace=True))
                before = width
        return nn.Sequential(*layers)

    def _width(self) -> int:
        """Number of features that reach the head; an error if the pictures are too small."""
        size = self.image_size
        try:
            with torch.no_grad():
                maps = self.features.eval()(torch.zeros(1, 3, size, size))
        except RuntimeError as error:
            blocks = len(self.settings["channels"])
            raise HorseHumanError(
                f"model.image_size={size} is too small for {blocks} blocks: "
                "give more pixels, or fewer model.channels"
            ) from error
        self.features.train()
        return int(self.pool(maps).shape[1])
