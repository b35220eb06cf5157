"""Files that mean harm, generated: what is called with each."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from PIL import Image

from horsehuman import HorseHumanError, load_classifier
from horsehuman.checkpoint import find_checkpoint
from horsehuman.data.archives import unpack
from horsehuman.data.folders import scan
from horsehuman.models.weights import read_trunk
from horsehuman.onnx_model import OnnxClassifier
from horsehuman.picture_set import find_set
from horsehuman.pictures import read_picture
from horsehuman.sources import open_picture
from horsehuman.training import resume_run
from tests.commands import run

Case = tuple[str, Callable[[], object]]


class Writes:
    """What, unpickled, would write a file."""

    def __init__(self, command: tuple[Any, ...]) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return self.command


def pictures(folder: Path) -> Iterator[Case]:
    """Fuzzed headers of formats that Pillow reads, bombs, and lies about sizes."""
    generator = np.random.default_rng(0)
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "DIB"):
        whole = io.BytesIO()
        image.save(whole, form)
        for number in range(12):
            content = bytearray(whole.getvalue())
            for place in generator.integers(0, min(64, len(content)), 3):
                content[place] = int(generator.integers(0, 256))
            path = folder / f"{form}-{number}.{form.lower()}"
            path.write_bytes(content[: len(content) // 2] if number % 4 == 3 else content)
            yield f"picture {path.name}", lambda path=path: read_picture(path)
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    for width, height in ((2**31 - 1, 2**31 - 1), (0, 0), (60_000, 60_000), (1, 2**31 - 1)):
        path = folder / f"{width}x{height}.png"
        path.write_bytes(header + struct.pack(">IIBBBBBI", width, height, 8, 2, 0, 0, 0, 0))
        yield f"picture {path.name}", lambda path=path: read_picture(path)
    path = folder / "bomb.bmp"
    path.write_bytes(b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 99999, 99999, 1, 24,
                                         0, 0, 0, 0, 0, 0))  # fmt: skip
    yield "picture bomb.bmp", lambda: read_picture(path)
    for source in (
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "gopher://x",
        "http://",
        "http://\0/",
    ):
        yield f"source {source!r}", lambda source=source: open_picture(source)
    for special in ("/dev/zero", "/dev/random", "/proc/self/mem", "/", "\0", "x" * 5000):
        yield f"file {special[:20]!r}", lambda special=special: read_picture(special)


def archives(folder: Path) -> Iterator[Case]:
    """Names that lead out of the folder, links, devices, bombs."""
    names = ["../out", "/tmp/out", "a/../../out", "..\\out", "C:\\out", "a/b/../../../out", "C:out"]
    names += ["\\\\host\\share\\out", "./../out", "a\\..\\..\\out"]
    for number, name in enumerate(names):
        path = folder / f"slip{number}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("horses/1.png", b"x")
            archive.writestr(zipfile.ZipInfo(name), b"out")
        yield f"archive {name!r}", lambda path=path: unpack({"train": path}, folder / "cache")
    for kind in (0o120777, 0o060666, 0o010666, 0o040777 | 0o120000):
        path = folder / f"kind{kind}.zip"
        entry = zipfile.ZipInfo("horses/link")
        entry.external_attr = kind << 16
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(entry, "/etc/passwd")
        yield f"archive of kind {kind:o}", lambda path=path: unpack({"train": path}, folder / "c")
    path = folder / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("horses/1.png", bytes(300_000_000))
    yield "archive bomb", lambda: unpack({"train": path}, folder / "cache")


def checkpoints(folder: Path, canary: Path) -> Iterator[Case]:
    """Pickles that would write a file, wrong types, resolvers, and headers that lie."""
    commands = [
        (os.system, (f"touch {canary}",)),
        (eval, (f"open({str(canary)!r}, 'w')",)),
        (exec, (f"open({str(canary)!r}, 'w')",)),
        (open, (str(canary), "w")),
        (Path.touch, (canary,)),
        (__import__, ("antigravity",)),
    ]
    good = torch.load(find_checkpoint("cnn"), weights_only=True)
    for number, command in enumerate(commands):
        for name, save in (("torch", torch.save), ("pickle", _dump), ("legacy", _legacy)):
            path = folder / f"{name}{number}.ckpt"
            save({**good, "extra": Writes(command)}, path)
            yield f"checkpoint {path.name}", lambda path=path: load_classifier(path)
    hyper, origin = good["hyper_parameters"], good["horsehuman"]
    changes: list[dict[str, Any]] = [
        {"hyper_parameters": {**hyper, "class_names": ["${oc.env:HOME}", "b"]}},
        {"hyper_parameters": {**hyper, "image_size": 10**9}},
        {"hyper_parameters": {**hyper, "image_size": "96"}},
        {"hyper_parameters": {**hyper, "channels": [10**7, 10**7]}},
        {"hyper_parameters": {**hyper, "convolutions": 10**6}},
        {"hyper_parameters": {**hyper, "temperature": float("nan")}},
        {"hyper_parameters": {**hyper, "threshold": -1}},
        {"hyper_parameters": []},
        {"state_dict": {}},
        {"state_dict": {key: value.reshape(-1)[:0] for key, value in good["state_dict"].items()}},
        {"state_dict": None},
        {"horsehuman": {"format": "2", "classifier": "CNNClassifier"}},
        {"horsehuman": {"format": 2, "classifier": "os.system"}},
        {"horsehuman": {"format": 99, "classifier": "CNNClassifier"}},
        {"horsehuman": None},
    ]
    for number, change in enumerate(changes):
        path = folder / f"changed{number}.ckpt"
        bare = {key: value for key, value in origin.items() if key != "checksum"}
        torch.save({**good, "horsehuman": bare, **change}, path)
        yield f"checkpoint {change.keys()} {number}", lambda path=path: load_classifier(path)
    for number, header in enumerate(
        [
            b"{}",
            b'{"a":{"dtype":"F32","shape":[999999999],"data_offsets":[0,3999999996]}}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99]}}',
            b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
            b"not json",
            b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        ]
    ):
        path = folder / f"lie{number}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        yield f"weights {header[:20]!r}", lambda path=path: read_trunk(str(path))
        upload = folder / f"upload{number}"
        upload.mkdir()
        (upload / "model.safetensors").write_bytes(path.read_bytes())
        (upload / "config.json").write_text(json.dumps({"horsehuman": origin}))
        yield f"folder with {header[:20]!r}", lambda upload=upload: load_classifier(upload)
    path = folder / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    yield "weights with a huge header", lambda: read_trunk(str(path))


def _dump(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps({k: v for k, v in value.items() if k == "extra"}))  # type: ignore[attr-defined]


def _legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def runs(folder: Path, canary: Path) -> Iterator[Case]:
    """Configs and lists of a run that would do more than describe it."""
    texts = [
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"data: !!python/object/apply:os.system ['touch {canary}']",
        "data: {source: folder, root: '${oc.env:HOME}'}",
        "data: [1, 2]",
        "a: &a [*a, *a]",
        "&a [&b [&c [*a]]]",
        "data: {source: archives, archives_dir: /dev/null}",
        "data: {source: nowhere}",
        "\0",
        "{" * 20_000,
        "data: {source: folder, root: 5}",
        "",
    ]
    for number, text in enumerate(texts):
        run = folder / f"run{number}"
        run.mkdir()
        (run / "config.yaml").write_text(text)
        rows = "x.png,a,g,train\n../../../etc/passwd,b,g,test\n"
        (run / "splits.csv").write_text("picture,label,group,split\n" + rows)
        yield (
            f"run with {text[:30]!r}",
            lambda run=run: [read_picture(record.path) for record in find_set(str(run)).records],
        )


def exports(folder: Path) -> Iterator[Case]:
    """ONNX files of others, with weights in another file, and with wrong metadata."""
    value = helper.make_tensor_value_info
    node = helper.make_node("Identity", ["pictures"], ["logit"])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="../../../etc/passwd")
    for number, (tensor, metadata) in enumerate(
        [
            (weight, {}),
            (outside, {"horsehuman_format": "1"}),
            (weight, {"horsehuman_format": "1", "class_names": "[1]"}),
            (weight, {"horsehuman_format": "1", "class_names": '["a", "b"]', "threshold": "x"}),
            (weight, {"horsehuman_format": "1", "horsehuman_digest": "0" * 64}),
            (
                weight,
                {
                    "horsehuman_format": "1",
                    "class_names": '["a", "b"]',
                    "threshold": "0.5",
                    "certain_from": "0.5",
                },
            ),
        ]
    ):
        graph = helper.make_graph([node], "g", [value("pictures", TensorProto.UINT8, [1])],
                                  [value("logit", TensorProto.UINT8, [1])], [tensor])  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(model, metadata)
        path = folder / f"{number}.onnx"
        path.write_bytes(model.SerializeToString())
        yield f"onnx {metadata}", lambda path=path: OnnxClassifier(path)


def trees(folder: Path) -> Iterator[Case]:
    """Folders that loop, lead out, or are not what they should be."""
    root = folder / "loop"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        (root / name / "again").symlink_to(root)
        Image.new("RGB", (4, 4)).save(root / name / "x.png")
    yield "tree with loops", lambda: scan(root)
    empty = folder / "empty"
    empty.mkdir()
    yield "empty tree", lambda: scan(empty)
    yield "tree that is a file", lambda: scan(folder / "bomb.bmp")
    for pattern in ("(", "(a)(b)", "", "(a*)*b", "a"):
        yield f"pattern {pattern!r}", lambda pattern=pattern: scan(root, pattern)


def commands(folder: Path) -> Iterator[Case]:
    """What the others are about, given to the commands; and names of every kind."""
    picture = folder / "good.png"
    Image.effect_noise((40, 30), 60).convert("RGB").save(picture)
    names = ["-rf.png", "$(touch canary).png", "[bold]x.png", "a\nb.png", "\u202egnp.x"]
    names += [
        "=cmd|' C calc'!A0.png",
        "x" * 240 + ".png",
        "\udcff.png",
        "{0}%s.png",
        "\U0001f40e.png",
    ]
    named = folder / "names"
    for label in ("a", "b"):
        (named / label).mkdir(parents=True)
        for name in names:
            (named / label / name).write_bytes(picture.read_bytes())
    calls = [
        ("predict", folder / "bomb.bmp"),
        ("predict", folder / "PNG-0.png", "--format", "csv"),
        ("predict", named, "--recursive", "--model", "cnn"),
        ("predict", named, "--recursive", "--model", "cnn", "--format", "csv"),
        ("predict", picture, "--model", folder / "torch0.ckpt"),
        ("predict", picture, "--model", folder / "0.onnx"),
        ("predict", picture, "--model", folder / "upload1"),
        ("predict", picture, "--model", folder / "bomb.zip"),
        ("predict", "http://127.0.0.1:9/x.png"),
        ("predict", "/dev/zero"),
        ("explain", folder / "bomb.bmp", "--out", folder / "explained"),
        ("evaluate", "--model", "cnn", "--data", folder / "run2", "--out", folder / "r2"),
        ("evaluate", "--model", "cnn", "--data", named, "--out", folder / "named-report"),
        ("evaluate", "--model", folder / "changed3.ckpt"),
        ("compare", folder / "run0", folder / "run1"),
        ("data", "--data", folder / "run9"),
        ("data", "--data", folder / "loop", "--out", folder / "sheets"),
        ("audit", "--data", folder / "loop", "--out", folder / "audit"),
        ("export", "--model", folder / "pickle1.ckpt", "--out", folder / "x.onnx"),
        ("card", "--model", folder / "legacy2.ckpt"),
    ]
    for arguments in calls:
        yield f"horsehuman {arguments}", lambda arguments=arguments: _called(*map(str, arguments))


def _called(*arguments: str) -> None:
    code, text = run(*arguments)
    if code:
        raise HorseHumanError((text.strip().splitlines() or [""])[-1])


def few_pictures(folder: Path) -> Path:
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(6):
            Image.effect_noise((9, 9), 60).save(folder / label / f"{number}.png")
    return folder


def trainings(folder: Path, canary: Path) -> Iterator[Case]:
    """Runs of others that are to be gone on with, and options that lead elsewhere."""
    few = few_pictures(folder / "few")
    whole = {
        "seed": 0, "test": False, "ema": None, "early_stopping": None, "resume": None,
        "model": {"_target_": "horsehuman.CNNClassifier", "image_size": 32, "channels": [2]},
        "data": {"_target_": "horsehuman.HorseHumanDataModule", "source": "folder",
                 "root": str(few), "batch_size": 4, "validation": "held_out"},
        "trainer": {"max_epochs": 1, "accumulate_grad_batches": 1, "limit_train_batches": 1.0,
                    "log_every_n_steps": 1, "devices": 1},
    }  # fmt: skip
    command = {"_target_": "subprocess.Popen", "args": f"touch {canary}", "shell": True}
    through = {**command, "_target_": "horsehuman.launching.subprocess.Popen"}
    changes: list[dict[str, Any]] = [
        {},  # it can be gone on with
        {"model": command},
        {"model": through},
        {"data": {**through, "batch_size": 4, "validation": "held_out"}},
        {"model": {"_target_": "horsehuman.load_classifier"}},
        {"model": {"_target_": ["horsehuman.CNNClassifier"]}},
        {"data": {**command, "batch_size": 4, "validation": "held_out"}},
        {"model": {"_target_": "antigravity.x"}},
        {"model": {"_target_": "horsehuman.os.system"}},
        {"model": {}},
        {"model": {**whole["model"], "image_size": "${oc.env:HOME}"}},
        {"model": {**whole["model"], "channels": [10**9]}},
        {"data": {**whole["data"], "root": "${oc.env:HOME}"}},
        {"data": {**whole["data"], "root": "/dev/null"}},
        {"data": {**whole["data"], "root": str(folder / "loop"), "group_pattern": "("}},
        {"trainer": {**whole["trainer"], "max_epochs": 10**12, "logger": "x"}},
        {"trainer": {**whole["trainer"], "devices": 10**6}},
        {"trainer": {**whole["trainer"], "strategy": "os.system", "devices": 2}},
        {"trainer": []},
        {"seed": -1},
    ]
    for number, change in enumerate(changes):
        run_folder = folder / f"resumed{number}"
        (run_folder / "checkpoints").mkdir(parents=True)
        (run_folder / "config.yaml").write_text(json.dumps({**whole, **change}))
        yield f"run {change}", lambda run_folder=run_folder: resume_run(run_folder)
    lists = [f"a{k + 1}: &a{k + 1} [" + ", ".join([f"*a{k}"] * 9) + "]" for k in range(9)]
    texts = ["\n".join(["a0: &a0 [x]", *lists])]
    texts += ["model: &m {_target_: x, again: *m}\ndata: {}\n"]
    for number, text in enumerate(texts):
        run_folder = folder / f"aliases{number}"
        run_folder.mkdir()
        (run_folder / "config.yaml").write_text(text)
        yield f"config {text[:20]!r}", lambda run_folder=run_folder: resume_run(run_folder)
