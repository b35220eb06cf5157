from __future__ import annotations

import logging
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from horsehuman.data.archives import bundled_archives
from horsehuman.data.records import SUBJECT_PATTERN

#: Names of the images of a small set: four subjects of each class, three frames of each.
TRAIN = {"horses": [f"horse{n:02}-{k}" for n in (1, 2, 3, 4) for k in (0, 4, 8)]}
TRAIN["humans"] = [f"human{n:02}-{k:02}" for n in (1, 2, 3, 4) for k in (0, 12, 24)]
TEST = {"horses": ["horse1-000", "horse1-105"], "humans": ["valhuman01-00", "valhuman02-05"]}

#: Options of ``scripts/train.py`` for a CNN that is trained for two epochs.
SMALL_CNN = ["model=cnn", "model.image_size=48", "model.channels=[4,8]", "trainer.max_epochs=2"]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache out of the tests, unless a run names one for all of them."""
    given = os.environ.get("HORSEHUMAN_CACHE")
    os.environ["HORSEHUMAN_CACHE"] = given or str(tmp_path_factory.mktemp("cache"))
    yield
    if given is None:
        del os.environ["HORSEHUMAN_CACHE"]


@pytest.fixture(autouse=True)
def _logs_reach_caplog() -> None:
    logger = logging.getLogger("horsehuman")
    logger.propagate = True
    logger.handlers.clear()
    logger.setLevel(logging.INFO)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder tree of real pictures: 24 to train on (8 subjects), 4 to test."""
    root = tmp_path_factory.mktemp("tree")
    for split, names in (("train", TRAIN), ("test", TEST)):
        with zipfile.ZipFile(bundled_archives()[split]) as archive:
            for class_name, stems in names.items():
                for stem in stems:
                    archive.extract(f"{class_name}/{stem}.webp", root / split)
    return root


def small_data(tree: Path) -> list[str]:
    """Options of ``scripts/train.py`` for the images of :func:`tree`."""
    pattern = f'data.group_pattern="{SUBJECT_PATTERN}"'
    return ["data=folder", f'data.root="{tree}"', "data.batch_size=4", pattern]


def small_cnn(tree: Path, *overrides: str) -> list[str]:
    """Options of ``scripts/train.py`` for a CNN that trains within a second on :func:`tree`."""
    return [*SMALL_CNN, *small_data(tree), *overrides]


def train_small_cnn(tree: Path, folder: Path, *overrides: str) -> Path:
    """Train the classifier of :func:`small_cnn` and return the folder of its run."""
    from horsehuman.training.config import compose
    from horsehuman.training.run import train

    train(compose(*small_cnn(tree, *overrides)), folder)
    return folder


@pytest.fixture(scope="session")
def cnn_run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on :func:`tree`. Tests copy it before they change it."""
    return train_small_cnn(tree, tmp_path_factory.mktemp("runs") / "run", "ema=0.5")


@pytest.fixture(scope="session")
def originals() -> Path:
    """The folder with the official PNG archives; tests on them need it."""
    given = os.environ.get("HORSEHUMAN_ORIGINALS")
    if not given:
        pytest.skip("HORSEHUMAN_ORIGINALS names no folder with the official archives")
    return Path(given)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that no process waits for one of them at the end."""
    long = (
        "commands_of_the_readme",
        "killed",
        "as_one_does",
        "flipped",
        "neither_and_both",
        "tour",
    )
    items.sort(key=lambda item: not any(name in item.name for name in long))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=1, help="kills of each run in test_resume.py")
    parser.addoption("--seconds", type=float, default=6, help="of test_demo_load.py")
