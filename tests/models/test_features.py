from __future__ import annotations

from pathlib import Path

import pytest
import torch

from horsehuman import InceptionClassifier
from horsehuman.models.features import FeatureCache, cache_key


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


@pytest.mark.parametrize("damage", ["foreign", "cut off"])
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
    path.write_bytes(b"no database" * 400 if damage == "foreign" else whole[: len(whole) // 2])
    assert torch.equal(FeatureCache(embed, 3, path)(pictures), expected)
    assert caplog.text.count("made anew") == 1
    assert embed.pictures == 12
    FeatureCache(embed, 3, path)(pictures)
    assert embed.pictures == 12


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


def test_the_cache_of_a_model_on_another_device_is_made_without_computing() -> None:
    model = InceptionClassifier(96, "random")
    path = model.feature_cache().path
    model.preprocess.to("meta")
    model.pool.to("meta")
    assert model.feature_cache().width == model.width == 768
    assert model.feature_cache().path == path


def test_the_key_stands_for_weights_and_settings() -> None:
    torch.manual_seed(0)
    first = InceptionClassifier(image_size=96, weights="random")
    paths = {first.feature_cache().path, InceptionClassifier(96, "random").feature_cache().path}
    for name, value in (("image_size", 97), ("pool", "max"), ("mean", [0.4] * 3)):
        first.hparams[name] = value
        paths.add(first.feature_cache().path)
    assert len(paths) == 5
    assert cache_key(first.backbone, []) == cache_key(first.backbone, [])
