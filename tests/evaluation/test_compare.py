from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from horsehuman.data.image_sets import ImageSet
from horsehuman.data.images import read_picture
from horsehuman.data.records import SUBJECT_PATTERN
from horsehuman.evaluation import metrics
from horsehuman.evaluation.compare import (
    evaluate_model,
    read_curves,
    short_names,
)
from horsehuman.models.base import Network
from tests import commands
from tests.conftest import train_small_cnn


@pytest.fixture(scope="module")
def runs(cnn_run: Path, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on the small tree, of two and of three epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return [cnn_run, train_small_cnn(tree, folder, "ema=null", "trainer.max_epochs=3")]


compare = partial(commands.run, "compare")

MCNEMAR_KEY, HOLM_KEY = (
    "p of McNemar's exact test, frames taken for independent",
    "p, Holm-corrected",
)


def test_two_runs(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed = compare(*map(str, runs), "--out", str(out))
    assert code == 0, printed
    content = json.loads((out / "compare.json").read_text())
    assert read_picture(out / "compare.png").shape[1] > 1000
    for run, model in zip(runs, content["models"], strict=True):
        reported = json.loads((run / "metrics.json").read_text())
        assert model["right"] == reported["test/right"]
        assert model["cost"]["epochs"] == reported["epochs"]
        assert model["cost"]["training, s"] == reported["seconds_training"]
        curve = model["accuracy over the epochs"]["val/acc"]
        assert len(curve) == reported["epochs"]
        assert curve[-1] == pytest.approx(reported["val/acc"])
    (pair,) = content["differences"]
    accuracies = [model["metrics"]["accuracy"]["value"] for model in content["models"]]
    difference = pair["second less first"]["accuracy"]["value"]
    assert difference == pytest.approx(accuracies[1] - accuracies[0])
    losses = [model["metrics"]["log loss"]["value"] for model in content["models"]]
    assert pair["second less first"]["log loss"]["value"] == pytest.approx(losses[1] - losses[0])
    different = pair["right in the first only"] + pair["right in the second only"]
    assert len(pair["pictures with two answers"]) == different
    code, printed = compare(*map(str, runs), "--out", str(out))
    assert code == 1
    assert "holds a report already" in printed


def test_three_bundled_models_without_logs(tree: Path, tmp_path: Path) -> None:
    arguments = ["cnn", "cnn", "inception", "--data", str(tree), "--split", "test"]
    code, printed = compare(
        *arguments, "--group-pattern", SUBJECT_PATTERN, "--out", str(tmp_path / "o")
    )
    assert code == 0, printed
    for title in ("cnn (2) less cnn (1)", "inception less cnn (1)", "inception less cnn (2)"):
        assert title in printed
    assert "not recorded" in printed
    content = json.loads((tmp_path / "o" / "compare.json").read_text())
    same, *others = content["differences"]
    assert [(pair["first"], pair["second"]) for pair in content["differences"]] == [
        ("cnn", "cnn"),
        ("cnn", "inception"),
        ("cnn", "inception"),
    ]
    p_values = [pair[MCNEMAR_KEY] for pair in content["differences"]]
    corrected = [pair["p, Holm-corrected"] for pair in content["differences"]]
    assert corrected == metrics.holm_correction(p_values)
    for pair in others:
        assert f"p = {pair[MCNEMAR_KEY]:.2g}, Holm-corrected {pair[HOLM_KEY]:.2g}" in printed
    assert same["second less first"]["accuracy"] == {
        "value": 0.0,
        "by group": [None, None],  # only one group of horses
        "by picture": [0.0, 0.0],
    }
    assert same[MCNEMAR_KEY] == same[HOLM_KEY] == 1.0
    sizes = [model["cost"]["weights, MB"] for model in content["models"]]
    assert sizes[0] < 2
    assert sizes[2] > 15  # with the backbone


def test_different_images_are_refused(runs: list[Path], tree: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tree, tmp_path / "other")
    image = other / "test" / "horses" / "horse1-000.webp"
    shutil.copy(other / "test" / "horses" / "horse1-105.webp", image)
    run = shutil.copytree(runs[0], tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tree), str(other)))
    code, printed = compare(str(runs[1]), str(run), "--out", str(tmp_path / "o"))
    assert code == 1
    assert "1 differ (test/horses/horse1-000.webp)" in printed
    assert not (tmp_path / "o").exists()
    assert (
        compare(str(runs[1]), str(run), "--data", str(tree), "--out", str(tmp_path / "o"))[0] == 0
    )


