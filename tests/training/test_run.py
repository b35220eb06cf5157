from __future__ import annotations

import csv
import hashlib
import json
import sqlite3
import subprocess
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from horsehuman import CNNClassifier, HorseHumanDataModule, HorseHumanError, load_classifier
from horsehuman.data.datasets import decode
from horsehuman.data.images import read_picture
from horsehuman.inference.predict import predict
from horsehuman.training import callbacks
from horsehuman.training.build import EPOCHS, MAX_EPOCHS, STEPS, build, build_trainer, epochs_for
from horsehuman.training.config import compose
from horsehuman.training.run import finalize_checkpoints
from horsehuman.training.run import train as train_run
from tests.conftest import SMALL_CNN, small_cnn, small_data

#: Options that make a run of ``conftest.small_cnn`` shorter by the validation and the test.
TRAIN_ONLY = ["data.val_fraction=0", "test=false"]

INCEPTION = ["model=inception", "model.image_size=96", "model.scales=[80]", "trainer.max_epochs=2"]


def train(folder: Path, *overrides: str) -> dict[str, Any]:
    config = compose(*overrides)
    return train_run(config, folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / "final.ckpt"
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize(
    ("size", "model"),
    [(48, SMALL_CNN), pytest.param(96, INCEPTION, marks=pytest.mark.slow)],
    ids=["cnn", "inception"],
)
def test_train_reload_predict(
    size: int, model: list[str], tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "outputs" / "cnn" / "run"
    metrics = train(run, *model, *small_data(tree), "trainer.log_every_n_steps=2")
    printed = capsys.readouterr()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best.ckpt",
        "final.ckpt",
        "last.ckpt",
    ]
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert metrics["test/pictures"] == 4
    assert read_picture(run / "samples.png").shape[1] == 8 * (size + 2) + 2
    assert (run.parent / "latest").resolve() == run
    assert f"horsehuman predict PICTURE --model {run}" in printed.out
    assert f"tensorboard --logdir {run}" in printed.out
    assert "epoch   2/2" in printed.err

    classifier = load_classifier(run)
    with (run / "splits.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    answers = predict(classifier, [tree / row["picture"] for row in rows])
    right = sum(a.class_name == row["label"] for a, row in zip(answers, rows, strict=True))
    assert right == metrics["test/right"]

    log = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lr"} <= set(log.Tags()["scalars"])
    assert len(log.Scalars("train/loss")) == 2
    assert log.Scalars("final/test/acc")[0].value == pytest.approx(metrics["test/acc"])
    assert log.Tags()["images"] == ["samples", "held out/report"]
    curve = log.summary_metadata["held out/precision and recall"]
    assert curve.plugin_data.plugin_name == "pr_curves"
    (text,) = log.Tensors("config/text_summary")
    assert f"max_epochs: {2}" in text.tensor_proto.string_val[0].decode()
    assert metrics["peak_memory_gb"] is None or 0.2 < metrics["peak_memory_gb"] < 8
    assert "_hparams_/session_start_info" in log.summary_metadata


def test_final_checkpoints_have_no_optimizer_state(cnn_run: Path) -> None:
    full, final, best = (
        torch.load(cnn_run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        for name in ("last", "final", "best")
    )
    assert "optimizer_states" in full
    assert not {"optimizer_states", "loops", "current_model_state"} & {*final, *best}
    differs = 0
    for name, value in final["state_dict"].items():
        assert torch.equal(value, full["state_dict"][name])  # the average
        differs += not torch.equal(value, full["current_model_state"][name])
    assert differs > 0


def test_averaged_weights_of_a_short_run_are_trained_weights(tree: Path, tmp_path: Path) -> None:
    """A plain average with decay 0.999 would still be the first, random weights."""
    train(tmp_path, *small_cnn(tree, *TRAIN_ONLY, "ema=0.999", "trainer.max_epochs=1"))
    full = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    name = "network.features.0.weight"
    average, last = full["state_dict"][name], full["current_model_state"][name]
    torch.manual_seed(0)
    L.seed_everything(0, verbose=False)
    first = CNNClassifier(image_size=48, channels=[4, 8]).state_dict()[name]
    assert float((average - last).norm()) < 0.7 * float((average - first).norm())


@pytest.mark.parametrize("flags", ["avx2 fma", "avx512_bf16"])
def test_bf16_without_instructions_is_said(
    flags: str,
    tree: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("horsehuman.runtime.cpu_flags", lambda: frozenset(flags.split()))
    options = ["trainer.max_epochs=1", "trainer.precision=bf16-mixed"]
    train(tmp_path, *small_cnn(tree, *TRAIN_ONLY, *options))
    assert caplog.text.count("has no bf16 instructions") == ("avx512_bf16" not in flags)


@pytest.mark.slow
def test_same_config_and_seed_give_the_same_weights(tree: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(tmp_path / name, *small_cnn(tree, *TRAIN_ONLY, f"seed={seed}"))
    first, second, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    workers: int, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "WRITE_SHARE", 1)  # write a checkpoint after every epoch
    overrides = small_cnn(tree, "test=false", "ema=0.9", "trainer.max_epochs=4")
    if workers:
        overrides += ["data.memory_limit=0", f"data.num_workers={workers}"]
    train(tmp_path / "uninterrupted", *overrides)

    class Stopped(BaseException):
        pass

    def stop_after_two(trainer: Any, *args: object) -> None:
        if trainer.current_epoch == 2:
            raise Stopped

    config = compose(*overrides)
    L.seed_everything(0, verbose=False)
    model = build("model", config)
    data = build("data", config, image_size=model.image_size, seed=0)
    data.setup()
    trainer = build_trainer(config, tmp_path / "parts", data)
    trainer.callbacks[0].on_train_batch_start = stop_after_two
    with pytest.raises(Stopped):
        trainer.fit(model, datamodule=data)
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"

    model = build("model", config)
    data = build("data", config, image_size=model.image_size, seed=0)
    data.setup()
    trainer = build_trainer(config, tmp_path / "parts", data)
    trainer.fit(model, datamodule=data, ckpt_path=last)
    finalize_checkpoints(last.parent)
    expected = weights(tmp_path / "uninterrupted")
    for name, value in weights(tmp_path / "parts").items():
        assert torch.equal(value, expected[name]), name


def test_checkpoints_that_wait_in_memory_are_saved_when_a_run_is_interrupted(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "WRITE_SHARE", 1e-6)
    last = tmp_path / "checkpoints" / "last.ckpt"

    def stop_after_three(self: object, trainer: Any, *args: object) -> None:
        if trainer.current_epoch == 3:
            assert torch.load(last, weights_only=True)["epoch"] == 0
            raise KeyError

    monkeypatch.setattr(callbacks.EpochSeed, "on_train_epoch_start", stop_after_three)
    with pytest.raises(KeyError):
        train(tmp_path, *small_cnn(tree, "trainer.max_epochs=4"))
    assert torch.load(last, weights_only=True)["epoch"] == 2


def test_nothing_held_out_and_no_test(tree: Path, tmp_path: Path) -> None:
    metrics = train(tmp_path, *small_cnn(tree, *TRAIN_ONLY))
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()
    assert not any(name.startswith(("val/", "test/")) for name in metrics)
    with pytest.raises(HorseHumanError, match="early_stopping=1 needs held-out pictures"):
        train(tmp_path / "b", *small_cnn(tree, *TRAIN_ONLY, "early_stopping=1"))


def test_early_stopping_ends_a_run(tree: Path, tmp_path: Path) -> None:
    overrides = ["early_stopping=1", "trainer.max_epochs=30", "model.optimizer.lr=10", "ema=null"]
    metrics = train(tmp_path, *small_cnn(tree, *overrides, "test=false"))
    assert metrics["epochs"] < 30


@pytest.mark.parametrize(("batch_size", "epochs"), [(24, 200), (4, 100), (1, 25)])
def test_small_sets_take_more_epochs(batch_size: int, epochs: int, tree: Path) -> None:
    data = HorseHumanDataModule(48, "folder", str(tree), val_fraction=0, batch_size=batch_size)
    data.setup()
    assert epochs_for(data, STEPS, EPOCHS, MAX_EPOCHS) == epochs


@pytest.mark.parametrize(("cached", "epochs"), [("true", 200), ("false", 25)])
def test_epochs_that_embed_images_anew_are_not_multiplied(
    cached: str, epochs: int, tree: Path, tmp_path: Path
) -> None:
    options = [f"model.cache_features={cached}", "data=folder", f"data.root={tree}"]
    config = compose(*options)
    data = build("data", config, image_size=48, seed=0)
    data.setup()
    assert build_trainer(config, tmp_path, data).max_epochs == epochs


def test_skipped_pictures_are_listed(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    subprocess.run(["cp", "-r", str(tree), str(root)], check=True)
    (root / "train" / "humans" / "broken.jpg").write_text("no picture")
    options = ["data.group_pattern=null", "data.skip_bad=true", "trainer.max_epochs=1"]
    train(tmp_path / "run", *small_cnn(root, *TRAIN_ONLY, *options))
    with (tmp_path / "run" / "skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["picture"]).name for row in rows] == ["broken.jpg"]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["trainer.max_epochs=abc"], "trainer.max_epochs='abc'"),
        (["seed=-1"], "seed=-1"),
        (["ema=1"], "ema=1"),
        (["+model.unheard=1"], r"model\.unheard is not an option of CNNClassifier"),
        (["+trainer.unheard=1"], "trainer does not take this: .*unheard"),
        (["trainer.precision=99"], "trainer does not take this: .*99"),
        (["trainer.limit_train_batches=0.01"], "trainer does not take this"),
        (["model._target_=horsehuman.Nope"], "model._target_=.* is not known"),
        (["model.mean=0.5"], "model.mean=0.5 does not work: give three numbers"),
        (["+model.class_names=5"], "model.class_names=5 does not work: give two names"),
        (["model.stem_kernel=100001"], "model.stem_kernel=100001"),
        (["data.augment.fill=nearest"], "white and spotlight need canvas"),
    ],
)
def test_options_of_the_script(overrides: list[str], text: str, tree: Path, tmp_path: Path) -> None:
    with pytest.raises(HorseHumanError, match=text):
        train(tmp_path, *small_cnn(tree, *overrides))


def test_a_number_of_steps_ends_a_run(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    metrics = train(tmp_path / "run", *small_cnn(tree, *TRAIN_ONLY, "+trainer.max_steps=2"))
    assert metrics["train/loss"] > 0
    assert "epoch   1/2  loss" in capsys.readouterr().err


def test_augmentation_of_cached_features_is_refused_before_a_run_begins(
    tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(HorseHumanError, match=r"data\.augment has no effect on cached features"):
        train(tmp_path / "run", *INCEPTION, *small_data(tree), "data.augment={flip: true}")
    assert not (tmp_path / "run").exists()


def test_plain_lightning_trains_too(tree: Path, tmp_path: Path) -> None:
    """The README's snippet, with everything of Lightning's defaults left on."""
    model = CNNClassifier(image_size=48, channels=[4, 8])
    data = HorseHumanDataModule(48, "folder", str(tree), augment={"flip": True}, batch_size=4)
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    assert (
        len(
            trainer.test(
                CNNClassifier.load_from_checkpoint(tmp_path / "mine.ckpt"), datamodule=data
            )
        )
        == 1
    )


@pytest.mark.slow
def test_cached_features_that_do_not_belong_to_test_pictures_are_noticed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HORSEHUMAN_CACHE", str(tmp_path / "cache"))
    options = [*INCEPTION, *small_data(tree)]
    expected = train(tmp_path / "first", *options)
    assert expected["precision"] == "float32"
    assert "answered end to end" not in caplog.text
    (path,) = (tmp_path / "cache" / "features").glob("*.sqlite")
    pictures = [decode(p, 96) for p in sorted((tree / "test").rglob("*.webp"))]
    keys = [hashlib.blake2b(p.numpy().tobytes(), digest_size=20).digest() for p in pictures]
    with closing(sqlite3.connect(path)) as cache, cache:
        wrong = torch.full((768,), 3.0).numpy().tobytes()
        for key in keys:
            row = (zlib.crc32(key + wrong).to_bytes(4, "big") + wrong, key)
            changed = cache.execute("UPDATE features SET feature = ? WHERE picture = ?", row)
            assert changed.rowcount == 1
    metrics = train(tmp_path / "second", *options)
    assert "all are answered end to end" in caplog.text
    for name in ("test/acc", "test/loss", "test/margin"):
        assert metrics[name] == pytest.approx(expected[name], abs=1e-4)
