from __future__ import annotations

import os
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch

from horsehuman import CNNClassifier, HorseHumanError, InceptionClassifier, load_classifier
from horsehuman.models.checkpoint import find_checkpoint
from horsehuman.training.module import BinaryClassifier

TINY_CNN = {"image_size": 32, "channels": [4, 8], "threshold": 0.7, "temperature": 1.5}


def save(model: BinaryClassifier, path: Path) -> Path:
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path, weights_only=True)
    return path


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[CNNClassifier, Path]:
    model = CNNClassifier(**TINY_CNN, class_names=["cats", "dogs"]).eval()
    return model, save(model, tmp_path_factory.mktemp("cnn") / "model.ckpt")


def test_reloaded_classifiers_give_bit_identical_logits(
    cnn: tuple[CNNClassifier, Path], tmp_path: Path
) -> None:
    inception = InceptionClassifier(
        image_size=96, scales=[80, 96], weights="random", hidden=[3]
    ).eval()
    for model, path in (cnn, (inception, save(inception, tmp_path / "inception.ckpt"))):
        images = torch.randint(0, 256, (3, 3, 70, 80), dtype=torch.uint8)
        module = type(model).load_from_checkpoint(path).eval()
        assert dict(module.hparams) == dict(model.hparams)
        for network in (load_classifier(path), module.network):
            assert type(network) is type(model.network)
            with torch.no_grad():
                assert torch.equal(network(images), model(images))
            assert network.settings == model.network.settings
            assert not network.training


def test_a_checkpoint_contains_the_decision_settings(cnn: tuple[CNNClassifier, Path]) -> None:
    loaded = load_classifier(cnn[1])
    assert loaded.class_names == ("cats", "dogs")
    assert loaded.threshold == 0.7
    assert loaded.settings["temperature"] == 1.5
    assert loaded.image_size == 32


def test_loads_offline_and_without_the_bundled_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = InceptionClassifier(image_size=96)
    assert model.hparams["weights"] == "checkpoint"
    path = save(model, tmp_path / "model.ckpt")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the internet or pretrained weights were accessed")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("timm.list_pretrained", refuse)
    assert load_classifier(path).image_size == 96
    hostile = {**model.hparams, "weights": "tv_in1k"}
    assert load_classifier(change(path, path, hyper_parameters=hostile)).image_size == 96


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it starts with b''"),
        (b"<!DOCTYPE html><html></html>", "it starts with b'<!DOCTYPE html>"),
        (pickle.dumps(Malicious()), r"is not a checkpoint: it starts with b'\\x80"),
        (b"PK\x03\x04 cut off", "is damaged"),
        (b"hello", r"is not a checkpoint: it starts with b'hello': name another"),
    ],
)
def test_files_that_are_not_checkpoints_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(HorseHumanError, match=reason) as raised:
        load_classifier(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "executed").exists()


def test_code_in_a_checkpoint_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, "model.ckpt")
    with pytest.raises(
        HorseHumanError,
        match="holds more than weights and plain values; nothing in it was executed",
    ):
        load_classifier("model.ckpt")
    assert not (tmp_path / "executed").exists()


def test_a_truncated_checkpoint_is_refused(cnn: tuple[CNNClassifier, Path], tmp_path: Path) -> None:
    content = cnn[1].read_bytes()
    for share in (0.2, 0.9):
        path = tmp_path / f"{share}.ckpt"
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(HorseHumanError, match="is damaged"):
            load_classifier(path)


def change(path: Path, target: Path, **values: object) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, **values}, target)
    return target


def test_checkpoints_of_other_programs_formats_and_settings_are_refused(
    cnn: tuple[CNNClassifier, Path], tmp_path: Path
) -> None:
    target = tmp_path / "model.ckpt"
    for values, reason in (
        ({"horsehuman": None}, "not written by horsehuman"),
        ({"horsehuman": {"format": 99, "classifier": "CNNClassifier"}}, "has format 99"),
        ({"horsehuman": {"format": 1, "classifier": "CNNClassifier"}}, "train it again"),
        (
            {"horsehuman": {"format": 2, "classifier": "Other"}},
            r"cannot load .*: its weights and settings do not match: train it again",
        ),
        (
            {"hyper_parameters": {**TINY_CNN, "channels": [4, 9]}},
            r"cannot load .*: its weights and settings do not match: train it again",
        ),
        ({"hyper_parameters": {**TINY_CNN, "image_size": 0}}, "image_size"),
        (
            {"state_dict": {}},
            r"cannot load .*: its weights and settings do not match: train it again",
        ),
    ):
        with pytest.raises(HorseHumanError, match=reason) as raised:
            load_classifier(change(cnn[1], target, **values))
        assert "\n" not in str(raised.value)
    large = save(CNNClassifier(image_size=96, channels=[4]), tmp_path / "large.ckpt")
    with pytest.raises(TypeError, match=r"Inception.* unexpected keyword argument 'channels'"):
        InceptionClassifier.load_from_checkpoint(large)
    torch.save([1, 2], target)
    with pytest.raises(HorseHumanError, match="is damaged, or holds more than weights"):
        load_classifier(target)


def test_checkpoint_of_a_run_and_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finals = []
    for name in ("cnn/a", "inception/sweep_b/0"):
        final = Path("outputs") / name / "checkpoints" / "final.ckpt"
        final.parent.mkdir(parents=True)
        final.touch()
        finals.append(final)
    assert find_checkpoint("outputs/cnn/a") == finals[0]
    assert find_checkpoint(finals[0]) == finals[0]
    finals[0].rename(finals[0].with_name("last.ckpt"))
    unfinished = r"has no checkpoints/final\.ckpt: name a finished run, or its"
    for folder in ("outputs/cnn/a", tmp_path):
        with pytest.raises(HorseHumanError, match=unfinished):
            find_checkpoint(folder)
    with pytest.raises(HorseHumanError, match="no such run or file: give a run, a checkpoint or"):
        find_checkpoint("outputs/cnn/c")
    with pytest.raises(HorseHumanError, match=r"did you mean inception\?"):
        find_checkpoint("incepton")
