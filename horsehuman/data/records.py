"""Turn a folder tree of images into records, and split the records by group.

A record holds file, label, group and split of an image. All errors about the structure of a folder
tree are raised here.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from horsehuman.data.images import is_hidden
from horsehuman.errors import HorseHumanError, printable
from horsehuman.run_dir import write_csv

T = TypeVar("T")

log = logging.getLogger(__name__)

#: Split of each folder name that is recognised, in lower case.
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
    "training_set": "train",
    "test_set": "test",
}

#: Group pattern of the official set: the rendered subject, which is all before the last dash of a
#: file name.
SUBJECT_PATTERN = r"([^/]+)-[^-/]*$"


@dataclass(frozen=True)
class Record:
    """One labelled image.

    Attributes:
        path: The file.
        label: Index of its class, 0 or 1.
        group: Name of its group; images of one group are always in the same split.
        split: ``train``, ``validation`` or ``test``; empty until it is assigned.
    """

    path: Path
    label: int
    group: str
    split: str


def scan_folder(
    root: Path, group_pattern: str | None = None, *, to_train: bool = True
) -> tuple[list[str], list[Record]]:
    """List the images of ``root/{train,validation,test}/{a,b}/`` or of ``root/{a,b}/``.

    Subfolders of class folders are included. Hidden files and those of file managers are ignored;
    every other file counts as an image.

    Args:
        root: The folder tree.
        group_pattern: Regular expression with one capturing group. It is searched for in the path
            below the class folder (with forward slashes), and what it captures is the image's
            group. ``None`` makes each image a group by itself.
        to_train: Whether a tree with split folders must have one for training.

    Returns:
        The two class names in sorted order, and the records sorted by path within each split and
        class.

    Raises:
        HorseHumanError: If the tree has neither form, a class has no images, the pattern is invalid
            or does not match a file, or a group is in more than one split folder.
    """
    pattern = _compile_pattern(group_pattern)
    if not root.is_dir():
        raise HorseHumanError(
            f"{printable(root)} is not a folder: name the folder that holds the class folders"
        )
    folders = _split_folders(root, to_train)
    names = {_class_names(folder) for folder in folders.values()}
    if len(names) > 1:
        pairs = " against ".join(" and ".join(pair) for pair in sorted(names))
        raise HorseHumanError(
            f"{printable(root)}: the split folders hold different classes ({printable(pairs)}): "
            "give them the same class names"
        )
    class_names = list(names.pop())
    records = [
        Record(path, label, group, split)
        for split, folder in folders.items()
        for label, name in enumerate(class_names)
        for path, group in _files_with_groups(root, folder / name, pattern)
    ]
    _check_groups(root, records)
    return class_names, records


def assign_splits(
    records: Sequence[Record],
    *,
    validation: str,
    val_fraction: float,
    test_fraction: float,
    fold: int | None,
    folds: int,
    seed: int,
) -> list[Record]:
    """Assign a split to each record: train, validation or test.

    Existing validation and test splits are kept. Missing ones are taken from the training groups
    of each class.

    Args:
        records: Records from :func:`scan_folder`.
        validation: ``held_out``, or ``test`` to hold nothing out.
        val_fraction: Fraction of the training groups to hold out for validation, in [0, 1); 0 for
            none.
        test_fraction: Fraction of all groups for the test split if the records have none, in
            (0, 1).
        fold: Index of the fold to hold out instead of ``val_fraction``, 0 to ``folds - 1``.
        folds: Number of folds.
        seed: Random seed; the same seed and records give the same splits.

    Returns:
        All records in their order, each with a split.

    Raises:
        HorseHumanError: If a class has too few groups, or the options contradict each other or the
            records.
    """
    records = [replace(r, split="train") if r.split == "" else r for r in records]
    splits = {record.split for record in records}
    if validation == "test" and fold is not None:
        raise HorseHumanError(
            f"data.fold={fold} does not go with data.validation=test, which holds nothing out"
        )
    if "validation" in splits and (fold is not None or validation == "test"):
        option = "data.validation=test" if fold is None else f"data.fold={fold}"
        raise HorseHumanError(f"{option} does not go with a validation folder: drop one of them")
    if "test" not in splits:
        records = _hold_out(records, test_fraction, seed, "test", "data.test_fraction")
    if fold is not None:
        return _hold_out_fold(records, fold, folds, seed)
    if "validation" in splits or validation == "test" or val_fraction == 0:
        return records
    return _hold_out(records, val_fraction, seed, "validation", "data.val_fraction")


def group_folds(
    labels: NDArray[np.int64], groups: Sequence[str], folds: int, seed: int = 0
) -> NDArray[np.int64]:
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
    kinds = classes_of_groups(labels, index)
    assigned = np.zeros(len(kinds), np.int64)
    generator = np.random.default_rng(seed)
    for kind in (1, 2, 3):
        assigned[kinds == kind] = generator.permutation((kinds == kind).sum()) % folds
    return assigned[index]


def classes_of_groups(labels: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the classes in each of G groups: 1 for class 0 only, 2 for class 1 only, 3 for both.

    Args:
        labels: Labels of the images, 0 or 1, shape ``(N,)``.
        index: Group of each image, 0 to G - 1, shape ``(N,)``.

    Returns:
        Array of shape ``(G,)``.
    """
    kinds = np.zeros(index.max() + 1, np.int64)
    np.bitwise_or.at(kinds, index, labels + 1)
    return kinds


