"""Turn a folder tree of images into records, and split the records by group.

A record holds file, label, group and split of an image. All errors about the structure of a folder
tree are raised here.
"""

import hashlib
import logging
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from horsehuman.data.images import is_hidden
from horsehuman.decision import Ints
from horsehuman.errors import HorseHumanError, check_choice, check_number, os_errors, printable
from horsehuman.run_dir import write_csv

T = TypeVar("T")

log = logging.getLogger(__name__)

#: Names of the folder of each split, in lower case.
SPLIT_FOLDERS = {
    "train": ("train", "training", "training_set"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing", "test_set"),
}

#: Group pattern of the official set: the rendered subject, which is all before the last dash of a
#: file name.
SUBJECT_PATTERN = r"([^/]+)-[^-/]*$"

#: The classes are unbalanced if one has more than this many times the images of the other.
MAX_CLASS_RATIO = 1.5


@dataclass(frozen=True)
class Record:
    """One labelled image.

    Attributes:
        path: The file.
        label: Index of its class, 0 or 1.
        group: Name of its group; images of one group are always in the same split.
        split: ``train``, ``validation`` or ``test``; empty until it is assigned.
        digest: Output of :func:`file_digest`; empty until the file is read.
    """

    path: Path
    label: int
    group: str
    split: str
    digest: bytes = b""


def file_digest(path: Path) -> bytes:
    """Return a digest of a file's contents, 16 bytes of BLAKE2b.

    A file that cannot be read gets its path as a key, which equals no digest and no other key.
    """
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError:
        return str(path).encode(errors="surrogateescape")


def is_unbalanced(labels: Sequence[int]) -> bool:
    """Return whether the classes differ by more than :data:`MAX_CLASS_RATIO` in their images.

    Args:
        labels: Labels of the images, 0 or 1.
    """
    ones = sum(labels)
    smaller, larger = sorted((ones, len(labels) - ones))
    return larger > MAX_CLASS_RATIO * smaller


@dataclass(frozen=True)
class SplitPlan:
    """The options that assign a split to records.

    Attributes:
        validation: ``held_out``, or ``test`` to validate on the test split, holding nothing out.
        val_fraction: Fraction of the training groups to hold out for validation, in [0, 1); 0 for
            none.
        test_fraction: Fraction of all groups for the test split if the records have none, in
            (0, 1).
        fold: Index of the fold to hold out instead of ``val_fraction``, 0 to ``folds - 1``.
        folds: Number of folds, at least 2.
        seed: Random seed; the same seed and records give the same splits.

    Raises:
        HorseHumanError: If a value is out of range, or the options contradict each other.
    """

    validation: str
    val_fraction: float
    test_fraction: float
    fold: int | None
    folds: int
    seed: int

    def __post_init__(self) -> None:
        check_choice("data.validation", self.validation, ("held_out", "test"))
        check_number("data.val_fraction", self.val_fraction, float, at_least=0, below=1)
        check_number("data.test_fraction", self.test_fraction, float, above=0, below=1)
        check_number("data.folds", self.folds, int, at_least=2)
        check_number("data.split_seed", self.seed, int)
        if self.fold is None:
            return
        check_number("data.fold", self.fold, int, at_least=0, below=self.folds)
        if self.validation == "test":
            raise HorseHumanError(f"data.fold={self.fold} needs data.validation=held_out, not test")


def scan_folder(
    root: Path, group_pattern: str | None = None, *, require_train: bool = True
) -> tuple[tuple[str, str], list[Record]]:
    """List the images of ``root/{train,validation,test}/{a,b}/`` or of ``root/{a,b}/``.

    Subfolders of class folders are included. Hidden files and those of file managers are ignored;
    every other file counts as an image.

    Args:
        root: The folder tree.
        group_pattern: Regular expression with one capturing group. It is searched for in the path
            below the class folder (with forward slashes), and what it captures is the image's
            group. ``None`` makes each image a group by itself.
        require_train: Whether a tree with split folders must have one for training.

    Returns:
        The two class names in sorted order, and the records sorted by path within each split and
        class.

    Raises:
        HorseHumanError: If the tree has neither form, a class has no images, the pattern is invalid
            or does not match a file, or a group is in more than one split folder.
    """
    pattern = _compile_pattern(group_pattern)
    if not root.is_dir():
        raise HorseHumanError(f"{printable(root)} is not a folder: name one with class folders")
    folders = _split_folders(root, require_train)
    names = {_class_names(folder) for folder in folders.values()}
    if len(names) > 1:
        pairs = printable(" against ".join(" and ".join(pair) for pair in sorted(names)))
        raise HorseHumanError(f"{printable(root)}: name the classes alike in all splits: {pairs}")
    class_names = names.pop()
    records = [
        Record(path, label, group, split)
        for split, folder in folders.items()
        for label, name in enumerate(class_names)
        for path, group in _groups_of_files(root, folder / name, pattern).items()
    ]
    _check_groups(root, records)
    return class_names, records


def scan_unlabelled(folder: Path) -> list[Record]:
    """List all images below a folder as records of class 0, each a group by itself.

    Raises:
        HorseHumanError: If there is no such folder.
    """
    if not folder.is_dir():
        raise HorseHumanError(
            f"data.outliers={printable(folder)} is not a folder: name one with pictures"
        )
    return [Record(path, 0, str(path), "") for path in sorted(_walk(folder, frozenset()))]


def assign_splits(records: Sequence[Record], options: SplitPlan) -> list[Record]:
    """Assign a split to each record: train, validation or test.

    Existing validation and test splits are kept. Missing ones are taken from the training groups
    of each class.

    Args:
        records: Records from :func:`scan_folder`.
        options: What to hold out.

    Returns:
        All records in their order, each with a split.

    Raises:
        HorseHumanError: If a class has too few groups, or the records have a validation split that
            the options do not use.
    """
    records = [replace(record, split=record.split or "train") for record in records]
    splits = {record.split for record in records}
    is_test = options.validation == "test"
    if "validation" in splits and (options.fold is not None or is_test):
        setting = "data.validation=test" if is_test else f"data.fold={options.fold}"
        raise HorseHumanError(f"{setting} does not go with a validation folder: drop one of them")
    if "test" not in splits:
        records = _hold_out(records, "test", options, "test_fraction")
    option = "val_fraction" if options.fold is None else "folds"
    if "validation" in splits or is_test or getattr(options, option) == 0:
        return records
    return _hold_out(records, "validation", options, option)


def group_folds(labels: Ints, groups: Sequence[str], folds: int, seed: int = 0) -> Ints:
    """Assign a fold, 0 to ``folds - 1``, to each image; groups are not divided.

    Groups of class 0, of class 1 and of both classes are each distributed evenly over the folds.

    Args:
        labels: Labels of the images, 0 or 1, shape ``(N,)``.
        groups: Names of their groups, length N.
        folds: Number of folds; each class should have at least as many groups.
        seed: Random seed.

    Returns:
        Fold of each image, shape ``(N,)``.
    """
    index = np.unique(groups, return_inverse=True)[1]
    classes = classes_of_groups(labels, index)
    assigned = np.zeros(len(classes), np.int64)
    generator = np.random.default_rng(seed)
    for kind in (1, 2, 3):
        assigned[classes == kind] = generator.permutation((classes == kind).sum()) % folds
    return assigned[index]


def classes_of_groups(labels: Ints, index: Ints) -> Ints:
    """Return the classes in each of G groups as a bit mask: 1 is class 0, 2 class 1, 3 both.

    Args:
        labels: Labels of the images, 0 or 1, shape ``(N,)``.
        index: Group of each image, 0 to G - 1, shape ``(N,)``.

    Returns:
        Array of shape ``(G,)``.
    """
    masks = np.zeros(index.max() + 1, np.int64)
    np.bitwise_or.at(masks, index, labels + 1)
    return masks


def min_groups_per_class(labels: Ints, groups: Sequence[str]) -> int:
    """Return the number of groups of the class with fewer groups.

    Args:
        labels: Labels of the images, 0 or 1, shape ``(N,)``.
        groups: Names of their groups, length N.
    """
    return min(len({g for g, y in zip(groups, labels, strict=True) if y == k}) for k in (0, 1))


def write_splits(folder: Path, root: Path, records: Sequence[Record], names: Sequence[str]) -> None:
    """Write ``splits.csv`` with the columns picture (path below ``root``), label, group and split.

    Args:
        folder: Folder of the file.
        root: Folder of the images.
        records: The records.
        names: Names of class 0 and class 1.
    """
    rows = (
        (r.path.relative_to(root).as_posix(), names[r.label], r.group, r.split) for r in records
    )
    write_csv(folder / "splits.csv", ("picture", "label", "group", "split"), rows)


def evenly_spaced(items: Sequence[T], limit: int) -> list[T]:
    """Return at most ``limit`` items at even distances, the first one included."""
    count = min(limit, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def _compile_pattern(group_pattern: str | None) -> re.Pattern[str] | None:
    if group_pattern is None:
        return None
    setting = f"data.group_pattern={group_pattern!r}"
    try:
        pattern = re.compile(group_pattern)
    except (re.error, TypeError) as error:
        raise HorseHumanError(f"{setting} is not a regular expression: {error}") from error
    if pattern.groups != 1:
        raise HorseHumanError(f"{setting} has {pattern.groups} capturing groups: give one (...)")
    return pattern


def _split_folders(root: Path, require_train: bool) -> dict[str, Path]:
    """Return the folder of each split; of a tree without split folders, ``{"": root}``."""
    split_of = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
    subfolders = _subfolders(root)
    folders: dict[str, Path] = {}
    for folder in subfolders:
        if split := split_of.get(folder.name.lower()):
            if split in folders:
                raise HorseHumanError(f"keep one of {printable(folders[split])} and {folder.name}/")
            folders[split] = folder
    if not folders:
        return {"": root}
    if others := [folder.name for folder in subfolders if folder not in folders.values()]:
        names = printable(", ".join(others))
        log.warning("%s: ignored folders that are not splits (%s)", printable(root), names)
    if require_train and "train" not in folders:
        raise HorseHumanError(f"{printable(root)} has no train folder: add one")
    return folders


def _class_names(folder: Path) -> tuple[str, str]:
    names = sorted(entry.name for entry in _subfolders(folder))
    if len(names) > 2:
        pairs = "; ".join(" and ".join(pair) for pair in islice(combinations(names, 2), 6))
        reason = f"has {len(names)} class folders, but a classifier has two classes"
        fix = f"train one for each pair ({printable(pairs)})"
        raise HorseHumanError(f"{printable(folder)} {reason}: {fix}")
    if len(names) < 2:
        listing = printable(f"1 ({names[0]})") if names else "none"
        fix = "put the pictures of each class into a folder of its own"
        if names and _subfolders(folder / names[0]):
            fix = f"is {printable(folder / names[0])} the folder to name?"
        raise HorseHumanError(f"{printable(folder)} needs two class folders, not {listing}: {fix}")
    return names[0], names[1]


def _groups_of_files(root: Path, folder: Path, pattern: re.Pattern[str] | None) -> dict[Path, str]:
    """Return the name of the group of each file in a class folder, in the order of the paths.

    Raises:
        HorseHumanError: If there are no files, or the pattern does not match all of them.
    """
    paths = sorted(_walk(folder, frozenset()))
    if not paths:
        raise HorseHumanError(f"{printable(folder)} has no pictures: add some or remove the class")
    if pattern is None:
        return {path: path.relative_to(root).as_posix() for path in paths}
    matches = {path: pattern.search(path.relative_to(folder).as_posix()) for path in paths}
    groups = {path: match[1] for path, match in matches.items() if match and match[1] is not None}
    unmatched = [path.name for path in paths if path not in groups]
    if unmatched:
        share = f"{len(unmatched)} of {len(paths)} names in {printable(folder)}"
        problem = f"data.group_pattern={pattern.pattern!r} does not match {share}"
        examples = printable(", ".join(unmatched[:3]))
        raise HorseHumanError(f"{problem}, such as {examples}: change it to match all")
    return groups


def _entries(folder: Path) -> list[Path]:
    """Return the files and folders in a folder in sorted order, without hidden ones."""
    with os_errors("read", folder):
        return sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _walk(folder: Path, parents: frozenset[str]) -> Iterator[Path]:
    """Yield the files below a folder; links are followed unless they lead back to a parent.

    Args:
        folder: The folder.
        parents: Real paths of the folders above it.
    """
    real = os.path.realpath(folder)
    if real in parents:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(entry, parents | {real})
        else:
            yield entry


def _check_groups(root: Path, records: Sequence[Record]) -> None:
    """Check that no group is in more than one split folder."""
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.group, set()).add(record.split)
    divided = sorted(group for group, names in splits.items() if len(names) > 1)
    if divided:
        example = f"{printable(divided[0])} in {' and '.join(sorted(splits[divided[0]]))}"
        problem = f"{printable(root)}: {len(divided)} groups are in more than one split ({example})"
        raise HorseHumanError(f"{problem}: move each into one, or change data.group_pattern")


def _hold_out(records: Sequence[Record], split: str, plan: SplitPlan, option: str) -> list[Record]:
    """Move training groups of each class to another split.

    Groups with both classes, such as scenes with both, are chosen from like a third class: they are
    not divided, and the classes stay balanced.

    Args:
        records: All records; a group is in one split only.
        split: The split that groups move to.
        plan: The options.
        option: Name of the option that sets how many groups move: ``folds``, ``val_fraction`` or
            ``test_fraction``. With a fraction, at least one of several groups moves, but not all; a
            single group stays.

    Raises:
        HorseHumanError: If a class has no images left to train on, or none in the split.
    """
    value = getattr(plan, option)
    labels: dict[str, set[int]] = {}
    for record in records:
        if record.split == "train":
            labels.setdefault(record.group, set()).add(record.label)
    held_out: set[str] = set()
    for classes in ((0,), (1,), (0, 1)):
        groups = sorted(group for group in labels if labels[group] == set(classes))
        random.Random(f"{plan.seed}-{classes}").shuffle(groups)
        if option == "folds":
            held_out.update(groups[plan.fold :: value])
        else:
            held_out.update(groups[: min(max(round(value * len(groups)), 1), len(groups) - 1)])
    moved = [replace(r, split=split if r.group in held_out else r.split) for r in records]
    for part in ("train", split):
        missing = {r.label for r in records} - {r.label for r in moved if r.split == part}
        if missing:
            example = next(record.path for record in records if record.label in missing)
            cause = f"data.{option}={value:g}: the class of {printable(example)} has too few groups"
            raise HorseHumanError(f"{cause}: add pictures of it, or hold out less")
    return moved
