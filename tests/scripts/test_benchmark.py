from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import benchmark as script
import pytest

ROWS = ("head_step", "evaluate")


@pytest.mark.slow
def test_the_short_form_fills_its_rows(tmp_path: Path) -> None:
    """It gates no figure: it shows, of the rows that take least, that the benchmark works."""
    out = tmp_path / "benchmark.json"
    command = [sys.executable, script.__file__, *ROWS, "--short", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["short"]
    assert {"cpu", "cores", "instruction sets", "torch"} <= set(found["machine"])
    names = [row["name"] for row in found["rows"]]
    for part in ("head", "evaluate"):
        assert any(part in name for name in names), part
    assert all(row["ratio"] > 0 for row in found["rows"] if row["plain"])


def test_rows_that_do_not_exist(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(["speed"])
    assert ended.value.code == 2
    assert "use cnn_step | trunk" in capsys.readouterr().err


def test_both_networks_of_the_benchmark_are_the_same() -> None:
    from benchmark_plain import plain_cnn
    from benchmark_work import notebook_cnn

    shapes = [
        sorted(tuple(parameter.shape) for parameter in network.parameters())
        for network in (plain_cnn(), notebook_cnn())
    ]
    assert shapes[0] == shapes[1]
