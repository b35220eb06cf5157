"""Files with one random byte changed: an error of one line, or no effect."""

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
from horsehuman.data.archives import unpack
from horsehuman.inference.export import export_and_report
from horsehuman.inference.onnx import OnnxClassifier
from horsehuman.models.base import Network
from horsehuman.models.checkpoint import add_checksum, checksum, find_checkpoint, verify_checksum
from horsehuman.models.feature_cache import FeatureCache

T = TypeVar("T")

POSITIONS = 200


def flipped(content: bytes, path: Path, seed: int = 0) -> Iterator[int]:
    """Write a file repeatedly, each time with another byte changed, and yield its position."""
    generator = np.random.default_rng(seed)
    for position in generator.integers(0, len(content), POSITIONS).tolist():
        damaged = bytearray(content)
        damaged[position] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        yield position


def opened(call: Callable[[], T]) -> T | None:
    """Return the result of a call, or ``None`` if it raises an error of one line."""
    try:
        return call()
    except HorseHumanError as error:
        text = str(error)
    assert len(text.splitlines()) == 1
    return None


def contents(folder: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def refusals(path: Path, load: Callable[[Path], T], same: Callable[[T], bool]) -> int:
    """Count the changed bytes that are an error; with the others the file must load as before."""
    count = 0
    for position in flipped(path.read_bytes(), path):
        result = opened(lambda: load(path))
        if result is None:
            count += 1
        else:
            assert same(result), position
    print(f"{count} of {POSITIONS} refused, the others without effect")
    return count


@pytest.mark.slow
def test_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "cnn.ckpt"
    shutil.copy(find_checkpoint("cnn"), path)
    pictures = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    classifier = load_classifier("cnn")
    expected, settings = classifier.logits(pictures), classifier.settings

    def same(network: Network) -> bool:
        return torch.equal(network.logits(pictures), expected) and network.settings == settings

    assert refusals(path, load_classifier, same) > 0.9 * POSITIONS


@pytest.mark.slow
def test_exported_files(tmp_path: Path) -> None:
    path = tmp_path / "cnn.onnx"
    export_and_report("cnn", path, force=False)
    pictures = np.random.default_rng(0).integers(0, 256, (1, 3, 90, 70)).astype(np.uint8)
    classifier = OnnxClassifier(path)
    expected, names = classifier.predict_batch(pictures), classifier.class_names

    def same(damaged: OnnxClassifier) -> bool:
        outputs = damaged.predict_batch(pictures)
        return np.array_equal(outputs, expected) and damaged.class_names == names

    assert refusals(path, OnnxClassifier, same) > 0.9 * POSITIONS


@pytest.mark.slow
def test_caches_of_features(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    pictures = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)

    def embed(images: Tensor) -> Tensor:
        return images.float().mean((2, 3)).repeat(1, 32)

    expected = FeatureCache(embed, path)(pictures)
    for place in flipped(path.read_bytes(), path):
        for extra in tmp_path.glob("cache.sqlite-*"):
            extra.unlink()
        assert torch.equal(FeatureCache(embed, path)(pictures), expected), place


@pytest.mark.slow
def test_archives_and_what_was_unpacked(tree: Path, tmp_path: Path) -> None:
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((tree / "test").rglob("*.webp")):
            file.write(path, path.relative_to(tree / "test").as_posix())
    target = unpack({"test": archive}, tmp_path / "intact")
    expected, intact = contents(target), archive.read_bytes()

    def load(path: Path) -> list[bytes]:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        return contents(unpack({"test": path}, tmp_path / "cache"))

    refusals(archive, load, lambda result: result == expected)
    archive.write_bytes(intact)
    picture = next(target.rglob("*.webp"))
    for _ in zip(range(20), flipped(picture.read_bytes(), picture), strict=False):
        assert contents(unpack({"test": archive}, tmp_path / "intact")) == expected


def test_the_checksum_covers_everything() -> None:
    checkpoint = {
        "state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)},
        "hyper_parameters": {"x": [1, 2.5, None, "name"]},
        "horsehuman": {"format": 2},
    }
    add_checksum(checkpoint)
    assert verify_checksum(checkpoint)
    add_checksum(checkpoint)  # a second time
    assert verify_checksum(checkpoint)
    for change in (
        {"state_dict": {"a": torch.arange(6.0).view(3, 2), "b": torch.tensor(1)}},
        {"state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0)}},
        {"hyper_parameters": {"x": [1, 2.5, None, "names"]}},
        {"horsehuman": {**checkpoint["horsehuman"], "format": 3}},
    ):
        assert not verify_checksum({**checkpoint, **change})
    assert verify_checksum({"state_dict": {}})  # of versions without checksums
    frozen = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    assert checksum(frozen) == checksum(frozen.contiguous())
