"""The package works from a wheel, without the clone that it was built from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CLIENT = """
from pathlib import Path
import lightning as L
from horsehuman import CNNClassifier, HorseHumanDataModule, Prediction, load_classifier, predict

def horses(folder: Path, least: float) -> list[str]:
    found: list[Prediction] = list(predict(load_classifier("cnn"), folder.iterdir()))
    return [p.source for p in found if p.class_name == "horses" and p.probability > least]

def train(path: Path) -> None:
    model = CNNClassifier(channels=[16, 32])
    trainer = L.Trainer(max_epochs=1)
    trainer.fit(model, datamodule=HorseHumanDataModule(model.image_size))
    trainer.save_checkpoint(path)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked source distribution."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns(".git", ".*cache", "*venv", "outputs", "build", "*.egg-info")
    clone = shutil.copytree(ROOT, folder / "clone", ignore=ignored)
    build = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    shutil.rmtree(clone)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    archive.unlink()
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, to be imported from."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "wheel", *options], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def call(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "horsehuman", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_source_distribution_can_test_itself(source: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    for arguments in (["--collect-only"], ["tests/test_architecture.py", "tests/test_docs.py"]):
        done = subprocess.run(
            [*command, *arguments], cwd=source, env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout.decode()


@pytest.mark.slow
def test_metadata_name_all_licences(site: Path) -> None:
    (folder,) = site.glob("*.dist-info")
    lines = (folder / "METADATA").read_text().splitlines()
    assert "License-Expression: MIT AND CC-BY-2.0 AND Apache-2.0" in lines
    files = {line.removeprefix("License-File: ") for line in lines if "License-File" in line}
    assert {"LICENSE", "horsehuman/assets/LICENSE-Apache-2.0.txt"} <= files
    assert all((folder / "licenses" / name).is_file() for name in files)


@pytest.mark.slow
def test_augmented_sheets_need_no_clone(site: Path, tmp_path: Path) -> None:
    done = call(site, tmp_path, "data", "--augmented", "--out", "sheets")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "sheets").glob("*-augmented.png"))) == 2
    assert (site / "horsehuman" / "evaluation" / "audit.html").is_file()


@pytest.mark.slow
def test_calibrate_and_card_need_no_clone(site: Path, tmp_path: Path) -> None:
    done = call(site, tmp_path, "calibrate", "nowhere")
    assert done.returncode == 1
    assert done.stderr == "error: cannot read nowhere/config.yaml: No such file or directory\n"
    done = call(site, tmp_path, "card", "--model", "cnn")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("---\n")


@pytest.mark.slow
def test_programs_that_use_the_package_can_be_strictly_typed(site: Path, tmp_path: Path) -> None:
    assert (site / "horsehuman" / "py.typed").is_file()
    (tmp_path / "client.py").write_text(CLIENT)
    options = ["--strict", "--config-file", ROOT / "setup.cfg", "--cache-dir", ROOT / ".mypy_cache"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "client.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("Success"), done.stdout + done.stderr
