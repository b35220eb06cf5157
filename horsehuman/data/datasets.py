"""From records to batches: decoded once and kept, or decoded on demand."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from horsehuman.data.images import PictureError, read_picture
from horsehuman.data.records import Record
from horsehuman.data.transforms import Augment, augment_each, resize
from horsehuman.distributed import gather_sharded, rank, shard_indices, world_size
from horsehuman.errors import HorseHumanError, printable
from horsehuman.runtime import track

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]

#: Pictures, uint8 ``(N, 3, S, S)``, to features, float32 ``(N, F)``, both on the CPU.
Embed = Callable[[Tensor], Tensor]


def decode(path: Path, size: int) -> Tensor:
    """A file as its canonical picture, uint8 ``(3, size, size)``; raises ``PictureError``."""
    return resize(torch.from_numpy(read_picture(path)).permute(2, 0, 1), size)


def decode_all(
    records: Sequence[Record], size: int, *, keep: bool, skip_bad: bool
) -> tuple[list[Record], Tensor | None, dict[str, str]]:
    """Look at every file, on all processors.

    Args:
        records: The pictures.
        size: Height and width of the canonical picture in pixels.
        keep: Whether to keep the pictures, or only to learn which can be read.
        skip_bad: Leave out files that cannot be read.

    Returns:
        The records that can be read; their pictures, uint8 of shape ``(N, 3, size, size)``, or
        ``None``; the files left out and why.

    Raises:
        HorseHumanError: Files cannot be read, and are not to be left out or are all of a class.
    """
    kept = torch.empty(len(records), 3, size, size, dtype=torch.uint8) if keep else None
    bad: dict[int, str] = {}

    def look(index: int) -> None:
        try:
            picture = decode(records[index].path, size)
        except PictureError as error:
            bad[index] = str(error)
        else:
            if kept is not None:
                kept[index] = picture

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = pool.map(look, range(len(records)))
        for _ in track(looks, "reading pictures", len(records)):
            pass
    if not bad:
        return list(records), kept, {}
    good = [index for index in range(len(records)) if index not in bad]
    _report_unreadable(records, good, dict(sorted(bad.items())), skip_bad)
    skipped = {str(records[index].path): bad[index] for index in sorted(bad)}
    return [records[i] for i in good], None if kept is None else kept[good], skipped


def _report_unreadable(
    records: Sequence[Record], good: Sequence[int], bad: dict[int, str], skip_bad: bool
) -> None:
    first = "; ".join(list(bad.values())[:3])
    if not skip_bad:
        raise HorseHumanError(
            f"{len(bad)} of {len(records)} pictures cannot be read ({first}): mend or remove "
            "them, or leave them out with data.skip_bad=true"
        )
    left = {(records[index].label, records[index].split) for index in good}
    for record in (records[index] for index in bad):
        if (record.label, record.split) not in left:
            raise HorseHumanError(
                f"no picture of the class of {printable(record.path)} can be read in "
                f"{record.split or 'the set'} ({first}): mend them"
            )
    log.warning("left out %d of %d pictures (%s)", len(bad), len(records), first)


class InMemoryDataset(Dataset[Batch]):
    """Batches out of memory.

    Args:
        inputs: Pictures or features of all records, first dimension N.
        labels: float32 ``(N,)``.
        indices: Which of them belong to this data set.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, indices: Sequence[int]) -> None:
        self.inputs, self.labels = inputs, labels
        self.indices = torch.tensor(indices, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, chosen: list[int]) -> Batch:
        where = self.indices[chosen]
        return self.inputs[where], self.labels[where]


class OnDemandDataset(Dataset[Batch]):
    """Batches decoded on demand, for sets that memory does not hold.

    Args:
        records: All records.
        size: Height and width of the canonical picture in pixels.
        indices: Which of them belong to this data set.
    """

    def __init__(self, records: Sequence[Record], size: int, indices: Sequence[int]) -> None:
        self.records, self.size = [records[index] for index in indices], size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, chosen: list[int]) -> Batch:
        records = [self.records[index] for index in chosen]
        pictures = torch.stack([decode(record.path, self.size) for record in records])
        return pictures, torch.tensor([float(record.label) for record in records])


BatchDataset = InMemoryDataset | OnDemandDataset


class ShardSampler(DistributedSampler[int]):
    """This process's share of ``count`` samples, in order: each is one process's, none is repeated.

    It is of a kind that Lightning leaves as it is.

    Args:
        count: Number of samples.
    """

    def __init__(self, count: int) -> None:
        super().__init__(range(count), world_size(), rank(), shuffle=False)  # type: ignore[arg-type]
        self.chosen = shard_indices(count)

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[int]:
        return iter(self.chosen)


class EpochSampler(ShardSampler):
    """An order that depends on the seed and the epoch alone, so that a resumed run repeats it.

    Each of several processes gets its share of each batch: together they see the batches that one
    process alone would. What is too little for a last whole batch waits for another epoch; where
    there is no whole one, and it cannot be shared evenly, the first samples are seen twice, fewer
    than there are processes.

    Args:
        count: Number of samples.
        batch_size: Of all processes together, a multiple of their number.
        seed: The run's seed.
        epoch: Gives the index of the epoch that is about to start.
    """

    def __init__(self, count: int, batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(count)
        self.count, self.base, self.epoch_to_come = count, 1_000_003 * seed, epoch
        whole = count - count % batch_size if count > batch_size else count
        self.each = -(-whole // world_size())

    def __len__(self) -> int:
        return self.each

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.base + self.epoch_to_come())
        order = torch.randperm(self.count, generator=generator).tolist()
        order = [*order, *order][: self.each * world_size()]
        return iter(order[rank() :: world_size()])


def make_loader(
    dataset: BatchDataset,
    order: Iterable[int],
    batch_size: int,
    num_workers: int,
) -> DataLoader[Batch]:
    """A loader of whole batches; workers decode what is not kept in memory."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=order,
        num_workers=0 if isinstance(dataset, InMemoryDataset) else num_workers,
        collate_fn=_identity,
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),  # an iterator draws a number: not from the run's stream
    )


def _leave_signals_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _identity(batch: Any) -> Any:
    return batch


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


def embed_all(loader: DataLoader[Batch], embed: Embed, what: str) -> InMemoryDataset:
    """Features and labels of all pictures, in order.

    Args:
        loader: Yields pictures and labels: this process's share.
        embed: What computes the features.
        what: Stands beside the progress bar.
    """
    found = [(embed(images), labels) for images, labels in track(loader, what, len(loader))]
    features, labels = (gather_sharded(torch.cat(part)) for part in zip(*found, strict=True))
    return InMemoryDataset(features, labels, range(len(labels)))


def embed_views(
    loader: DataLoader[Batch], embed: Embed, views: int, augment: Augment | None, seed: int
) -> InMemoryDataset:
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
    return InMemoryDataset(inputs, labels, range(len(labels)))
