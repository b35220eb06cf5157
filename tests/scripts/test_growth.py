from __future__ import annotations

from pathlib import Path

import growth as script
import pytest


@pytest.mark.slow
def test_short_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(script, "CASES", script.CASES[2:3])
    script.main(["--sizes", "40", "--work", str(tmp_path)])
    table, audit = capsys.readouterr().out.split("\n\n")
    row = table.splitlines()[-1].split(" | ")
    assert row[:3] == ["| CNN, decoded anew", "40", "1"]
    assert all(float(figure.strip(" |")) > 0 for figure in row[3:])
    assert audit.startswith("audit of set40: ")
    assert len(list((tmp_path / "set40" / "train").rglob("*.webp"))) == 40
