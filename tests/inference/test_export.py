from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

import horsehuman
from horsehuman import HorseHumanError, load_classifier, read_picture
from horsehuman.inference.export import ExportedNetwork
from horsehuman.inference.onnx import INPUT, OUTPUTS, OnnxClassifier
from horsehuman.inference.predict import predict
from tests import commands

#: Folder of the package, which must not be named in exported files.
HERE = os.fsencode(Path(horsehuman.__file__).parent)


def export(model: str, path: Path) -> float:
    """Export a classifier with the command and return the difference that it prints."""
    code, printed = commands.run("export", "--model", model, "--out", str(path))
    assert code == 0, printed
    size, difference = printed.splitlines()
    assert size == f"{path}: {path.stat().st_size / 1e6:.1f} MB"
    assert difference.startswith("probabilities differ from the checkpoint's by at most ")
    return float(difference.split()[-1]) / 10


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the bundled CNN as ONNX."""
    path = tmp_path_factory.mktemp("onnx") / "cnn.onnx"
    assert export("cnn", path) < 1e-3
    return path


def test_an_exported_file_matches_the_network(exported: Path, tree: Path) -> None:
    classifier, network = OnnxClassifier(exported), load_classifier("cnn")
    assert classifier.class_names == network.class_names
    assert classifier.confidence_threshold == network.confidence_threshold
    paths = sorted(tree.rglob("*.webp"))
    for exported_answer, answer in zip(
        predict(classifier, paths), predict(network, paths), strict=True
    ):
        assert exported_answer.class_name == answer.class_name
        assert exported_answer.probability == pytest.approx(answer.probability, abs=1e-3)
        assert exported_answer.status == answer.status
    assert onnxruntime.InferenceSession(exported).get_inputs()[0].shape[1] == 3
    assert HERE not in exported.read_bytes()  # It names no files of the machine that wrote it.


def test_without_importing_torch(exported: Path, tree: Path) -> None:
    code = """
import sys
from horsehuman.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
heavy = ("torch", "timm", "lightning", "scipy", "matplotlib")
loaded = [name for name in heavy if name in sys.modules]
assert not loaded, loaded
"""
    path = str(tree / "test" / "horses" / "horse1-000.webp")
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", path, "--model", str(exported)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "horses"


@pytest.mark.slow
def test_inception_with_neither_and_both(tmp_path: Path, tree: Path) -> None:
    path = tmp_path / "inception.onnx"
    assert export("inception", path) < 1e-3
    classifier = OnnxClassifier(path)
    noise = np.random.default_rng(0).integers(0, 256, (120, 90, 3)).astype(np.uint8)
    paths = sorted((tree / "test").rglob("*.webp"))
    sides = [np.asarray(Image.open(path).resize((150, 300))) for path in (paths[0], paths[-1])]
    answers = predict(classifier, [noise, *paths, np.concatenate(sides, axis=1)])
    assert [answer.status for answer in answers] == ["neither", "ok", "ok", "ok", "ok", "both"]


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.99, float("nan")])
def test_a_file_whose_outputs_differ_is_not_written(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ExportedNetwork.forward

    def wrong(self: ExportedNetwork, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, probabilities, *others = forward(self, pictures)
        exporting = torch.compiler.is_exporting()
        return logits, probabilities * (factor if exporting else 1), *others

    monkeypatch.setattr(ExportedNetwork, "forward", wrong)
    code, printed = commands.run("export", "--model", "cnn", "--out", str(tmp_path / "cnn.onnx"))
    assert code == 1
    assert "export cancelled: probabilities differ by" in printed
    assert not list(tmp_path.iterdir())


def test_wrong_files_are_refused(exported: Path, tmp_path: Path) -> None:
    content = exported.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.onnx").write_text("hello")
    other = onnx.load(exported)
    metadata = {entry.key: entry.value for entry in other.metadata_props}
    del metadata["horsehuman_digest"]  # The digest would reveal every one of these changes.
    for name, change in {
        "foreign": {"horsehuman_format": None},
        "newer": {"horsehuman_format": "99"},
        "bare": {"class_names": "x"},
    }.items():
        del other.metadata_props[:]
        onnx.helper.set_model_props(
            other, {k: v for k, v in {**metadata, **change}.items() if v is not None}
        )
        onnx.save(other, tmp_path / f"{name}.onnx")
    reasons = {
        "cut.onnx": "is damaged or not a file of horsehuman: export it again",
        "text.onnx": "is damaged or not a file of horsehuman: export it again",
        "missing.onnx": "cannot read",
        "foreign.onnx": "is damaged or not a file of horsehuman",
        "newer.onnx": "has format 99, not 2",
        "bare.onnx": "is damaged or not a file of horsehuman",
    }
    for name, reason in reasons.items():
        with pytest.raises(HorseHumanError, match=reason):
            OnnxClassifier(tmp_path / name)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> str:
        code, printed = commands.run("export", "--model", "cnn", "--out", str(tmp_path / name))
        assert code == 1
        return printed

    (tmp_path / "there.onnx").touch()
    assert "exists already" in run("there.onnx")
    assert "the folder does not exist" in run("no/x.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    needed = "error: export needs onnx, onnxruntime, onnxscript: pip install -e '.[export]'"
    assert run("x.onnx") == needed


@pytest.mark.slow
def test_the_program_of_the_docs_needs_no_torch(exported: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "use.md").read_text()
    program = text.split("```python\n# answer.py\n")[1].split("```")[0]
    program += "assert not {'torch', 'horsehuman'} & set(sys.modules)\n"
    (tmp_path / "answer.py").write_text(program)
    Image.fromarray(read_picture(next(Path(__file__).parents[2].glob("docs/samples.webp")))).save(
        tmp_path / "picture.jpg"
    )
    done = subprocess.run(
        [sys.executable, "answer.py", exported, "picture.jpg"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    answer = next(predict(load_classifier("cnn"), tmp_path / "picture.jpg", always_answer=True))
    assert answer.class_name in done.stdout
    assert f"{answer.probability:.1%}" in done.stdout


def test_an_exported_file_reads_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is valid but for a weight that stands in a file of the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret")
    nodes = [helper.make_node("Identity", ["weight"], [name]) for name in OUTPUTS]
    inputs = [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [1, 3, "H", "W"])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in OUTPUTS]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    named = {"horsehuman_format": "2", "class_names": '["a", "b"]'}
    helper.set_model_props(model, {**named, "threshold": "0.5", "confidence_threshold": "0.5"})
    (tmp_path / "crafted.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(HorseHumanError, match="may read other files"):
        OnnxClassifier(tmp_path / "crafted.onnx")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'["horses"', b'["hors\xe5s"'),
        (b"class_names", b"class_n\xe1mes"),
        (b"confidence_threshold", b"xxxxxxxxxx_threshold"),
    ],
)
def test_damaged_metadata_are_refused(
    before: bytes, after: bytes, exported: Path, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.onnx"
    assert before in exported.read_bytes()
    path.write_bytes(exported.read_bytes().replace(before, after))
    with pytest.raises(HorseHumanError, match="is damaged or not a file of horsehuman"):
        OnnxClassifier(path)
