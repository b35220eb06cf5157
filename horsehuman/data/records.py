"""A folder tree of pictures as records; every complaint about a tree comes from here."""

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

#: The names of split folders, in any case, with the other names that are in use for them.
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

#: Of the official file names, what names the rendered figure: all before the last dash.
SUBJECT_PATTERN = r"([^/]+)-[^-/]*$"


@dataclass(frozen=True)
class Record:
    """One picture.

    Attributes:
        path: The file.
        label: 0 or 1, the index of its class.
        group: What must not be split; pictures with the same group are never torn apart.
        split: ``train``, ``validation`` or ``test``; empty while it is not decided.
    """

    path: Path
    label: int
    group: str
    split: str


def scan_folder(
    root: Path, group_pattern: str | None = None, *, to_train: bool = True
) -> tuple[list[str], list[Record]]:
    """List the pictures of ``root/{train,validation,test}/{a,b}/`` or of ``root/{a,b}/``.

    Hidden files and the litter of file managers are left aside; every other file counts as a
    picture. Folders below a class folder are searched too.

    Args:
        root: The folder.
        group_pattern: A regular expression with one capturing group, searched for in the path
            below the class folder (with forward slashes); what it captures is the picture's
            group. Without it each picture is a group by itself.
        to_train: Whether there must be pictures to train on.

    Returns:
        The two class names in sorted order, and the records in the order of their paths.

    Raises:
        HorseHumanError: The tree is not of either form, a class has no pictures, the pattern does
            not work, or a group stands in two split folders.
    """
    pattern = _compile(group_pattern)
    if not root.is_dir():
        raise HorseHumanError(
            f"{printable(root)} is no folder: give the folder that holds the classes"
        )
    folders = _split_folders(root, to_train)
    names = {_class_names(folder) for folder in folders.values()}
    if len(names) > 1:
        raise HorseHumanError(
            f"{printable(root)}: the split folders hold different classes "
            f"({printable(' against '.join(' and '.join(pair) for pair in sorted(names)))}): name them "
            "alike"
        )
    class_names = list(names.pop())
    records = [
        Record(path, label, group, split)
        for split, folder in folders.items()
        for label, name in enumerate(class_names)
        for path, group in _groups(root, folder / name, pattern)
    ]
    _refuse_torn_groups(root, records)
    return class_names, records


def evenly_spaced(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly spread."""
    count = min(most, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def describe_splits(records: Sequence[Record]) -> str:
    """Count pictures and groups of each split, as in ``"834 to train on (54 groups), ..."``."""
    words = {"train": "to train on", "validation": "held out", "test": "to test"}
    parts = []
    for split, word in words.items():
        groups = [record.group for record in records if record.split == split]
        if groups:
            parts.append(f"{len(groups):,} {word} ({len(set(groups)):,} groups)")
    return ", ".join(parts)


def _compile(group_pattern: str | None) -> re.Pattern[str] | None:
    if group_pattern is None:
        return None
    try:
        pattern = re.compile(group_pattern)
    except (re.error, TypeError) as error:
        raise HorseHumanError(
            f"data.group_pattern={group_pattern!r} is no regular expression: {error}"
        ) from error
    if pattern.groups != 1:
        raise HorseHumanError(
            f"data.group_pattern={group_pattern!r} has {pattern.groups} capturing groups: "
            "put exactly one (...) around what names the group"
        )
    return pattern


def _split_folders(root: Path, to_train: bool) -> dict[str, Path]:
    """Map split names to folders; a tree without split folders is one undecided split."""
    folders: dict[str, Path] = {}
    others = []
    for folder in _folders(root):
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
        log.warning(
            "%s: left aside what is no split (%s)", printable(root), printable(", ".join(others))
        )
    if to_train and "train" not in folders:
        raise HorseHumanError(
            f"{printable(root)} has {' and '.join(sorted(folders))} but no train folder: add one"
        )
    return folders


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in _folders(folder)))
    if len(names) != 2:
        found = f"{len(names)} ({', '.join(names[:5])})" if names else "none"
        raise HorseHumanError(
            f"{printable(folder)} must hold two class folders and holds {printable(found)}: "
            "put the pictures of each class into a folder of its own"
        )
    return names


def _groups(
    root: Path, folder: Path, pattern: re.Pattern[str] | None
) -> Iterator[tuple[Path, str]]:
    paths = sorted(_files(folder, frozenset()))
    if not paths:
        raise HorseHumanError(f"{printable(folder)} holds no picture: add some or remove the class")
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
        raise HorseHumanError(
            f"data.group_pattern={pattern.pattern!r} does not fit {len(unmatched)} of {len(paths)} "
            f"names in {printable(folder)} ({printable(', '.join(unmatched[:3]))}): change it to fit all"
        )


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(e for e in folder.iterdir() if e.is_dir() and not is_hidden(e.name))
    except OSError as error:
        raise HorseHumanError(f"cannot read {printable(folder)}: {error.strerror}") from error


def _files(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """Walk a folder through links, but not in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise HorseHumanError(f"cannot read {printable(folder)}: {error.strerror}") from error
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from _files(entry, above | {real})
        else:
            yield entry


def _refuse_torn_groups(root: Path, records: Sequence[Record]) -> None:
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.group, set()).add(record.split)
    torn = sorted(group for group, found in splits.items() if len(found) > 1)
    if torn:
        where = " and ".join(f"{split}/" for split in sorted(splits[torn[0]]))
        raise HorseHumanError(
            f"{printable(root)}: {len(torn)} groups stand in more than one split folder (first: "
            f"{printable(torn[0])} in {where}): move their pictures together or mend data.group_pattern"
        )


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
    """Decide for each picture whether it trains, validates or tests.

    Splits that the records already name stand; what is missing is cut from the training
    pictures, by group and for each class.

    Args:
        records: Pictures as :func:`~horsehuman.data.folders.scan_folder` found them.
        validation: ``held_out``, or ``test`` to hold nothing out.
        val_fraction: Share of the training groups that is held out; 0 for none.
        test_fraction: Share of all groups that becomes the test set where there is none.
        fold: Index of the fold to hold out instead of a share.
        folds: Number of folds.
        seed: The same seed and records give the same splits.

    Returns:
        All records in their order, each with a split.

    Raises:
        HorseHumanError: A class has too few groups, or the options contradict the records.
    """
    records = [replace(r, split="train") if r.split == "" else r for r in records]
    found = {record.split for record in records}
    if validation == "test" and fold is not None:
        raise HorseHumanError(
            f"data.fold={fold} does not go with data.validation=test, which holds nothing out"
        )
    if "validation" in found and (fold is not None or validation == "test"):
        option = "data.validation=test" if fold is None else f"data.fold={fold}"
        raise HorseHumanError(f"{option} does not go with a validation folder: drop one of them")
    if "test" not in found:
        records = _hold_out(records, test_fraction, seed, "test", "data.test_fraction")
    if fold is not None:
        return _hold_out_fold(records, fold, folds, seed)
    if "validation" in found or validation == "test" or val_fraction == 0:
        return records
    return _hold_out(records, val_fraction, seed, "validation", "data.val_fraction")


