from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from horsehuman import InceptionClassifier
from horsehuman.models import feature_cache
from horsehuman.models.feature_cache import FeatureCache, cache_key
from horsehuman.models.inception import Inception


class Embed:
    """Return the mean of each channel, and count the images that were embedded."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.count += len(images)
        return images.float().mean((2, 3))


@pytest.fixture
def embed() -> Embed:
    return Embed()


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)


def test_only_new_images_are_embedded(embed: Embed, images: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "new" / "features.sqlite"
    features = FeatureCache(embed, path)(images)
    assert torch.equal(features, images.float().mean((2, 3)))
    assert embed.count == 6
    cache = FeatureCache(embed, path)
    assert torch.equal(cache(images.flip(0)), features.flip(0))
    assert embed.count == 6
    changed = images.clone()
    changed[2, 0, 0, 0] += 1
    assert torch.equal(cache(changed), changed.float().mean((2, 3)))
    assert embed.count == 7
    twice = torch.full((2, 3, 8, 8), 7, dtype=torch.uint8)  # the same image, and a new one
    assert torch.equal(cache(twice), twice.float().mean((2, 3)))
    assert embed.count == 8


@pytest.mark.parametrize("damage", ["foreign", "cut off"])
def test_a_damaged_file_is_recreated(
    damage: str,
    embed: Embed,
    images: torch.Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "features.sqlite"
    expected = FeatureCache(embed, path)(images)
    content = path.read_bytes()
    path.write_bytes(b"no database" * 400 if damage == "foreign" else content[: len(content) // 2])
    assert torch.equal(FeatureCache(embed, path)(images), expected)
    assert len(re.findall(r"is not a feature cache \(.+\): recreated", caplog.text)) == 1
    assert embed.count == 12
    FeatureCache(embed, path)(images)
    assert embed.count == 12


@pytest.mark.slow
def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    code = f"""
import sys, torch
from pathlib import Path
from horsehuman.models.feature_cache import FeatureCache
cache = FeatureCache(lambda p: p.float().mean((2, 3)), Path({str(path)!r}))
for k in range(40):
    cache(torch.full((2, 3, 4, 4), 5 * k + int(sys.argv[1]), dtype=torch.uint8))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(n)]) for n in (0, 1, 2)]
    assert [process.wait() for process in processes] == [0, 0, 0]

    def refuse(images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("embedded again")

    cache = FeatureCache(refuse, path)
    for value in (5 * k + n for k in range(40) for n in (0, 1, 2)):
        image = torch.full((1, 3, 4, 4), value, dtype=torch.uint8)
        assert cache(image).tolist() == [[value] * 3]


@pytest.mark.slow
def test_a_full_disk_disables_writing_and_nothing_else(
    embed: Embed, images: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "features.sqlite"
    FeatureCache(embed, path)(images[:2])
    code = f"""
import resource, signal, sys, torch
from pathlib import Path
from horsehuman.models.feature_cache import FeatureCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
computed = []
def embed(images):
    computed.append(len(images))
    return images.float().flatten(1)
cache = FeatureCache(embed, Path({str(path)!r}))
images = [torch.full((1, 3, 8, 8), value, dtype=torch.uint8) for value in range(40)]
for _ in range(2):
    for value, image in enumerate(images):
        assert cache(image).tolist() == [[value] * 192]
assert 40 < len(computed) < 80, len(computed)  # what was written before is still read
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stderr.count("features are not cached in") == 1
    FeatureCache(embed, path)(images[:2])
    assert embed.count == 2


def test_a_file_that_another_process_creates_meanwhile_keeps_its_rows(
    embed: Embed,
    images: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another cache creates and fills the file after this one has opened it."""
    path = tmp_path / "features.sqlite"
    connect = sqlite3.connect

    class Slow(sqlite3.Connection):
        def execute(self, *arguments: object) -> sqlite3.Cursor:  # type: ignore[override]
            if not path.stat().st_size:
                super().execute("SELECT count(*) FROM sqlite_master").fetchone()
                FeatureCache(embed, path)(images)
            return super().execute(*arguments)  # type: ignore[arg-type]

    def connect_slowly(*arguments: object, **options: object) -> sqlite3.Connection:
        monkeypatch.setattr(sqlite3, "connect", connect)
        return connect(*arguments, factory=Slow, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(sqlite3, "connect", connect_slowly)
    FeatureCache(embed, path)(images[:1])
    assert path.stat().st_size
    assert not caplog.records
    embed.count = 0
    FeatureCache(embed, path)(images)
    assert embed.count == 0


def test_a_damaged_file_that_cannot_be_deleted_is_not_used(
    embed: Embed,
    images: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "features.sqlite"
    path.write_bytes(b"something else" * 100)

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "unlink", refuse)
    cache = FeatureCache(embed, path)
    for _ in range(2):
        assert torch.equal(cache(images), images.float().mean((2, 3)))
    assert len(caplog.records) == 1
    assert path.read_bytes().startswith(b"something else")


@pytest.mark.parametrize("value", ["substr(feature, 1, 9)", "'text'", "1", "NULL", "zeroblob(16)"])
def test_damaged_values_are_computed_again(
    value: str, images: torch.Tensor, embed: Embed, tmp_path: Path
) -> None:
    path = tmp_path / "features.sqlite"
    expected = FeatureCache(embed, path)(images)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE features SET feature = {value}")
    for _ in range(2):
        assert torch.equal(FeatureCache(embed, path)(images), expected)
    assert embed.count == 12


def test_a_cache_that_cannot_be_written_is_not_used(
    embed: Embed, images: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = FeatureCache(embed, tmp_path / "file" / "features.sqlite")
    for _ in range(2):
        assert torch.equal(cache(images), images.float().mean((2, 3)))
    assert caplog.text.count("features are not cached in") == 1


@pytest.mark.slow
def test_a_cache_is_built_without_a_forward_pass() -> None:
    model = InceptionClassifier(image_size=96, weights="random")
    path = model.network.feature_cache().path
    model.network.normalize.to("meta")
    assert model.network.width == 768
    assert model.network.feature_cache().path == path


@pytest.mark.slow
def test_the_key_depends_on_weights_and_settings() -> None:
    torch.manual_seed(0)
    first, second = (Inception(weights="random") for _ in range(2))
    paths = {first.feature_cache().path, second.feature_cache().path}
    settings = {"image_size": 97, "pool": "max", "mean": [0.4] * 3, "scales": [299]}
    for name, value in settings.items():
        first.settings[name] = value
        paths.add(first.feature_cache().path)
    assert len(paths) == 6
    assert cache_key(first.backbone, []) == cache_key(first.backbone, [])


def test_the_key_depends_on_what_computes_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device, by another torch, or in another precision, their last bits differ."""
    network = Inception(image_size=80, scales=[75], cut="Conv2d_2b_3x3")
    path = network.feature_cache().path
    assert network.feature_cache().path == path
    paths = {path}
    for owner, name, value in (
        (Inception, "device", torch.device("cuda")),
        (torch, "__version__", "99.0"),
        (feature_cache, "_VERSION", 99),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            paths.add(network.feature_cache().path)
    for precision in (torch.float16, torch.bfloat16):
        cache = network.to(precision).feature_cache()
        paths.add(cache.path)
    assert len(paths) == 6
    assert cache.embed(torch.zeros(1, 3, 80, 80, dtype=torch.uint8)).dtype == torch.float32
