"""The page that says what a new closed form costs is followed to the letter."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from runpy import run_path

from processes import alone

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'```python title="([^"]+)"\n(.*?)```', re.DOTALL)
HEAL = ("heal", "ckpt", "out", "--method", "rescale", "--layers", 2, "--data", "book.txt")
HEAL += ("--eval_data", "other.txt", "--size", 16, "--eval_windows", 2, "--device", "cpu")


def test_a_closed_form_costs_three_files(tmp_path, monkeypatch):
    for package in ("short_gpt", "llama", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    page = (ROOT / "docs" / "add-a-method.md").read_text()
    blocks = dict(BLOCK.findall(page))
    registry = "short_gpt/healing/job.py"
    assert len(blocks) == 3 and registry in blocks
    for name, text in blocks.items():
        if name != registry:
            assert not (tmp_path / name).exists()
            (tmp_path / name).write_text(text)
    imported, line = blocks[registry].strip().split("\n\n")
    source = (tmp_path / registry).read_text()
    former = line.rsplit("\n", 1)[0]  # without the new line
    assert source.count(former) == 1
    first = "\nfrom short_gpt.healing"
    source = source.replace(former, line).replace(first, f"\n{imported}{first}", 1)
    (tmp_path / registry).write_text(source)
    test = next(name for name in blocks if name.startswith("tests/"))
    run = tmp_path / "run.py"
    run.write_text(STEPS.format(root=str(tmp_path), test=test, heal=HEAL))
    for folder in (tmp_path / "tests", tmp_path):
        monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    done = alone(tmp_path / "printed", run_path, str(run)).end()
    assert done.codes == [0], done.out + done.err
    assert '"method": "rescale"' in (tmp_path / "out" / "pruning.json").read_text()


STEPS = """import pytest
options = ["-q", "-n", "0", "-p", "no:cacheprovider"]
options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported already
assert pytest.main([*options, {test!r}]) == 0
import short_gpt
assert short_gpt.__file__.startswith({root!r})
from pathlib import Path
from commands import TEXT, run
from conftest import BYTE_VOCAB, make_transformer, save_checkpoint, write_byte_tokenizer
save_checkpoint(Path("ckpt"), make_transformer(vocab_size=BYTE_VOCAB))
write_byte_tokenizer(Path("ckpt"))
Path("book.txt").write_text(TEXT)
Path("other.txt").write_text("Call me Ishmael. Some years ago, never mind how long. " * 8)
from short_gpt.jobs import heal
for name, value in (("ridge", 0.3), ("parts", "mlp")):
    with pytest.raises(ValueError, match=f"`{{name}}` is for `method` refit"):
        heal("ckpt", "out", "rescale", layers=[2], data="book.txt", **{{name: value}})
run(*{heal!r})
how = {{"size": 16, "eval_windows": 2, "eval_data": "other.txt", "device": "cpu", "aim": 0.5}}
half = heal("ckpt", "half", "rescale", layers=[2], data="book.txt", **how).evidence.how
import json
whole = json.loads(Path("out/pruning.json").read_text())["healing"][0]
assert abs(2 * (half["factors"][1] - 1) - (whole["factors"]["1"] - 1)) < 1e-6
how |= {{"steps": 1, "batch_size": 1, "rank": 2, "warmup": 0}}
chain = heal("ckpt", "chain", "rescale,lora", layers=[2], data="book.txt", **how).evidence
assert chain.steps[0]["windows"] <= 64
"""
