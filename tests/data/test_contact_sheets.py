from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from horsehuman import HorseHumanError, plots
from horsehuman.data import contact_sheets
from horsehuman.data.contact_sheets import training_augmentation
from horsehuman.data.images import read_picture
from horsehuman.data.records import SUBJECT_PATTERN
from tests import commands

data = partial(commands.run, "data")


def rows(path: Path) -> float:
    """Return the number of image rows of a sheet, computed from its shape."""
    with Image.open(path) as sheet:
        return sheet.height / sheet.width * 8


def test_a_sheet_for_each_class_and_split(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed = data("--data", str(tree), "--group-pattern", SUBJECT_PATTERN, "--out", str(out))
    assert code == 0, printed
    sheets = [f"{split}-{name}.png" for split in ("train", "test") for name in ("horses", "humans")]
    assert {path.name for path in out.iterdir()} == {"data.json", *sheets}
    lines = [line.split() for line in printed.splitlines()]
    assert ["train", "horses", "12", "4"] in lines
    assert ["test", "humans", "2", "2"] in lines
    assert rows(out / "train-horses.png") > rows(out / "test-humans.png")
    report = json.loads((out / "data.json").read_text())
    assert report["sheets"] == sheets
    assert report["root"] == str(tree)
    assert report["counts"][1:3] == [
        {"split": "train", "class": "humans", "pictures": 12, "groups": 4},
        {"split": "test", "class": "horses", "pictures": 2, "groups": 1},
    ]
    code, printed = data("--data", str(tree), "--out", str(out))
    assert code == 1
    assert "holds a report already" in printed


def test_force_replaces_the_sheets_of_the_earlier_report_and_no_other_file(
    tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert data("--data", str(tree), "--out", str(out))[0] == 0
    others = [out / "mine.png", out / "mine.txt", tmp_path / "up.png"]
    for path in others:
        path.touch()
    report = json.loads((out / "data.json").read_text())
    report["sheets"] += ["../up.png", str(tmp_path / "up.png"), "mine.txt"]
    (out / "data.json").write_text(json.dumps(report))
    assert data("--data", str(tree / "train"), "--out", str(out), "--force")[0] == 0
    kept = {"data.json", "mine.png", "mine.txt"}
    assert {path.name for path in out.iterdir()} == {"horses.png", "humans.png", *kept}
    assert data("--data", str(tree), "--out", str(out), "--force", "--no-plot")[0] == 0
    assert {path.name for path in out.iterdir()} == kept
    assert all(path.exists() for path in others)


def test_json_is_all_that_is_printed(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed = data("--data", str(tree), "--json", "--no-plot", "--out", str(out))
    assert code == 0
    report = json.loads(printed)
    assert report == json.loads((out / "data.json").read_text())
    assert report["sheets"] == []
    assert [row["groups"] for row in report["counts"]] == [None] * 4


def test_augmented_sheets_show_training_images_reproducibly(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(tree), "--group-pattern", SUBJECT_PATTERN, "--augmented"]
    assert data(*arguments, "--out", str(out))[0] == 0
    names = sorted(path.name for path in out.glob("*.png"))
    assert names == ["train-horses-augmented.png", "train-humans-augmented.png"]
    again = tmp_path / "again"
    assert data(*arguments, "--out", str(again))[0] == 0
    first, second = (read_picture(folder / names[0]) for folder in (out, again))
    assert np.array_equal(first, second)
    size, augment = training_augmentation("box")
    assert size == 96
    assert augment.hue == 60


def test_unknown_groups_and_class_names_with_special_characters(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    shutil.copytree(tree / "train" / "horses", root / "a b*")
    shutil.copytree(tree / "train" / "humans", root / "c")
    (root / "c" / "broken.png").write_bytes(b"no picture")
    code, printed = data("--data", str(root), "--out", str(tmp_path / "out"))
    assert code == 1
    assert f"error: cannot read {root / 'c' / 'broken.png'}: not an image" in caplog.text
    assert "unknown" in printed
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"a_b_.png", "c.png"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--data", "EMPTY"], "two class folders"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], text: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    arguments = [a.replace("EMPTY", str(tmp_path / "empty")) for a in arguments]
    code, printed = data(*arguments, "--out", str(tmp_path / "out"))
    assert code == 1
    assert text in printed
    assert not (tmp_path / "out").exists()


def test_a_run_shows_its_own_augmentation(tmp_path: Path) -> None:
    (tmp_path / "splits.csv").write_text(
        "picture,label,group,split\na/1.png,a,one,train\na/2.png,a,one,train\nb/1.png,b,two,test\n"
    )
    config = tmp_path / "config.yaml"
    config.write_text("model: {image_size: 64}\ndata: {augment: {flip: true}}\n")
    size, augment = training_augmentation(str(tmp_path))
    assert (size, augment.flip, augment.rotation) == (64, True, 0)
    config.write_text("model: {image_size: 64}\ndata: {augment: null}\n")
    with pytest.raises(HorseHumanError, match="without augmentation"):
        training_augmentation(str(tmp_path))


def test_groups_of_a_run_are_those_of_its_splits(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {source: folder, root: /nowhere}\n")
    splits = tmp_path / "splits.csv"
    header = "picture,label,group,split\n"
    splits.write_text(header + "a/1,a,one,train\na/2,a,one,train\nb/1,b,two,train\n")
    arguments = ["--data", str(tmp_path), "--no-plot", "--json", "--force", "--out"]
    report = json.loads(data(*arguments, str(tmp_path / "out"))[1])
    assert [row["groups"] for row in report["counts"]] == [1, 1]
    splits.write_text(header + "a/1,a,a/1,train\na/2,a,a/2,train\nb/1,b,b/1,train\n")
    report = json.loads(data(*arguments, str(tmp_path / "out"))[1])
    assert [row["groups"] for row in report["counts"]] == [None, None]


def test_the_caption_names_what_a_row_shows(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(plots, "sheet", lambda rows, columns, title: titles.append(title))
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    for options in ((), ("--group-pattern", SUBJECT_PATTERN), ("--augmented",)):
        data("--data", str(tree), *options, "--out", str(tmp_path / str(len(titles))))
    captions = [title.partition("; ")[2] for title in titles]
    assert captions[:4] == ["ordered by name"] * 4
    assert captions[4:8] == ["one row per group"] * 4
    assert captions[8:] == ["original, then augmented as in training"] * 2


def test_the_augmentation_of_the_cnn_is_found_in_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "cnn.yaml").write_text(
        "model: {image_size: 32}\ndata: {augment: {flip: true}}\n"
    )
    monkeypatch.setattr(contact_sheets, "configs_dir", lambda: tmp_path)
    assert training_augmentation("box")[0] == 32


def test_large_training_images_are_shown_smaller(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[int] = []
    monkeypatch.setattr(plots, "sheet", lambda rows, *_: sides.append(rows[0][1].shape[1]))
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    monkeypatch.setattr(contact_sheets, "configs_dir", lambda: tmp_path)
    (tmp_path / "model").mkdir()
    for size in (100, 300):
        (tmp_path / "model" / "cnn.yaml").write_text(
            f"model: {{image_size: {size}}}\ndata: {{augment: {{flip: true}}}}\n"
        )
        data("--data", str(tree), "--augmented", "--out", str(tmp_path / str(size)))
    assert sides == [100, 100, 128, 128]


def test_a_picture_of_the_user_is_not_overwritten(tree: Path, tmp_path: Path) -> None:
    picture = tmp_path / "train-horses.png"
    picture.write_text("mine")
    code, printed = commands.run("data", "--data", str(tree), "--out", str(tmp_path))
    assert code == 1
    assert "holds a report already: add --force" in printed
    assert picture.read_text() == "mine"
