"""Transfer learning: a frozen Inception-v3 trunk and a head of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from horsehuman.errors import check_choice, check_flag, check_number, check_widths
from horsehuman.models.classifier import BinaryClassifier
from horsehuman.models.features import FeatureCache, cache_key
from horsehuman.models.layers import Pool, dense_layers, initialise
from horsehuman.models.preprocess import Preprocess
from horsehuman.models.weights import CUTS, load_trunk, read_trunk
from horsehuman.runtime import cache_dir

#: What ``weights`` becomes in a checkpoint: they are in it, and nothing else is read.
CHECKPOINT = "checkpoint"


class FrozenBackbone(nn.Module):
    """timm's ``inception_v3`` up to a cut, which training cannot change.

    It has no gradients and never leaves eval mode, so the statistics of its batch norms stay
    what they are too.

    Args:
        cut: The last layer, a key of :data:`~horsehuman.models.weights.CUTS`.
    """

    def __init__(self, cut: str) -> None:
        super().__init__()
        check_choice("model.cut", cut, list(CUTS))
        self.trunk = timm.create_model(
            "inception_v3", features_only=True, out_indices=(list(CUTS).index(cut),)
        )
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in eval mode, whatever the module around it does."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` to maps; at ``Mixed_6e`` and 300 px ``(N, 768, 17, 17)``."""
        with torch.no_grad():
            maps: Tensor = self.trunk(x)[-1]
        return maps


class InceptionClassifier(BinaryClassifier):
    """``head(pool(maps(images)))`` on a frozen Inception-v3.

    Args:
        image_size: Height and width in pixels of the canonical picture, at least 75.
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
        cache_features: Compute the features of every picture once, before training, train the
            head on them, and keep them in the user's cache for other runs; needs data that
            augments nothing.
        optimizer: See :class:`~horsehuman.models.classifier.BinaryClassifier`, as all below.
        schedule: Of the learning rate.
        label_smoothing: In [0, 1).
        class_names: Names of the two classes.
        threshold: Probability from which on a picture is of class 1.
        temperature: Divides the logits.

    Raises:
        HorseHumanError: A value does not work, or the weights cannot be read.
    """

    def __init__(
        self,
        image_size: int = 300,
        weights: str = "box",
        cut: str = "Mixed_6e",
        pool: str = "avg",
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        initialisation: str = "torch",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        cache_features: bool = True,
        optimizer: Mapping[str, Any] = {"name": "AdamW", "lr": 0.03, "weight_decay": 0.01},
        schedule: str = "cosine",
        label_smoothing: float = 0.0,
        class_names: Sequence[str] = ("horses", "humans"),
        threshold: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(class_names, threshold, temperature, optimizer, schedule, label_smoothing)
        check_number("model.image_size", image_size, int, at_least=75)
        check_widths("model.hidden", hidden)
        check_number("model.dropout", dropout, float, at_least=0, below=1)
        check_flag("model.cache_features", cache_features)
        self.save_hyperparameters(logger=False)
        backbone = FrozenBackbone(cut)
        if weights != CHECKPOINT:
            trunk = read_trunk(weights)
            load_trunk(backbone.trunk, trunk, cut)
            mean, std = mean or trunk.mean, std or trunk.std
        self.hparams.update(weights=CHECKPOINT, mean=mean, std=std)
        self._keep_plain()
        self.preprocess = Preprocess(image_size, mean or (), std or ())
        self.backbone = backbone
        self.pool = Pool(pool)
        with torch.no_grad():
            maps = self.backbone(torch.zeros(1, 3, image_size, image_size))
        self.width = self.pool(maps).shape[1]
        *before, last = dense_layers(self.width, [*hidden, 1])
        self.head = nn.Sequential(*before, nn.Dropout(dropout), last)
        initialise(self.head, initialisation)
        self.to(memory_format=torch.channels_last)
        self.example_input_array = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N,)`` of pictures, uint8 ``(N, 3, H, W)``."""
        x = self.embed(images)  # N x F
        logits: Tensor = self.head(x)  # N x 1
        return logits.squeeze(1)

    def maps(self, images: Tensor) -> Tensor:
        """What the frozen backbone sees: ``(N, C, H', W')``, float32, without gradients."""
        maps: Tensor = self.backbone(self.preprocess(images))
        return maps

    def embed(self, images: Tensor) -> Tensor:
        """Features ``(N, F)``, float32, of pictures, uint8 ``(N, 3, H, W)``."""
        features: Tensor = self.pool(self.maps(images))
        return features

    def setup(self, stage: str) -> None:
        """Compute the features of the data's pictures, if they are to be cached."""
        super().setup(stage)
        replace = getattr(getattr(self.trainer, "datamodule", None), "replace_pictures", None)
        if stage == "fit" and self.hparams["cache_features"] and replace:
            self.to(self.trainer.strategy.root_device)
            keep = self.hparams["pool"] != "flatten"  # nearly 1 MB for each picture
            replace(self.feature_cache() if keep else lambda x: self.embed(x.to(self.device)).cpu())

    def feature_cache(self) -> FeatureCache:
        """:meth:`embed` that remembers, in the user's cache, what it has computed."""
        own = self.hparams
        settings = [own[name] for name in ("image_size", "cut", "pool", "mean", "std")]
        name = f"{cache_key(self.backbone, settings)}.sqlite"
        return FeatureCache(
            lambda images: self.embed(images.to(self.device)).cpu(),
            self.width,
            cache_dir() / "features" / name,
        )

    def _logits(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(inputs).squeeze(1) if inputs.ndim == 2 else self(inputs)
        return logits
