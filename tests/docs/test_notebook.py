"""The notebook runs from the first cell to the last."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples/quickstart.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:  # fewer samples and steps than its own
        for more, fewer in (("inputs(24,", "inputs(4,"), ("inputs(12,", "inputs(3,"), ('"steps": 30', '"steps": 2')):
            cell.source = cell.source.replace(more, fewer)
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    done = client.execute()
    texts = [output.get("text", "") for cell in done.cells for output in cell.get("outputs", [])]
    assert "SceneGenerator with 2 early exits" in "".join(texts)
    assert any("image/png" in output.get("data", {}) for output in done.cells[-2]["outputs"])
