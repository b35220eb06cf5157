"""Datasets, samplers and loaders: records to batches of images, or of features computed once.

Images are decoded once and kept in memory, or decoded again whenever a batch needs them.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from horsehuman.data.images import PictureError, read_picture
from horsehuman.data.records import Record, file_digest
from horsehuman.data.transforms import resize
from horsehuman.distributed import gather_sharded, rank, world_size
from horsehuman.errors import HorseHumanError, printable
from horsehuman.runtime import track

log = logging.getLogger(__name__)

#: Images uint8 ``(N, 3, S, S)`` or features float32 ``(N, F)``, and labels float32 ``(N,)``.
Batch = tuple[Tensor, Tensor]

#: Function from images, uint8 ``(N, 3, S, S)``, to features, float32 ``(N, F)``, both on the CPU.
Embed = Callable[[Tensor], Tensor]


def decode(path: Path, size: int) -> Tensor:
    """Read a file as its canonical image, uint8 ``(3, size, size)``.

    Raises:
        PictureError: If the file cannot be read.
    """
    return resize(torch.from_numpy(read_picture(path)).permute(2, 0, 1), size)


class OnDemandImages:
    """Images that are decoded whenever they are indexed, for sets that do not fit into memory.

    Args:
        records: Records of the files, N of them.
        size: Height and width S of the canonical image in pixels.
    """

    def __init__(self, records: Sequence[Record], size: int) -> None:
        self.records, self.size = records, size

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode the images of some indices, ``(n,)``, in threads, as uint8 ``(n, 3, S, S)``."""
        paths = [self.records[index].path for index in indices]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # 1 in a worker of a loader
            return torch.stack(list(pool.map(decode, paths, repeat(self.size))))


#: Images or features in memory, or images that are decoded on demand.
Inputs = Tensor | OnDemandImages


def decode_all(
    records: Sequence[Record], size: int, *, keep: bool, skip_bad: bool
) -> tuple[list[Record], Inputs, dict[str, str]]:
    """Decode and hash all files in threads, one per CPU.

    Args:
        records: Records of the files.
        size: Height and width of the canonical image in pixels.
        keep: Keep the images in memory; otherwise only check that they can be read.
        skip_bad: Leave out files that cannot be read instead of raising.

    Returns:
        The records whose files can be read, with digests; their images, uint8
        ``(N, 3, size, size)``, in memory or decoded on demand; and the reason for each path that
        was left out.

    Raises:
        HorseHumanError: If files cannot be read, and ``skip_bad`` is false or a class has no file
            left in a split.
    """
    images = torch.empty(len(records), 3, size, size, dtype=torch.uint8) if keep else None

    def read(index: int) -> Record | str:
        record = records[index]
        try:
            image = decode(record.path, size)
        except PictureError as error:
            return str(error)
        if images is not None:
            images[index] = image
        return replace(record, digest=file_digest(record.path))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reads = pool.map(read, range(len(records)))
        results = list(track(reads, "reading pictures", len(records)))
    kept = [index for index, result in enumerate(results) if isinstance(result, Record)]
    remaining = [result for result in results if isinstance(result, Record)]
    both = zip(records, results, strict=True)
    skipped = {str(record.path): error for record, error in both if isinstance(error, str)}
    if skipped:
        first = "; ".join(list(skipped.values())[:3])
        count = f"{len(skipped)} of {len(records)} pictures"
        if not skip_bad:
            fix = "repair them, or leave them out with data.skip_bad=true"
            raise HorseHumanError(f"{count} are unreadable ({first}): {fix}")
        parts = {(record.label, record.split) for record in remaining}
        for record in records:
            if (record.label, record.split) not in parts:
                place = f"the class of {printable(record.path)} in {record.split or 'the set'}"
                raise HorseHumanError(f"no picture of {place} can be read ({first}): repair them")
        log.warning("left out %s (%s)", count, first)
    if images is None:
        return remaining, OnDemandImages(remaining, size), skipped
    return remaining, images[kept] if skipped else images, skipped


