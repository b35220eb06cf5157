from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from huggingface_hub import ModelCard

from horsehuman import HorseHumanError, InceptionClassifier, load_classifier
from horsehuman.data.archives import image_root
from horsehuman.models.checkpoint import find_checkpoint
from tests import commands


def command(*arguments: str) -> str:
    code, printed = commands.run("card", *arguments)
    assert code == 0 or printed.startswith("error: "), printed
    return printed


@pytest.fixture(scope="module")
def report(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a report of the bundled CNN on the small tree.

    It does not name its checkpoint, as those of earlier versions, so it passes for any classifier.
    """
    out = tmp_path_factory.mktemp("report") / "r"
    arguments = ["--model", "cnn", "--data", str(tree), "--group-pattern", "([^/]+)-[^-/]*$"]
    code, printed = commands.run("evaluate", *arguments, "--no-plot", "--out", str(out))
    assert code == 0, printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.pop("checkpoint")
    (out / "metrics.json").write_text(json.dumps(metrics))
    return out


@pytest.mark.parametrize("name", ["cnn", "inception"])
def test_metadata_can_be_read_by_model_hubs(name: str, tree: Path, report: Path) -> None:
    text = command("--model", name, "--report", str(report))
    card = ModelCard(text)
    assert card.content == text
    assert card.data.license == ("mit" if name == "cnn" else "apache-2.0")
    assert card.data.base_model is None
    assert card.data.pipeline_tag == card.data.tags[0] == "image-classification"
    assert card.data.tags[1:] == ["horses", "humans", "horsehuman"]
    assert card.data.datasets == ["horses-or-humans"]
    metrics = json.loads((report / "metrics.json").read_text())["metrics"]
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "accuracy": metrics["accuracy"]["value"],
        "roc-auc": metrics["ROC-AUC"]["value"],
        "log_loss": metrics["log loss"]["value"],
    }
    assert {(r.dataset_name, r.dataset_split) for r in results.values()} == {(tree.name, "test")}
    assert "CC BY 2.0" in text
    assert ("Google" in text) == (name == "inception")
    assert "\n\n\n" not in text


def test_numbers_come_from_the_files(report: Path) -> None:
    text = command("--model", "cnn", "--report", str(report))
    evaluation = json.loads((report / "metrics.json").read_text())
    assert f"On {evaluation['pictures']} pictures" in text
    assert f"| log loss | {evaluation['metrics']['log loss']['value']:.4f} |" in text
    assert "| train | horses | 500 | 50 |" in text
    network = load_classifier("cnn")
    assert f"{sum(p.numel() for p in network.parameters()):,} parameters" in text
    assert f"| temperature | {network.settings['temperature']:.4f} |" in text


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
    weights = (folder / "model.safetensors").read_bytes()
    changed = weights.replace(b'"format":"pt"', b'"format":"qt"')  # nothing reads this
    (folder / "model.safetensors").write_bytes(changed)
    with pytest.raises(HorseHumanError, match="is unusable: copy both again"):
        load_classifier(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{")
    with pytest.raises(HorseHumanError, match="is unusable: copy both again"):
        load_classifier(folder)
    (folder / "config.json").unlink()
    with pytest.raises(HorseHumanError, match=r"or its config\.json is unusable"):
        load_classifier(folder)


@pytest.mark.parametrize(
    ("weights", "base_model", "licence", "text"),
    [
        ("box", None, "apache-2.0", "Inception-v3 of Google (graph of 5 December 2015)"),
        ("tv_in1k", "timm/inception_v3.tv_in1k", "unknown", "timm/inception_v3.tv_in1k"),
        ("mine.safetensors", None, "unknown", "`mine.safetensors`, origin and licence unknown"),
        (None, None, "unknown", "`unknown`, origin and licence unknown"),
    ],
)
def test_the_card_names_the_weights_that_the_checkpoint_records(
    weights: str | None, base_model: str | None, licence: str, text: str, tmp_path: Path
) -> None:
    origin = {"format": 2, "classifier": "InceptionClassifier"}
    if weights:
        origin["weights"] = weights
    module = InceptionClassifier(image_size=80, scales=[80], weights="random")
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save({**checkpoint, "horsehuman": origin}, tmp_path / "x.ckpt")
    card = ModelCard(command("--model", str(tmp_path / "x.ckpt")))
    assert card.data.base_model == base_model
    assert card.data.license == licence
    assert text in card.content
    assert card.data.datasets is None
    assert "Laurence Moroney" not in card.content


def test_a_checkpoint_records_the_weights_it_began_with(tmp_path: Path) -> None:
    module = InceptionClassifier(image_size=80, scales=[80], weights="random")
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for name in ("first.ckpt", "second.ckpt"):  # saved, and loaded and saved again
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / name, weights_only=True)
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved["horsehuman"]["weights"] == "random"
        module = InceptionClassifier.load_from_checkpoint(tmp_path / name)


def test_a_missing_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Not measured yet" in command("--model", "cnn")
    assert "not a report of horsehuman evaluate" in command("--report", str(tmp_path))


def test_a_report_of_other_weights_is_refused(report: Path, tmp_path: Path) -> None:
    metrics = json.loads((report / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "checkpoint": "00" * 16}))
    printed = command("--model", "cnn", "--report", str(tmp_path))
    assert printed.startswith(f"error: {tmp_path} is a report of other weights: run horsehuman")


def test_a_card_tells_what_weakens_its_numbers(report: Path, tmp_path: Path) -> None:
    metrics = json.loads((report / "metrics.json").read_text())
    for count, text in ((None, "It is unknown whether"), (3, "was trained on 3 of these pictures")):
        changed = {**metrics, "seen in training": count, "groups": metrics["pictures"]}
        (tmp_path / "metrics.json").write_text(json.dumps(changed))
        card = command("--model", "cnn", "--report", str(tmp_path))
        assert text in card
        assert "No groups are defined" in card
        assert "\n\n\n" not in card


def test_the_report_in_the_default_folder_is_used_if_it_is_on_the_test_set(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluation = json.loads((report / "metrics.json").read_text())
    folder = tmp_path / "outputs" / "evaluate" / "cnn"
    folder.mkdir(parents=True)  # as an interrupted evaluation leaves it
    assert "Not measured yet" in command("--model", "cnn")
    assert "no report of cnn: run horsehuman evaluate first" in caplog.text
    box = image_root("box")
    for data, split, used in (
        (str(box), "test", True),
        (f"/elsewhere/{box.name}", "test", True),
        (str(box), "train", False),
        (evaluation["data"], "test", False),
    ):
        changed = {**evaluation, "data": data, "split": split}
        (folder / "metrics.json").write_text(json.dumps(changed))
        caplog.clear()
        text = command("--model", "cnn")
        assert ("On 4 pictures (test split)" in text) == used
        assert ("name: Horses or Humans" in text) == used
        assert ("metrics are those of outputs/evaluate/cnn\n" in caplog.text) == used
        assert "On 4 pictures" in command("--model", "cnn", "--report", str(folder))


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
