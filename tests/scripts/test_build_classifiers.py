from __future__ import annotations

from pathlib import Path

import build_classifiers as script
import pytest
import torch

from horsehuman import load_classifier
from horsehuman.models.checkpoint import find_checkpoint
from horsehuman.runtime import BUNDLED


def options(tree: Path) -> list[str]:
    pattern = 'data.group_pattern="([^/]+)-[^-/]*$"'
    return ["data=folder", f"data.root={tree}", pattern, "trainer.max_epochs=1"]


@pytest.mark.slow
def test_the_backbone_is_not_stored_twice(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "inception.ckpt"
    script.build("inception", target, [*options(tree), "model.scales=[80]"], calibrated=False)
    assert target.stat().st_size < 50_000
    checkpoint = torch.load(target, weights_only=True)
    assert set(checkpoint["state_dict"]) == {"network.head.1.weight", "network.head.1.bias"}
    network = load_classifier(target)
    assert network.class_names == ("horses", "humans")
    images = torch.randint(0, 256, (2, 3, 90, 90), dtype=torch.uint8)
    assert network.logits(images).shape == (2,)


def test_unknown_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in (["vgg", "--out", str(tmp_path)], ["vgg"]):
        assert script.main(arguments) == 1
        assert capsys.readouterr().err.startswith("error: NAME='vgg' is not known: use inception")


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_classifiers_are_right_on_training_images(name: str, tree: Path) -> None:
    from horsehuman.inference.predict import predict

    paths = sorted((tree / "train").rglob("*.webp"))[::3]
    predictions = predict(load_classifier(name), paths)
    assert [p.class_name for p in predictions] == [path.parent.name for path in paths]


def test_bundled_classifiers_are_small() -> None:
    sizes = {name: find_checkpoint(name).stat().st_size for name in BUNDLED}
    assert sizes["cnn"] <= 2e6
    assert sum(sizes.values()) <= 5e6