class BatchDataset(Dataset[Batch]):
    """Some of the images or features and labels of a set, fetched a batch at a time.

    Args:
        inputs: Images or features of all N records, indexed by a tensor.
        labels: Labels of all records, float32 ``(N,)``.
        indices: Indices of the records that belong to this dataset.
    """

    def __init__(self, inputs: Inputs, labels: Tensor, indices: Sequence[int]) -> None:
        self.inputs, self.labels = inputs, labels
        self.indices = torch.tensor(indices, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: list[int]) -> Batch:
        indices = self.indices[positions]
        return self.inputs[indices], self.labels[indices]


class MirroredDataset(BatchDataset):
    """The images of a dataset, and after them their mirror images.

    Args:
        dataset: N images.
    """

    def __init__(self, dataset: BatchDataset) -> None:
        super().__init__(dataset.inputs, dataset.labels, dataset.indices.repeat(2).tolist())

    def __getitems__(self, positions: list[int]) -> Batch:
        images, labels = super().__getitems__(positions)
        is_mirrored = torch.tensor(positions) >= len(self) // 2
        images[is_mirrored] = images[is_mirrored].flip(3)
        return images, labels


class ShardSampler(DistributedSampler[int]):
    """This rank's shard of ``count`` samples, in order; no sample is repeated or left out.

    It derives from ``DistributedSampler`` so that Lightning does not replace it.

    Args:
        count: Number of samples of all ranks.
    """

    def __init__(self, count: int) -> None:
        super().__init__(range(count), world_size(), rank(), shuffle=False)  # type: ignore[arg-type]
        self.shard = range(rank(), count, world_size())

    def __len__(self) -> int:
        return len(self.shard)

    def __iter__(self) -> Iterator[int]:
        return iter(self.shard)


class EpochSampler(ShardSampler):
    """This rank's share of a random order that depends only on seed and epoch.

    A resumed run therefore repeats the order. The ranks together see the batches that a single
    process would see. A last, smaller batch is left out. If there are fewer samples than one batch
    and they cannot be shared evenly, the first ones are repeated, fewer than there are ranks.

    Args:
        count: Number of samples of all ranks.
        batch_size: Batch size of all ranks together, a multiple of their number.
        seed: Seed of the run.
        epoch: Returns the index of the epoch that is about to start.
    """

    def __init__(self, count: int, batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        used = count - count % batch_size if count > batch_size else count
        super().__init__(-(-used // world_size()) * world_size())
        # Generator seeds of runs with different seeds do not coincide for the first million epochs.
        self.count, self.first_seed, self.next_epoch = count, 1_000_003 * seed, epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.first_seed + self.next_epoch())
        order = torch.randperm(self.count, generator=generator).tolist()
        return iter(order[position % self.count] for position in self.shard)


def make_loader(
    dataset: BatchDataset, sampler: Iterable[int], batch_size: int, num_workers: int
) -> DataLoader[Batch]:
    """Build a loader that fetches one batch per call of the dataset.

    Args:
        dataset: The dataset.
        sampler: Yields the positions of the samples.
        batch_size: Batch size of this rank.
        num_workers: Worker processes that decode images; unused for inputs in memory.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=0 if isinstance(dataset.inputs, Tensor) else num_workers,
        collate_fn=tuple,
        worker_init_fn=_leave_signals_to_parent,
        # Each iterator draws a seed, which must not come from the global generator of the run.
        generator=torch.Generator(),
    )


def _leave_signals_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def embed_all(loader: DataLoader[Batch], embed: Embed) -> BatchDataset:
    """Compute the features of all images, in the order of the dataset, on all ranks together.

    Args:
        loader: Yields images and labels of this rank's shard.
        embed: Computes features of a batch.

    Returns:
        Features and labels of the images of all ranks.
    """
    features, start = torch.empty(0), 0
    for images, _ in track(loader, "computing features", len(loader)):
        batch = embed(images)
        if start == 0:  # one tensor for all: feature maps may fill a part of the memory
            features = batch.new_empty(len(loader.sampler), *batch.shape[1:])  # type: ignore[arg-type]
        features[start : start + len(batch)] = batch
        start += len(batch)
    data: Any = loader.dataset
    return BatchDataset(gather_sharded(features), data.labels[data.indices], range(len(data)))
