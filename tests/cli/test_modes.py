"""Whatever a command writes has the mode that the umask leaves, whoever wrote the bytes."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase

import pytest
from commands import DATA, run
from conftest import BYTE_VOCAB, make_transformer, save_byte_llama
from gguf_families import make, write_model

from short_gpt.healing import job
from short_gpt.healing.refit_state import RefitState
from short_gpt.runtime.state import StateFile

BOOK, HELD = ("".join(random.Random(seed).choices(ascii_lowercase, k=800)) for seed in (0, 1))
HEAL = ("--data", "book.txt", "--eval_data", "held.txt", "--size", 32, "--max_windows", 4)
TRAIN = ("--recipe", "paper,steps=2,batch_size=1,eval_every=1,rank=2")


@pytest.fixture
def umask() -> Iterator[int]:
    """Not the usual one, which a mode that is written down somewhere would equal."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_files_have_the_mode_that_the_umask_leaves(tmp_path, monkeypatch, umask):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(BOOK)
    Path("held.txt").write_text(HELD)
    save_byte_llama(Path("ckpt"), make_transformer(vocab_size=BYTE_VOCAB, n_layers=5))
    write_model(Path("qwen.gguf"), "qwen2", make("qwen2", num_hidden_layers=3))
    for kind in (StateFile, RefitState):  # so that what an interrupted run leaves is there
        monkeypatch.setattr(kind, "clear", lambda self: None)
    monkeypatch.setattr(job, "clear", lambda _: None)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    run("convert", "ckpt", "hf")
    run("convert", "ckpt", "model.gguf")
    run("convert", "model.gguf", "meta")
    run("convert", "qwen.gguf", "qwen")
    run("rank", "hf", *DATA, "--n", 1, "--json", "r.json", "--plots", "pictures")
    run("prune", "ckpt", "cut", "--layers", 1)
    run("prune", "hf", "mixed", "--scores", "r.json", "--n", 1)
    run("prune", "model.gguf", "cut.gguf", "--layers", 1)
    run("heal", "hf", "healed", "--layers", 1, *HEAL, "--stream", "--json", "heal.json")
    run("heal", "hf", "trained", "--layers", 1, *HEAL, "--heal_by", "patch,distill", *TRAIN)
    written = [p for p in Path().rglob("*") if p.is_file() and ".writing-" not in str(p)]
    modes = {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in written}
    assert {mode: path for path, mode in modes.items()}.keys() == {oct(0o666 & ~umask)}, modes
    expected = {"r.json.state", "model.safetensors", "adapter_model.safetensors", "values.1"}
    expected |= {"predictions.bin", "block_influence.png"}
    assert expected <= {path.name for path in written}
