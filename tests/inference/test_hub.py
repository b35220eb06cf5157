from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from horsehuman import HorseHumanError, load_classifier
from horsehuman.inference.hub import model_card
from horsehuman.models.checkpoint import find_checkpoint
from tests import commands


def command(*arguments: str) -> str:
    code, printed = commands.run("card", *arguments)
    assert code == 0 or printed.startswith("error: "), printed
    return printed


@pytest.fixture(scope="module")
def report(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluate the bundled CNN on the small tree and return the folder of the report."""
    out = tmp_path_factory.mktemp("report") / "r"
    arguments = ["--model", "cnn", "--data", str(tree), "--group-pattern", "([^/]+)-[^-/]*$"]
    code, printed = commands.run("evaluate", *arguments, "--no-plot", "--out", str(out))
    assert code == 0, printed
    return out


@pytest.mark.parametrize("name", ["cnn", "inception"])
def test_metadata_can_be_read_by_model_hubs(name: str, report: Path) -> None:
    card = ModelCard(model_card(name, report))
    card.data.to_dict()
    assert card.data.license == ("mit" if name == "cnn" else "apache-2.0")
    assert card.data.pipeline_tag == "image-classification"
    accuracy = json.loads((report / "metrics.json").read_text())["metrics"]["accuracy"]["value"]
    (first, *_) = card.data.eval_results
    assert (first.metric_type, first.metric_value) == ("accuracy", accuracy)
    block = yaml.safe_load(card.content.split("---")[1])
    assert block["tags"][1:3] == ["horses", "humans"]
    assert "CC BY 2.0" in card.content
    assert ("Google" in card.content) == (name == "inception")


def test_numbers_come_from_the_files(report: Path) -> None:
    text = model_card("cnn", report)
    evaluation = json.loads((report / "metrics.json").read_text())
    assert f"On {evaluation['pictures']} pictures" in text
    assert f"| log loss | {evaluation['metrics']['log loss']['value']:.4f} |" in text
    assert "| train | horses | 500 | 50 |" in text
    network = load_classifier("cnn")
    assert f"{sum(p.numel() for p in network.parameters()):,} parameters" in text


def test_a_hub_folder_loads_as_a_classifier(report: Path, tmp_path: Path) -> None:
    folder = tmp_path / "upload"
    command("--model", "inception", "--folder", str(folder))
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "model.safetensors",
        "config.json",
    }
    first, second = load_classifier("inception"), load_classifier(folder)
    pictures = torch.randint(0, 256, (2, 3, 90, 90), dtype=torch.uint8)
    assert torch.equal(first.logits(pictures), second.logits(pictures))
    assert first.settings == second.settings
    assert "holds README.md" in command("--model", "cnn", "--folder", str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(HorseHumanError, match="is damaged"):
        load_classifier(folder)
    (folder / "config.json").unlink()
    with pytest.raises(HorseHumanError, match="cannot read"):
        load_classifier(folder)


def test_a_missing_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Not measured yet" in command("--model", "cnn")
    assert "not a report of horsehuman evaluate" in command("--report", str(tmp_path))


def test_the_newest_report_on_the_test_set_is_used(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "evaluate" / "cnn").mkdir(
        parents=True
    )  # as an interrupted evaluation leaves it
    other = ["--data", str(tree), "--no-plot"]
    assert commands.run("evaluate", "--model", "cnn", "--no-plot")[0] == 0
    assert commands.run("evaluate", "--model", "cnn", *other)[0] == 0
    folders = sorted(path.name for path in (tmp_path / "outputs" / "evaluate").iterdir())
    assert folders == ["cnn", "cnn-2"]
    text = command("--model", "cnn")
    assert "On 256 pictures" in text
    assert "metrics are those of outputs/evaluate/cnn\n" in text
    assert commands.run("evaluate", "--model", "cnn", "--no-plot")[0] == 0
    assert "metrics are those of outputs/evaluate/cnn-3\n" in command("--model", "cnn")


def test_a_checkpoint_outside_a_run_uses_any_report(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(find_checkpoint("cnn"), "mine.ckpt")
    options = ["--data", str(tree / "train"), "--no-plot"]
    assert commands.run("evaluate", "--model", "mine.ckpt", *options)[0] == 0
    assert "On 24 pictures" in command("--model", "mine.ckpt")


def test_a_run_is_not_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"test/acc": 1.0}')
    assert "not a report of horsehuman evaluate" in command("--report", str(tmp_path))
