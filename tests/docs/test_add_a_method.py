"""The page that says what a new closed form costs is followed to the letter."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from runpy import run_path

from processes import alone

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'```python title="([^"]+)"\n(.*?)```', re.DOTALL)
HEAL = ("heal", "ckpt", "out", "--heal_by", "rescale", "--layers", 2, "--data", "book.txt")
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
from conftest import save_byte_llama
save_byte_llama(Path("ckpt"))
Path("book.txt").write_text(TEXT)
Path("other.txt").write_text("Call me Ishmael. Some years ago, never mind how long. " * 8)
from short_gpt.jobs import compare_checkpoint, heal, shrink
files = {{"data": "book.txt", "eval_data": "other.txt"}}
how = {{"size": 16, "eval_windows": 2, "device": "cpu", **files}}
rescale = {{"heal_by": "rescale", "layers": [2], **how}}
for name, value in (("ridge", 0.3), ("recipe", "small")):  # no fields of its settings
    with pytest.raises(ValueError, match=f"`{{name}}` is for `heal_by` "):
        heal("ckpt", "out", **{{**rescale, name: value}})
run(*{heal!r})
half = heal("ckpt", "half", **rescale, step_size=0.5).evidence.how
import json
whole = json.loads(Path("out/pruning.json").read_text())["healing"][0]
assert abs(2 * (half["factors"][1] - 1) - (whole["factors"]["1"] - 1)) < 1e-6
import random
Path("long.txt").write_text("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=2000)))
chain = {{**rescale, "heal_by": "rescale,lora", "data": "long.txt"}}
chain["recipe"] = "steps=1,batch_size=1,rank=2"
steps = heal("ckpt", "chain", **chain).evidence.steps  # of 125 windows
assert steps[0]["windows"] == 64
compared = {{"method": "bi", "n": 1, "heal_by": "raw,rescale", "max_windows": 4}}
rows = compare_checkpoint("ckpt", **compared, **how).rows
assert [row.healing for row in rows[1:]] == ["raw", "rescale"]
from conftest import random_windows
from short_gpt import choose_healed, open_model
short, windows = open_model("ckpt", device="cpu"), random_windows(16, 16)
assert choose_healed(short, windows, 1, heal_by="rescale", progress=False).kld > 0
with pytest.raises(ValueError, match="heal_by = 'lora': expected one of .*rescale"):
    choose_healed(short, windows, 1, heal_by="lora", progress=False)
Path("questions.jsonl").write_text('{{"prompt": "Say a", "right": "a"}}')
more = {{"n": 1, "method": "auto", "max_windows": 4, "prompts": "questions.jsonl"}}
done = shrink("ckpt", "small", heal_by="rescale", **more, **{{**how, "data": "long.txt"}})
assert [step["method"] for step in done.healing] == ["rescale"] and done.choice.fitted == 2
with pytest.raises(ValueError, match="heal_by. = 'lora': expected one of .*rescale"):
    shrink("ckpt", "small", heal_by="lora", n=1, **how)
"""
