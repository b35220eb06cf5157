from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from horsehuman import load_classifier
from horsehuman.cli import app
from horsehuman.data.loading import decode
from horsehuman.explain import explain
from horsehuman.models.cnn import CNN
from horsehuman.models.inception import Inception


@pytest.mark.parametrize("name", ["cnn", "inception"])
def test_heat_adds_up_to_the_logit(name: str, tree: Path) -> None:
    network = load_classifier(name)
    path = tree / "test" / "humans" / "valhuman01-00.webp"
    picture = decode(path, network.image_size)[None]
    (found,) = explain(network, picture)
    assert found.heat.shape == (network.image_size, network.image_size)
    assert found.logit == pytest.approx(float(network.logits(picture)), rel=1e-4)
    bias = float(network.head[-1].bias.detach())
    assert float(found.heat.sum()) == pytest.approx(found.logit - bias, rel=0.05)


@pytest.mark.parametrize("name", ["cnn", "inception"])
def test_heat_lies_in_the_half_that_the_figure_fills(name: str, tree: Path) -> None:
    network = load_classifier(name)
    size = network.image_size
    figure = decode(tree / "test" / "humans" / "valhuman01-00.webp", size)
    small = torch.nn.functional.interpolate(figure[None].float(), (size, size // 2))[0]
    for side in (0, 1):
        picture = torch.full((3, size, size), 255, dtype=torch.uint8)
        start = side * (size // 2)
        picture[:, :, start : start + size // 2] = small.round().to(torch.uint8)
        (found,) = explain(network, picture[None])
        heat = found.for_answer(int(found.logit > 0))
        half = heat[:, start : start + size // 2].sum() / heat.sum()
        assert half > 0.6


def test_heat_changes_when_weights_are_drawn_anew(tree: Path) -> None:
    """The sanity check of Adebayo et al. 2018, over 24 pictures and five draws."""
    network = load_classifier("cnn")
    paths = sorted((tree / "train").rglob("*.webp"))
    pictures = torch.stack([decode(path, network.image_size) for path in paths])
    first = explain(network, pictures)
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        for mine, other in zip(first, explain(CNN(**network.settings), pictures), strict=True):
            pair = torch.stack([mine.heat.flatten(), other.heat.flatten()])
            found.append(float(torch.corrcoef(pair)[0, 1]))
    assert len(found) == 120
    assert abs(sum(found) / len(found)) < 0.35


def test_a_mirrored_picture_has_mirrored_heat(tree: Path) -> None:
    network = load_classifier("cnn")
    picture = decode(tree / "test" / "horses" / "horse1-000.webp", network.image_size)[None]
    first, second = explain(network, picture)[0].heat, explain(network, picture.flip(3))[0].heat
    torch.testing.assert_close(first, second.flip(1), rtol=1e-3, atol=1e-6)


def test_hidden_layers_and_scales_are_explained_too() -> None:
    torch.manual_seed(0)
    network = Inception(scales=[75, 96], weights="random", image_size=96, hidden=[4])
    found = explain(network, torch.randint(0, 256, (2, 3, 80, 70), dtype=torch.uint8))
    assert [f.heat.shape for f in found] == [(96, 96)] * 2


def test_command(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "heat.png"
    folder = str(tree / "test" / "humans")
    arguments = ["explain", folder, str(tmp_path / "missing.png"), "--model", "cnn"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 1  # one picture is missing, the others are drawn
    assert Image.open(out).width > 400
    again = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert "is there already" in str(again.exception)
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