def group_folds(
    labels: NDArray[np.int64], groups: Sequence[str], parts: int, seed: int = 0
) -> NDArray[np.int64]:
    """A part, 0 to ``parts - 1``, for each picture; groups are whole, and each kind is shared out.

    Args:
        labels: 0 or 1, ``(N,)``.
        groups: Which pictures belong together.
        parts: How many; each class should have as many groups.
        seed: Of the drawing.
    """
    index = np.unique(groups, return_inverse=True)[1]
    kinds = classes_of_groups(labels, index)
    found = np.zeros(len(kinds), np.int64)
    generator = np.random.default_rng(seed)
    for kind in (1, 2, 3):
        found[kinds == kind] = generator.permutation((kinds == kind).sum()) % parts
    return found[index]


def classes_of_groups(labels: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
    """What each of G groups shows, ``(G,)``: 1 for class 0 alone, 2 for class 1, 3 for both.

    Args:
        labels: 0 or 1, ``(N,)``.
        index: Group of each picture, 0 to G - 1.
    """
    kinds = np.zeros(index.max() + 1, np.int64)
    np.bitwise_or.at(kinds, index, labels + 1)
    return kinds


def min_groups_per_class(labels: NDArray[np.int64], groups: Sequence[str]) -> int:
    """Groups of the class that has fewer."""
    return min(len({g for g, own in zip(groups, labels, strict=True) if own == k}) for k in (0, 1))


def _hold_out(
    records: Sequence[Record], fraction: float, seed: int, into: str, option: str
) -> list[Record]:
    """Move a share of the training groups of each class; one moves and one stays at least."""
    moved: set[str] = set()
    for groups in _shuffled_strata(records, seed):
        count = min(max(round(fraction * len(groups)), 1), len(groups) - 1)
        moved.update(groups[:count])
    return _assign(records, moved, into, f"{option}={fraction:g}")


def _hold_out_fold(records: Sequence[Record], fold: int, folds: int, seed: int) -> list[Record]:
    """Move one fold; over all folds each training group moves once."""
    moved: set[str] = set()
    for groups in _shuffled_strata(records, seed):
        moved.update(groups[fold::folds])
    return _assign(records, moved, "validation", f"data.folds={folds}")


def _shuffled_strata(records: Sequence[Record], seed: int) -> list[list[str]]:
    """Lists of shuffled training groups, one for each set of classes that groups cover.

    A group is usually of one class; those that hold both (a scene with both, say) are shared out
    among themselves, so that they stay whole and the classes stay balanced.
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


def _assign(records: Sequence[Record], groups: set[str], into: str, asked: str) -> list[Record]:
    moved = [
        replace(record, split=into)
        if record.split == "train" and record.group in groups
        else record
        for record in records
    ]
    for split in ("train", into):
        missing = {r.label for r in records} - {r.label for r in moved if r.split == split}
        if missing:
            example = next(record for record in records if record.label in missing)
            raise HorseHumanError(
                f"{asked}: the class of {printable(example.path)} has too few groups for it: add "
                "pictures of that class, hold out less, or group differently"
            )
    return moved


def write_splits(
    folder: Path, root: Path, records: Sequence[Record], class_names: Sequence[str]
) -> None:
    """Write ``splits.csv``: picture (below the data's root), label, group, split."""
    rows = (
        (os.path.relpath(r.path, root).replace(os.sep, "/"), class_names[r.label], r.group, r.split)
        for r in records
    )
    write_csv(folder / "splits.csv", ("picture", "label", "group", "split"), rows)
