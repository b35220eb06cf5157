from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from horsehuman.data.archives import bundled_archives, unpack
from horsehuman.data.records import (
    SUBJECT_PATTERN,
    Record,
    SplitPlan,
    assign_splits,
    group_folds,
    scan_folder,
)
from horsehuman.errors import HorseHumanError


def make_tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_split_folders_by_alternative_names(tmp_path: Path) -> None:
    make_tree(
        tmp_path, "train/b/1.png", "train/a/2.jpg", "val/a/3", "val/b/4", "test/a/5", "test/b/6"
    )
    class_names, records = scan_folder(tmp_path)
    assert class_names == ("a", "b")
    assert {(r.path.name, r.label, r.split) for r in records} == {
        ("1.png", 1, "train"),
        ("2.jpg", 0, "train"),
        ("3", 0, "validation"),
        ("4", 1, "validation"),
        ("5", 0, "test"),
        ("6", 1, "test"),
    }


def test_class_folders_without_splits_leave_the_split_empty(tmp_path: Path) -> None:
    make_tree(tmp_path, "pferd ä/ein bild.png", "mensch/bild\nzwei.png", "mensch/deep/er/3.png")
    class_names, records = scan_folder(tmp_path)
    assert class_names == ("mensch", "pferd ä")
    assert len(records) == 3
    assert {record.split for record in records} == {""}
    assert len({record.group for record in records}) == 3


def test_only_hidden_and_system_files_are_ignored(tmp_path: Path) -> None:
    make_tree(tmp_path, "a/1.png", "a/.DS_Store", "a/Thumbs.db", "b/2.png", "b/notes.txt", ".git/x")
    make_tree(tmp_path, "__MACOSX/a/1.png")
    _, records = scan_folder(tmp_path)
    assert [record.path.name for record in records] == ["1.png", "2.png", "notes.txt"]


def test_groups_by_pattern(tmp_path: Path) -> None:
    make_tree(tmp_path, "a/horse01-0.png", "a/horse01-1.png", "b/x/human-2-7.png")
    _, records = scan_folder(tmp_path, r"([^/]+)-[^-/]*$")
    assert [record.group for record in records] == ["horse01", "horse01", "human-2"]


def test_split_names_in_any_case_and_other_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_tree(tmp_path, "Train/a/1", "Train/b/2", "Testing/a/3", "Testing/b/4", "copy/train/a/1")
    _, records = scan_folder(tmp_path)
    assert [record.split for record in records] == ["test", "test", "train", "train"]
    assert "ignored folders that are not splits (copy)" in caplog.text


def test_circular_links_end(tmp_path: Path) -> None:
    make_tree(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "circle").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a", target_is_directory=True)
    _, records = scan_folder(tmp_path)
    assert [record.path.name for record in records] == ["1.png", "2.png", "1.png"]


@pytest.mark.parametrize(
    ("names", "pattern", "reason"),
    [
        ([], None, "needs two class folders, not none"),
        (["a/1.png"], None, r"not 1 \(a\)"),
        (["x/a/1", "x/b/1"], None, "is .*/x the folder to name?"),
        (["a/1", "b/1", "c/1"], None, r"has 3 class folders.* \(a and b; a and c; b and c\)"),
        (["a/1", "b/.hidden"], None, "b has no pictures"),
        (
            ["train/a/1", "train/b/1", "test/a/1", "test/c/1"],
            None,
            "name the classes alike in all splits: a and b against a and c",
        ),
        (["test/a/1", "test/b/1"], None, "no train folder"),
        (["train/a/1", "train/b/1", "val/a/1", "valid/a/1"], None, "keep one"),
        (["a/1", "b/1"], "(", "is not a regular expression"),
        (["a/1", "b/1"], "a", "0 capturing groups"),
        (["a/1-1", "b/22"], "(.+)-", "does not match 1 of 1 names"),
        (
            ["train/a/1-1", "train/b/2-1", "test/a/1-2", "test/b/3-1"],
            "(.)-",
            r"1 groups are in more than one split \(1 in test and train\)",
        ),
    ],
)
def test_invalid_trees_are_errors(
    tmp_path: Path, names: list[str], pattern: str | None, reason: str
) -> None:
    with pytest.raises(HorseHumanError, match=reason) as caught:
        scan_folder(make_tree(tmp_path, *names), pattern)
    assert "\n" not in str(caught.value)


