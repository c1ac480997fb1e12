"""The notebook runs from top to bottom; here on few windows of the real small model."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FEWER = {
    "short_llama.ipynb": {
        "max_windows = 24 ": "max_windows = 3 ",
        "eval_windows = 8 ": "eval_windows = 1 ",
    },
    "short_hf.ipynb": {
        "max_windows = 24 ": "max_windows = 3 ",
        "eval_windows = 8 ": "eval_windows = 1 ",
    },
}


@pytest.mark.real
@pytest.mark.parametrize("name", FEWER)
def test_the_notebook_runs(name, tmp_path):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    parameters = next(c for c in notebook.cells if "n_prune_layers = 8" in c.source)
    for old, new in FEWER[name].items():
        assert old in parameters.source
        parameters.source = parameters.source.replace(old, new)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}})
    client.execute()
    assert (tmp_path / name.replace(".ipynb", "_pruned") / "pruning.json").is_file()
    printed = "".join(o.text for c in notebook.cells for o in c.get("outputs", []) if "text" in o)
    assert "the same completion: True" in printed


@pytest.mark.parametrize("name", FEWER)
def test_the_outputs_are_kept(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    outputs = [o for c in code for o in c.outputs]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert all(o.output_type != "error" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
