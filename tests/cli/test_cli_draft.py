"""short-gpt draft from the shell: a model and what was made of it, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import TEXT, fails, run
from conftest import BYTE_VOCAB, make_transformer, save_checkpoint, write_byte_tokenizer
from gguf_files import write_gguf

from short_gpt.jobs import Drafting, draft

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
FEW = ("--size", 16, "--max_windows", 3, "--tokens", 12)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    model = make_transformer(vocab_size=BYTE_VOCAB)
    write_byte_tokenizer(save_checkpoint(tmp_path / "meta", model))
    (tmp_path / "book.txt").write_text(TEXT)
    (tmp_path / "prompts.txt").write_text("It was\n\nthe best of times\nit was the worst\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_more_is_written_than_a_model_takes(here, capsys):
    """Meta's format makes room for what is asked for, before it is known whether it fits."""
    both = ("draft", "meta", "meta", "--data", "book.txt")
    line = fails(capsys, *both, "--tokens", 10**9)
    assert "--size 128 and --tokens 1000000000 are more than meta takes, 131072: give fewer" in line
    Path("meta/conversion.json").write_text('{"max_position_embeddings": 64}')
    line = fails(capsys, *both, "--size", 16, "--tokens", 49)
    assert "are more than meta takes, 64" in line
    run(*both, "--size", 16, "--tokens", 48)


def test_a_model_and_its_other_formats_agree_and_a_cut_one_less(here, capsys):
    run("convert", "meta", "hf", "--to", "hf")
    run("convert", "meta", "model.gguf")
    run("prune", "meta", "cut.gguf", "--layers", "1,2,3", "--to", "gguf")
    capsys.readouterr()
    for name in ("meta", "hf", "model.gguf"):
        run("draft", "meta", name, "--data", "book.txt", *FEW)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == [
            "draft",
            "accepted",
            "±",
            "(95%)",
            "drafted",
            "tokens",
            "a",
            "pass",
        ]
        assert [line.split()[:2] for line in lines[1:9]] == [
            [str(k), "100.0%"] for k in range(1, 9)
        ]
        assert lines[10:] == [
            "36 tokens of the whole model's greedy text",
            "±: over 3 prompts of 1 text: what other texts would give is not covered",
        ]
    run("draft", "meta", "cut.gguf", "--data", "book.txt", *FEW, "--out", "d.json")
    record = json.loads(Path("d.json").read_text())
    assert record["command"] == "draft" and record["arguments"]["tokens"] == 12
    shares = [row["share"] for row in record["lengths"]]
    assert record["prompts"] == 3 and len(shares) == 8 and max(shares) < 1
    assert f"{shares[3]:>8.1%}" in capsys.readouterr().out
    found = draft("meta", "cut.gguf", "book.txt", drafting=Drafting(16, 3, tokens=12))
    assert [row.share for row in found.lengths] == shares


def test_prompts_of_a_file_are_read_whole_and_alone(here, capsys):
    run("draft", "meta", "meta", "--prompts", "prompts.txt", "--tokens", 5)
    out = capsys.readouterr().out
    assert "13 tokens of the whole" in out and "±: over 3 prompts of 3 texts" in out
    Path("one.jsonl").write_text(json.dumps({"ask": "It was\nso"}))
    run("draft", "meta", "meta", "--prompts", "one.jsonl", "--column", "ask", "--tokens", 5)
    out = capsys.readouterr().out
    assert "±: no interval: one prompt tells nothing of others" in out
    assert [line.split()[2] for line in out.splitlines()[1:9]] == ["-"] * 8 and "nan" not in out


def test_another_tokenizer_is_refused_by_name(here, capsys):
    write_gguf(here / "other.gguf", make_transformer(vocab_size=BYTE_VOCAB))  # "ab" is one token
    line = fails(capsys, "draft", "meta", "other.gguf", "--data", "book.txt", *FEW)
    assert "other.gguf cannot draft for meta: expected the same tokenizer" in line
    line = fails(capsys, "draft", "meta", "meta", "--prompts", "none.txt")
    assert "'none.txt' does not exist" in line
