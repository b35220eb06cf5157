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
    """A report of the CNN in the box on the small tree."""
    out = tmp_path_factory.mktemp("report") / "r"
    arguments = ["--model", "cnn", "--data", str(tree), "--group-pattern", "([^/]+)-[^-/]*$"]
    code, printed = commands.run("evaluate", *arguments, "--no-plot", "--out", str(out))
    assert code == 0, printed
    return out


@pytest.mark.parametrize("name", ["cnn", "inception"])
def test_metadata_are_what_model_hubs_read(name: str, report: Path) -> None:
    found = ModelCard(model_card(name, report))
    found.data.to_dict()
    assert found.data.license == ("mit" if name == "cnn" else "apache-2.0")
    assert found.data.pipeline_tag == "image-classification"
    accuracy = json.loads((report / "metrics.json").read_text())["metrics"]["accuracy"]["value"]
    (first, *_) = found.data.eval_results
    assert (first.metric_type, first.metric_value) == ("accuracy", accuracy)
    block = yaml.safe_load(found.content.split("---")[1])
    assert block["tags"][1:3] == ["horses", "humans"]
    assert "CC BY 2.0" in found.content
    assert ("Google" in found.content) == (name == "inception")


def test_figures_are_those_of_the_files(report: Path) -> None:
    text = model_card("cnn", report)
    found = json.loads((report / "metrics.json").read_text())
    assert f"On {found['pictures']} pictures" in text
    assert f"| log loss | {found['metrics']['log loss']['value']:.4f} |" in text
    assert "| train | horses | 500 | 50 |" in text
    network = load_classifier("cnn")
    assert f"{sum(p.numel() for p in network.parameters()):,} parameters" in text


def test_a_folder_for_a_hub_is_a_classifier(report: Path, tmp_path: Path) -> None:
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


def test_what_is_not_known_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Not measured yet" in command("--model", "cnn")
    assert "is no report of horsehuman evaluate" in command("--report", str(tmp_path))


def test_the_newest_report_on_the_own_pictures_counts(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "evaluate" / "cnn").mkdir(parents=True)  # of one that was interrupted
    other = ["--data", str(tree), "--no-plot"]
    assert commands.run("evaluate", "--model", "cnn", "--no-plot")[0] == 0
    assert commands.run("evaluate", "--model", "cnn", *other)[0] == 0
    folders = sorted(path.name for path in (tmp_path / "outputs" / "evaluate").iterdir())
    assert folders == ["cnn", "cnn-2"]
    text = command("--model", "cnn")
    assert "On 256 pictures" in text
    assert "figures are those of outputs/evaluate/cnn\n" in text
    assert commands.run("evaluate", "--model", "cnn", "--no-plot")[0] == 0
    assert "figures are those of outputs/evaluate/cnn-3\n" in command("--model", "cnn")


def test_a_checkpoint_of_unknown_origin_has_the_report_that_there_is(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(find_checkpoint("cnn"), "mine.ckpt")
    options = ["--data", str(tree / "train"), "--no-plot"]
    assert commands.run("evaluate", "--model", "mine.ckpt", *options)[0] == 0
    assert "On 24 pictures" in command("--model", "mine.ckpt")


def test_a_run_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"test/acc": 1.0}')
    assert "is no report of horsehuman evaluate" in command("--report", str(tmp_path))
