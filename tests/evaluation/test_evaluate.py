from __future__ import annotations

import csv
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from horsehuman import HorseHumanError
from horsehuman.data.image_sets import count_images_seen_in_training, find_image_set
from horsehuman.data.images import read_picture
from horsehuman.data.records import SUBJECT_PATTERN
from horsehuman.evaluation.evaluate import (
    caveats,
    group_rows,
    most_wrong,
    predict_labelled,
    summarize,
)
from horsehuman.models.checkpoint import load_classifier
from tests import commands
from tests.conftest import train_small_cnn


@pytest.fixture(scope="module")
def run(cnn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(cnn_run, tmp_path_factory.mktemp("runs") / "run")


evaluate = partial(commands.run, "evaluate")


def test_metrics_equal_those_of_training(run: Path) -> None:
    code, printed = evaluate("--model", str(run), "--no-plot")
    assert code == 0, printed
    reported = json.loads((run / "metrics.json").read_text())
    metrics = json.loads((run / "evaluate-test" / "metrics.json").read_text())
    assert metrics["right"] == reported["test/right"]
    assert metrics["pictures"] == reported["test/pictures"] == 4
    assert metrics["smallest margin"] == pytest.approx(reported["test/margin"], abs=1e-6)
    assert metrics["metrics"]["log loss"]["value"] == pytest.approx(reported["test/loss"], rel=1e-5)
    with (run / "evaluate-test" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["right"]) for row in rows) == metrics["right"]
    assert sorted(row["picture"] for row in rows)[0] == "test/horses/horse1-000.webp"
    code, printed = evaluate("--model", str(run), "--no-plot")
    assert (code, "evaluate-test holds a report already" in printed) == (1, True)
    assert evaluate("--model", str(run), "--no-plot", "--force")[0] == 0
    assert [path.name for path in run.glob("evaluate*")] == ["evaluate-test"]


def test_training_images_are_recognized(run: Path, tree: Path, tmp_path: Path) -> None:
    assert (
        count_images_seen_in_training(str(run), find_image_set(str(run)).split("test").records) == 0
    )
    assert (
        count_images_seen_in_training(str(run), find_image_set(str(run)).split("train").records)
        == 18
    )
    assert (
        count_images_seen_in_training("cnn", find_image_set(str(tree)).split("train").records) == 24
    )
    assert count_images_seen_in_training(str(run / "checkpoints" / "final.ckpt"), []) == 0
    lost = shutil.copy(run / "checkpoints" / "final.ckpt", tmp_path / "lost.ckpt")
    assert count_images_seen_in_training(str(lost), []) is None
    broken = shutil.copytree(run, tmp_path / "broken")
    outside = "/etc/passwd,horses,1,test", "a/../../x,horses,1,test"
    for row in ("x.webp", "x.webp,humans,1,test", "x.webp,horses,1,tset", *outside):
        rows = f"x.webp,humans,1,test\n{row}\n"
        (broken / "splits.csv").write_text(f"picture,label,group,split\n{rows}")
        assert count_images_seen_in_training(str(broken), []) is None
        with pytest.raises(HorseHumanError, match="damaged"):
            find_image_set(str(broken))


