from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from horsehuman import HorseHumanError, load_classifier
from horsehuman.cli import app
from horsehuman.data.images import read_picture
from horsehuman.decision import Prediction, Scores, decide
from horsehuman.inference.output import COLUMNS, FORMATS, copy_each, write_predictions
from horsehuman.inference.predict import predict
from horsehuman.runtime import Interrupted

NAN = float("nan")
NAMES = ["=1+1.png", "a,b.png", 'say "x".png', "two\nlines.png", os.fsdecode(b"\xff.png"), "-x.png"]


def predictions() -> list[Prediction]:
    good = [Prediction(name, "horses", 0.75, -1.1, "ok") for name in NAMES]
    return [
        *good,
        Prediction("near.png", "humans", 0.55, 0.2, "unsure"),
        Prediction("truck.png", "", NAN, 3.0, "neither"),
        Prediction("bad.png", "", NAN, NAN, "error", "bad.png: is damaged"),
    ]


def written(output_format: str, path: Path) -> str:
    assert not write_predictions(predictions(), output_format, path, 20)  # One is an error.
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def test_csv_has_one_line_per_image_and_is_safe_in_spreadsheets(tmp_path: Path) -> None:
    text = written("csv", tmp_path / "out.csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(text.splitlines()) - 1 == len(NAMES) + 3
    assert rows[0]["source"] == "'=1+1.png"
    assert rows[1]["source"] == "a,b.png"
    assert rows[5]["source"] == "'-x.png"
    assert float(rows[0]["logit"]) == -1.1
    assert [row["status"] for row in rows[-3:]] == ["unsure", "neither", "error"]
    assert rows[-2]["class"] == rows[-2]["probability"] == rows[-1]["logit"] == ""
    assert rows[-1]["error"] == "bad.png: is damaged"


def test_json_and_jsonl_have_equal_contents(tmp_path: Path) -> None:
    rows = json.loads(written("json", tmp_path / "out.json"))
    lines = written("jsonl", tmp_path / "out.jsonl").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert [row["source"] for row in rows[: len(NAMES)]] == NAMES
    assert rows[-2]["class"] is None
    assert write_predictions([], "json", tmp_path / "none.json", 20)
    assert json.loads((tmp_path / "none.json").read_text()) == []
    assert write_predictions([], "csv", tmp_path / "none.csv", 20)
    assert (tmp_path / "none.csv").read_text() == ",".join(COLUMNS) + "\n"


@pytest.mark.parametrize("output_format", FORMATS)
def test_predictions_before_an_interruption_are_written(output_format: str, tmp_path: Path) -> None:
    def interrupted() -> Iterator[Prediction]:
        yield predictions()[0]
        raise Interrupted(130)

    expected, path = tmp_path / "expected", tmp_path / "out"
    write_predictions(predictions()[:1], output_format, expected, 20)
    with pytest.raises(Interrupted):
        write_predictions(interrupted(), output_format, path, 20)
    assert path.read_bytes() == expected.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_classifier_that_raises_leaves_no_half_written_file(
    output_format: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails:
        class_names, threshold, confidence_threshold = ("a", "b"), 0.5, 0.5
        preprocess = staticmethod(np.asarray)
        batches = 0

        def score(self, images: list[np.ndarray]) -> list[Scores]:
            self.batches += 1
            if self.batches > 1:
                raise RuntimeError("out of memory")
            return [Scores(1.0, 0.75)] * len(images)

    monkeypatch.setattr("horsehuman.inference.predict.load", lambda *unused: Fails())
    out = tmp_path / "out"
    picture = str(tree / "test" / "horses" / "horse1-000.webp")
    arguments = ["predict", *[picture] * 40, "--format", output_format, "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert str(result.exception) == "out of memory"
    assert not list(tmp_path.iterdir())
    out.write_text("earlier answers")
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 1
    assert out.read_text() == "earlier answers"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_decide() -> None:
    class Thresholds:
        class_names = ("horses", "humans")
        threshold, confidence_threshold = 0.4, 0.7

    def answer(
        probability: float, neither: float = -1, both: float = -1, **options: bool
    ) -> tuple[str, str]:
        scores = Scores(0.0, probability, neither, both)
        prediction = decide(Thresholds(), "x", scores, **options)
        return prediction.class_name, prediction.status

    assert answer(0.9) == ("humans", "ok")
    assert answer(0.41) == ("humans", "unsure")
    assert answer(0.39) == ("horses", "unsure")
    assert answer(0.1) == ("horses", "ok")
    assert answer(0.99, 0) == ("", "neither")
    assert answer(0.99, -0.1, 0) == ("", "both")
    assert answer(0.99, 0.1, 0.1) == ("", "neither")
    assert answer(0.45, 1.5, 1.5, always_answer=True) == ("humans", "ok")


def test_images_of_every_type_in_python(tree: Path) -> None:
    classifier = load_classifier("cnn")
    path = tree / "test" / "horses" / "horse1-000.webp"
    pixels = read_picture(path)
    image = Image.fromarray(pixels)
    answers = list(predict(classifier, [path, str(path), image, pixels]))
    assert len({answer.logit for answer in answers}) == 1
    assert [answer.source for answer in answers][2:] == ["picture 2", "picture 3"]
    for single in (path, image, pixels):
        assert next(predict(classifier, single)).class_name == "horses"
    assert len(list(predict(classifier, np.stack([pixels] * 3)))) == 3
    (bad,) = predict(classifier, pixels.astype(np.float32))
    assert bad.error.endswith(
        "picture 0: float32 (300, 300, 3) is not uint8 (H, W, 3) with values of 0 to 255"
    )


def test_sorted_copies_overwrite_nothing(tree: Path, tmp_path: Path) -> None:
    source = str(tree / "test" / "horses" / "horse1-000.webp")
    answers = [("horses", "ok"), ("horses", "ok"), ("", "neither"), ("humans", "unsure")]
    answers.append(("", "both"))
    predicted = [Prediction(source, name, 0.9, 1.0, status) for name, status in answers]
    predicted.append(Prediction("missing", "", NAN, NAN, "error"))
    predicted.append(Prediction("http://127.0.0.1/x.png", "horses", 0.9, 1.0, "ok"))
    assert list(copy_each(predicted, tmp_path / "sorted")) == predicted
    copies = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.webp")}
    assert copies == {
        "sorted/horses/horse1-000.webp",
        "sorted/horses/horse1-000-2.webp",
        "sorted/both/horse1-000.webp",
        "sorted/neither/horse1-000.webp",
        "sorted/unsure/horse1-000.webp",
    }
    (tmp_path / "file").touch()
    with pytest.raises(HorseHumanError, match=f"cannot copy {source} to .*file/horses/horse1-000"):
        list(copy_each(predicted, tmp_path / "file"))


def test_command(tree: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["predict", *arguments, "--model", "cnn"])
        error = str(result.exception) if isinstance(result.exception, HorseHumanError) else ""
        return result.exit_code, error + result.output

    out = tmp_path / "out.csv"
    arguments = [str(tree / "test"), str(tmp_path / "none.png"), "-r", "--format", "csv"]
    assert run(*arguments, "--out", str(out), "--sort-into", str(tmp_path / "s"))[0] == 1
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["status"] == "error" for row in rows] == [False] * 4 + [True]
    assert len(list((tmp_path / "s").rglob("*.webp"))) == 4
    assert "exists already" in run(*arguments, "--out", str(out))[1]
    assert "use table | csv" in run(*arguments, "--format", "xml")[1]
    assert (
        "the folder does not exist" in run(*arguments, "--out", str(tmp_path / "no" / "o.csv"))[1]
    )
    assert "copies files only" in run("http://127.0.0.1/x", "--sort-into", str(tmp_path))[1]


def test_ctrl_c_keeps_the_predictions_so_far(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "horsehuman", "predict", "-", "--model", "cnn"]
    process = subprocess.Popen(
        [*command, "--format", "jsonl", "--out", str(out)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    name = str(tree / "test" / "horses" / "horse1-000.webp")
    process.stdin.write(f"{name}\n".encode() * 200)
    process.stdin.flush()
    temporary = tmp_path / f".out.jsonl.{process.pid}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (temporary.is_file() and temporary.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    lines = out.read_text().splitlines()
    assert len(lines) > 0
    assert all(json.loads(line)["class"] == "horses" for line in lines)


def test_predictions_are_printed_at_once_until_the_reader_closes_the_pipe(tree: Path) -> None:
    command = [sys.executable, "-m", "horsehuman", "predict", "-", "--model", "cnn"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    name = os.fsencode(tree / "test" / "horses" / "horse1-000.webp")
    with subprocess.Popen(command, bufsize=0, **pipes) as process:
        process.stdin.write((name + b"\n") * 64)
        assert process.stdout.readline().startswith(name)
        assert process.poll() is None
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write((name + b"\n") * 3000)
        process.stdin.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert not any(word in errors for word in (b"error", b"Traceback", b"Exception"))
