from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import build_assets as script
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from horsehuman import HorseHumanError, InceptionClassifier, load_classifier, runtime
from horsehuman.data.archives import ARCHIVES, bundled_archives, image_root
from horsehuman.models.inception import bundled_backbone
from horsehuman.runtime import ASSETS, BACKBONE_FILE, DIGESTS


def test_everything_is_listed_with_its_digest() -> None:
    text = (ASSETS / "ASSETS.md").read_text()
    listed = dict(re.findall(r"\| `([\w.-]+)` \| [\d,]+ \| `([0-9a-f]{64})` \|", text))
    files = {path.name for path in ASSETS.iterdir()} - {
        "ASSETS.md",
        "LICENSE-Apache-2.0.txt",
        DIGESTS,
    }
    assert set(listed) == files
    for name, digest in listed.items():
        data = (ASSETS / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
        assert f"| `{name}` | {len(data):,} |" in text
    lines = sorted(f"{digest}  {name}" for name, digest in listed.items())
    assert sorted((ASSETS / DIGESTS).read_text().splitlines()) == lines
    assert "Laurence Moroney" in text
    assert "CC BY 2.0" in text


@pytest.mark.parametrize("name", ["photographs.safetensors", "presence.safetensors"])
def test_a_build_is_the_same_each_time(name: str) -> None:
    """Safetensors writes several entries of metadata in random order."""
    with safe_open(ASSETS / name, "pt") as file:
        assert len(file.metadata()) == 1


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("cnn.ckpt", lambda: load_classifier("cnn")),
        ("inception.ckpt", lambda: load_classifier("inception")),
        (BACKBONE_FILE, lambda: load_classifier("inception")),
        (BACKBONE_FILE, lambda: InceptionClassifier()),
        ("horse-or-human.zip", lambda: image_root("box")),
        ("validation-horse-or-human.zip", lambda: image_root("box")),
    ],
)
def test_a_bundled_file_with_a_flipped_byte_is_refused(
    name: str, read: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(ASSETS, tmp_path / "assets")
    monkeypatch.setattr(runtime, "ASSETS", copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) * 2 // 3] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(HorseHumanError, match=rf"{name} is damaged .*install horsehuman again"):
        read()


@pytest.mark.parametrize(
    ("split", "horses", "humans", "subjects"), [("train", 500, 527, 67), ("test", 128, 128, 11)]
)
def test_the_bundled_archives_hold_the_official_pictures(
    split: str, horses: int, humans: int, subjects: int
) -> None:
    with zipfile.ZipFile(bundled_archives()[split]) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
        sizes = {Image.open(io.BytesIO(archive.read(str(name)))).size for name in names}
    assert sum(name.parts[0] == "horses" for name in names) == horses
    assert sum(name.parts[0] == "humans" for name in names) == humans
    assert len({(name.parts[0], name.stem.rpartition("-")[0]) for name in names}) == subjects
    assert {name.suffix for name in names} == {".webp"}
    assert sizes == {(300, 300)}


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_bundled_pictures_are_close_to_the_originals(split: str, originals: Path) -> None:
    box = bundled_archives()[split]
    with zipfile.ZipFile(originals / box.name) as given, zipfile.ZipFile(box) as packed:
        names = {PurePosixPath(n).with_suffix("") for n in given.namelist() if n.endswith(".png")}
        assert names == {PurePosixPath(name).with_suffix("") for name in packed.namelist()}
        for name in names:
            pair = [
                np.asarray(Image.open(io.BytesIO(archive.read(f"{name}{suffix}"))).convert("RGB"))
                for archive, suffix in ((given, ".png"), (packed, ".webp"))
            ]
            error = np.square(pair[0].astype(float) - pair[1]).mean()
            assert 10 * np.log10(255**2 / error) > 33.9, name


@pytest.mark.slow
def test_the_bundled_files_can_be_rebuilt(originals: Path, tmp_path: Path) -> None:
    """Build the validation archive, twenty pictures of the other one, and the backbone again."""
    (test,) = (name for name in ARCHIVES.values() if name.startswith("validation"))
    (train,) = set(ARCHIVES.values()) - {test}
    shutil.copy(originals / test, tmp_path / test)
    with (
        zipfile.ZipFile(originals / train) as given,
        zipfile.ZipFile(tmp_path / train, "w") as few,
    ):
        for member in [m for m in given.namelist() if m.endswith(".png")][::50]:
            few.writestr(member, given.read(member))
    target = tmp_path / "built"
    command = [sys.executable, script.__file__, "--archives", str(tmp_path), "--out", str(target)]
    weights = ["--weights", str(bundled_backbone())]
    subprocess.run([*command, *weights], check=True, capture_output=True)
    for path in (bundled_backbone(), bundled_archives()["test"]):
        assert (target / path.name).read_bytes() == path.read_bytes()
    digests = (ASSETS / DIGESTS).read_text().splitlines()
    assert len(set((target / DIGESTS).read_text().splitlines()) & set(digests)) == 2
    with (
        zipfile.ZipFile(target / train) as built,
        zipfile.ZipFile(bundled_archives()["train"]) as box,
    ):
        assert len(built.namelist()) > 20
        for name in built.namelist():
            assert built.read(name) == box.read(name)
