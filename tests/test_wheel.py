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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, to be imported from."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "wheel", *options], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    shutil.rmtree(source)
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
