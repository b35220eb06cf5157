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

from horsehuman import load_classifier
from horsehuman.data.archives import unpack
from horsehuman.data.image_sets import find_image_set
from horsehuman.data.images import read_picture
from horsehuman.data.records import scan_folder
from horsehuman.data.sources import read_source
from horsehuman.inference.onnx import OnnxClassifier
from horsehuman.models.checkpoint import find_checkpoint
from horsehuman.models.inception import read_pretrained

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
    deep = folder / "deep.png"
    Image.fromarray(np.zeros((10_000, 9_999), np.uint16)).save(deep, compress_level=1)
    yield "picture deep.png", lambda: read_picture(deep)
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
        yield f"source {source!r}", lambda source=source: read_source(source)
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
    """Pickles that would write a file, wrong types and resolvers."""
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


def weights(folder: Path) -> Iterator[Case]:
    """Safetensors with headers that lie, by themselves and in a folder for a hub."""
    origin = torch.load(find_checkpoint("cnn"), weights_only=True)["horsehuman"]
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
        yield f"weights {header[:20]!r}", lambda path=path: read_pretrained(str(path))
        upload = folder / f"upload{number}"
        upload.mkdir()
        (upload / "model.safetensors").write_bytes(path.read_bytes())
        (upload / "config.json").write_text(json.dumps({"horsehuman": origin}))
        yield f"folder with {header[:20]!r}", lambda upload=upload: load_classifier(upload)
    path = folder / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    yield "weights with a huge header", lambda: read_pretrained(str(path))


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
        other = ("../../../etc/passwd", "/etc/passwd", "y.png")[number % 3]
        rows = f"x.png,a,g,train\n{other},b,g,test\n"
        (run / "splits.csv").write_text("picture,label,group,split\n" + rows)
        yield (
            f"run with {text[:30]!r}",
            lambda run=run: [
                read_picture(record.path) for record in find_image_set(str(run)).records
            ],
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
    yield "tree with loops", lambda: scan_folder(root)
    empty = folder / "empty"
    empty.mkdir()
    yield "empty tree", lambda: scan_folder(empty)
    yield "tree that is a file", lambda: scan_folder(folder / "bomb.bmp")
    for pattern in ("(", "(a)(b)", "", "(a*)*b", "a"):
        yield f"pattern {pattern!r}", lambda pattern=pattern: scan_folder(root, pattern)