def min_groups_per_class(labels: NDArray[np.int64], groups: Sequence[str]) -> int:
    """Return the number of groups of the class with fewer groups.

    Args:
        labels: Labels of the images, 0 or 1, shape ``(N,)``.
        groups: Names of their groups, length N.
    """
    return min(len({g for g, y in zip(groups, labels, strict=True) if y == k}) for k in (0, 1))


def describe_splits(records: Sequence[Record]) -> str:
    """Count images and groups of each split, as in ``"834 to train on (54 groups), ..."``."""
    words = {"train": "to train on", "validation": "held out", "test": "to test"}
    parts = []
    for split, word in words.items():
        groups = [record.group for record in records if record.split == split]
        if groups:
            parts.append(f"{len(groups):,} {word} ({len(set(groups)):,} groups)")
    return ", ".join(parts)


def write_splits(
    folder: Path, root: Path, records: Sequence[Record], class_names: Sequence[str]
) -> None:
    """Write ``splits.csv`` with the columns picture (path below ``root``), label, group and split.

    Args:
        folder: Folder of the file.
        root: Folder of the images.
        records: The records.
        class_names: Names of class 0 and class 1.
    """
    rows = (
        (os.path.relpath(r.path, root).replace(os.sep, "/"), class_names[r.label], r.group, r.split)
        for r in records
    )
    write_csv(folder / "splits.csv", ("picture", "label", "group", "split"), rows)


def evenly_spaced(items: Sequence[T], most: int) -> list[T]:
    """Return at most ``most`` items at even distances, the first one included."""
    count = min(most, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def _compile_pattern(group_pattern: str | None) -> re.Pattern[str] | None:
    if group_pattern is None:
        return None
    try:
        pattern = re.compile(group_pattern)
    except (re.error, TypeError) as error:
        raise HorseHumanError(
            f"data.group_pattern={group_pattern!r} is not a regular expression: {error}"
        ) from error
    if pattern.groups != 1:
        raise HorseHumanError(
            f"data.group_pattern={group_pattern!r} has {pattern.groups} capturing groups: "
            "put exactly one (...) around the part that names the group"
        )
    return pattern


def _split_folders(root: Path, to_train: bool) -> dict[str, Path]:
    """Return the folder of each split; of a tree without split folders, ``{"": root}``."""
    folders: dict[str, Path] = {}
    others = []
    for folder in _subfolders(root):
        split = SPLITS.get(folder.name.lower())
        if split in folders:
            raise HorseHumanError(
                f"{printable(root)} has both {folders[split].name}/ and {folder.name}/: keep one"
            )
        if split:
            folders[split] = folder
        else:
            others.append(folder.name)
    if not folders:
        return {"": root}
    if others:
        names = printable(", ".join(others))
        log.warning("%s: ignored folders that are not splits (%s)", printable(root), names)
    if to_train and "train" not in folders:
        raise HorseHumanError(
            f"{printable(root)} has {' and '.join(sorted(folders))} but no train folder: add one"
        )
    return folders


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in _subfolders(folder)))
    if len(names) != 2:
        listing = f"{len(names)} ({', '.join(names[:5])})" if names else "none"
        raise HorseHumanError(
            f"{printable(folder)} must hold two class folders and holds {printable(listing)}: "
            "put the pictures of each class into a folder of its own"
        )
    return names


