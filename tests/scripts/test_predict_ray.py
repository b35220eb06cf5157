"""Prediction with Ray: equal to ``horsehuman predict``, and complete after processes are killed."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

pyarrow = pytest.importorskip("pyarrow.parquet", reason="Ray is not installed")
predict_ray = pytest.importorskip("predict_ray", reason="Ray is not installed")

SCRIPT = Path(predict_ray.__file__)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--model", "cnn"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(*arguments: object) -> tuple[int, str]:
    process = start(*arguments)
    printed, _ = process.communicate(timeout=120)
    (total,) = [line for line in printed.splitlines() if "unreadable) in" in line]
    return process.returncode, total


def rows(files: Iterator[Path] | list[Path]) -> list[dict[str, str]]:
    """Return the rows of CSV files by source."""
    found = [row for path in files for row in csv.DictReader(path.read_text().splitlines())]
    return sorted(found, key=lambda row: row["source"])


def predicted(folder: Path, out: Path) -> list[dict[str, str]]:
    """Return the rows of ``horsehuman predict``."""
    command = ["predict", str(folder), "--recursive", "--model", "cnn", "--format", "csv"]
    subprocess.run([sys.executable, "-m", "horsehuman", *command, "--out", str(out)], check=False)
    return rows([out])


def check_equal(found: list[dict[str, str]], expected: list[dict[str, str]]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        numbers = [
            {key: float(row[key] or "nan") for key in ("probability", "logit")}
            for row in (one, other)
        ]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-4, nan_ok=True)
        texts = ("source", "class", "status", "error")
        assert [one[key] for key in texts] == [other[key] for key in texts]


@pytest.mark.slow
def test_rows_are_those_of_horsehuman_predict(tree: Path, tmp_path: Path) -> None:
    pictures, out = shutil.copytree(tree, tmp_path / "a set"), tmp_path / "out"
    (pictures / "broken.png").write_text("no picture")
    expected = predicted(pictures, tmp_path / "expected.csv")
    code, printed = run(pictures, "--out", out, "--actors", 2, "--shards", 4)
    assert code == 1
    assert printed == f"29 pictures (1 unreadable) in 4 shards, 4 of them new: {out}"
    check_equal(rows(out.glob("*.csv")), expected)
    code, printed = run(pictures, "--out", out, "--shards", 4)
    assert code == 1  # the broken file is still there
    assert printed == f"29 pictures (1 unreadable) in 4 shards, 0 of them new: {out}"
    columns = tmp_path / "columns"
    assert run(f"file://{tree}", "--out", columns, "--format", "parquet", "--shards", 2)[0] == 0
    table = pyarrow.read_table(columns).to_pylist()
    assert {row["source"] for row in table} == {f"file://{p}" for p in tree.rglob("*.webp")}
    assert {row["class"] for row in table} <= {"horses", "humans"}


def ray_processes(driver: int, name: str = "") -> list[int]:
    """Return the processes of Ray that a driver has started, by the beginning of their names."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"HORSEHUMAN_TEST={driver}".encode() in environment and command.startswith(name):
            found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_killed_actors_and_jobs_leave_nothing_out(tree: Path, tmp_path: Path) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for path in tree.rglob("*.webp"):
        for copy in range(40):
            (pictures / f"{copy}-{path.name}").symlink_to(path)
    os.environ["HORSEHUMAN_TEST"] = mark = str(time.monotonic_ns())
    arguments = (pictures, "--out", out, "--actors", 2, "--shards", 40)
    process = start(*arguments)

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 100
        while len(list(out.glob("*.csv"))) < count:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    wait_for(3)
    os.kill(ray_processes(mark, "ray::MapWorker")[0], signal.SIGKILL)  # an actor
    wait_for(12)
    process.kill()  # the driver
    process.communicate()
    written = len(list(out.glob("*.csv")))
    assert 12 <= written < 40
    code, total = run(*arguments)
    assert code == 0
    found = re.search(r"40 shards, (\d+) of them new", total)
    assert found
    assert 0 < int(found[1]) <= 40 - written
    check_equal(rows(out.glob("*.csv")), predicted(pictures, tmp_path / "expected.csv"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY"], "EMPTY: no pictures"),
        (["file://EMPTY"], "EMPTY: no pictures"),
        (["nowhere.png"], "nowhere.png: no pictures"),
        (["xyz://host/photos"], "xyz"),
        (["TREE", "--address", "127.0.0.1:FREE"], "no answer: give HOST:PORT"),
        (["TREE", "--address", "localhost"], "give HOST:PORT"),
        (["TREE", "--out", "s3://bucket/answers"], "name a folder, not a URI"),
        (["TREE", "--out", "TREE/test/horses/horse1-000.webp"], "cannot write into --out"),
        (["TREE", "--shards", "0"], "--shards"),
        (["TREE", "--actors", "-1"], "--actors=-1"),
        (["TREE", "--model", "nothing"], "--model nothing"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    message: str,
    tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "TREE": str(tree), "FREE": port}

    def fill(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    given = ["--model", "cnn", "--out", str(tmp_path / "out"), *map(fill, arguments)]
    assert predict_ray.main(given) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert fill(message) in printed
    assert printed.count("\n") == 1


def test_answers_of_another_job_are_refused(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = predict_ray.list_pictures(str(tree), {})
    shards = predict_ray.make_shards(pictures, 3)
    assert sorted(name for names in shards.values() for name in names) == sorted(pictures)
    name = next(iter(pictures))
    changed = predict_ray.make_shards({**pictures, name: "1 2"}, 3)
    assert len(changed.keys() - shards.keys()) == 1
    options = Namespace(model="cnn", out=tmp_path, format="csv", sources=["photos"])
    assert len(predict_ray.missing_shards(shards, options)) == 3
    for option, value, reason in (
        ("model", "inception", "model"),
        ("format", "parquet", "format"),
        ("sources", ["more"], "source"),
    ):
        other = Namespace(**{**vars(options), option: value})
        with pytest.raises(predict_ray.HorseHumanError, match=f"another {reason}: name another"):
            predict_ray.missing_shards(shards, other)


def test_without_ray_a_line_says_what_to_install(tmp_path: Path) -> None:
    code = f"import runpy, sys; sys.modules['ray'] = None; runpy.run_path({str(SCRIPT)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: Ray is not installed: pip install -e '.[ray]'\n"
