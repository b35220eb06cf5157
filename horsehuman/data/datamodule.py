"""Pictures of two classes for training, held out by group, and for the test at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from horsehuman.data.archives import image_root
from horsehuman.data.datasets import (
    Batch,
    BatchDataset,
    Embed,
    EpochSampler,
    InMemoryDataset,
    OnDemandDataset,
    ShardSampler,
    check_views,
    decode_all,
    embed_all,
    embed_views,
    make_loader,
    view_key,
)
from horsehuman.data.records import (
    SUBJECT_PATTERN,
    Record,
    assign_splits,
    describe_splits,
    scan_folder,
)
from horsehuman.data.transforms import augment_each, make_augment
from horsehuman.distributed import world_size
from horsehuman.errors import HorseHumanError, check_choice, check_flag, check_number, printable

log = logging.getLogger(__name__)


class HorseHumanDataModule(L.LightningDataModule):
    """Two classes of pictures as batches ``(images uint8 (N, 3, S, S), labels float32 (N,))``.

    Several processes share each training batch, and the pictures that validate and test: each of
    these is seen by one of them.

    Args:
        image_size: S, height and width in pixels; take it from the model.
        source: ``box`` (the official set, in this package), ``archives`` (the official PNG
            archives), or ``folder``.
        root: The folder tree, for ``folder``; see :func:`~horsehuman.data.folders.scan_folder`.
        archives_dir: Folder with both official zips, for ``archives``; without it they are
            downloaded.
        group_pattern: Regular expression with one capturing group that names the group in a
            file name; by default the figure in the official set, and nothing in a folder.
        validation: ``held_out`` validates on held-out groups (or the folder's own validation
            split); ``test`` holds nothing out and validates on the test set, as the original
            notebook does.
        val_fraction: Share of the training groups that is held out, in [0, 1).
        test_fraction: Share of all groups that becomes the test set where a folder has none.
        fold: Index of a cross-validation's fold to hold out instead, 0 to ``folds - 1``.
        folds: Number of folds.
        split_seed: Decides which groups are held out.
        seed: Decides the order of training batches.
        batch_size: Pictures in a batch, of all processes together.
        augment: Arguments of :class:`~horsehuman.data.augment.Augment`, for training batches.
        skip_bad: Leave out files that cannot be read, instead of refusing the set.
        memory_limit: GiB of decoded pictures up to which they are kept in memory, by each
            process; a larger set is decoded anew in each epoch.
        num_workers: Processes that decode a set which is not kept.

    Attributes:
        class_names: Names of class 0 and class 1, after :meth:`setup`.
        records: All pictures with their splits, after :meth:`setup`.
        skipped: Files left out and why, after :meth:`setup`.

    Raises:
        HorseHumanError: A value does not work.
    """

    def __init__(
        self,
        image_size: int = 300,
        source: str = "box",
        root: str | None = None,
        archives_dir: str | None = None,
        group_pattern: str | None = None,
        validation: str = "held_out",
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        fold: int | None = None,
        folds: int = 5,
        split_seed: int = 0,
        seed: int = 0,
        batch_size: int = 32,
        augment: Mapping[str, Any] | None = None,
        skip_bad: bool = False,
        memory_limit: float = 4.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.image_size, self.source, self.archives_dir = image_size, source, archives_dir
        self.root = Path(str(root)).expanduser() if root else None
        self.group_pattern = group_pattern or (None if source == "folder" else SUBJECT_PATTERN)
        self.validation, self.val_fraction, self.test_fraction = (
            validation,
            val_fraction,
            test_fraction,
        )
        self.fold, self.folds, self.split_seed = fold, folds, split_seed
        self.seed, self.batch_size, self.num_workers = seed, batch_size, num_workers
        self.augment = make_augment(augment)
        self.skip_bad, self.memory_limit = skip_bad, memory_limit
        self._check_options()
        self.class_names: list[str] = []
        self.records: list[Record] = []
        self.skipped: dict[str, str] = {}
        self._pictures: Tensor | None = None
        self._embedded: dict[str, InMemoryDataset] = {}
        self._labels = torch.empty(0)
        self._first_epoch = 0

    def _check_options(self) -> None:
        check_number("model.image_size", self.image_size, int, at_least=8, at_most=4096)
        check_choice("data.source", self.source, ("box", "archives", "folder"))
        check_choice("data.validation", self.validation, ("held_out", "test"))
        check_number("data.val_fraction", self.val_fraction, float, at_least=0, below=1)
        check_number("data.test_fraction", self.test_fraction, float, above=0, below=1)
        check_number("data.folds", self.folds, int, at_least=2)
        if self.fold is not None:
            check_number("data.fold", self.fold, int, at_least=0, below=self.folds)
        check_number("data.split_seed", self.split_seed, int)
        check_number("seed", self.seed, int, at_least=0, below=2**32)
        check_number("data.batch_size", self.batch_size, int, at_least=1)
        check_number("data.memory_limit", self.memory_limit, float, at_least=0)
        check_number("data.num_workers", self.num_workers, int, at_least=0)
        check_flag("data.skip_bad", self.skip_bad)
        if self.source != "folder" and self.root is not None:
            raise HorseHumanError("data.root goes with a folder of pictures: add data=folder")
        if self.source != "archives" and self.archives_dir is not None:
            raise HorseHumanError("data.archives_dir goes with data=archives: add that")
        if self.source == "folder" and self.root is None:
            raise HorseHumanError("data.root is missing: name the folder with data.root=DIR")

    def prepare_data(self) -> None:
        """Unpack, download or find the pictures; safe in several processes at once."""
        self.root = image_root(self.source, self.root, self.archives_dir)

    def setup(self, stage: str | None = None) -> None:
        """Find the pictures, look at every file, split by group.

        Raises:
            HorseHumanError: The folder tree, a file or a split does not work.
        """
        self._embedded = {}
        if self.records:
            return
        if self.source != "folder" and self.root is None:
            self.prepare_data()
        assert self.root is not None
        self.class_names, records = scan_folder(self.root, self.group_pattern)
        needed = len(records) * 3 * self.image_size**2
        keep = needed <= self.memory_limit * 2**30
        records, pictures, self.skipped = decode_all(
            records, self.image_size, keep=keep, skip_bad=self.skip_bad
        )
        self.records = assign_splits(
            records,
            validation=self.validation,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            fold=self.fold,
            folds=self.folds,
            seed=self.split_seed,
        )
        for split in ("train", self._validation_split, "test"):
            if 0 < len(self._indices(split)) < world_size():
                raise HorseHumanError(
                    f"{split} has {len(self._indices(split))} pictures for {world_size()} "
                    "processes: use fewer"
                )
        self._pictures = pictures
        self._labels = torch.tensor([float(record.label) for record in records])
        self._log_summary()

    def use_features(self, embed: Embed, views: int = 1) -> None:
        """Train and validate on features instead of pictures, until the next :meth:`setup`.

        They are computed once and kept; testing goes on with the pictures.

        Args:
            embed: Computes them.
            views: Views of each training picture, see
                :func:`~horsehuman.data.embedding.embed_views`. Held-out pictures have one.

        Raises:
            HorseHumanError: There is nothing to augment with, or augmentation without a view.
        """
        check_views(views, self.augment)
        train, held_out = (
            self._sequential_loader("train"),
            self._sequential_loader(self._validation_split),
        )
        self._embedded["train"] = embed_views(train, embed, views, self.augment, self.seed)
        if len(held_out):
            what = "features of held-out pictures"
            self._embedded["validation"] = embed_all(held_out, embed, what)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches; a last, smaller one is left out where there are others."""
        dataset = self._embedded.get("train") or self._dataset(self._indices("train"))
        sampler = EpochSampler(len(dataset), self.batch_size, self.seed, self._epoch)
        return make_loader(dataset, sampler, self.batch_size // world_size(), self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Batches in order; an empty list where nothing validates."""
        if dataset := self._embedded.get("validation"):
            return self._loader(dataset)
        return (
            self._sequential_loader(self._validation_split)
            if self._indices(self._validation_split)
            else []
        )

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of this process's pictures, in order."""
        return self._sequential_loader("test")

    def validation_records(self) -> list[Record]:
        """The pictures that validate, in the order of :meth:`val_dataloader`."""
        return [self.records[index] for index in self._indices(self._validation_split)]

    def samples(self, views: int = 1, columns: int = 8, rows: int = 4) -> Tensor:
        """Some training pictures for a look: uint8 ``(rows * columns, 3, S, S)``.

        The first row is plain; below it stand the same pictures as training sees them, where
        they are augmented: of several ``views`` the first ones that are embedded. Torch's
        generators are left as they were.
        """
        train = self._indices("train")
        chosen = [train[k * len(train) // columns] for k in range(columns)]
        plain = self._dataset(chosen).__getitems__(list(range(columns)))[0]
        if self.augment is None:
            return plain
        if views > 1:
            keys = [view_key(self.seed, view) for view in range(1, min(views, rows))]
            return torch.cat([plain, *(augment_each(self.augment, plain, key) for key in keys)])
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return torch.cat([plain, *(self.augment(plain) for _ in range(rows - 1))])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches of pictures, on the device."""
        training = self.trainer is not None and self.trainer.training
        if not training or self.augment is None or isinstance(batch, Tensor):
            return batch  # a bare tensor is the example of Lightning's own model summary
        inputs, labels = batch
        return (self.augment(inputs), labels) if inputs.ndim == 4 else batch

    @property
    def _validation_split(self) -> str:
        return "test" if self.validation == "test" else "validation"

    def state_dict(self) -> dict[str, Any]:
        """The epoch that comes next, for a checkpoint.

        Lightning asks for batches of a resumed run before it knows where that is, and workers begin
        with them at once.
        """
        trainer: Any = self.trainer
        has_ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        return {"epoch": trainer.current_epoch + int(has_ended)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._first_epoch = int(state_dict["epoch"])

    def _epoch(self) -> int:
        return max(self._first_epoch, self.trainer.current_epoch if self.trainer else 0)

    def _indices(self, split: str) -> list[int]:
        return [index for index, record in enumerate(self.records) if record.split == split]

    def _dataset(self, indices: list[int]) -> BatchDataset:
        if self._pictures is None:
            return OnDemandDataset(self.records, self.image_size, indices)
        return InMemoryDataset(self._pictures, self._labels, indices)

    def _sequential_loader(self, split: str) -> DataLoader[Batch]:
        return self._loader(self._dataset(self._indices(split)))

    def _loader(self, dataset: BatchDataset) -> DataLoader[Batch]:
        return make_loader(dataset, ShardSampler(len(dataset)), self.batch_size, self.num_workers)

    def _log_summary(self) -> None:
        """Log what was found, and what makes its figures less honest than they look."""
        log.info("%s or %s: %s", *map(printable, self.class_names), describe_splits(self.records))
        if self.validation == "test":
            log.info("validating on the test set: these figures are selected on it, not honest")
        elif not self._indices("validation"):
            log.info("nothing is held out: no figure before the test says how good the model is")
        if self.group_pattern is None:
            log.info(
                "no data.group_pattern: near-duplicates on both sides of a split would flatter "
                "all figures"
            )