def _files_with_groups(
    root: Path, folder: Path, pattern: re.Pattern[str] | None
) -> Iterator[tuple[Path, str]]:
    """Yield the files of a class folder in sorted order, each with the name of its group.

    Raises:
        HorseHumanError: If there are no files, or the pattern does not match all of them.
    """
    paths = sorted(_walk(folder, frozenset()))
    if not paths:
        raise HorseHumanError(f"{printable(folder)} has no pictures: add some or remove the class")
    unmatched: list[str] = []
    for path in paths:
        if pattern is None:
            yield path, path.relative_to(root).as_posix()
            continue
        match = pattern.search(path.relative_to(folder).as_posix())
        if match is None or match[1] is None:
            unmatched.append(path.name)
        else:
            yield path, match[1]
    if pattern and unmatched:
        names = printable(", ".join(unmatched[:3]))
        raise HorseHumanError(
            f"data.group_pattern={pattern.pattern!r} does not match {len(unmatched)} of "
            f"{len(paths)} names in {printable(folder)} ({names}): change it to match all"
        )


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(e for e in folder.iterdir() if e.is_dir() and not is_hidden(e.name))
    except OSError as error:
        raise HorseHumanError(f"cannot read {printable(folder)}: {error.strerror}") from error


def _walk(folder: Path, parents: frozenset[str]) -> Iterator[Path]:
    """Yield the files below a folder; links are followed unless they lead back to a parent.

    Args:
        folder: The folder.
        parents: Real paths of the folders above it.
    """
    real = os.path.realpath(folder)
    if real in parents:
        return
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise HorseHumanError(f"cannot read {printable(folder)}: {error.strerror}") from error
    for entry in entries:
        if is_hidden(entry.name):
            continue
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
        folders = " and ".join(f"{split}/" for split in sorted(splits[divided[0]]))
        raise HorseHumanError(
            f"{printable(root)}: {len(divided)} groups are in more than one split folder (first: "
            f"{printable(divided[0])} in {folders}): move the pictures of each group together, or "
            "change data.group_pattern"
        )


def _hold_out(
    records: Sequence[Record], fraction: float, seed: int, split: str, option: str
) -> list[Record]:
    """Move a fraction of the training groups of each class, at least one but not all, to a split.

    Args:
        records: All records.
        fraction: Fraction of the groups.
        seed: Random seed.
        split: The split that the groups move to.
        option: Name of the option that sets the fraction, for the error message.
    """
    moved: set[str] = set()
    for groups in _shuffled_strata(records, seed):
        count = min(max(round(fraction * len(groups)), 1), len(groups) - 1)
        moved.update(groups[:count])
    return _move(records, moved, split, f"{option}={fraction:g}")


def _hold_out_fold(records: Sequence[Record], fold: int, folds: int, seed: int) -> list[Record]:
    """Move one fold of the training groups to validation; each group is in exactly one fold."""
    moved: set[str] = set()
    for groups in _shuffled_strata(records, seed):
        moved.update(groups[fold::folds])
    return _move(records, moved, "validation", f"data.folds={folds}")


def _shuffled_strata(records: Sequence[Record], seed: int) -> list[list[str]]:
    """Return the shuffled training groups of each set of classes.

    A group usually has one class. Groups with both classes, such as scenes with both, form a
    stratum of their own: they are not divided, and the classes stay balanced.
    """
    labels: dict[str, set[int]] = {}
    for record in records:
        if record.split == "train":
            labels.setdefault(record.group, set()).add(record.label)
    strata: dict[tuple[int, ...], list[str]] = {}
    for group in sorted(labels):
        strata.setdefault(tuple(sorted(labels[group])), []).append(group)
    for stratum, groups in strata.items():
        random.Random(f"{seed}-{stratum}").shuffle(groups)
    return [strata[stratum] for stratum in sorted(strata)]


def _move(records: Sequence[Record], groups: set[str], split: str, option: str) -> list[Record]:
    """Move training groups to a split.

    Raises:
        HorseHumanError: If a class has no images left to train on, or none in the split.
    """
    moved = [
        replace(record, split=split)
        if record.split == "train" and record.group in groups
        else record
        for record in records
    ]
    for name in ("train", split):
        missing = {r.label for r in records} - {r.label for r in moved if r.split == name}
        if missing:
            example = next(record for record in records if record.label in missing)
            raise HorseHumanError(
                f"{option}: the class of {printable(example.path)} has too few groups: add "
                "pictures of that class, hold out less, or group differently"
            )
    return moved