def test_images_that_change_during_the_comparison_end_it(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(tree, tmp_path / "set")

    def evaluate_and_remove(model: str, classifier: Network, images: ImageSet) -> object:
        result = evaluate_model(model, classifier, images)
        (root / "test" / "horses" / "horse1-000.webp").unlink(missing_ok=True)
        return result

    monkeypatch.setattr("horsehuman.evaluation.compare.evaluate_model", evaluate_and_remove)
    arguments = ["cnn", "cnn", "--data", str(root), "--split", "test"]
    code, printed = compare(*arguments, "--out", str(tmp_path / "o"))
    assert (code, "run it again" in printed) == (1, True)
    assert not (tmp_path / "o").exists()


def test_an_unreadable_image_is_left_out_for_all(tree: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tree / "test", tmp_path / "set")
    (root / "humans" / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "o"
    assert compare("cnn", "cnn", "--data", str(root), "--out", str(out))[0] == 1
    assert json.loads((out / "compare.json").read_text())["pictures"] == 4


def test_no_report_is_left_if_no_image_can_be_read(tmp_path: Path) -> None:
    for label in ("horses", "humans"):
        (tmp_path / "set" / label).mkdir(parents=True)
        (tmp_path / "set" / label / "broken.png").write_bytes(b"no picture")
    arguments = ["cnn", "cnn", "--data", str(tmp_path / "set")]
    code, printed = compare(*arguments, "--out", str(tmp_path / "o"))
    assert (code, "can be read" in printed) == (1, True)
    assert not (tmp_path / "o").exists()
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "compare.json").write_text("earlier")
    compare(*arguments, "--out", str(tmp_path / "o"), "--force")
    assert (tmp_path / "o" / "compare.json").read_text() == "earlier"


def test_json_and_figures_of_an_earlier_report(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "o"
    assert compare(*map(str, runs), "--out", str(out))[0] == 0
    assert (out / "compare.png").is_file()
    arguments = [*map(str, runs), "--out", str(out), "--force", "--no-plot", "--json"]
    result = commands.CliRunner().invoke(commands.app, ["compare", *arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((out / "compare.json").read_text())
    assert [path.name for path in out.iterdir()] == ["compare.json"]


def test_short_names_lack_the_shared_folders() -> None:
    assert short_names(["out/cnn/latest", "out/inception/latest"]) == [
        "cnn/latest",
        "inception/latest",
    ]
    assert short_names(["cnn", "a/b", "cnn"]) == ["cnn (1)", "a/b", "cnn (2)"]


def test_truncated_logs(runs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = shutil.copytree(runs[1], tmp_path / "run")
    log, *others = sorted(run.glob("events*"))
    for other in others:  # written after training
        other.unlink()
    content = log.read_bytes()
    assert len(read_curves(run)["train/acc"]) == 3
    lengths = []
    first = content.index(b"train/acc")
    for share in (0.2, 0.5, 0.9, 0.97):
        log.write_bytes(content[: first + int((len(content) - first) * share)])
        lengths.append(len(read_curves(run).get("train/acc", [])))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] <= 3
    log.write_bytes(b"no log at all" * 99)
    assert read_curves(run, 3).get("train/acc", []) == []
    assert "ends after 0 of 3 epochs" in caplog.text
    caplog.clear()
    log.unlink()
    assert read_curves(run, 3) == {}
    assert "ends after 0 of 3 epochs" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["cnn"], "needs two models or more, not only cnn"),
        (["cnn", "nowhere"], "no such run or file"),
        (["cnn", "inception", "--data", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], text: str, tmp_path: Path) -> None:
    code, printed = compare(*arguments, "--out", str(tmp_path / "o"))
    assert code == 1
    assert text in printed


def test_mcnemar_is_a_sign_test() -> None:
    first = np.array([True] * 9 + [False] * 3 + [True] * 20)
    second = np.array([False] * 9 + [True] * 3 + [True] * 20)
    assert metrics.mcnemar(first, second)[:2] == (9, 3)
    assert metrics.mcnemar(first, second)[2] == pytest.approx(2 * binom.cdf(3, 12, 0.5))


def test_paired_intervals_are_narrower() -> None:
    generator = np.random.default_rng(0)
    groups = [f"g{index // 20}" for index in range(400)]
    labels = np.arange(400) // 20 % 2
    difficulty = generator.random(20)[np.arange(400) // 20]
    first = (difficulty + generator.normal(0, 0.1, 400) > 0.4).astype(float)
    second = (difficulty + generator.normal(0, 0.1, 400) > 0.5).astype(float)
    paired = metrics.bootstrap_mean(second - first, labels, groups, draws=2000)
    single = metrics.bootstrap_mean(first, labels, groups, draws=2000)
    assert np.ptp(paired["by group"]) < np.ptp(single["by group"])
    low, high = paired["by group"]
    assert low <= paired["value"] <= high
