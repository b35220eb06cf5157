"""Measure what happens to a frozen backbone if its batch norms stay in training mode.

    python scripts/studies/batch_norm.py

Trains a head on a plain copy of the bundled backbone (299 px, RMSprop, three epochs), first with
the copy in eval mode, then in training mode as ``model.train()`` leaves it. No weight of the copy
is trained. Prints the metrics on held-out subjects and on the test set, the copy in eval mode, and
how far the running means moved, in running standard deviations.
"""

from typing import Any

import lightning as L
import timm
import torch

from horsehuman import HorseHumanDataModule, InceptionClassifier
from horsehuman.models.inception import load_pretrained, read_pretrained


def train_head(data: HorseHumanDataModule, mode: str) -> dict[str, float]:
    """Train a head on a copy in ``eval`` or ``train`` mode; return metrics and ``shift``."""
    L.seed_everything(0)
    rmsprop = {"name": "RMSprop", "lr": 1e-3}
    model = InceptionClassifier(cache_features=False, optimizer=rmsprop, scales=[data.image_size])
    copy: Any = timm.create_model("inception_v3", features_only=True, out_indices=(3,))
    load_pretrained(copy, read_pretrained("box"), "Mixed_6e")
    model.network.backbone.trunk = copy.requires_grad_(False)
    if mode == "eval":
        copy.eval().train = lambda mode: copy
    norms: list[Any] = [x for x in copy.modules() if isinstance(x, torch.nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    trainer = L.Trainer(max_epochs=3, logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    metrics = {**trainer.validate(model, data)[0], **trainer.test(model, data)[0]}
    shift = [(n.running_mean - m) / n.running_var**0.5 for n, m in zip(norms, before, strict=True)]
    return {**metrics, "shift": float(torch.cat(shift).abs().mean())}


if __name__ == "__main__":
    data = HorseHumanDataModule(299)
    for mode in ("eval", "train"):
        print(mode, train_head(data, mode))
