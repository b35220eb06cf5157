from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from horsehuman import HorseHumanDataModule, HorseHumanError
from horsehuman.data.datasets import OnDemandImages
from horsehuman.data.records import SUBJECT_PATTERN, SplitPlan, assign_splits


def make(tree: Path, **options: object) -> HorseHumanDataModule:
    defaults = {
        "source": "folder",
        "root": str(tree),
        "group_pattern": SUBJECT_PATTERN,
        "image_size": 64,
    }
    data = HorseHumanDataModule(**{**defaults, "batch_size": 4, **options})  # type: ignore[arg-type]
    data.setup()
    return data


def test_batches_are_pictures_and_labels(tree: Path) -> None:
    data = make(tree, val_fraction=0.25)
    assert data.class_names == ["horses", "humans"]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 64, 64)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.float32
    sizes = [len(loader.dataset) for loader in (data.train_dataloader(), data.test_dataloader())]
    assert sizes == [18, 4]
    assert len(data.val_dataloader().dataset) == 6
    assert len(data.train_dataloader()) == 4  # the last, smaller batch is left out
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 4


def test_order_depends_only_on_seed_and_epoch(tree: Path) -> None:
    def order(seed: int, epoch: int) -> list[float]:
        data = make(tree, seed=seed)
        data._epoch = lambda: epoch  # type: ignore[method-assign]
        return [float(images.float().mean()) for images, _ in data.train_dataloader()]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_decoding_on_demand_gives_the_same_batches(tree: Path, workers: int) -> None:
    in_memory = make(tree)
    on_demand = make(tree, memory_limit=0, num_workers=workers)
    assert isinstance(on_demand._images, OnDemandImages)
    for stage in ("train", "val", "test"):
        batches = [list(getattr(data, f"{stage}_dataloader")()) for data in (in_memory, on_demand)]
        for (images, labels), (others, other_labels) in zip(*batches, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)


