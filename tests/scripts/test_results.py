from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import results as script
from omegaconf import OmegaConf
from PIL import Image

KIND = {"cnn": "horsehuman.CNNClassifier", "inception": "horsehuman.InceptionClassifier"}


def run(folder: Path, model: str, seed: int, right: int, **options: object) -> None:
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "model": {"_target_": KIND[model], **options},
        "data": {"source": "box", "val_fraction": 0 if seed == 9 else 0.2},
    }
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    metrics = {"seed": seed, "seconds": 10 * seed, "test/right": right, "test/pictures": 4}
    metrics |= {"test/acc": right / 4, "test/margin": 0.5 - seed}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_runs_that_differ_only_by_seed_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for seed, right in ((1, 3), (0, 4), (2, 4)):
        run(tmp_path / "sweep" / str(seed), "cnn", seed, right)
    run(tmp_path / "other", "cnn", 0, 2, dropout=0.1)
    report = tmp_path / "other" / "evaluate-test"  # a report of horsehuman evaluate is no run
    report.mkdir()
    (report / "metrics.json").write_text('{"pictures": 4}')
    (tmp_path / "latest").symlink_to(tmp_path / "sweep" / "0", target_is_directory=True)
    first, second = sorted(script.collect([tmp_path, tmp_path]), key=lambda r: len(r.metrics))
    assert first.accuracies == [50.0]
    assert second.accuracies == [100.0, 75.0, 100.0]
    assert script.main([str(tmp_path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "0 1 2" in line)
    assert "4 3 4 of 4" in line
    assert "91.67 %" in line
    assert "75.00 %" in line
    assert "-1.50" in line


def test_folds_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split_seed, fold, right in ((0, 0, 4), (0, 1, 3), (1, 0, 4)):
        folder = tmp_path / f"{split_seed}{fold}"
        run(folder, "cnn", 0, 0)
        config = OmegaConf.load(folder / "config.yaml")
        config.data.split_seed, config.data.fold = split_seed, fold
        OmegaConf.save(config, folder / "config.yaml")
        metrics = {"val/acc": right / 4, "val/loss": fold / 10, "val/margin": fold - split_seed}
        (folder / "metrics.json").write_text(json.dumps({"seed": 0, **metrics}))
    (result,) = script.collect([tmp_path])
    assert (result.tested, len(result.metrics)) == (False, 3)
    assert script.main([str(tmp_path)]) == 0
    title, line = capsys.readouterr().out.splitlines()
    assert title.split()[:4] == ["model", "pictures", "runs", "held"]
    assert line.split()[:8] == ["cnn", "box", "3", "91.67", "%", "0.0333", "-1.00", "+0.00"]


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    run(tmp_path / "a", "cnn", 0, 3)
    run(tmp_path / "b", "inception", 0, 4)
    target = tmp_path / "plot.png"
    assert script.main([str(tmp_path), "--plot", str(target)]) == 0
    with Image.open(target) as image:
        assert image.width > 800
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json"])
def test_a_damaged_run_is_a_one_line_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(tmp_path / "a", "cnn", 0, 3)
    (tmp_path / "a" / name).write_text("{a: [")
    assert script.main([str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path / 'a' / name}")
    assert message.count("\n") == 1


def test_the_run_that_ended_later_counts(tmp_path: Path) -> None:
    run(tmp_path / "sweep_1" / "0", "cnn", 0, 3)
    run(tmp_path / "a", "cnn", 0, 4)
    os.utime(tmp_path / "sweep_1" / "0" / "metrics.json", (1, 1))
    (result,) = script.collect([tmp_path])
    assert result.accuracies == [100.0]
    assert result.folder == tmp_path / "a"


def test_no_runs_are_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert script.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: no run that ended below ")
    (tmp_path / "metrics.json").write_text("{")
    assert script.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_without_held_out_images_are_a_line_of_their_own(tmp_path: Path) -> None:
    for seed in (0, 9):
        run(tmp_path / str(seed), "cnn", seed, 3)
    assert {result.data for result in script.collect([tmp_path])} == {
        "box",
        "box, nothing held out",
    }
