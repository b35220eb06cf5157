"""Bytes that were flipped, at places drawn by seed: refused in one line, or without effect."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from horsehuman import HorseHumanError, load_classifier
from horsehuman.checkpoint import find_checkpoint
from horsehuman.data.archives import unpack
from horsehuman.export import export
from horsehuman.models.features import FeatureCache
from horsehuman.onnx_model import OnnxClassifier
from horsehuman.seal import checksum, is_whole, seal

T = TypeVar("T")

PLACES = 200


def flipped(whole: bytes, path: Path, seed: int = 0) -> Iterator[int]:
    """Write the file again and again, each time with another byte turned over."""
    generator = np.random.default_rng(seed)
    for place in generator.integers(0, len(whole), PLACES).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        yield place


def opened(call: Callable[[], T]) -> T | None:
    """What a call gives; ``None`` where it refuses in one line."""
    try:
        return call()
    except HorseHumanError as error:
        text = str(error)
    assert len(text.splitlines()) == 1
    return None


def contents(folder: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_checkpoints(tmp_path: Path) -> None:
    whole = find_checkpoint("cnn").read_bytes()
    path = tmp_path / "cnn.ckpt"
    pictures = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    classifier = load_classifier("cnn")
    expected, settings = classifier.logits(pictures), classifier.settings
    count = 0
    for place in flipped(whole, path):
        found = opened(lambda: load_classifier(path))
        if found is None:
            count += 1
        else:
            assert torch.equal(found.logits(pictures), expected), place
            assert found.settings == settings
    print(f"{count} of {PLACES} refused, the others without effect")
    assert count > 0.9 * PLACES


@pytest.mark.slow
def test_exported_files(tmp_path: Path) -> None:
    path = tmp_path / "cnn.onnx"
    export("cnn", "onnx", path, force=False)
    pictures = np.random.default_rng(0).integers(0, 256, (1, 3, 90, 70)).astype(np.uint8)
    classifier = OnnxClassifier(path)
    expected, names = classifier.run(pictures), classifier.class_names
    count = 0
    for place in flipped(path.read_bytes(), path):
        found = opened(lambda: OnnxClassifier(path))
        if found is None:
            count += 1
        else:
            assert np.array_equal(found.run(pictures), expected), place
            assert found.class_names == names
    print(f"{count} of {PLACES} refused, the others without effect")
    assert count > 0.9 * PLACES


@pytest.mark.slow
def test_caches_of_features(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    pictures = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)

    def embed(images: Tensor) -> Tensor:
        return images.float().mean((2, 3)).repeat(1, 32)

    expected = FeatureCache(embed, 96, path)(pictures)
    for place in flipped(path.read_bytes(), path):
        for extra in tmp_path.glob("cache.sqlite-*"):
            extra.unlink()
        assert torch.equal(FeatureCache(embed, 96, path)(pictures), expected), place


@pytest.mark.slow
def test_archives_and_what_was_unpacked(tree: Path, tmp_path: Path) -> None:
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((tree / "test").rglob("*.webp")):
            file.write(path, path.relative_to(tree / "test").as_posix())
    target = unpack({"test": archive}, tmp_path / "whole")
    expected = contents(target)
    whole, count = archive.read_bytes(), 0
    for place in flipped(whole, archive):
        found = opened(lambda: unpack({"test": archive}, tmp_path / "cache"))
        if found is None:
            count += 1
        else:
            assert contents(found) == expected, place
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    print(f"{count} of {PLACES} refused, the others without effect")
    archive.write_bytes(whole)
    picture = next(target.rglob("*.webp"))
    for _ in zip(range(20), flipped(picture.read_bytes(), picture), strict=False):
        assert contents(unpack({"test": archive}, tmp_path / "whole")) == expected


def test_a_checksum_is_of_everything() -> None:
    checkpoint = {
        "state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)},
        "hyper_parameters": {"x": [1, 2.5, None, "name"]},
        "horsehuman": {"format": 2},
    }
    seal(checkpoint)
    assert is_whole(checkpoint)
    seal(checkpoint)  # a second time
    assert is_whole(checkpoint)
    for change in (
        {"state_dict": {"a": torch.arange(6.0).view(3, 2), "b": torch.tensor(1)}},
        {"state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0)}},
        {"hyper_parameters": {"x": [1, 2.5, None, "names"]}},
        {"horsehuman": {**checkpoint["horsehuman"], "format": 3}},
    ):
        assert not is_whole({**checkpoint, **change})
    assert is_whole({"state_dict": {}})  # of before there were checksums
    frozen = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    assert checksum(frozen) == checksum(frozen.contiguous())
