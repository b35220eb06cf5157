"""The plain way, for the benchmark: a page of Lightning, timm and torchvision with their defaults.

The same pictures and batch size as ours; the notebook's augmentation, loss and optimizer; its CNN,
or the same frozen trunk at one scale with a linear head: what a user would write today.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAccuracy
from torchvision import datasets, transforms

from horsehuman.data.archives import bundled_archives, unpack
from horsehuman.models.inception import bundled_backbone

BATCH = 32


def plain_cnn() -> nn.Sequential:
    """The notebook's network: pictures ``(N, 3, 300, 300)``, normalised, to ``(N, 1)``."""
    layers: list[nn.Module] = []
    for before, after in ((3, 64), (64, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(before, after, 3), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Dropout(0.2), nn.Linear(65_536, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 1))


def plain_trunk() -> Any:
    """Timm's Inception-v3 up to ``Mixed_6e`` with the weights of the box, frozen."""
    trunk = timm.create_model("inception_v3", features_only=True, out_indices=(3,))
    trunk.load_state_dict(safetensors.torch.load_file(bundled_backbone()))
    return trunk.eval().requires_grad_(False)


class PlainModule(L.LightningModule):
    """A module as every tutorial has it.

    Args:
        model: ``cnn`` or ``inception``.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.trunk = plain_trunk() if model == "inception" else None
        self.head = nn.Linear(768, 1) if model == "inception" else plain_cnn()
        self.train_acc, self.val_acc = BinaryAccuracy(), BinaryAccuracy()

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, S, S)`` to logits ``(N,)``."""
        x = images if self.trunk is None else self.trunk(images)[-1].mean((2, 3))
        logits: Tensor = self.head(x)
        return logits.squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        return self._step(batch, "train", self.train_acc)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss of a batch, logged."""
        self._step(batch, "val", self.val_acc)

    def _step(self, batch: Any, stage: str, accuracy: BinaryAccuracy) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        accuracy(logits.sigmoid(), labels)
        self.log(f"{stage}_loss", loss)
        self.log(f"{stage}_acc", accuracy, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The notebook's optimizer."""
        return torch.optim.RMSprop(self.head.parameters(), lr=1e-4)


def plain_loader(model: str, split: str) -> DataLoader[Any]:
    """Pictures from the folder, augmented as in the notebook, decoded by two workers."""
    size = 299 if model == "inception" else 300
    steps: list[Any] = [transforms.Resize((size, size))]
    if split == "train":
        steps += [
            transforms.RandomAffine(40, translate=(0.2, 0.2), scale=(0.8, 1.2), shear=0.2),
            transforms.RandomHorizontalFlip(),
        ]
    steps += [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    folder = datasets.ImageFolder(unpack(bundled_archives()) / split, transforms.Compose(steps))
    return DataLoader(folder, BATCH, shuffle=split == "train", num_workers=2)
