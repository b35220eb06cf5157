"""Tests of docs/tour.ipynb, which is docs/tour.py with its outputs."""

from pathlib import Path

import jupytext
import nbclient
import pytest
from nbformat import NotebookNode

from horsehuman.runtime import SPIN_COUNT

SCRIPT = Path(__file__).parents[1] / "docs" / "tour.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: NotebookNode) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def test_the_notebook_is_the_script_with_outputs() -> None:
    notebook, script = jupytext.read(NOTEBOOK), jupytext.read(SCRIPT)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in script.cells]
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert NOTEBOOK.stat().st_size < 1.5e6


def test_cells_are_short() -> None:
    assert all(cell.source.count("\n") < 15 for cell in code_cells(jupytext.read(SCRIPT)))


@pytest.mark.slow
def test_the_tour_shows_what_it_says(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", SPIN_COUNT)  # other tests run beside it
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tour")))
    notebook = jupytext.read(SCRIPT)
    nbclient.NotebookClient(notebook, timeout=300).execute()
    text = printed(notebook)
    validation = [float(line[-5:-1]) for line in text.splitlines() if line.startswith("training ")]
    assert validation[3] < 55
    assert validation[7] > 70
    assert "inception  plot     neither" in text
    assert "inception  both     both" in text
    answers = [line for line in text.splitlines() if line.startswith("admiral.png")]
    assert len(answers) == 2
    assert len(set(answers)) == 1
