"""Weights and configs that a model may come with, through the commands: read, or one line."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run
from conftest import BYTE_VOCAB, make_transformer, save_byte_llama
from safetensors.torch import load_file, save_file

from llama.checkpoint.pth import Shard
from llama.formats.hf import meta_to_hf
from short_gpt import convert, open_model

CUT = ("--layers", 1)
HEAL = ("--data", "book.txt", "--eval_data", "held.txt", "--size", 16, "--max_windows", 8)
WEIGHT = "layers.2.feed_forward.w2.weight"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("book.txt", "held.txt")):
        Path(name).write_text("".join(random.Random(seed).choices("etaoin shr", k=600)))
    model = make_transformer(vocab_size=BYTE_VOCAB, n_layers=4)
    save_byte_llama(Path("ckpt"), model)
    return tmp_path


def told(capsys, *argv: object) -> str:
    """Runs a command that must exit with 1 and, below its bars, one line; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and line.startswith("short-gpt: ")
    return line


def stored(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Stores one weight of the checkpoint otherwise; returns it."""
    weights = torch.load("ckpt/consolidated.00.pth")
    weights[WEIGHT] = change(weights[WEIGHT])
    torch.save(weights, "ckpt/consolidated.00.pth")
    return weights[WEIGHT]


@pytest.mark.parametrize(
    "change",
    [lambda w: w[:1].expand(w.shape), lambda w: w.T.contiguous().T],
    ids=["a row for all", "transposed"],
)
def test_a_tensor_that_is_no_block_of_the_file_is_read_and_written(here, capsys, change):
    weight = stored(change)
    read = Shard(Path("ckpt/consolidated.00.pth")).read(WEIGHT)
    assert torch.equal(read, weight) and read.is_contiguous()
    windows = [[*b"hello world"]]
    found = []
    for stream in (False, True):
        short = open_model("ckpt", max_seq_len=16, stream=stream, device="cpu")
        short.measure(windows, progress=False)
        found.append(short.importances)
    assert torch.allclose(*found, rtol=1e-5)
    for number, stream in enumerate(((), ("--stream",))):
        run("heal", "ckpt", f"healed{number}", *CUT, *HEAL, *stream)
        assert Shard(Path(f"healed{number}/consolidated.00.pth")).infos


@pytest.mark.parametrize(
    ("model", "value"), [("ckpt", float("-inf")), ("hf", float("nan")), ("m.gguf", float("nan"))]
)
def test_a_weight_that_the_logits_do_not_show_is_named(here, capsys, model, value):
    """A row of the embedding that no token of the proof reads."""
    meta_to_hf("ckpt", "hf")
    weights = load_file("hf/model.safetensors")
    weights["model.embed_tokens.weight"][-1, 0] = value
    save_file(weights, "hf/model.safetensors", {"format": "pt"})
    if model == "m.gguf":
        convert("hf", model, type="f32")
    if model == "ckpt":
        convert("hf", "broken", to="meta", verify=False)
        model = "broken"
    own = {"hf": "model.embed_tokens", "broken": "tok_embeddings"}.get(model, "embed_tokens")
    to = "meta" if model == "hf" else "hf"
    out = "out.gguf" if model == "m.gguf" else "out"
    prune = ("prune", model, out, *CUT, "--verify", "yes")
    for command in (prune, ("convert", model, "out", "--to", to)):
        line = told(capsys, *command)
        assert "has NaN or infinite weights, " in line and f"{own}.weight" in line
        assert "or skip verification (--verify no)" in line and not [*here.glob("out*")]
    run(*prune[:-1], "no")
    assert "verified: the logits" not in "".join(capsys.readouterr())
    before = sorted(here.iterdir())
    for command in (
        ("rank", model, "--data", "book.txt", "--size", 16),
        ("heal", model, "healed", *CUT, *HEAL),
        ("shrink", model, "shrunk", *HEAL),
    ):
        line = told(capsys, *command)
        assert re.search(r"the model has NaN or .* weights, .*embed\w*\.weight; fetch", line)
        assert sorted(here.iterdir()) == before
    run("evaluate", model, "--data", "book.txt", "--size", 16)  # whose tokens are others


@pytest.mark.parametrize("layers", [1, 2])
def test_a_damaged_layer_may_be_cut(here, capsys, layers):
    stored(lambda weight: weight.fill_(float("nan")))
    if layers == 2:
        run("prune", "ckpt", "out", "--layers", 2, "--verify")
        assert "verified: " in "".join(capsys.readouterr())
    else:
        assert "layer 2 in " in told(capsys, "prune", "ckpt", "out", "--layers", 1, "--verify")


@pytest.mark.parametrize("model", ["ckpt", "hf"])
@pytest.mark.parametrize("temperature", [0, 0.6])
def test_no_token_is_chosen_of_logits_that_are_no_numbers(here, capsys, model, temperature):
    stored(lambda weight: torch.full_like(weight, float("nan")))
    convert("ckpt", "hf", verify=False)
    line = told(capsys, "generate", model, "a text", "--temperature", temperature)
    assert "gives NaN or infinite logits: a weight is damaged" in line