def test_a_tree_that_holds_itself_again_is_read_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy of the official set on Kaggle is such a tree."""
    names = ["train/horses/1.png", "train/humans/2.png", "validation/horses/3.png"]
    names += ["validation/humans/4.png"]
    make_tree(tmp_path, *names, *(f"horse-or-human/{name}" for name in names))
    _, records = scan_folder(tmp_path)
    assert sorted(record.path.name for record in records) == ["1.png", "2.png", "3.png", "4.png"]
    assert "ignored folders that are not splits (horse-or-human)" in caplog.text


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HorseHumanError, match="is not a folder"):
        scan_folder(tmp_path / "nowhere")


DEFAULT = {
    "validation": "held_out",
    "val_fraction": 0.2,
    "test_fraction": 0.2,
    "fold": None,
    "folds": 5,
    "seed": 0,
}


def records(horses: int = 10, humans: int = 6, frames: int = 3, split: str = "") -> list[Record]:
    subjects = [("horses", 0, n) for n in range(horses)] + [("humans", 1, n) for n in range(humans)]
    return [
        Record(Path(name) / f"{n}-{frame}.png", label, f"{name}{n}", split)
        for name, label, n in subjects
        for frame in range(frames)
    ]


def groups(records: list[Record]) -> dict[str, set[str]]:
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.split, set()).add(record.group)
    return splits


def assert_groups_intact(records: list[Record]) -> None:
    counts = Counter(group for members in groups(records).values() for group in members)
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("seed", range(20))
def test_no_group_is_in_two_splits(seed: int) -> None:
    assigned = assign_splits(records(), SplitPlan(**{**DEFAULT, "seed": seed}))
    assert_groups_intact(assigned)
    assert {split: len(members) for split, members in groups(assigned).items()} == {
        "train": 10,
        "validation": 3,
        "test": 3,
    }
    assert [r.path for r in assigned] == [r.path for r in records()]


def test_official_set_is_held_out_by_subject() -> None:
    _, official = scan_folder(unpack(bundled_archives()), SUBJECT_PATTERN)
    for seed in range(3):
        assigned = assign_splits(official, SplitPlan(**{**DEFAULT, "seed": seed}))
        assert_groups_intact(assigned)
        assert {split: len(members) for split, members in groups(assigned).items()} == {
            "train": 54,
            "validation": 13,
            "test": 11,
        }


def test_same_seed_gives_same_splits_in_any_folder() -> None:
    moved = [replace(record, path=Path("/elsewhere") / record.path) for record in records()]
    first = [record.split for record in assign_splits(records(), SplitPlan(**DEFAULT))]
    assert [record.split for record in assign_splits(moved, SplitPlan(**DEFAULT))] == first
    other = assign_splits(records(), SplitPlan(**{**DEFAULT, "seed": 1}))
    assert [record.split for record in other] != first


def test_each_group_is_held_out_in_one_fold() -> None:
    held: Counter[str] = Counter()
    for fold in range(3):
        assigned = assign_splits(
            records(split="train")
            + [replace(r, group="t" + r.group) for r in records(2, 2, 1, "test")],
            SplitPlan(**{**DEFAULT, "fold": fold, "folds": 3}),
        )
        assert_groups_intact(assigned)
        held.update(groups(assigned)["validation"])
    assert set(held.values()) == {1}
    assert len(held) == 16


def test_groups_with_both_classes_stay_intact() -> None:
    both = [
        Record(Path(name) / f"scene{n}.png", label, f"scene{n}", "")
        for n in range(10)
        for label, name in enumerate(("horses", "humans"))
    ]
    assigned = assign_splits(both, SplitPlan(**DEFAULT))
    assert_groups_intact(assigned)
    assert len(groups(assigned)["test"]) == 2


def test_folds_have_intact_groups_of_every_kind() -> None:
    groups = np.repeat([f"g{number:02}" for number in range(30)], 4)
    labels = np.repeat([0, 1, 0], 40)
    labels[80::3] = 1  # the last ten groups have both classes
    folds = group_folds(labels, groups.tolist(), 5)
    for group in np.unique(groups):
        assert len(set(folds[groups == group])) == 1
    for kind in (slice(0, 40), slice(40, 80), slice(80, 120)):
        assert np.bincount(folds[kind]).tolist() == [8] * 5


def test_nothing_held_out_and_validation_on_the_test_set() -> None:
    for change in ({"val_fraction": 0}, {"validation": "test"}):
        assigned = assign_splits(records(), SplitPlan(**{**DEFAULT, **change}))
        assert set(groups(assigned)) == {"train", "test"}


@pytest.mark.parametrize(
    ("records", "change", "reason"),
    [
        (records(1, 5), {}, r"test_fraction=0.2: the class of horses/.* has too few groups"),
        (records(5, 2, split="train"), {}, "has too few groups"),
        (records(10, 6), {"folds": 9, "fold": 8}, r"data.folds=9: the class of \w+/.* has too few"),
    ],
)
def test_too_few_groups(records: list[Record], change: dict, reason: str) -> None:
    with pytest.raises(HorseHumanError, match=reason):
        assign_splits(records, SplitPlan(**{**DEFAULT, **change}))


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(HorseHumanError, match=r"data\.fold=1 needs data\.validation=held_out"):
        assign_splits(records(), SplitPlan(**{**DEFAULT, "fold": 1, "validation": "test"}))


def test_options_that_contradict_the_validation_folder() -> None:
    given = records(split="train") + [
        replace(r, group="v" + r.group) for r in records(2, 2, 1, "validation")
    ]
    for change in ({"fold": 1}, {"validation": "test"}):
        with pytest.raises(HorseHumanError, match="does not go with a validation folder"):
            assign_splits(given, SplitPlan(**{**DEFAULT, **change}))
