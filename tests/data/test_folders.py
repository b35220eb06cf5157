from __future__ import annotations

from pathlib import Path

import pytest

from horsehuman.data.records import scan_folder
from horsehuman.errors import HorseHumanError


def plant(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_split_folders_by_any_of_their_names(tmp_path: Path) -> None:
    plant(tmp_path, "train/b/1.png", "train/a/2.jpg", "val/a/3", "val/b/4", "test/a/5", "test/b/6")
    class_names, records = scan_folder(tmp_path)
    assert class_names == ["a", "b"]
    found = {(r.path.name, r.label, r.split) for r in records}
    assert found == {
        ("1.png", 1, "train"),
        ("2.jpg", 0, "train"),
        ("3", 0, "validation"),
        ("4", 1, "validation"),
        ("5", 0, "test"),
        ("6", 1, "test"),
    }


def test_class_folders_alone_leave_the_split_open(tmp_path: Path) -> None:
    plant(tmp_path, "pferd ä/ein bild.png", "mensch/bild\nzwei.png", "mensch/deep/er/3.png")
    class_names, records = scan_folder(tmp_path)
    assert class_names == ["mensch", "pferd ä"]
    assert len(records) == 3
    assert {record.split for record in records} == {""}
    assert len({record.group for record in records}) == 3


def test_litter_is_left_aside_and_nothing_else(tmp_path: Path) -> None:
    plant(tmp_path, "a/1.png", "a/.DS_Store", "a/Thumbs.db", "b/2.png", "b/notes.txt", ".git/x")
    plant(tmp_path, "__MACOSX/a/1.png")
    _, records = scan_folder(tmp_path)
    assert [record.path.name for record in records] == ["1.png", "2.png", "notes.txt"]


def test_groups_by_pattern(tmp_path: Path) -> None:
    plant(tmp_path, "a/horse01-0.png", "a/horse01-1.png", "b/x/human-2-7.png")
    _, records = scan_folder(tmp_path, r"([^/]+)-[^-/]*$")
    assert [record.group for record in records] == ["horse01", "horse01", "human-2"]


def test_names_of_splits_in_any_case_and_what_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plant(tmp_path, "Train/a/1", "Train/b/2", "Testing/a/3", "Testing/b/4", "copy/train/a/1")
    _, records = scan_folder(tmp_path)
    assert [record.split for record in records] == ["test", "test", "train", "train"]
    assert "left aside what is no split (copy)" in caplog.text


def test_links_in_circles_end(tmp_path: Path) -> None:
    plant(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "circle").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a", target_is_directory=True)
    _, records = scan_folder(tmp_path)
    assert [record.path.name for record in records] == ["1.png", "2.png", "1.png"]


@pytest.mark.parametrize(
    ("names", "pattern", "reason"),
    [
        ([], None, "must hold two class folders and holds none"),
        (["a/1.png"], None, r"holds 1 \(a\)"),
        (["a/1", "b/1", "c/1"], None, r"holds 3 \(a, b, c\)"),
        (["a/1", "b/.hidden"], None, "b holds no picture"),
        (["train/a/1", "train/b/1", "test/a/1", "test/c/1"], None, "different classes"),
        (["test/a/1", "test/b/1"], None, "no train folder"),
        (["train/a/1", "train/b/1", "val/a/1", "valid/a/1"], None, "keep one"),
        (["a/1", "b/1"], "(", "no regular expression"),
        (["a/1", "b/1"], "a", "0 capturing groups"),
        (["a/1-1", "b/22"], "(.+)-", "does not fit 1 of 1 names"),
        (["train/a/1-1", "train/b/2-1", "test/a/1-2", "test/b/3-1"], "(.)-", "1 groups stand in"),
    ],
)
def test_complaints_about_a_tree(
    tmp_path: Path, names: list[str], pattern: str | None, reason: str
) -> None:
    with pytest.raises(HorseHumanError, match=reason) as caught:
        scan_folder(plant(tmp_path, *names), pattern)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(HorseHumanError, match="is no folder"):
        scan_folder(tmp_path / "nowhere")
