"""Every command in README.md and docs/ runs; training is cut short and on few images."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import results
from PIL import Image

from horsehuman.training.config import compose
from horsehuman.training.run import train
from tests import commands

ROOT = Path(__file__).parents[1]

#: Programs whose commands are run or listed below.
PROGRAMS = ("python", "horsehuman", "torchrun", "tensorboard", "pip", "pytest", "find", "bash")

#: Commands that another test runs, or the gate.
ELSEWHERE = (
    (r"pip install|pytest|ruff|bash \.ci/run", ".ci/run"),
    (r"horsehuman demo", "tests/inference/test_demo.py"),
    (r"horsehuman calibrate", "tests/training/test_calibrate.py"),
    (r"torchrun", "tests/training/test_ddp.py"),
    (r"python scripts/train\.py.* trainer=ddp", "tests/training/test_ddp.py"),
    (r"python scripts/benchmark\.py", "tests/scripts/test_benchmark.py"),
    (r"python scripts/build_assets\.py", "tests/test_assets.py"),
    (r"python scripts/build_classifiers\.py", "tests/scripts/test_build_classifiers.py"),
    (r"python scripts/predict_ray\.py", "tests/scripts/test_predict_ray.py"),
    (r"python scripts/floors\.py", "tests/test_architecture.py"),
    (r"python scripts/studies/", "tests/scripts"),
    (r".* data=archives", "tests/data/test_archives.py"),
    (r"python answer\.py", "tests/inference/test_export.py"),
    (r".*https://", "tests/data/test_sources.py"),
)

TINY = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.log_every_n_steps=1"]
TINY_CNN = ["model.image_size=80", "model.channels=[2,2,2,2]"]
TINY_INCEPTION = ["model.image_size=32", "model.scales=[75]"]


def documented_commands() -> list[str]:
    """Return the commands of all fenced blocks, without comments, each once."""
    lines: dict[str, None] = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for block in [text for language, text in blocks if not language]:
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s+#.*", "", line).strip()
                if command.startswith(PROGRAMS):
                    lines |= dict.fromkeys(command.split(" && "))
    return list(lines)


def is_run_here(command: str) -> bool:
    return not any(re.match(pattern, command) for pattern, _ in ELSEWHERE)


def test_commands_run_elsewhere_name_a_test() -> None:
    for _, place in ELSEWHERE:
        assert (ROOT / place).exists(), place
    assert len(documented_commands()) > 30


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.*[dy]")]))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?://", link):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.fixture(scope="module")
def workspace(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name: pictures, folders, runs."""
    folder = tmp_path_factory.mktemp("docs")
    picture = next((tree / "test" / "horses").iterdir())
    (folder / "photos").mkdir()
    for name in ("picture.jpg", "photo.jpg", "photos/one.jpg"):
        shutil.copy(picture, folder / name)
    shutil.copytree(tree, folder / "DIR")
    (folder / "OTHERS").mkdir()
    for index in range(20):
        Image.effect_noise((80, 80), 100).save(folder / "OTHERS" / f"{index}.png")
    for path in (folder / "DIR").rglob("*.webp"):  # names that the documented pattern matches
        stem, _, number = path.stem.rpartition("-")
        path.rename(path.with_name(f"{stem}_{number}.webp"))
    for model, tiny in (("cnn", TINY_CNN), ("inception", TINY_INCEPTION)):
        data = ["data=folder", f"data.root={folder / 'DIR'}"]
        options = [f"model={model}", *data, *TINY, *tiny]
        train(compose(*options), folder / "outputs" / model / "RUN")
    shutil.copy(
        folder / "outputs" / "cnn" / "RUN" / "checkpoints" / "final.ckpt", folder / "cnn.ckpt"
    )
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the run folder is a copy
@pytest.mark.parametrize("command", list(filter(is_run_here, documented_commands())))
def test_documented_command(
    command: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(workspace, folder, symlinks=True)
    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(command)
    if "|" in arguments:
        subprocess.run(["bash", "-c", command], check=True, timeout=120)
    elif program == "horsehuman":
        code, output = commands.run(*arguments)
        assert code == 0, output
    elif program == "tensorboard":
        inspect = [sys.executable, "-m", "tensorboard.main", "--inspect"]
        subprocess.run([*inspect, *arguments], check=True)
    elif arguments[0].endswith("results.py"):
        assert results.main(arguments[1:]) == 0
    else:
        assert arguments[0] == "scripts/train.py"
        assert commands.run_train_script(monkeypatch, folder, *shortened(arguments[1:])) == 0


def shortened(options: list[str]) -> list[str]:
    """Return the options of a training with few images, few steps and one run of a sweep."""
    if any(option.startswith("resume=") for option in options):
        Path("outputs/cnn/RUN/metrics.json").unlink()  # otherwise the run has ended
        return options
    single = [re.sub(r",[^=]*$", "", option) for option in options]
    tiny = TINY_CNN if any(option.endswith("cnn") for option in single) else TINY_INCEPTION
    data = [] if "data=folder" in single else ["data=folder", "data.root=DIR"]
    return [*single, *TINY, *tiny, *data]
