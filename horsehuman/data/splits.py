"""Splits and folds by group: no group ever stands on two sides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from horsehuman.data.folders import Record
from horsehuman.errors import HorseHumanError, shown


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
        records: Pictures as :func:`~horsehuman.data.folders.scan` found them.
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
        records = _cut(records, test_fraction, seed, "test", "data.test_fraction")
    if fold is not None:
        return _cut_fold(records, fold, folds, seed)
    if "validation" in found or validation == "test" or val_fraction == 0:
        return records
    return _cut(records, val_fraction, seed, "validation", "data.val_fraction")


def parts_by_group(
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
    kinds = kinds_of_groups(labels, index)
    found = np.zeros(len(kinds), np.int64)
    generator = np.random.default_rng(seed)
    for kind in (1, 2, 3):
        found[kinds == kind] = generator.permutation((kinds == kind).sum()) % parts
    return found[index]


def kinds_of_groups(labels: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
    """What each of G groups shows, ``(G,)``: 1 for class 0 alone, 2 for class 1, 3 for both.

    Args:
        labels: 0 or 1, ``(N,)``.
        index: Group of each picture, 0 to G - 1.
    """
    kinds = np.zeros(index.max() + 1, np.int64)
    np.bitwise_or.at(kinds, index, labels + 1)
    return kinds


def fewest_groups(labels: NDArray[np.int64], groups: Sequence[str]) -> int:
    """Groups of the class that has fewer."""
    return min(len({g for g, own in zip(groups, labels, strict=True) if own == k}) for k in (0, 1))


def _cut(
    records: Sequence[Record], fraction: float, seed: int, into: str, option: str
) -> list[Record]:
    """Move a share of the training groups of each class; one moves and one stays at least."""
    moved: set[str] = set()
    for groups in _shuffled_strata(records, seed):
        count = min(max(round(fraction * len(groups)), 1), len(groups) - 1)
        moved.update(groups[:count])
    return _move(records, moved, into, f"{option}={fraction:g}")


def _cut_fold(records: Sequence[Record], fold: int, folds: int, seed: int) -> list[Record]:
    """Move one fold; over all folds each training group moves once."""
    moved: set[str] = set()
    for groups in _shuffled_strata(records, seed):
        moved.update(groups[fold::folds])
    return _move(records, moved, "validation", f"data.folds={folds}")


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


def _move(records: Sequence[Record], groups: set[str], into: str, asked: str) -> list[Record]:
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
                f"{asked}: the class of {shown(example.path)} has too few groups for it: add "
                "pictures of that class, hold out less, or group differently"
            )
    return moved
