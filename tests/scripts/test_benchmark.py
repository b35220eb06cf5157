from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import benchmark as script
import pytest

from horsehuman.data.images import read_picture
from horsehuman.training.build import build
from horsehuman.training.config import compose

#: The row that takes least time, and how many lines it adds to the table.
ROWS = {"evaluate": 1}


@pytest.mark.slow
def test_a_short_row_is_finite_and_written(tmp_path: Path) -> None:
    """No value is checked against its target: ``--short`` only shows that the benchmark works."""
    out = tmp_path / "benchmark.json"
    command = [sys.executable, script.__file__, *ROWS, "--short", "--out", str(out)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    result = json.loads(out.read_text())
    assert result["short"]
    assert {"cpu", "cores", "instruction sets", "torch"} <= set(result["machine"])
    rows = result["rows"]
    assert len(rows) == sum(ROWS.values())
    assert all(row["name"] in process.stdout for row in rows)
    for row in rows:
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in ("ours", "plain")), row


def test_a_set_has_distinct_images_of_both_classes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "unpack", lambda archives: tree)  # with 24 training images
    folder = script.make_set(tmp_path / "set", 40)
    train = sorted((folder / "train").rglob("*.webp"))
    assert len(train) == 40
    assert {path.parent.name for path in train} == {"horses", "humans"}
    assert any((folder / "test").rglob("*.webp"))
    turned = [path for path in train if path.name.startswith("train1")]
    assert turned
    for path in turned[:5]:
        original = path.with_name(path.name.replace("train1", "train0", 1))
        assert (read_picture(path) != read_picture(original)).any()


def test_unknown_rows_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(["speed"])
    assert ended.value.code == 2
    assert "speed: use training | predict" in capsys.readouterr().err


def test_a_failed_command_ends_the_benchmark(tmp_path: Path) -> None:
    bench = script.Bench(True, tmp_path)
    with pytest.raises(SystemExit, match="No module named 'nothing'"):
        bench.run("-c", "import nothing")


def test_ratios_are_above_one_where_ours_is_faster() -> None:
    assert script.Row("a", 0.5, 1.0).cells()[1:3] == ["0.5 s", "1 s (2.00x)"]
    assert script.Row("b", 2, 1, 0.5, "images/s").cells()[2:4] == [
        "1 images/s (2.00x)",
        "0.5 images/s (4.00x)",
    ]


def test_the_plot_shows_the_trainings(tmp_path: Path) -> None:
    rows = [script.Row("first run", 10, 100, 200), script.Row("memory", 1, unit="GB")]
    axes = script.draw(rows).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first run"]
    assert {bar.get_width() for bar in axes.patches} == {10, 100, 200}


def test_the_plain_cnn_is_the_notebooks() -> None:
    shapes = [
        sorted(tuple(parameter.shape) for parameter in network.parameters())
        for network in (
            script.plain_cnn(),
            build("model", compose("experiment=notebook_cnn")).network,
        )
    ]
    assert shapes[0] == shapes[1]
