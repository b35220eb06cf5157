"""A small file of every format so far is read, or refused with what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from horsehuman import CNNClassifier, HorseHumanError, load_classifier
from horsehuman.inference.onnx import FORMAT as EXPORT_FORMAT
from horsehuman.inference.onnx import OnnxClassifier
from horsehuman.models.base import FORMAT
from horsehuman.models.checkpoint import read_checkpoint, write_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"

#: An image, uint8 ``(1, 3, 32, 32)``, and its calibrated logit when the files were written.
IMAGE, LOGIT = torch.arange(3 * 32 * 32, dtype=torch.uint8).view(1, 3, 32, 32), 0.42073625


def test_every_format_has_a_file() -> None:
    names = {path.name for path in FIXTURES.iterdir()}
    assert names == {
        *(f"cnn-format{number}.ckpt" for number in range(1, FORMAT + 1)),
        *(f"cnn-export{number}.onnx" for number in range(1, EXPORT_FORMAT + 1)),
    }


def test_checkpoints() -> None:
    for number in (2, 3):
        network = load_classifier(FIXTURES / f"cnn-format{number}.ckpt")
        assert network.logits(IMAGE).item() == pytest.approx(LOGIT, abs=1e-4)
        assert network.confidence_threshold == 0.5
    with pytest.raises(HorseHumanError, match="format 1, this code reads 2 and 3: train it again"):
        load_classifier(FIXTURES / "cnn-format1.ckpt")


def test_settings_of_format_2_keep_their_values(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(FIXTURES / "cnn-format2.ckpt")
    checkpoint["hyper_parameters"] |= {"certain_from": 0.75, "far_from": 0.04}
    write_checkpoint(tmp_path / "old.ckpt", checkpoint)
    assert load_classifier(tmp_path / "old.ckpt").confidence_threshold == 0.75


def test_lightning_loads_the_format_before() -> None:
    module = CNNClassifier.load_from_checkpoint(FIXTURES / "cnn-format2.ckpt")
    assert module.network.logits(IMAGE).item() == pytest.approx(LOGIT, abs=1e-4)


def test_exports() -> None:
    for number in (1, 2):
        classifier = OnnxClassifier(FIXTURES / f"cnn-export{number}.onnx")
        logit, _, neither, both = classifier.predict_batch(IMAGE.numpy())
        assert logit.item() == pytest.approx(LOGIT, abs=1e-4)
        assert neither.item() == both.item() == -1
