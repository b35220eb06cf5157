from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from horsehuman import InceptionClassifier
from horsehuman.models.feature_cache import FeatureCache, cache_key
from horsehuman.models.inception import Inception


class Embed:
    """The mean of each channel; counts what it computes."""

    def __init__(self) -> None:
        self.pictures = 0

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        self.pictures += len(pictures)
        return pictures.float().mean((2, 3))


@pytest.fixture
def embed() -> Embed:
    return Embed()


@pytest.fixture
def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)


def test_only_what_is_new_is_computed(embed: Embed, pictures: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "new" / "features.sqlite"
    first = FeatureCache(embed, 3, path)(pictures)
    assert torch.equal(first, pictures.float().mean((2, 3)))
    assert embed.pictures == 6
    again = FeatureCache(embed, 3, path)
    assert torch.equal(again(pictures.flip(0)), first.flip(0))
    assert embed.pictures == 6
    changed = pictures.clone()
    changed[2, 0, 0, 0] += 1
    assert torch.equal(again(changed), changed.float().mean((2, 3)))
    assert embed.pictures == 7


@pytest.mark.parametrize("damage", ["foreign", "cut off", "another version"])
def test_a_damaged_file_is_made_anew(
    damage: str,
    embed: Embed,
    pictures: torch.Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "features.sqlite"
    expected = FeatureCache(embed, 3, path)(pictures)
    whole = path.read_bytes()
    if damage == "another version":
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript("PRAGMA user_version = 99; DROP TABLE features; VACUUM;")
            connection.executescript("CREATE TABLE features (other INTEGER)")
    else:
        path.write_bytes(b"no database" * 400 if damage == "foreign" else whole[: len(whole) // 2])
    assert torch.equal(FeatureCache(embed, 3, path)(pictures), expected)
    assert caplog.text.count("made anew") == 1
    assert embed.pictures == 12
    FeatureCache(embed, 3, path)(pictures)
    assert embed.pictures == 12


@pytest.mark.slow
def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    code = f"""
import sys, torch
from pathlib import Path
from horsehuman.models.features import FeatureCache
cache = FeatureCache(lambda p: p.float().mean((2, 3)), 3, Path({str(path)!r}))
for k in range(40):
    cache(torch.full((2, 3, 4, 4), 5 * k + int(sys.argv[1]), dtype=torch.uint8))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(n)]) for n in (0, 1, 2)]
    assert [process.wait() for process in processes] == [0, 0, 0]

    def refuse(pictures: torch.Tensor) -> torch.Tensor:
        raise AssertionError("computed again")

    cache = FeatureCache(refuse, 3, path)
    for value in (5 * k + n for k in range(40) for n in (0, 1, 2)):
        picture = torch.full((1, 3, 4, 4), value, dtype=torch.uint8)
        assert cache(picture).tolist() == [[value] * 3]


@pytest.mark.slow
def test_a_full_disk_costs_the_cache_and_not_the_run(
    embed: Embed, pictures: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "features.sqlite"
    FeatureCache(embed, 3, path)(pictures[:2])
    code = f"""
import resource, signal, sys, torch
from pathlib import Path
from horsehuman.models.features import FeatureCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
computed = []
def embed(pictures):
    computed.append(len(pictures))
    return pictures.float().flatten(1)
cache = FeatureCache(embed, 192, Path({str(path)!r}))
pictures = [torch.full((1, 3, 8, 8), value, dtype=torch.uint8) for value in range(40)]
for _ in range(2):
    for value, picture in enumerate(pictures):
        assert cache(picture).tolist() == [[value] * 192]
assert 40 < len(computed) < 80, len(computed)  # what was kept before is still read
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("features are not kept in") == 1
    FeatureCache(embed, 3, path)(pictures[:2])
    assert embed.pictures == 2


def test_another_process_that_makes_the_file_meanwhile_loses_nothing(
    embed: Embed,
    pictures: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The file appears, whole, between two statements of ours."""
    path = tmp_path / "features.sqlite"
    connect = sqlite3.connect

    class Slow(sqlite3.Connection):
        def execute(self, *arguments: object) -> object:  # type: ignore[override]
            found = super().execute(*arguments)  # type: ignore[arg-type]
            if path.stat().st_size:
                return found
            row = found.fetchone()
            FeatureCache(embed, 3, path)(pictures)
            return SimpleNamespace(fetchone=lambda: row)

    def connect_slowly(*arguments: object, **options: object) -> sqlite3.Connection:
        monkeypatch.setattr(sqlite3, "connect", connect)
        return connect(*arguments, factory=Slow, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(sqlite3, "connect", connect_slowly)
    FeatureCache(embed, 3, path)(pictures[:1])
    assert path.stat().st_size
    assert not caplog.records
    embed.pictures = 0
    FeatureCache(embed, 3, path)(pictures)
    assert embed.pictures == 0


def test_a_damaged_file_that_cannot_be_removed_is_done_without(
    embed: Embed,
    pictures: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "features.sqlite"
    path.write_bytes(b"something else" * 100)

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "unlink", refuse)
    cache = FeatureCache(embed, 3, path)
    for _ in range(2):
        assert torch.equal(cache(pictures), pictures.float().mean((2, 3)))
    assert len(caplog.records) == 1
    assert path.read_bytes().startswith(b"something else")


def test_features_of_another_width_are_not_taken(
    pictures: torch.Tensor, embed: Embed, tmp_path: Path
) -> None:
    path = tmp_path / "features.sqlite"
    FeatureCache(embed, 3, path)(pictures)
    found = FeatureCache(lambda p: p.float().mean((2, 3))[:, :2], 2, path)(pictures)
    assert found.shape == (6, 2)


def test_a_cache_that_cannot_be_written_is_done_without(
    embed: Embed, pictures: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = FeatureCache(embed, 3, tmp_path / "file" / "features.sqlite")
    for _ in range(2):
        assert torch.equal(cache(pictures), pictures.float().mean((2, 3)))
    assert caplog.text.count("features are not kept in") == 1


@pytest.mark.slow
def test_the_cache_of_a_model_on_another_device_is_made_without_computing() -> None:
    model = InceptionClassifier(image_size=96, weights="random")
    path = model.network.feature_cache().path
    model.network.preprocess.to("meta")
    assert model.network.feature_cache().width == model.network.width == 768
    assert model.network.feature_cache().path == path


@pytest.mark.slow
def test_the_key_stands_for_weights_and_settings() -> None:
    torch.manual_seed(0)
    first, second = (Inception(weights="random") for _ in range(2))
    paths = {first.feature_file(), second.feature_file()}
    settings = {"image_size": 97, "pool": "max", "mean": [0.4] * 3, "scales": [299]}
    for name, value in settings.items():
        first.settings[name] = value
        paths.add(first.feature_file())
    assert len(paths) == 6
    assert cache_key(first.backbone, []) == cache_key(first.backbone, [])