def test_report_of_a_folder(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    arguments = ["--model", "cnn", "--data", str(tree), "--group-pattern", SUBJECT_PATTERN]
    code, printed = evaluate(*arguments, "--out", str(out))
    assert code == 0, printed
    assert {path.name for path in out.iterdir()} == {
        "metrics.json",
        "predictions.csv",
        "report.png",
        "pictures.png",
    }
    assert read_picture(out / "report.png").shape[1] > 1000
    assert "few groups (3)" in printed
    code, printed = evaluate(*arguments, "--out", str(out))
    assert code == 1
    assert "holds a report already" in printed
    assert evaluate(*arguments, "--out", str(out), "--force", "--no-plot")[0] == 0
    assert {path.name for path in out.iterdir()} == {"metrics.json", "predictions.csv"}


def test_json_is_all_that_is_printed(tree: Path, tmp_path: Path) -> None:
    arguments = ["--model", "cnn", "--data", str(tree), "--no-plot", "--out", str(tmp_path / "o")]
    result = commands.CliRunner().invoke(commands.app, ["evaluate", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    expected = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert json.loads(result.stdout) == expected


def test_groups_and_worst_predictions(tree: Path) -> None:
    predictions = predict_labelled(
        load_classifier("cnn"), find_image_set(str(tree), SUBJECT_PATTERN).split("train")
    )
    rows = group_rows(predictions)
    assert len(rows) == 8
    assert sum(row["right"] for row in rows) == predictions.correct.sum()
    assert [row["right"] / row["pictures"] for row in rows] == sorted(
        row["right"] / row["pictures"] for row in rows
    )
    order = most_wrong(predictions, 24)
    wrong = int((~predictions.correct).sum())
    assert not predictions.correct[order[:wrong]].any()
    assert np.all(np.diff(np.abs(predictions.probabilities[order[wrong:]] - 0.5)) >= 0)


def test_metrics_of_a_missing_class_are_undefined(tree: Path) -> None:
    image_set = find_image_set(str(tree)).split("test")
    image_set.records[:] = [record for record in image_set.records if record.label == 1]
    summary = summarize(predict_labelled(load_classifier("cnn"), image_set))
    assert summary["metrics"]["ROC-AUC"]["value"] is None
    json.dumps(summary, allow_nan=False)
    lines = caveats(summary, grouped=False)
    assert "no groups are defined" in lines[0]
    assert "ROC-AUC" in lines[-1]


def test_unreadable_images_are_reported_and_the_others_classified(
    tree: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(tree / "test", tmp_path / "set")
    (root / "humans" / "broken.png").write_bytes(b"no picture")
    code, _ = evaluate(
        "--model", "cnn", "--data", str(root), "--no-plot", "--out", str(tmp_path / "o")
    )
    assert code == 1
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert metrics["pictures"] == 4
    assert len(metrics["unreadable"]) == 1


NAMES = [
    "cost$1_$x",
    "x[/red]",
    "photo[copy]",
    os.fsdecode(b"b\xffad"),
    "two\nlines",
    "馬",
    "x:smile:",
]


@pytest.fixture(scope="module")
def odd(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, classes and groups whose names contain formulas, markup or undecodable bytes."""
    root = tmp_path_factory.mktemp("odd") / "a$_$b[red]"
    for label in ("horses", "humans"):
        source = next((tree / "test" / label).iterdir())
        for name in NAMES:
            target = root / label / f"{name}.webp"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return root


def test_special_names_are_shown_literally(odd: Path, tmp_path: Path) -> None:
    code, printed = evaluate("--model", "cnn", "--data", str(odd), "--out", str(tmp_path / "out"))
    assert code == 0, printed
    assert (tmp_path / "out" / "pictures.png").is_file()
    for name in ("cost$1_$x", "x[/red]", "photo[copy]", r"b\udcffad", r"two\nlines", "x:smile:"):
        assert f"{name}.webp" in printed
    for command in (["explain", str(odd), "--model", "cnn"], ["data", "--data", str(odd)]):
        out = tmp_path / f"{command[0]}.png"
        code, printed = commands.run(*command, "--out", str(out))
        assert code == 0, printed
    arguments = ["cnn", "cnn", "--data", str(odd), "--no-plot", "--out", str(tmp_path / "c")]
    code, printed = commands.run("compare", *arguments)
    assert code == 0, printed


def test_training_with_special_names(odd: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_small_cnn(odd, run, "data.group_pattern=null")
    assert json.loads((run / "metrics.json").read_text())["test/pictures"] > 0
    assert evaluate("--model", str(run), "--split", "validation", "--no-plot")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--split", "tset"], "did you mean test"),
        (["--data", "TREE", "--split", "validation"], "has only test, train"),
        (
            ["--data", "CATS"],
            "holds cats and humans, the classifier knows horses and humans: name pictures of these",
        ),
        (["--data", "EMPTY"], "needs two class folders"),
        (["--model", "CUT"], "config.yaml"),
        (["--group-pattern", "(.)"], "has groups of its own"),
        (["--out", "RUN"], "is a run's folder: name another one"),
        (["--out", "CUT/config.yaml/x"], "cannot write into"),
        (["--out", "FILE"], "config.yaml: File exists; name another folder with --out"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], text: str, tree: Path, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(tree / "test", tmp_path / "cats")
    (tmp_path / "cats" / "horses").rename(tmp_path / "cats" / "cats")
    (tmp_path / "empty").mkdir()
    shutil.copytree(run, tmp_path / "cut")
    (tmp_path / "cut" / "config.yaml").unlink()
    places = {"TREE": tree, "CATS": tmp_path / "cats", "EMPTY": tmp_path / "empty"}
    places |= {"CUT": tmp_path / "cut", "RUN": run, "CUT/config.yaml/x": run / "config.yaml" / "x"}
    places["FILE"] = run / "config.yaml"
    given = [str(places.get(argument, argument)) for argument in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    code, printed = evaluate("--model", "cnn", *given, "--no-plot", *out)
    assert code == 1
    assert text in printed
    assert not (tmp_path / "out").exists()
