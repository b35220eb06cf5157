"""Hostile and damaged input that a user can meet: an error of one line, or a harmless result."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from horsehuman import HorseHumanError, cli, load_classifier
from horsehuman.data.archives import unpack
from horsehuman.data.images import read_picture
from horsehuman.data.records import scan_folder
from horsehuman.data.sources import read_source
from horsehuman.inference.onnx import OnnxClassifier
from horsehuman.models.checkpoint import find_checkpoint
from horsehuman.models.inception import read_pretrained
from horsehuman.runtime import PeakMemory, cache_dir
from horsehuman.training.run import resume_run

#: An input, and the call that reads it.
Case = tuple[str, Callable[[], object]]

#: Name of the file that code in an input would create.
CANARY = "canary"

#: Most seconds that an input may take, and most additional memory in GB.
SECONDS, MEMORY = 10, 2


class Malicious:
    """An object whose unpickling calls a function.

    Args:
        function: The function.
        arguments: Its arguments.
    """

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def pictures(folder: Path) -> Iterator[Case]:
    """Files with random bytes in their headers, cut files, decompression bombs, devices, URLs."""
    generator = np.random.default_rng(0)
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    for file_format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        intact = io.BytesIO()
        image.save(intact, file_format)
        for number in range(8):
            content = bytearray(intact.getvalue())
            for position in generator.integers(0, min(64, len(content)), 3):
                content[position] = int(generator.integers(0, 256))
            path = folder / f"{number}.{file_format.lower()}"
            path.write_bytes(content[: len(content) // 2] if number % 4 == 3 else content)
            yield path.name, lambda path=path: read_picture(path)
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    for width, height in ((2**31 - 1, 2**31 - 1), (0, 0), (60_000, 60_000)):
        path = folder / f"{width}x{height}.png"
        path.write_bytes(header + struct.pack(">IIBBBBBI", width, height, 8, 2, 0, 0, 0, 0))
        yield path.name, lambda path=path: read_picture(path)
    wide = folder / "wide.tif"  # 90 million pixels in one line
    Image.new("L", (8, 1)).save(wide, compression="tiff_lzw")
    content = wide.read_bytes()
    width = content.index(struct.pack("<H", 256), 8)  # the entry of the tag ImageWidth
    entry = struct.pack("<HHII", 256, 4, 1, 90_000_000)
    wide.write_bytes(content[:width] + entry + content[width + len(entry) :])
    yield wide.name, lambda: read_picture(wide)
    for source in ("file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "http://127.0.0.1:9/x"):
        yield source, lambda source=source: read_source(source)
    for source in ("/dev/zero", "/", "x" * 5000):
        yield source[:20], lambda source=source: read_picture(source)


def archives(folder: Path) -> Iterator[Case]:
    """Zip files with paths out of their folder, links, devices, and a zip bomb."""
    for number, name in enumerate(("../out", "/tmp/out", "a/../../out", "..\\out", "C:\\out")):
        path = folder / f"path{number}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("horses/1.png", b"x")
            archive.writestr(zipfile.ZipInfo(name), b"out")
        yield name, lambda path=path: unpack({"train": path}, folder / "cache")
    for mode in (0o120777, 0o060666):  # a symbolic link, a block device
        path = folder / f"mode{mode:o}.zip"
        entry = zipfile.ZipInfo("horses/link")
        entry.external_attr = mode << 16
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(entry, "/etc/passwd")
        yield path.name, lambda path=path: unpack({"train": path}, folder / "cache")
    bomb = folder / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("horses/1.png", bytes(300_000_000))
    yield bomb.name, lambda: unpack({"train": bomb}, folder / "cache")


def checkpoints(folder: Path) -> Iterator[Case]:
    """Checkpoints that contain code, and checkpoints with wrong types and values."""
    good = torch.load(find_checkpoint("cnn"), weights_only=True)
    for number, code in enumerate(
        (Malicious(os.system, f"touch {CANARY}"), Malicious(open, CANARY, "w"))
    ):
        new, old, bare = (folder / f"{name}{number}.ckpt" for name in ("new", "old", "bare"))
        torch.save({**good, "extra": code}, new)
        torch.save({**good, "extra": code}, old, _use_new_zipfile_serialization=False)
        bare.write_bytes(pickle.dumps(code))
        for path in (new, old, bare):
            yield path.name, lambda path=path: load_classifier(path)
    settings, metadata = good["hyper_parameters"], good["horsehuman"]
    without_checksum = {key: value for key, value in metadata.items() if key != "checksum"}
    changes: list[dict[str, Any]] = [
        {"hyper_parameters": {**settings, "class_names": ["${oc.env:HOME}", "b"]}},
        {"hyper_parameters": {**settings, "image_size": 10**9}},
        {"hyper_parameters": {**settings, "image_size": "96"}},
        {"hyper_parameters": {**settings, "channels": [10**7, 10**7]}},
        {"hyper_parameters": {**settings, "temperature": float("nan")}},
        {"hyper_parameters": []},
        {"state_dict": {}},
        {"state_dict": None},
        {"horsehuman": {"format": 2, "classifier": "os.system"}},
        {"horsehuman": {"format": 99, "classifier": "CNNClassifier"}},
        {"horsehuman": None},
        {"horsehuman": {"format": "3", "classifier": "CNNClassifier"}},
        {"horsehuman": {"format": torch.zeros(2), "classifier": "CNNClassifier"}},
        {"hyper_parameters": {**settings, "mean": [10**400, 0, 0]}},
        {"state_dict": {**good["state_dict"], "extra": torch.eye(3).to_sparse()}},
        {"state_dict": {name: value.to("meta") for name, value in good["state_dict"].items()}},
    ]
    for number, change in enumerate(changes):
        path = folder / f"changed{number}.ckpt"
        torch.save({**good, "horsehuman": without_checksum, **change}, path)
        yield f"{path.name}: {change}"[:99], lambda path=path: load_classifier(path)


def weights(folder: Path) -> Iterator[Case]:
    """Safetensors with wrong headers, by themselves and in a folder from a model hub."""
    metadata = torch.load(find_checkpoint("cnn"), weights_only=True)["horsehuman"]
    headers = (
        b"{}",
        b'{"a":{"dtype":"F32","shape":[999999999],"data_offsets":[0,3999999996]}}',
        b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
        b"not json",
    )
    for number, header in enumerate(headers):
        path = folder / f"weights{number}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        yield path.name, lambda path=path: read_pretrained(str(path))
        hub = folder / f"hub{number}"
        hub.mkdir()
        (hub / "model.safetensors").write_bytes(path.read_bytes())
        (hub / "config.json").write_text(json.dumps({"horsehuman": metadata}))
        yield hub.name, lambda hub=hub: load_classifier(hub)


def exports(folder: Path) -> Iterator[Case]:
    """ONNX files of other programs, with external weights, and with wrong metadata."""
    node = helper.make_node("Identity", ["pictures"], ["logit"])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    external = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    external.data_location = TensorProto.EXTERNAL
    external.external_data.add(key="location", value="../../../etc/passwd")
    named = {"horsehuman_format": "2", "class_names": '["a", "b"]', "confidence_threshold": "0.5"}
    files: list[tuple[TensorProto, dict[str, str]]] = [
        (weight, {}),
        (external, {"horsehuman_format": "1"}),
        (weight, {**named, "class_names": "[1]", "threshold": "0.5"}),
        (weight, {**named, "threshold": "x"}),
        (weight, {**named, "threshold": "0.5", "horsehuman_digest": "0" * 64}),
    ]
    for number, (tensor, metadata) in enumerate(files):
        inputs, outputs = (
            [helper.make_tensor_value_info(name, TensorProto.UINT8, [1])]
            for name in ("pictures", "logit")
        )
        graph = helper.make_graph([node], "graph", inputs, outputs, [tensor])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(model, metadata)
        path = folder / f"{number}.onnx"
        path.write_bytes(model.SerializeToString())
        yield f"{path.name}: {metadata}", lambda path=path: OnnxClassifier(path)


def trees(folder: Path) -> Iterator[Case]:
    """Folders with loops of links, no pictures, odd names, and group patterns that do not fit."""
    loop = folder / "loop"
    for name in ("a", "b"):
        (loop / name).mkdir(parents=True)
        (loop / name / "again").symlink_to(loop)
        Image.new("RGB", (4, 4)).save(loop / name / "x.png")
    (folder / "empty").mkdir()
    for root in (loop, folder / "empty", loop / "a" / "x.png"):
        yield f"tree {root.name}", lambda root=root: scan_folder(root)
    for pattern in ("(", "(a)(b)", "", "(a*)*b", "a"):
        yield f"pattern {pattern}", lambda pattern=pattern: scan_folder(loop, pattern)


def runs(folder: Path) -> Iterator[Case]:
    """Run folders of others: configs that name other code or wrong values."""
    for label in ("a", "b"):
        (folder / "few" / label).mkdir(parents=True)
        for number in range(6):
            Image.effect_noise((9, 9), 60).save(folder / "few" / label / f"{number}.png")
    data = {"_target_": "horsehuman.HorseHumanDataModule", "source": "folder", "batch_size": 4}
    data |= {"root": str(folder / "few"), "validation": "held_out"}
    model = {"_target_": "horsehuman.CNNClassifier", "image_size": 32, "channels": [2]}
    trainer = {"max_epochs": 1, "accumulate_grad_batches": 1, "limit_train_batches": 1.0}
    trainer |= {"log_every_n_steps": 1, "devices": 1}
    config: dict[str, Any] = {"seed": 0, "test": False, "ema": None, "early_stopping": None}
    config |= {"model": model, "data": data, "trainer": trainer}
    command = {"_target_": "subprocess.Popen", "args": f"touch {CANARY}", "shell": True}
    changes: list[dict[str, Any]] = [
        {},  # valid: it is trained
        {"model": command},
        {"model": {**command, "_target_": "horsehuman.training.resume.subprocess.Popen"}},
        {"model": {"_target_": "horsehuman.load_classifier"}},
        {"model": {"_target_": ["horsehuman.CNNClassifier"]}},
        {"model": {**model, "image_size": "${oc.env:HOME}"}},
        {"data": {**data, **command}},
        {"data": {**data, "root": "/dev/null"}},
        {"trainer": {**trainer, "strategy": "os.system", "devices": 2}},
        {"trainer": []},
    ]
    for number, change in enumerate(changes):
        path = folder / f"run{number}"
        (path / "checkpoints").mkdir(parents=True)
        (path / "config.yaml").write_text(json.dumps({**config, **change}))
        yield f"run {change}", lambda path=path: resume_run(path)


def commands(folder: Path) -> Iterator[Case]:
    """The commands, given the inputs of the other generators and files with odd names."""
    for generator in (pictures, checkpoints, weights, exports, trees):
        list(generator(folder))
    names = ("-rf.png", "$(touch canary).png", "[bold]x.png", "a\nb.png", "\u202egnp.x")
    names += ("=cmd|' C calc'!A0.png", "x" * 240 + ".png", "\udcff.png", "{0}%s.png")
    for label in ("a", "b"):
        (folder / "names" / label).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (9, 9)).save(folder / "names" / label / name, "PNG")
    picture = folder / "names" / "a" / "-rf.png"
    calls = [
        ["predict", folder / "60000x60000.png"],
        ["predict", folder / "0.png", "--format", "csv"],
        ["predict", folder / "names", "--recursive", "--model", "cnn", "--format", "csv"],
        ["predict", picture, "--model", folder / "new0.ckpt"],
        ["predict", picture, "--model", folder / "0.onnx"],
        ["predict", picture, "--model", folder / "hub1"],
        ["explain", folder / "60000x60000.png", "--out", folder / "explained.png"],
        ["evaluate", "--model", "cnn", "--data", folder / "names", "--out", folder / "report"],
        ["evaluate", "--model", folder / "changed3.ckpt"],
        ["data", "--data", folder / "loop", "--out", folder / "sheets"],
        ["audit", "--data", folder / "loop", "--out", folder / "audit"],
        ["export", "--model", folder / "bare1.ckpt", "--out", folder / "x.onnx"],
        ["card", "--model", folder / "old1.ckpt"],
    ]
    for arguments in calls:
        yield f"horsehuman {arguments}", lambda arguments=arguments: call(*map(str, arguments))


def call(*arguments: str) -> None:
    """Run a command; if it fails, raise its whole standard error."""
    out, error = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["horsehuman", *arguments])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", error)
        patch.setattr(cli.runtime, "raise_on_signals", lambda: None)
        patch.setattr(cli.runtime, "report_uncaught_errors", lambda: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    if ended.value.code:
        raise HorseHumanError(error.buffer.getvalue().decode().removesuffix("\n"))


#: Each generator, the number of its inputs, and the least number of these that are refused.
FAMILIES = {
    pictures: (59, 20),
    archives: (8, 8),
    checkpoints: (22, 20),
    weights: (8, 8),
    exports: (5, 5),
    trees: (8, 5),
    runs: (10, 9),
    commands: (13, 9),
}

#: Events of Python that write, with the positions of the paths among their arguments.
WRITING = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,)}
WRITING |= {"os.symlink": (0, 1), "os.link": (0, 1), "os.truncate": (0,), "os.chmod": (0,)}

#: Paths that this process has written to since the list was cleared, while a test watches.
written: list[Path] = []
watching = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Record what is written anywhere; an audit hook, which cannot be removed."""
    if not watching:
        return
    paths: tuple[Any, ...] = tuple(arguments[place] for place in WRITING.get(event, ()))
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        paths = arguments[:1]
    absolute = [Path(os.fsdecode(p)).absolute() for p in paths if isinstance(p, str | bytes)]
    written.extend(p for p in absolute if not (event == "os.mkdir" and p.is_dir()))


