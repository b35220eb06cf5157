"""Runs that learn *neither* from pictures of other things."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from horsehuman import HorseHumanDataModule, HorseHumanError, InceptionClassifier, load_classifier
from horsehuman.inference.predict import predict
from horsehuman.training.config import compose
from horsehuman.training.run import train

SMALL = ["model.image_size=96", "model.scales=[80]", "trainer.max_epochs=3", "data=folder"]


@pytest.fixture
def outliers(tmp_path: Path) -> Path:
    """Create a folder with 24 pictures of noise, two of them in a subfolder."""
    folder = tmp_path / "others"
    (folder / "more").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(24):
        pixels = generator.integers(0, 256, (60, 60, 3)).astype(np.uint8)
        place = folder / "more" if index < 2 else folder
        Image.fromarray(pixels).resize((96, 96)).save(place / f"{index}.png")
    return folder


@pytest.mark.slow
def test_a_run_learns_neither_from_a_folder(tree: Path, outliers: Path, tmp_path: Path) -> None:
    groups = 'data.group_pattern="([^/]+)-"'
    config = compose(*SMALL, f"data.root={tree}", groups, f"data.outliers={outliers}")
    metrics = train(config, tmp_path / "run")
    assert metrics["neither/outliers"] == 24
    assert metrics["neither/refused"] == 1
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    network = load_classifier(tmp_path / "run")
    statuses = [answer.status for answer in predict(network, sorted(outliers.glob("*.png")))]
    assert statuses == ["neither"] * 22
    known = predict(network, sorted((tree / "train").rglob("*.webp")))
    assert "neither" not in {answer.status for answer in known}
    path = tmp_path / "run" / "checkpoints" / "final.ckpt"
    assert InceptionClassifier.load_from_checkpoint(path).network.settings["neither"]


@pytest.mark.slow
def test_a_run_on_a_folder_ends_with_advice(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(tree, folder)
    shutil.move(folder / "train/horses/horse02-4.webp", folder / "train/humans")
    for path in folder.glob("train/horses/horse0[34]-[48].webp"):
        path.unlink()
    options = [*SMALL, "model.image_size=150", "model.scales=[150]", f"data.root={folder}"]
    metrics = train(compose(*options, "data.val_fraction=0"), tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("advice")]
    assert len(lines) == 4, lines
    near_duplicates, label, balance, neither = lines
    assert """'data.group_pattern="([^/]+)-[^-/]*$"' fits the file names""" in near_duplicates
    assert "horse02-4.webp as humans: check them" in label
    assert label.endswith(f"(horsehuman audit --data {folder})")
    assert "horses is rare, and answered more rarely" in balance
    assert "data.outliers=DIR teaches neither" in neither
    assert not any(name.startswith("neither") for name in metrics)
    assert not load_classifier(tmp_path / "run").settings["neither"]


def test_outliers_that_do_not_work(tree: Path, outliers: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        data = HorseHumanDataModule(32, "folder", str(tree), outliers=str(folder))
        with pytest.raises(HorseHumanError) as error:
            data.setup()
        return str(error.value)

    assert "missing is not a folder: name one with pictures" in refused(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "has 0 pictures: give at least 20 that show neither class" in refused(tmp_path / "empty")
    shutil.copy(next((tree / "train" / "horses").iterdir()), outliers / "copy.webp")
    assert "has 1 pictures of the classes" in (message := refused(outliers))
    assert "copy.webp): remove them from one of the two folders" in message
    (outliers / "copy.webp").write_text("text")
    assert "1 of 25 pictures are unreadable" in refused(outliers)


def test_outliers_need_inception(outliers: Path, tmp_path: Path) -> None:
    config = compose("model=cnn", f"data.outliers={outliers}")
    with pytest.raises(HorseHumanError, match=r"data\.outliers needs model=inception"):
        train(config, tmp_path / "run")
