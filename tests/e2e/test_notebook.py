"""The notebook of docs/: its cells as one program with fewer epochs; in the slow suite as people run it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from forked import Forks

NOTEBOOK = Path(__file__).parents[2] / "docs" / "examples" / "digits.ipynb"


def cells(notebook: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def texts(notebook: dict) -> str:
    """What the cells printed."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout")


def test_what_is_committed_is_small_and_names_no_folder() -> None:
    text = NOTEBOOK.read_text()
    notebook = json.loads(text)
    assert len(text) < 100_000
    assert not re.search(r"/(home|root|work|tmp|Users)\b", text)
    assert all(cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert not [o for cell in notebook["cells"] for o in cell.get("outputs", []) if o["output_type"] == "error"]
    assert re.search(r"selected half +[\d,]+ +\d\d\.\d+%", texts(notebook))


def test_the_cells_run_as_they_stand(forks: Forks, tmp_path: Path, tiny_model: str) -> None:
    program = "\n".join(cells(json.loads(NOTEBOOK.read_text())))
    for old, new in (("EPOCHS, BATCH = 8,", "EPOCHS, BATCH = 1,"), ("timm:tf_efficientnet_lite0?size=32", tiny_model)):
        assert program.count(old) == 1
        program = program.replace(old, new)
    (tmp_path / "cells.py").write_text(program)
    process = forks.start([str(tmp_path / "cells.py")], cwd=tmp_path)
    out, errors = process.communicate(240)
    assert process.returncode == 0, out + errors
    assert re.search(r"selected half +[\d,]+ +\d+\.\d+%", out)
    assert re.search(r"(\d+) of \1 steps", out)


@pytest.mark.faults
def test_the_notebook_runs_in_a_kernel(tmp_path: Path, monkeypatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert texts(notebook).splitlines()[:4] == texts(json.loads(NOTEBOOK.read_text())).splitlines()[:4]