sys.addaudithook(watch)


def test_the_docs_count_the_hostile_inputs() -> None:
    page = Path(__file__).parents[1] / "docs" / "reliability.md"
    assert f"Each of {sum(count for count, _ in FAMILIES.values())} hostile" in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("generator", FAMILIES)
def test_hostile_inputs(
    generator: Callable[[Path], Iterator[Case]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "inputs"
    folder.mkdir()
    cases, refused, memory = list(generator(folder)), 0, PeakMemory()
    before = memory.gigabytes()
    written.clear()
    monkeypatch.setattr(sys.modules[__name__], "watching", True)
    for name, read in cases:
        start, message = time.monotonic(), ""
        try:
            read()
        except HorseHumanError as error:
            message = str(error)
        except Exception as error:
            pytest.fail(f"{name}: {type(error).__name__}: {error}")
        refused += bool(message)
        assert len(message.splitlines()) <= 1, name
        assert time.monotonic() - start < SECONDS, name
    monkeypatch.setattr(sys.modules[__name__], "watching", False)
    others = [tmp_path, cache_dir(), Path("/dev"), Path("/proc/self")]
    allowed = [folder / "cache"] if generator is archives else others
    outside = {path for path in written if not any(path.is_relative_to(a) for a in allowed)}
    assert not outside
    assert (len(cases), refused >= FAMILIES[generator][1]) == (FAMILIES[generator][0], True)
    after = memory.gigabytes()
    assert before is not None
    assert after is not None
    assert after - before < MEMORY
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]
    assert not (folder / CANARY).exists()
