from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from horsehuman import load_classifier
from horsehuman.cli import app
from horsehuman.data.datasets import decode
from horsehuman.data.image_sets import find_image_set
from horsehuman.data.images import read_picture
from horsehuman.data.records import SUBJECT_PATTERN
from horsehuman.errors import HorseHumanError
from horsehuman.inference.explain import activations, explain, find_layer, heat_on_subject, stages
from horsehuman.models.cnn import CNN
from horsehuman.models.inception import Inception
from horsehuman.training.config import compose
from horsehuman.training.run import train


@pytest.mark.parametrize("name", ["cnn", "inception"])
def test_heat_adds_up_to_the_logit(name: str, tree: Path) -> None:
    network = load_classifier(name)
    path = tree / "test" / "humans" / "valhuman01-00.webp"
    picture = decode(path, network.image_size)[None]
    (explanation,) = explain(network, picture)
    assert explanation.heat.shape == (network.image_size, network.image_size)
    logit = explanation.scores.logit
    assert logit == pytest.approx(float(network.logits(picture)), rel=1e-4)
    bias = float(network.head[-1].bias.detach())
    assert float(explanation.heat.sum()) == pytest.approx(logit - bias, rel=0.05)


@pytest.mark.parametrize("name", ["cnn", "inception"])
def test_heat_lies_in_the_half_that_contains_the_subject(name: str, tree: Path) -> None:
    network = load_classifier(name)
    size = network.image_size
    subject = decode(tree / "test" / "humans" / "valhuman01-00.webp", size)
    small = torch.nn.functional.interpolate(subject[None].float(), (size, size // 2))[0]
    for side in (0, 1):
        picture = torch.full((3, size, size), 255, dtype=torch.uint8)
        start = side * (size // 2)
        picture[:, :, start : start + size // 2] = small.round().to(torch.uint8)
        (explanation,) = explain(network, picture[None])
        heat = explanation.for_class(int(explanation.scores.logit > 0))
        half = heat[:, start : start + size // 2].sum() / heat.sum()
        assert half > 0.6


def test_heat_changes_with_random_weights(tree: Path) -> None:
    """Apply the sanity check of Adebayo et al. 2018 to 24 images and five random networks."""
    network = load_classifier("cnn")
    paths = sorted((tree / "train").rglob("*.webp"))
    pictures = torch.stack([decode(path, network.image_size) for path in paths])
    trained = explain(network, pictures)
    correlations = []
    for seed in range(5):
        torch.manual_seed(seed)
        random = explain(CNN(**network.settings), pictures)
        for first, second in zip(trained, random, strict=True):
            pair = torch.stack([first.heat.flatten(), second.heat.flatten()])
            correlations.append(float(torch.corrcoef(pair)[0, 1]))
    assert len(correlations) == 120
    assert abs(sum(correlations) / len(correlations)) < 0.35


def test_a_mirrored_picture_has_mirrored_heat(tree: Path) -> None:
    network = load_classifier("cnn")
    picture = decode(tree / "test" / "horses" / "horse1-000.webp", network.image_size)[None]
    first, second = explain(network, picture)[0].heat, explain(network, picture.flip(3))[0].heat
    torch.testing.assert_close(first, second.flip(1), rtol=1e-3, atol=1e-6)


def test_hidden_layers_and_scales_are_explained_too() -> None:
    torch.manual_seed(0)
    network = Inception(scales=[75, 96], weights="random", image_size=96, hidden=[4])
    explanations = explain(network, torch.randint(0, 256, (2, 3, 80, 70), dtype=torch.uint8))
    assert [e.heat.shape for e in explanations] == [(96, 96)] * 2


def test_heat_of_an_earlier_layer_depends_on_that_layer(tree: Path) -> None:
    network = load_classifier("inception")
    picture = decode(tree / "test" / "horses" / "horse1-000.webp", network.image_size)[None]
    last, early = (
        explain(network, picture, find_layer(network, name))[0] for name in ("Mixed_6e", "Mixed_5d")
    )
    assert last.scores == early.scores
    torch.testing.assert_close(last.heat, explain(network, picture)[0].heat)
    assert float((early.heat - last.heat).abs().max()) > 0
    assert early.heat.any()
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
        find_layer(load_classifier(model), name)


def test_activations_by_layer(tree: Path) -> None:
    network = load_classifier("cnn")
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


@pytest.mark.parametrize("name", ["cnn", "inception"])
def test_more_heat_lies_on_the_subject_than_by_chance(name: str, tree: Path) -> None:
    """Only cut-outs are measured; the training images of the tree are scenes."""
    pictures = find_image_set(str(tree), SUBJECT_PATTERN)
    shares = heat_on_subject(load_classifier(name), pictures.records)
    assert shares is not None
    assert 1 <= shares["pictures"] <= 4
    assert 0 < shares["share of area"] < shares["share of heat"] <= 1
    assert heat_on_subject(load_classifier("cnn"), pictures.split("train").records) is None


def test_an_image_without_heat_is_reported(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_classifier("cnn")
    network.head[-1].weight.data.zero_()  # The logit is the bias.
    monkeypatch.setattr("horsehuman.inference.explain.load_classifier", lambda model: network)
    picture = tree / "test" / "horses" / "horse1-000.webp"
    arguments = ["explain", str(picture), "--out", str(tmp_path / "o.png")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "the heat map is empty" in result.output


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
        heat.append(explain(load_classifier(run), picture)[0].heat)
    torch.testing.assert_close(heat[0], heat[1], rtol=1e-3, atol=1e-6)


def test_more_pictures_than_the_backbone_takes_at_a_time() -> None:
    torch.manual_seed(0)
    network = Inception(scales=[75], weights="random", image_size=80)
    pictures = torch.randint(0, 256, (11, 3, 80, 80), dtype=torch.uint8)
    explanations = explain(network, pictures)
    torch.testing.assert_close(explanations[-1].heat, explain(network, pictures[-1:])[0].heat)


def test_command(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "heat.png"
    folder = str(tree / "test" / "humans")
    arguments = ["explain", folder, str(tmp_path / "missing.png"), "--model", "cnn"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 1  # One image is missing; the others are drawn.
    assert read_picture(out).shape[1] > 400
    again = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert "exists already" in str(again.exception)
    assert (
        CliRunner()
        .invoke(app, ["explain", folder, "--out", str(out), "--force", "--model", "cnn"])
        .exit_code
        == 0
    )
    empty = CliRunner().invoke(
        app, ["explain", str(tmp_path / "none.png"), "--out", str(tmp_path / "x.png")]
    )
    assert empty.exit_code == 1
    assert not (tmp_path / "x.png").exists()
