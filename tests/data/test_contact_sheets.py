from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from horsehuman import HorseHumanError
from horsehuman.data.contact_sheets import training_recipe
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
    assert {path.name for path in out.iterdir()} == {
        f"{split}-{name}.png" for split in ("train", "test") for name in ("horses", "humans")
    }
    lines = [line.split() for line in printed.splitlines()]
    assert ["train", "horses", "12", "4"] in lines
    assert ["test", "humans", "2", "2"] in lines
    assert rows(out / "train-horses.png") > rows(out / "test-humans.png")
    code, printed = data("--data", str(tree), "--out", str(out))
    assert code == 1
    assert "holds a report already" in printed


def test_augmented_sheets_show_training_images_reproducibly(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(tree), "--group-pattern", SUBJECT_PATTERN, "--augmented"]
    assert data(*arguments, "--out", str(out))[0] == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["train-horses-augmented.png", "train-humans-augmented.png"]
    again = tmp_path / "again"
    assert data(*arguments, "--out", str(again))[0] == 0
    first, second = (read_picture(folder / names[0]) for folder in (out, again))
    assert np.array_equal(first, second)
    size, augment = training_recipe("box")
    assert size == 96
    assert augment.hue == 60


def test_unknown_groups_and_class_names_with_special_characters(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(tree / "train" / "horses", root / "a b*")
    shutil.copytree(tree / "train" / "humans", root / "c")
    (root / "c" / "broken.png").write_bytes(b"no picture")
    code, printed = data("--data", str(root), "--out", str(tmp_path / "out"))
    assert code == 1
    assert "broken.png" in printed
    assert "unknown" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a_b_.png", "c.png"}


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
    (tmp_path / "splits.csv").write_text("picture,label,group,split\n")
    config = tmp_path / "config.yaml"
    config.write_text("model: {image_size: 64}\ndata: {augment: {flip: true}}\n")
    size, augment = training_recipe(str(tmp_path))
    assert (size, augment.flip, augment.rotation) == (64, True, 0)
    config.write_text("model: {image_size: 64}\ndata: {augment: null}\n")
    with pytest.raises(HorseHumanError, match="without augmentation"):
        training_recipe(str(tmp_path))
