"""A new metric takes the files that docs/add-a-metric.md names: a toy one, added as it says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from conftest import save_byte_llama
from processes import alone

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-metric.md").read_text(encoding="utf-8")
# the toy metric by hand, on states that hooks of its own keep
BY_HAND = """
import short_gpt, torch
from short_gpt import open_model
from short_gpt.jobs import rank
result = rank("ckpt", "book.txt", n=2, method="change", size=32, max_windows=2, stride=256)
short = open_model("ckpt", max_seq_len=32)
text = [open("book.txt").read()]
windows = [list(w) for w in short_gpt.windows(text, short.encode, size=32, stride=256, limit=2)]
states, sums = [], torch.zeros(5).double()
for layer in short.decoder.layers:
    layer.register_forward_hook(lambda m, args, y: states.append((args[0], y)))
with torch.no_grad():
    for window in windows:
        states.clear()
        short.decoder.run(torch.tensor([window]))
        sums += torch.stack([(y - x).norm(dim=-1).sum() for x, y in states]).double()
means = sums / sum(map(len, windows))
assert torch.allclose(result.importance.mean("change"), means, rtol=1e-5)
assert result.layers == means.argsort()[:2].tolist()
"""


def inside(assignment: str) -> str:
    """What stands between the brackets of a page's dictionary or tuple, with a comma."""
    entries = assignment[assignment.index("= ") + 3 :].rstrip()[:-1].rstrip(" ,\n")
    return f"    {entries.strip()},\n"


def added(folder: Path) -> list[str]:
    """Follows the page in a copy of the library; the files that it changed."""
    files = re.findall(r"^\d\. `([^`]+)`", PAGE, flags=re.M)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    equation, row = blocks[:2]
    metrics, methods = folder / files[0], folder / files[1]
    text = metrics.read_text()
    head = "LAYER_METRICS: dict[str, Callable[[TokenProducts], Tensor]] = {\n"
    assert text.count(head) == 1
    function, entry = equation.rsplit("\n\n", 1)
    metrics.write_text(text.replace(head, head + inside(entry)) + f"\n\n{function}\n")
    text = methods.read_text()
    assert text.count("REGISTRY = (\n") == 1
    methods.write_text(text.replace("REGISTRY = (\n", "REGISTRY = (\n" + inside(row)))
    return files


def test_a_toy_metric_that_follows_the_page_ranks_prunes_and_is_kept(tmp_path, monkeypatch):
    for package in ("short_gpt", "llama"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    files = added(tmp_path)
    assert files[2:] == ["tests/selection/test_methods.py"] and len(files) == 3
    save_byte_llama(tmp_path / "ckpt")
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst. " * 9)
    few = ("--data", "book.txt", "--size", "32", "--max_windows", "2", "--device", "cpu")
    rank = ["rank", "ckpt", *few, "--n", "2", "--method", "change", "--json", "s.json"]
    prune = ["prune", "ckpt", "small", "--scores", "s.json", "--n", "2"]
    code = f"{BY_HAND}from short_gpt.cli.app import main\nmain({rank})\nmain({prune})\n"
    code += f"assert short_gpt.__file__.startswith({str(tmp_path)!r})\n"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    done = alone(tmp_path / "printed", exec, code, {}).end()
    assert done.codes == [0], done.err[-2000:]
    assert "smallest change" in done.out
    assert (tmp_path / "small" / "params.json").is_file()