def test_unreadable_files_are_one_error_or_left_out(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    shutil.copytree(tree, root)
    victims = sorted((root / "train" / "horses").iterdir())[:4]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(HorseHumanError, match=r"^4 of 28 pictures are unreadable") as caught:
        make(root)
    assert str(caught.value).count("damaged (") == 3
    assert "data.skip_bad=true" in str(caught.value)
    data = make(root, skip_bad=True)
    assert sorted(data.skipped) == [str(victim) for victim in victims]
    assert len(data.records) == 24
    assert "left out 4 of 28" in caplog.text
    for images, labels in data.test_dataloader():
        assert len(images) == len(labels) == 4


def test_setup_does_not_change_warning_filters(tree: Path) -> None:
    before = list(warnings.filters)
    make(tree)
    assert warnings.filters == before


def test_a_class_without_readable_images_is_an_error(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(tree, root)
    for victim in (root / "test" / "humans").iterdir():
        victim.write_bytes(b"")
    with pytest.raises(
        HorseHumanError, match=r"no picture of the class of .*/humans/.* in test can be read"
    ):
        make(root, skip_bad=True)


def test_options_that_make_metrics_optimistic_are_logged(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tree, group_pattern=None)
    assert "near-duplicates inflate metrics (horsehuman audit)" in caplog.text
    caplog.clear()
    make(tree, val_fraction=0)
    assert "nothing is held out" in caplog.text
    caplog.clear()
    make(tree, validation="test")
    assert "its metrics are selected on it" in caplog.text
    assert "near-duplicates" not in caplog.text


def test_validation_is_empty_or_the_test_set(tree: Path) -> None:
    assert make(tree, val_fraction=0).val_dataloader() == []
    data = make(tree, validation="test")
    assert len(data.val_dataloader().dataset) == 4
    assert len(data.train_dataloader().dataset) == 24


def test_features_replace_images(tree: Path) -> None:
    data = make(tree, val_fraction=0.25)
    image_batches = {
        split: list(getattr(data, f"{split}_dataloader")()) for split in ("train", "val", "test")
    }

    def embed(images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))

    data.use_features(embed, "fit")
    assert next(iter(data.test_dataloader()))[0].ndim == 4
    data.use_features(embed, "test")
    images, features = data.sample_test(3, torch.device("cpu"))
    assert images.shape[:2] == (3, 3)
    assert torch.equal(embed(images), features)
    for split, batches in image_batches.items():
        feature_batches = getattr(data, f"{split}_dataloader")()
        pairs = zip(batches, feature_batches, strict=True)
        for (images, labels), (features, feature_labels) in pairs:
            assert torch.equal(embed(images), features)
            assert torch.equal(labels, feature_labels)
    data.setup("fit")  # setup for another model discards the features
    assert next(iter(data.train_dataloader()))[0].ndim == 4


def test_augmented_images_cannot_be_cached(tree: Path) -> None:
    data = make(tree, augment={"flip": True})
    text = (
        r"^data\.augment has no effect on cached features: set data\.augment=null or "
        r"model\.cache_features=false$"
    )
    with pytest.raises(HorseHumanError, match=text):
        data.check_cacheable()
    with pytest.raises(HorseHumanError, match=text):
        data.use_features(lambda images: images.flatten(1).float(), "fit")
    make(tree).check_cacheable()


def test_samples_are_originals_above_augmented_versions(tree: Path) -> None:
    plain = make(tree).samples()
    data = make(tree, augment={"rotation": 30}, seed=3)
    state = torch.get_rng_state()
    samples = data.samples()
    assert samples.shape == (32, 3, 64, 64)
    assert torch.equal(samples[:8], plain)
    assert not torch.equal(samples[8:16], plain)
    assert torch.equal(samples, data.samples())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"val_fraction": 1}, "val_fraction"),
        ({"test_fraction": 0}, "test_fraction"),
        ({"fold": 5}, "fold"),
        ({"folds": 1}, "folds"),
        ({"batch_size": 0}, "batch_size"),
        ({"validation": "tset"}, "validation"),
        ({"source": "zip"}, "source"),
        ({"source": "folder", "root": None}, "root"),
        ({"root": "somewhere"}, "data=folder"),
        ({"archives_dir": "somewhere"}, "data=archives"),
        ({"augment": {"rotatoin": 3}}, "did you mean rotation"),
        ({"augment": True}, "augment"),
        ({"image_size": 0}, "image_size"),
        ({"memory_limit": -1}, "memory_limit"),
        ({"skip_bad": "yes"}, "skip_bad"),
    ],
)
def test_invalid_values_are_refused(options: dict, name: str) -> None:
    with pytest.raises(HorseHumanError, match=name):
        HorseHumanDataModule(**options)


def nearest_neighbour_accuracy(images: torch.Tensor, labels: torch.Tensor, held: list) -> float:
    flat = images.flatten(1).float()
    held_out = torch.zeros(len(flat), dtype=torch.bool)
    held_out[held] = True
    nearest = torch.cdist(flat[held_out], flat[~held_out]).argmin(1)
    return float((labels[~held_out][nearest] == labels[held_out]).float().mean())


@pytest.mark.slow
def test_the_bundled_set_is_the_default_and_a_random_split_of_it_flatters() -> None:
    """Compute the nearest-neighbour accuracies in the README, on 32 x 32 pixels."""
    data = HorseHumanDataModule(image_size=32)
    data.setup()
    assert len(data.records) == 1283
    assert [len(d().dataset) for d in (data.train_dataloader, data.test_dataloader)] == [834, 256]

    accuracies: dict[str, list[float]] = {"random": [], "by group": []}
    train = [index for index, record in enumerate(data.records) if record.split != "test"]
    images, labels = data._images[train], data._labels[train]
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        held = torch.randperm(len(train), generator=generator)[:205].tolist()
        accuracies["random"].append(nearest_neighbour_accuracy(images, labels, held))
        records = assign_splits(
            [
                replace(r, split="train" if r.split == "validation" else r.split)
                for r in data.records
            ],
            SplitPlan("held_out", 0.2, 0.2, None, 5, seed),
        )
        held = [i for i, index in enumerate(train) if records[index].split == "validation"]
        accuracies["by group"].append(nearest_neighbour_accuracy(images, labels, held))
    means = {name: sum(values) / len(values) for name, values in accuracies.items()}
    print(means)
    assert means["random"] > 0.94
    assert means["by group"] < 0.88
