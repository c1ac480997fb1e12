"""What a reader with a GPU runs in one command, on a tiny Llama of the same names and settings."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import fire
import pytest
import torch
from commands import run
from conftest import random_windows, refuses, save_meta

from benchmarks.studies import published
from llama.formats.hf import meta_to_hf
from llama.tokenizer import with_bos
from short_gpt import open_model

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu.sh"
pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def model(tmp_path) -> Path:
    """With what the config of Llama-3.1-8B says beside its shape."""
    scaled = {"rope_theta": 5e5, "use_scaled_rope": True, "dtype": torch.bfloat16}
    save_meta(tmp_path / "meta", n_layers=6, **scaled)
    words = tmp_path / "meta/tokenizer.json"
    words.write_text(with_bos(words.read_text(), "<s>", 0))
    return meta_to_hf(tmp_path / "meta", tmp_path / "model")


def text(seed: int, size: int) -> str:
    return "".join(chr(97 + token) for token in random_windows(1, size, vocab=26, seed=seed)[0])


def test_pieces_are_drawn_from_long_documents_and_lines_are_joined():
    def encode(document: str) -> list[int]:
        return [*map(ord, document)]

    pieces = published.c4_pieces(["short", text(1, 90), text(2, 64), text(3, 65)], encode, 64, 50)
    documents = [encode(text(1, 90)), encode(text(3, 65))]  # one more token than a piece, or more
    assert {len(piece) for piece in pieces} == {64} and len({*map(tuple, pieces)}) > 10
    assert all(any("".join(map(chr, p)) in "".join(map(chr, d)) for d in documents) for p in pieces)
    assert published.ptb_pieces(" a b \nc d\n", encode, 3) == [[97, 32, 98], [10, 10, 99]]


def test_every_step_runs_on_a_tiny_llama_and_is_done_once(
    model, tasks, lm_eval, tmp_path, monkeypatch
):
    """The script's commands, as it calls them, run one by one in this process."""
    out, program, said = tmp_path / "out", tmp_path / "bin/short-gpt", tmp_path / "said"
    python, quoted = program.with_name("python"), f'printf "%q " "$@" >> {said}\necho >> {said}\n'
    for folder in (out, program.parent):
        folder.mkdir()
    program.write_text(f"#!/bin/bash\n{quoted}")
    # the table is made at once, other scripts are written down
    python.write_text(f'#!/bin/bash\n[ "$1" != - ] || exec {sys.executable} "$@"\n{quoted}')
    for path in (program, python):
        path.chmod(0o755)
    for name, seed, size in (("calibration", 1, 2000), ("held_out", 2, 600), ("wiki", 3, 500)):
        (out / f"{name}.txt").write_text(text(seed, size))
    documents = [json.dumps({"text": text(seed, 150)}) for seed in range(3)]
    (tmp_path / "c4.json").write_text("\n".join(documents))
    how = {"N": "2", "SIZE": "64", "WINDOWS": "20", "HELD": "6", "MODEL": str(model)}
    how |= {"TASKS": str(tasks / "tiny_choice.yaml"), "C4": "c4.json"}
    how |= {"WIKITEXT": "out/wiki.txt", "PTB": "out/wiki.txt"}
    how |= {"PATH": f"{program.parent}:{os.environ['PATH']}"}

    def script(path: Path) -> str:
        options = {"env": {**os.environ, **how}, "check": True, "cwd": tmp_path, "text": True}
        return subprocess.run(["bash", path, out], **options, stdout=subprocess.PIPE).stdout

    first = tmp_path / "commands.sh"  # without its table, which needs what the commands write
    first.write_text(SCRIPT.read_text().partition('python - "$MODEL"')[0])
    script(first)
    asked = [shlex.split(line) for line in said.read_text().splitlines()]
    said.unlink()
    each = ["evaluate", "published.py", "published.py"]
    named = ["rank", "prune", "heal", *each * 2, "rank", "heal", *each]
    assert [Path(words[0]).name for words in asked] == named
    monkeypatch.chdir(out)
    monkeypatch.setattr(published, "open_model", partial(open_model, device="cpu"))
    for name, *words in asked:
        if name.endswith("published.py"):
            refuses("0|False", fire.Fire, published.main, words, error=SystemExit)
        else:
            run(name, *words, *([] if name == "prune" else ["--device", "cpu"]))
    printed = script(SCRIPT)
    assert not said.exists()  # every step was there already
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    evaluated = json.loads(Path("wikitext-2-refitted.json").read_text())["result"]["refitted"]
    ptb = json.loads(Path("ptb-refitted.json").read_text())["result"]["refitted"]
    assert rows["refitted"][0] == f"{evaluated['wikitext-2 perplexity']:.2f}"
    assert rows["refitted"][2] == f"{ptb['ptb perplexity']:.2f}"
    assert rows["refitted"][3] == f"{100 * evaluated['tiny_choice acc_norm']:.2f}"
    assert rows["original"][4] == "100.00" and len(rows["automatic"]) == 5
    assert rows["dense"] == ["6.14", "8.88", "10.6", "73.44", "100.00"]
    for name in ("pruned", "refitted", "automatic"):
        assert json.loads(Path(name, "config.json").read_text())["num_hidden_layers"] == 4
