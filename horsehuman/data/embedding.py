"""Features instead of pictures: a data set seen once through a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from horsehuman.data.augment import Augment, augment_each
from horsehuman.data.loading import Batch, KeptBatches
from horsehuman.errors import HorseHumanError
from horsehuman.processes import whole
from horsehuman.terminal import track

#: Pictures, uint8 ``(N, 3, S, S)``, to features, float32 ``(N, F)``, both on the CPU.
Embed = Callable[[Tensor], Tensor]


def check_views(views: int, augment: Augment | None) -> None:
    """Raise :class:`HorseHumanError` for views without augmentation, and the other way round."""
    if augment and views == 1:
        raise HorseHumanError(
            "data.augment has no effect on features computed once: set data.augment=null, "
            "model.views above 1, or model.cache_features=false"
        )
    if views > 1 and augment is None:
        raise HorseHumanError(
            f"model.views={views} needs something to augment with: set data.augment, such as "
            "'data.augment={flip: true, rotation: 15}', or model.views=1"
        )


def view_key(seed: int, view: int) -> str:
    """What makes a view of a picture, from 1 on, another than the other ones."""
    return f"{seed}-{view}"


def embed_all(loader: DataLoader[Batch], embed: Embed, what: str) -> KeptBatches:
    """Features and labels of all pictures, in order.

    Args:
        loader: Yields pictures and labels: this process's share.
        embed: What computes the features.
        what: Stands beside the progress bar.
    """
    found = [(embed(images), labels) for images, labels in track(loader, what, len(loader))]
    features, labels = (whole(torch.cat(part)) for part in zip(*found, strict=True))
    return KeptBatches(features, labels, range(len(labels)))


def embed_views(
    loader: DataLoader[Batch], embed: Embed, views: int, augment: Augment | None, seed: int
) -> KeptBatches:
    """Features of several views of each picture.

    Args:
        loader: Yields pictures and labels, in the same order each time.
        embed: What computes the features.
        views: The first is the picture itself; the others are augmented and depend on the picture,
            the seed and the number of the view alone.
        augment: How.
        seed: The run's seed.

    Returns:
        All pictures' first views, then all second ones, and so on, with their labels.
    """
    found = [embed_all(loader, embed, "computing features")]
    for view in range(1, views):

        def embed_view(images: Tensor, key: str = view_key(seed, view)) -> Tensor:
            assert augment is not None
            return embed(augment_each(augment, images, key))

        found.append(embed_all(loader, embed_view, f"view {view + 1} of {views}"))
    inputs = torch.cat([dataset.inputs for dataset in found])
    labels = torch.cat([dataset.labels for dataset in found])
    return KeptBatches(inputs, labels, range(len(labels)))
