from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import horsehuman
from horsehuman import CNNClassifier
from horsehuman.cli import main
from horsehuman.inference.predict import predict
from tests.models.test_checkpoint import save


@pytest.fixture(scope="module")
def brightness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a classifier whose class is "day" for bright images and "night" for dark ones."""
    model = CNNClassifier(
        image_size=16,
        channels=[1],
        convolutions=1,
        batch_norm=False,
        pool="avg",
        class_names=["night", "day"],
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.network.features[0].bias.fill_(1.0)
        model.network.features[0].weight[:, :, 2, 2] = 1 / 3
        model.network.head[-1].weight.fill_(4.0)
        model.network.head[-1].bias.fill_(-4.0)
    return save(model, tmp_path_factory.mktemp("model") / "model.ckpt")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("dark.png", "not a picture.png", "bright\n馬.png")]
    Image.new("RGB", (20, 30), "black").save(paths[0])
    paths[1].write_text("hello")
    Image.new("RGB", (64, 8), "white").save(paths[2])
    return paths


def test_predictions_keep_their_order_and_report_unreadable_files(
    brightness: Path, pictures: list[Path]
) -> None:
    classifier = horsehuman.load_classifier(brightness)
    for batch_size in (1, 2, 16):
        answers = list(predict(classifier, pictures, batch_size))
        assert [answer.source for answer in answers] == [str(path) for path in pictures]
        assert [answer.class_name for answer in answers] == ["night", "", "day"]
        assert [bool(answer.error) for answer in answers] == [False, True, False]
        assert all(answer.probability > 0.9 for answer in answers if not answer.error)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["horsehuman", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_command_prints_predictions_on_stdout_and_the_rest_on_stderr(
    brightness: Path,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run(monkeypatch, "predict", *pictures, "--model", brightness) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 2
    assert lines[0].split()[-2:] == ["night", "98.20%"]
    assert repr(str(pictures[2]))[1:-1].replace("馬", r"\u99ac") in lines[1]
    assert err.count("error: ") == 1
    assert "not an image format that Pillow supports" in err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--version"], 0, horsehuman.__version__),
        (["--help"], 0, "predict"),
        (["predict", "--help"], 0, "--model"),
        (["predict"], 2, "Missing argument"),
        (["predct", "x"], 2, "predict"),
        (["predict", "x", "--modle", "y"], 2, "--model"),
        (["predict", "x.png", "--model", "nowhere"], 1, "nowhere: no such run or file"),
    ],
)
def test_usage(
    arguments: list[str],
    code: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == code
    out, err = capsys.readouterr()
    assert text in out + err
    assert "Traceback" not in out + err


def test_right_after_the_install_offline_without_the_training_framework(
    tree: Path, tmp_path: Path
) -> None:
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.getaddrinfo = socket.socket.connect = refuse
from horsehuman.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
# torch._dynamo is loaded by torchvision, and that by timm
unwanted = ("lightning", "torchmetrics", "hydra", "matplotlib", "scipy")
loaded = [name for name in unwanted if name in sys.modules]
assert not loaded, loaded
"""
    pictures = [
        tree / "test" / name for name in ("horses/horse1-000.webp", "humans/valhuman01-00.webp")
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", *map(str, pictures)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["horses", "humans"]
    assert done.stderr == ""


def test_the_bundled_cnn_imports_nothing_that_takes_seconds(pictures: list[Path]) -> None:
    code = """
import sys
from horsehuman.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
unwanted = ("torch._dynamo", "lightning", "matplotlib", "scipy", "timm", "torchvision")
loaded = [name for name in unwanted if name in sys.modules]
assert not loaded, loaded
"""
    command = [sys.executable, "-c", code, "predict", str(pictures[0]), "--model", "cnn"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_training_data_of_the_bundled_cnn_is_logged(
    brightness: Path,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run(monkeypatch, "predict", pictures[0], "--model", "cnn") == 0
    assert "trained on 67 rendered subjects" in capsys.readouterr().err
    assert run(monkeypatch, "predict", pictures[0], "--model", brightness) == 0
    assert capsys.readouterr().err == ""


def test_cache_shows_and_clears_its_own_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HORSEHUMAN_CACHE", str(tmp_path))
    ours = [f"pictures/{'a1' * 8}/train/1.png", f"features/{'b2' * 16}.sqlite"]
    ours += [
        "pictures/.unpacking-x/1.png",
        f"features/{'b2' * 16}.sqlite-journal",
    ]  # left by a killed process
    others = "pictures/holiday/1.png", "archives/mine.zip", "mine/file"
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(2**20))
    assert run(monkeypatch, "cache") == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()] == [
        [str(tmp_path)],
        ["pictures", "2.0"],
        ["features", "2.0"],
        ["archives", "0.0"],
    ]
    assert run(monkeypatch, "cache", "--clear") == 0
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(others)


def test_a_pil_image_that_cannot_be_decoded_is_an_error_of_its_own() -> None:
    content = io.BytesIO()
    Image.effect_noise((40, 30), 60).save(content, "PNG")
    damaged = Image.open(io.BytesIO(content.getvalue()[:300]))
    bad, good = predict(horsehuman.load_classifier("cnn"), [damaged, Image.new("RGB", (40, 30))])
    assert bad.status == "error"
    assert bad.error.startswith("cannot read picture 0: ")
    assert good.status != "error"
