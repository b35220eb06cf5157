from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from horsehuman import load_classifier
from horsehuman.cli import app
from horsehuman.data.datasets import decode
from horsehuman.data.images import read_picture
from horsehuman.data.records import SUBJECT_PATTERN
from horsehuman.errors import HorseHumanError
from horsehuman.inference.explain import activations, explain, explain_answer, find_layer, stages
from horsehuman.models.cnn import CNN
from horsehuman.models.inception import Inception
from horsehuman.training.config import compose
from horsehuman.training.run import train
from tests import commands

#: Load a classifier once for all tests; none of them changes it.
load = functools.cache(load_classifier)


@pytest.mark.parametrize("name", ["cnn", "inception"])
def test_heat_adds_up_to_the_logit(name: str, tree: Path) -> None:
    network = load(name)
    path = tree / "test" / "humans" / "valhuman01-00.webp"
    picture = decode(path, network.image_size)[None]
    heat, (scores,) = explain(network, picture)
    assert heat.shape == (1, network.image_size, network.image_size)
    assert scores.logit == pytest.approx(float(network.logits(picture)), rel=1e-4)
    bias = float(network.head[-1].bias.detach())
    assert float(heat.sum()) == pytest.approx(scores.logit - bias, rel=0.05)


@pytest.mark.parametrize("name", ["cnn", "inception"])
def test_heat_lies_in_the_half_that_contains_the_subject(name: str, tree: Path) -> None:
    network = load(name)
    size = network.image_size
    subject = decode(tree / "test" / "humans" / "valhuman01-00.webp", size)
    small = torch.nn.functional.interpolate(subject[None].float(), (size, size // 2))[0]
    for side in (0, 1):
        picture = torch.full((3, size, size), 255, dtype=torch.uint8)
        start = side * (size // 2)
        picture[:, :, start : start + size // 2] = small.round().to(torch.uint8)
        heat = explain_answer(network, picture, None)[1][1]
        half = heat[:, start : start + size // 2].sum() / heat.sum()
        assert half > 0.6


def test_heat_changes_with_random_weights(tree: Path) -> None:
    """Apply the sanity check of Adebayo et al. 2018 to 24 images and five random networks."""
    network = load("cnn")
    paths = sorted((tree / "train").rglob("*.webp"))
    pictures = torch.stack([decode(path, network.image_size) for path in paths])
    trained, _ = explain(network, pictures)
    correlations = []
    for seed in range(5):
        torch.manual_seed(seed)
        random, _ = explain(CNN(**network.settings), pictures)
        for first, second in zip(trained, random, strict=True):
            pair = torch.stack([first.flatten(), second.flatten()])
            correlations.append(float(torch.corrcoef(pair)[0, 1]))
    assert len(correlations) == 120
    assert abs(sum(correlations) / len(correlations)) < 0.35


def test_a_mirrored_picture_has_mirrored_heat(tree: Path) -> None:
    network = load("cnn")
    picture = decode(tree / "test" / "horses" / "horse1-000.webp", network.image_size)[None]
    first, second = explain(network, picture)[0], explain(network, picture.flip(3))[0]
    torch.testing.assert_close(first, second.flip(2), rtol=1e-3, atol=1e-6)


def test_hidden_layers_and_scales_are_explained_too() -> None:
    torch.manual_seed(0)
    network = Inception(scales=[75, 96], weights="random", image_size=96, hidden=[4])
    heat, scores = explain(network, torch.randint(0, 256, (2, 3, 80, 70), dtype=torch.uint8))
    assert heat.shape == (2, 96, 96)
    assert len(scores) == 2


def test_heat_of_an_earlier_layer_depends_on_that_layer(tree: Path) -> None:
    network = load("inception")
    picture = decode(tree / "test" / "horses" / "horse1-000.webp", network.image_size)[None]
    last, early = (
        explain(network, picture, find_layer(network, name)) for name in ("Mixed_6e", "Mixed_5d")
    )
    assert last[1] == early[1]
    torch.testing.assert_close(last[0], explain(network, picture)[0])
    assert float((early[0] - last[0]).abs().max()) > 0
    assert early[0].any()
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("model", "name", "text"),
    [
        ("cnn", "feature.3", "did you mean features.3"),
        ("cnn", "Mixed_6a", "use one such as features.4"),
        ("inception", "conv", "is ambiguous: use one such as Conv2d_1a_3x3.conv"),
        ("inception", "Mixd_5d", "did you mean Mixed_5d"),
    ],
)
def test_layers_that_are_not_there(model: str, name: str, text: str) -> None:
    with pytest.raises(HorseHumanError, match=text):
        find_layer(load(model), name)


def test_activations_by_layer(tree: Path) -> None:
    network = load("cnn")
    picture = decode(tree / "test" / "horses" / "horse1-000.webp", network.image_size)
    maps = activations(network, picture)
    assert [tuple(maps[name].shape) for name in stages(maps)] == [
        (24, 48, 48),
        (48, 24, 24),
        (96, 12, 12),
        (128, 6, 6),
        (128, 3, 3),
    ]
    last = network.forward_features(picture[None])[0][0]
    torch.testing.assert_close(maps["features.27"], last)


def test_the_evidence_is_that_for_the_predicted_class(tree: Path) -> None:
    network = load("cnn")
    for path in (tree / "test").rglob("*.webp"):
        picture = decode(path, network.image_size)
        (signed,), (expected,) = explain(network, picture[None])
        scores, heats = explain_answer(network, picture, None)
        assert scores == expected
        label = int(path.parent.name == "humans")
        assert list(heats) == [label]
        heat, sign = heats[label], 2 * label - 1
        assert (scores.probability >= network.threshold) == (sign == 1)
        assert torch.equal(heat, (sign * signed).clamp_min(0))


def test_an_image_without_heat_is_reported(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = load_classifier("cnn")
    network.head[-1].weight.data.zero_()  # The logit is the bias.
    monkeypatch.setattr("horsehuman.inference.explain.load_classifier", lambda model: network)
    picture = tree / "test" / "horses" / "horse1-000.webp"
    assert command(str(picture), "--out", str(tmp_path / "o.png"))[0] == 0
    assert "horse1-000.webp: the heat map for horses is empty" in caplog.text


@pytest.mark.slow
def test_training_on_cached_features_is_explained_like_training_on_pictures(
    tree: Path, tmp_path: Path
) -> None:
    heat = []
    picture = decode(tree / "test" / "horses" / "horse1-000.webp", 96)[None]
    overrides = ["model.image_size=96", "model.scales=[80]", "trainer.max_epochs=2", "test=false"]
    overrides += ["data=folder", f"data.root={tree}", f'data.group_pattern="{SUBJECT_PATTERN}"']
    for cached in ("true", "false"):
        run = tmp_path / cached
        config = compose(*overrides, f"model.cache_features={cached}")
        train(config, run)
        heat.append(explain(load_classifier(run), picture)[0])
    torch.testing.assert_close(heat[0], heat[1], rtol=1e-3, atol=1e-6)


def test_more_pictures_than_the_backbone_takes_at_a_time() -> None:
    torch.manual_seed(0)
    network = Inception(scales=[75], weights="random", image_size=80)
    pictures = torch.randint(0, 256, (11, 3, 80, 80), dtype=torch.uint8)
    heat, _ = explain(network, pictures)
    torch.testing.assert_close(heat[-1:], explain(network, pictures[-1:])[0])


def command(*arguments: str) -> tuple[int, str]:
    return commands.run("explain", *arguments, "--model", "cnn")


def test_command(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(tree / "test" / "humans")
    code, printed = command(folder, "missing.png", "--out", "heat.PNG")
    assert code == 1  # One image is missing; the others are drawn.
    assert "missing.png: No such file" in caplog.text
    assert printed == "heat.PNG\n"
    assert read_picture("heat.PNG").shape[1] > 400
    assert "exists already" in command(folder, "--out", "heat.PNG")[1]
    assert command(folder, "--out", "heat.PNG", "--force") == (0, "heat.PNG\n")
    assert command(f"{folder}/valhuman01-00.webp") == (0, "explain.png\n")
    assert "explain.png exists already" in command(folder)[1]
    for sources in (("none.png",), ("none.png", "nor this.png")):
        code, printed = command(*sources, "--out", "x.png")
        assert code == 1
        assert printed == ""
        assert "error: cannot read none.png: No such file" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"heat.PNG", "explain.png"}


def test_out_that_is_no_png_file(tmp_path: Path) -> None:
    """The message says what ``--out`` expects, in the terms of ``--help``."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("photos", ": name a PNG file, such as explain.png"),
        ("folder.png", " is a folder or a device: name a file"),
        ("heat.jpg", ": name a PNG file, such as explain.png"),
        ("heat", ": name a PNG file, such as explain.png"),
    ):
        out = tmp_path / name
        expected = f"error: --out {out}{reason}"
        assert command("x.png", "--out", str(out), "--force") == (1, expected)
    (line,) = [line for line in command("--help")[1].splitlines() if "--out  " in line]
    assert "PNG" in line
    assert "explain.png" in line


def test_json(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = [str(tree / "test"), "missing.png"]
    options = ["--json", "--model", "cnn"]
    result = CliRunner().invoke(app, ["explain", *sources, "--out", "heat.png", *options])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["drawing"] == "heat.png"
    assert Path("heat.png").is_file()
    options = ["--recursive", "--model", "cnn", "--format", "json", "--out", "predictions.json"]
    assert commands.run("predict", *sources, *options)[0] == 1
    expected = json.loads(Path("predictions.json").read_text())
    assert len(expected) == 5
    for row, other in zip(report["pictures"], expected, strict=True):
        numbers = [[values.pop(key) for key in ("probability", "logit")] for values in (row, other)]
        assert row == other
        if row["status"] != "error":
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)
    assert report["pictures"][-1]["status"] == "error"


def test_no_plot_draws_nothing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("horsehuman.inference.explain.MAX_IMAGES", 2)  # It limits drawings only.
    code, printed = command(str(tree / "test"), "--no-plot", "--json")
    assert code == 0
    report = json.loads(printed)
    assert report["drawing"] is None
    assert len(report["pictures"]) == 4
    code, printed = command(str(tree / "test"), "--no-plot")
    assert code == 0
    assert [line.split()[1] for line in printed.splitlines()] == ["horses"] * 2 + ["humans"] * 2
    assert not list(tmp_path.iterdir())
    code, printed = command(str(tree / "test"), "--json")
    assert "drawing 2 of 4 pictures" in caplog.text
    assert len(json.loads(printed)["pictures"]) == 2
