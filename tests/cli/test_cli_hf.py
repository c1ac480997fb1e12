"""The commands on Hugging Face directories and GGUF files, as a user types them."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from commands import DATA, TEXT, fails, run
from transformers import AutoModelForCausalLM

from llama.checkpoint.meta import write_model
from llama.formats.safetensors import tensor_bytes
from short_gpt.models.hf import HFDecoder
from short_gpt.wrappers.opening import open_model

LAYERS = 5
CUT = ("--layers", "1,3")
TOKENS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def made(llama_folders) -> Path:
    """A random Llama in all formats, and a text."""
    (llama_folders / "book.txt").write_text(TEXT)
    return llama_folders


def spoilt(write):
    """A writer of weights that turns every tensor upside down."""
    return lambda folder, args, infos, read, **more: write(
        folder, args, infos, lambda name: read(name).flip(0), **more
    )


def record(name: str) -> dict:
    return json.loads(Path(name).read_text())


def logits(directory: str) -> torch.Tensor:
    model, problems = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(problems.values()), problems
    return HFDecoder(model.eval()).logits(TOKENS)


def test_prune_by_scores_verified(here, capsys):
    run("rank", "hf", *DATA, "--max_windows", 4, "--json", "r.json")
    scores = ("--scores", "r.json", "--n", 2)
    run("prune", "hf", "small", *scores)
    out = capsys.readouterr().out
    found = record("small/pruning.json")
    assert f"removed layers {found['removed_layers']}" in out
    assert "verified: the logits are those of the source without these layers, bit for bit" in out
    assert "Block Influence" in found["method"] and found["source"] == "hf"
    assert found["scored_by"]["data"] == "book.txt" and len(found["block_influence"]) == LAYERS
    card = Path("small/README.md").read_text()
    assert f"    {found['removed_layers']}\n" in card
    assert f"Scores: {found['method']}, on 128 tokens of book.txt in 4 windows." in card
    model = AutoModelForCausalLM.from_pretrained("hf").eval()
    decoder = HFDecoder(model)
    decoder.keep_layers(found["kept_layers"])
    assert torch.equal(logits("small"), decoder.logits(TOKENS))

    run("prune", "hf", "block", *scores, "--method", "angular", "--verify", "no")
    block = record("block/pruning.json")["removed_layers"]
    assert block[1] == block[0] + 1
    assert "verified" not in capsys.readouterr().out


def test_prune_proves_weights_without_a_tokenizer_too(here, capsys):
    for path in Path("hf").glob("tokenizer*"):
        path.unlink()
    run("prune", "hf", "small", *CUT)
    assert "verified: the logits are those of the source" in capsys.readouterr().out
    assert "hf came without a tokenizer" in fails(capsys, "rank", "hf", *DATA)


CONVERSIONS = [("hf",), ("meta",), ("model.gguf",), ("meta", "--shards", "2", "--verify")]


@pytest.mark.parametrize("how", CONVERSIONS, ids=" ".join)
def test_a_conversion_that_is_another_model_leaves_the_earlier_one(here, capsys, monkeypatch, how):
    source, *flags = how
    run("convert", source, "kept", *flags)
    before = {p: p.read_bytes() for p in Path("kept").iterdir()}
    monkeypatch.setattr("llama.formats.gguf.write_model", spoilt(write_model))
    monkeypatch.setattr("llama.formats.hf.tensor_bytes", lambda t: tensor_bytes(t.flip(0)))
    with pytest.raises(RuntimeError, match=f"kept is not {source}: logits differ by up to"):
        run("convert", source, "kept", *flags, "--overwrite")
    assert {p: p.read_bytes() for p in Path("kept").iterdir()} == before
    assert not [p.name for p in here.iterdir() if p.name.startswith(".")]
    capsys.readouterr()
    run("convert", source, "kept", *flags[:2], "--overwrite", "--verify", "no")
    assert capsys.readouterr().out == "written: kept\n"


@pytest.mark.parametrize("source", ["hf", "model.gguf"])
def test_generate(here, capsys, source):
    run("generate", source, "It was", "--temperature", 0, "--max_new_tokens", 5)
    out = capsys.readouterr().out
    run("generate", "meta", "It was", "--temperature", 0, "--max_new_tokens", 5)
    assert out == capsys.readouterr().out and out.startswith("It was")
    for _ in range(2):
        run("generate", source, "It was", "--seed", 3, "--max_new_tokens", 5)
    first, second = capsys.readouterr().out.split("It was")[1:]
    assert first == second


def test_convert_says_what_was_written_and_proved(here, capsys):
    for source, out in (("hf", "a"), ("a", "b"), ("model.gguf", "c")):
        run("convert", source, out)
    said = capsys.readouterr().out.splitlines()
    proof = "verified: the logits are those of the source"
    assert [line for line in said if line.startswith("written")] == [
        "written: a",
        "written: b",
        "written: c",
    ]
    assert sum(line.startswith(f"{proof}, except for the last digits, and") for line in said) == 3
    run("convert", "hf", "half", "--dtype", "bfloat16")
    assert f"{proof} in bfloat16, except for the last digits" in capsys.readouterr().out
    assert torch.load("half/consolidated.00.pth")["norm.weight"].dtype == torch.bfloat16
    assert "b exists" in fails(capsys, "convert", "a", "b")
    run("convert", "a", "b", "--overwrite")


def test_evaluate_dense_against_pruned(here, capsys, lm_eval, tasks):
    """Perplexity of a folder and a local task, for either format, in one table and one file."""
    Path("texts").mkdir()
    shutil.copy("book.txt", "texts")
    task = tasks / "tiny_choice.yaml"
    options = ("--data", "texts", "--size", 64, "--tasks", task)
    found = {}
    for name in ("hf", "meta"):
        run("prune", name, f"{name}-cut", *CUT, "--verify", "no")
        capsys.readouterr()
        run("evaluate", name, f"{name}-cut", *options, "--json", f"{name}.json")
        out = capsys.readouterr().out
        found[name] = [*record(f"{name}.json")["result"].values()]
        assert f"{name}-cut" in out and "texts perplexity" in out and "tiny_choice acc" in out
    dense, cut = found["hf"]
    assert (dense["layers"], cut["layers"]) == (LAYERS, LAYERS - 2)
    assert dense["texts perplexity"] != cut["texts perplexity"]
    assert 0 <= dense["tiny_choice acc"] <= 1
    names = [
        f"{name} change{end}"
        for name in ("texts nats", "tiny_choice acc")
        for end in ("", "_stderr")
    ]
    assert not {*names} & {*dense} and {*names} <= {*cut}
    change = cut["tiny_choice acc"] - dense["tiny_choice acc"]
    assert cut["tiny_choice acc change"] == pytest.approx(change)
    ratio = math.exp(cut["texts nats change"])
    assert ratio == pytest.approx(cut["texts perplexity"] / dense["texts perplexity"])
    for ours, theirs in zip(found["hf"], found["meta"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, nan_ok=True)
    assert record("hf.json")["arguments"]["tasks"] == str(task)
    short = open_model("hf", max_seq_len=64)
    ids = short.encode(TEXT)
    windows = [ids[i : i + 64] for i in range(0, len(ids) - 63, 64)]
    value = short.perplexity(windows, progress=False).value
    assert dense["texts perplexity"] == pytest.approx(value, rel=1e-6)


READ = "--data book.txt --size 32 --stride 16"
MISTAKES = [
    ("prune hf x.gguf --scores no.json -n 1", "x.gguf is of another format than hf: convert hf"),
    ("prune model.gguf x --layers 1", "x is of another format than model.gguf: convert model.gg"),
    ("prune model.gguf model.gguf --layers 1 --overwrite", "model.gguf exists and is"),
    (f"rank strange {READ}", "strange cannot be loaded: The checkpoint you are trying"),
    ("generate hf --samples 1 --out o.jsonl --max_new_tokens 5000", "takes 2 to 4,096"),
    ("generate meta a --max_new_tokens 200000000", "expected at most 1,048,576"),
    ("generate hf 'It was' --max_new_tokens 9999", "but the model's context is 4,096: shorten"),
    ("generate hf \udcff", "holds '\\udcff' as character 0, half a surrogate pair"),
    ("convert meta x --dtype bfloat16", "is for Meta's format"),
    ("evaluate hf --data none", "nothing to evaluate: give --data or --tasks"),
    ("evaluate hf --data book.txt --source x", "--source is a copy of wiki"),
    ("evaluate hf --data ptb", "ptb needs a local copy: pass --source, such as ptb"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=lambda part: ascii(part[:60]))
def test_mistakes_cost_one_line(here, capsys, lm_eval, line, message):
    Path("empty").mkdir()
    shutil.copytree("hf", "strange")
    Path("strange/config.json").write_text('{"model_type": "nothing"}')
    before = sorted(p.name for p in Path().iterdir())
    assert message in fails(capsys, *shlex.split(line))
    assert sorted(p.name for p in Path().iterdir()) == before
