from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image

from horsehuman import CNNClassifier, HorseHumanDataModule, HorseHumanError
from horsehuman.training.build import QUIET
from tests import commands
from tests.conftest import train_small_cnn


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one grey image in two classes, four times as often in the first."""
    root = tmp_path_factory.mktemp("grey")
    for name, count in (("a", 24), ("b", 6)):
        for split in ("train", "test"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (48, 48), "grey").save(root / split / name / f"{index}.png")
    return root


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"balance": "none"}, 0.2),
        ({"balance": "auto"}, 0.2),
        ({"balance": "none", "prior": 0.5}, 0.5),
        ({"balance": "auto", "prior": 0.5}, 0.5),
        ({"balance": "loss", "prior": 0.9}, 0.9),
    ],
)
def test_probabilities_are_right_for_the_prior(
    options: dict[str, Any], share: float, grey: Path
) -> None:
    L.seed_everything(0)
    data = HorseHumanDataModule(
        48, "folder", str(grey), validation="test", batch_size=30, **options
    )
    model = CNNClassifier(
        image_size=48,
        channels=[4],
        batch_norm=False,
        dropout=0.0,
        label_smoothing=0.0,
        schedule="cosine",
        optimizer={"name": "Adam", "lr": 0.1},
    )
    trainer = L.Trainer(max_epochs=60, logger=False, enable_checkpointing=False, **QUIET)
    trainer.fit(model, data)
    images, _ = next(iter(data.test_dataloader()))
    probability = model.network.logits(images).sigmoid()
    assert torch.allclose(probability, torch.tensor(share), atol=0.02), probability


def test_reports_of_unbalanced_classes_lead_with_balanced_accuracy(
    grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_groups = ("data.group_pattern=null", "data.val_fraction=0")
    run = train_small_cnn(grey, tmp_path / "run", *no_groups)
    assert "test        50.00% balanced: 100.0% of a and 0.0% of b" in capsys.readouterr().out
    code, output = commands.run("evaluate", "--model", str(run), "--out", str(tmp_path / "out"))
    assert code == 0
    rows = [output.index(name) for name in ("balanced accuracy", "recall of b", "precision of a")]
    assert rows == sorted(rows)


@pytest.mark.parametrize("options", [{"balance": "yes"}, {"prior": 0}, {"prior": 1.0}])
def test_wrong_options(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(HorseHumanError, match=f"data.{name}"):
        HorseHumanDataModule(**options)
