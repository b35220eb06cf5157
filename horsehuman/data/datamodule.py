"""The Lightning data module: labelled images of two classes for training, validation and test."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from horsehuman.data import datasets
from horsehuman.data.archives import image_root
from horsehuman.data.records import (
    SUBJECT_PATTERN,
    Record,
    SplitPlan,
    assign_splits,
    is_unbalanced,
    scan_folder,
    scan_unlabelled,
)
from horsehuman.data.transforms import make_augment
from horsehuman.distributed import world_size
from horsehuman.errors import HorseHumanError, check_choice, check_flag, check_number, printable
from horsehuman.runtime import memory_size

log = logging.getLogger(__name__)

#: Smallest number of images in ``outliers``.
MIN_OUTLIERS = 20

#: Share of the machine's memory that feature maps may take.
MAPS_MEMORY = 0.25


class HorseHumanDataModule(L.LightningDataModule):
    """Images of two classes as batches ``(images uint8 (N, 3, S, S), labels float32 (N,))``.

    Ranks share each training batch. Validation and test images are divided between them: each image
    is evaluated by exactly one rank.

    Args:
        image_size: S, height and width in pixels, 8 to 4096; take it from the model.
        source: ``box`` (the bundled official set), ``archives`` (the official PNG archives) or
            ``folder``.
        root: Folder tree, for ``folder``; see :func:`~horsehuman.data.records.scan_folder`.
        archives_dir: Folder with both official zip files, for ``archives``; ``None`` downloads
            them.
        group_pattern: Regular expression with one capturing group that names the group in a file
            name. ``None`` stands for the rendered subject in the official set, and for no groups
            in a folder.
        validation: ``held_out`` validates on held-out groups (or on the folder's validation
            split); ``test`` holds nothing out and validates on the test set, as the original
            notebook does.
        val_fraction: Fraction of the training groups to hold out, in [0, 1).
        test_fraction: Fraction of all groups for the test set if a folder has none, in (0, 1).
        fold: Index of the cross-validation fold to hold out instead of ``val_fraction``, 0 to
            ``folds - 1``.
        folds: Number of folds, at least 2.
        split_seed: Seed of the choice of held-out groups.
        seed: Seed of the order of training batches and of :meth:`samples`, 0 to 2^32 - 1.
        batch_size: Images per batch, over all ranks together.
        balance: ``none`` weights all images the same in the loss, ``loss`` both classes; ``auto``
            is ``loss`` if the classes are unbalanced, see
            :func:`~horsehuman.data.records.is_unbalanced`.
        prior: Share of class 1 among the images to classify, in (0, 1), for which probabilities
            are right; ``None`` for the share in the training set.
        augment: Arguments of :class:`~horsehuman.data.transforms.Augment`, for training batches.
        skip_bad: Leave out files that cannot be read instead of raising.
        memory_limit: Size of the decoded images in GiB up to which each process keeps them in
            memory; larger sets are decoded again in each epoch.
        num_workers: Worker processes that decode images which are not kept in memory.
        outliers: Folder with at least :data:`MIN_OUTLIERS` images of neither class, subfolders
            included, to learn *neither* from; ``None`` for none.

    Attributes:
        class_names: Names of class 0 and class 1, after :meth:`setup`.
        records: Records of all images with their splits, after :meth:`setup`.
        skipped: Reason for each path that was left out, after :meth:`setup`.

    Raises:
        HorseHumanError: If a value is invalid, or options contradict each other.

    Example:
        >>> from horsehuman import HorseHumanDataModule
        >>> data = HorseHumanDataModule(image_size=96, batch_size=16)
        >>> data.setup()
        >>> data.class_names
        ['horses', 'humans']
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, images.dtype, labels.shape
        (torch.Size([16, 3, 96, 96]), torch.uint8, torch.Size([16]))
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
        balance: str = "none",
        prior: float | None = None,
        augment: Mapping[str, Any] | None = None,
        skip_bad: bool = False,
        memory_limit: float = 4.0,
        num_workers: int = 0,
        outliers: str | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.source, self.archives_dir = image_size, source, archives_dir
        self.root = Path(str(root)).expanduser() if root else None
        self.group_pattern = group_pattern or (None if source == "folder" else SUBJECT_PATTERN)
        self.validation = validation
        self.splits = SplitPlan(validation, val_fraction, test_fraction, fold, folds, split_seed)
        self._held_out = "test" if validation == "test" else "validation"
        self.seed, self.batch_size, self.num_workers = seed, batch_size, num_workers
        self.augment = make_augment(augment)
        self.balance, self.prior = balance, prior
        self.skip_bad, self.memory_limit = skip_bad, memory_limit
        self.outliers = Path(str(outliers)).expanduser() if outliers else None
        self._check_options()
        self.class_names: list[str] = []
        self.records: list[Record] = []
        self.skipped: dict[str, str] = {}
        self._images: datasets.Inputs = torch.empty(0)
        self._outlier_images: datasets.OnDemandImages | None = None
        self._features: dict[str, datasets.BatchDataset] = {}
        self._labels = torch.empty(0)
        self._first_epoch = 0

    def _check_options(self) -> None:
        check_number("model.image_size", self.image_size, int, at_least=8, at_most=4096)
        check_choice("data.source", self.source, ("box", "archives", "folder"))
        check_number("seed", self.seed, int, at_least=0, below=2**32)
        check_number("data.batch_size", self.batch_size, int, at_least=1)
        check_number("data.memory_limit", self.memory_limit, float, at_least=0)
        check_number("data.num_workers", self.num_workers, int, at_least=0)
        check_flag("data.skip_bad", self.skip_bad)
        check_choice("data.balance", self.balance, ("auto", "none", "loss"))
        if self.prior is not None:
            check_number("data.prior", self.prior, float, above=0, below=1)
        for option, source in (("root", "folder"), ("archives_dir", "archives")):
            if getattr(self, option) is not None and self.source != source:
                raise HorseHumanError(f"data.{option} needs data={source}: add it, or drop this")
        if self.source == "folder" and self.root is None:
            raise HorseHumanError("data.root is missing: name the folder with data.root=DIR")

    def prepare_data(self) -> None:
        """Download or unpack the images if necessary; safe in several processes at once."""
        self.root = image_root(self.source, self.root, self.archives_dir)

    def setup(self, stage: str | None = None) -> None:
        """Scan the folder, check every file and assign splits by group.

        Later calls only discard the features of :meth:`use_features`, and begin at epoch 0.

        Args:
            stage: Ignored; all splits are set up at once.

        Raises:
            HorseHumanError: If the folder tree is invalid, a file cannot be read, or a split cannot
                be made.
        """
        self.discard_features()
        self._first_epoch = 0
        if self.records:
            return
        if self.root is None:
            self.prepare_data()
        assert self.root is not None
        class_names, records = scan_folder(self.root, self.group_pattern)
        keep = len(records) * 3 * self.image_size**2 <= self.memory_limit * 2**30  # bytes
        decoded = datasets.decode_all(records, self.image_size, keep=keep, skip_bad=self.skip_bad)
        records, self._images, self.skipped = decoded
        self.class_names, self.records = list(class_names), assign_splits(records, self.splits)
        for split in ("train", self._held_out, "test"):
            count = len(self._indices(split))
            if 0 < count < world_size():
                raise HorseHumanError(f"{split} has only {count} pictures: use fewer processes")
        self._labels = torch.tensor([float(record.label) for record in records])
        self._log_summary()
        if self.outliers is not None:
            self._outlier_images = self._read_outliers(self.outliers)

    def _read_outliers(self, folder: Path) -> datasets.OnDemandImages:
        """Check the images of neither class.

        Raises:
            HorseHumanError: If there are too few, one cannot be read, or one is in a class, too.
        """
        name, size = f"data.outliers={printable(folder)}", self.image_size
        found = scan_unlabelled(folder)
        records, _, skipped = datasets.decode_all(found, size, keep=False, skip_bad=self.skip_bad)
        self.skipped |= skipped
        if len(records) < MIN_OUTLIERS:
            few = f"{name} has {len(records)} pictures: give at least {MIN_OUTLIERS}"
            raise HorseHumanError(f"{few} that show neither class")
        digests = {record.digest for record in self.records}
        same = [printable(record.path) for record in records if record.digest in digests]
        if same:
            overlap = f"{name} has {len(same)} pictures of the classes ({', '.join(same[:3])})"
            raise HorseHumanError(f"{overlap}: remove them from one of the two folders")
        log.info("%s: %d pictures of neither class", name, len(records))
        return datasets.OnDemandImages(records, size)

    def class_weights(self) -> tuple[tuple[float, float] | None, float]:
        """Return the weights of the classes in the loss, and the shift of the logits.

        A classifier trained with equal classes estimates the logit of class 1 for a share of 0.5;
        without weights, for its share in the training set. The shift is the difference of the
        logits of the wanted share and of that share (Elkan 2001).

        Returns:
            Weights of class 0 and class 1, 1 on average over the training images, or ``None`` for
            equal weights of all images; and the shift.
        """
        labels = [self.records[index].label for index in self._indices("train")]
        share = sum(labels) / len(labels)
        is_weighted = self.balance == "loss" or (self.balance == "auto" and is_unbalanced(labels))
        learned, wanted = 0.5 if is_weighted else share, self.prior or share
        shift = math.log(wanted / (1 - wanted)) - math.log(learned / (1 - learned))
        return ((0.5 / (1 - share), 0.5 / share) if is_weighted else None), shift

    def check_cacheable(self) -> None:
        """Check that the features of training images are the same in every epoch.

        Raises:
            HorseHumanError: If training images are augmented.
        """
        if self.augment is not None:
            fix = "set data.augment=null or model.cache_features=false"
            raise HorseHumanError(f"data.augment has no effect on cached features: {fix}")

    def use_features(self, embed: datasets.Embed, stage: str) -> None:
        """Train and validate, or test, on features instead of images, until :meth:`setup`.

        The features are computed once and kept in memory.

        Args:
            embed: Computes the features of a batch.
            stage: ``fit`` or ``test``.

        Raises:
            HorseHumanError: If training images are augmented, and the stage is ``fit``.
        """
        if stage == "fit":
            self.check_cacheable()
        for split in ("train", self._held_out) if stage == "fit" else ("test",):
            loader = self._loader(self._dataset(split))
            if len(loader):
                self._features[split] = datasets.embed_all(loader, embed)

    def use_feature_maps(self, embed: datasets.Embed) -> None:
        """Train on the feature maps of images and mirror images, and validate on those of images.

        They are computed once and kept in memory if they fit into :data:`MAPS_MEMORY`; otherwise
        the images are used, and the maps are computed anew in each epoch.

        Args:
            embed: Computes the maps of a batch.
        """
        train, held_out = self._dataset("train"), self._dataset(self._held_out)
        parts = {"train": datasets.MirroredDataset(train), self._held_out: held_out}
        size = embed(train.__getitems__([0])[0]).nbytes * sum(map(len, parts.values()))
        if size > MAPS_MEMORY * memory_size():
            log.warning("feature maps of %.1f GiB: computed anew in each epoch", size / 2**30)
            self._features = {"train": parts["train"]}
            return
        for split, dataset in parts.items():
            self._features[split] = datasets.embed_all(self._loader(dataset), embed)

    def training_features(self, embed: datasets.Embed) -> tuple[Tensor, list[Record]]:
        """Return features ``(N, F)`` of training images, not augmented, and their records.

        Args:
            embed: Computes the features of a batch, unless :meth:`use_features` has.
        """
        dataset = self._features.get("train")
        dataset = dataset or datasets.embed_all(self._loader(self._dataset("train")), embed)
        records = [self.records[index] for index in self._indices("train")]
        return dataset.__getitems__(list(range(len(dataset))))[0], records

    def outlier_features(self, embed: datasets.Embed) -> Tensor | None:
        """Return features ``(M, F)`` of the images of neither class; ``None`` without them."""
        if self._outlier_images is None:
            return None
        count = len(self._outlier_images.records)
        dataset = datasets.BatchDataset(self._outlier_images, torch.zeros(count), range(count))
        return datasets.embed_all(self._loader(dataset), embed).__getitems__(list(range(count)))[0]

    def discard_features(self) -> None:
        """Return images again instead of features."""
        self._features = {}

    def sample_test(self, count: int, device: torch.device) -> datasets.Batch:
        """Return test images drawn by seed, uint8 ``(N, 3, S, S)``, and their features ``(N, F)``.

        Args:
            count: Largest number of images.
            device: Device of both.
        """
        both = self._dataset("test"), self._features["test"]
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(both[0]), generator=generator)[:count].tolist()
        images, features = (data.__getitems__(chosen)[0].to(device) for data in both)
        return images, features

    def train_dataloader(self) -> DataLoader[datasets.Batch]:
        """Return shuffled batches; a last, smaller batch is left out unless it is the only one."""
        dataset = self._features.get("train") or self._dataset("train")
        sampler = datasets.EpochSampler(len(dataset), self.batch_size, self.seed, self._epoch)
        size = self.batch_size // world_size()
        return datasets.make_loader(dataset, sampler, size, self.num_workers)

    def val_dataloader(self) -> DataLoader[datasets.Batch] | list[Any]:
        """Return validation batches of this rank, in order; an empty list without validation."""
        dataset = self._features.get(self._held_out) or self._dataset(self._held_out)
        return self._loader(dataset) if len(dataset) else []

    def test_dataloader(self) -> DataLoader[datasets.Batch]:
        """Return test batches of this rank, in order."""
        return self._loader(self._features.get("test") or self._dataset("test"))

    def validation_records(self) -> list[Record]:
        """Return the records of the validation images of all ranks, in order."""
        return [self.records[index] for index in self._indices(self._held_out)]

    def samples(self, columns: int = 8, rows: int = 4) -> Tensor:
        """Return a grid of training images, originals and augmented, uint8 ``(N, 3, S, S)``.

        The first row has original images. With augmentation, the rows below it have augmented
        versions of the same images. The state of torch's generators is restored.

        Args:
            columns: Images per row.
            rows: Number of rows with augmentation.

        Returns:
            The images row by row.
        """
        dataset = self._dataset("train")
        chosen = [k * len(dataset) // columns for k in range(columns)]
        originals = dataset.__getitems__(chosen)[0]
        if self.augment is None:
            return originals
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return torch.cat([originals, *(self.augment(originals) for _ in range(rows - 1))])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches of images on their device.

        Args:
            batch: The batch; batches of other stages are returned unchanged.
            dataloader_idx: Ignored.
        """
        training = self.trainer is not None and self.trainer.training
        # Lightning's model summary passes its example input, a single tensor.
        if not training or self.augment is None or isinstance(batch, Tensor):
            return batch
        images, labels = batch
        return self.augment(images), labels

    def state_dict(self) -> dict[str, Any]:
        """Return the index of the next epoch, for a checkpoint.

        When a run is resumed, Lightning asks for batches, and workers start on them, before the
        trainer's epoch is restored.
        """
        trainer: Any = self.trainer
        has_ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        return {"epoch": trainer.current_epoch + int(has_ended)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the index of the next epoch.

        Args:
            state_dict: State from :meth:`state_dict`.
        """
        self._first_epoch = int(state_dict["epoch"])

    def _epoch(self) -> int:
        return max(self._first_epoch, self.trainer.current_epoch if self.trainer else 0)

    def _indices(self, split: str) -> list[int]:
        return [index for index, record in enumerate(self.records) if record.split == split]

    def _dataset(self, split: str) -> datasets.BatchDataset:
        return datasets.BatchDataset(self._images, self._labels, self._indices(split))

    def _loader(self, dataset: datasets.BatchDataset) -> DataLoader[datasets.Batch]:
        sampler = datasets.ShardSampler(len(dataset))
        return datasets.make_loader(dataset, sampler, self.batch_size, self.num_workers)

    def _log_summary(self) -> None:
        """Log the size of each split, and the options that make metrics too optimistic."""
        parts = []
        words = {"train": "to train on", "validation": "held out", "test": "to test"}
        for split, word in words.items():
            groups = [record.group for record in self.records if record.split == split]
            if groups:
                parts.append(f"{len(groups):,} {word} ({len(set(groups)):,} groups)")
        log.info("%s or %s: %s", *map(printable, self.class_names), ", ".join(parts))
        if self.class_weights()[0]:
            log.info("data.balance=%s: both classes weigh the same in the loss", self.balance)
        if self.validation == "test":
            log.info("validating on the test set: its metrics are selected on it and optimistic")
        elif not self._indices("validation"):
            log.info("nothing is held out: no metric before the test is of unseen pictures")
        if self.group_pattern is None:
            log.info("no data.group_pattern: near-duplicates inflate metrics (horsehuman audit)")
