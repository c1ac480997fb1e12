"""GGUF files from the shell: written from every format, and to every format."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from commands import fails, run
from gguf_families import make, write_model
from tokenizer_files import ODD, meta

from llama.checkpoint import pth
from llama.formats import gguf_read, gguf_write
from llama.formats.gguf_read import ARRAY, STRING, GGUFParts
from llama.formats.gguf_write import UINT32, copied, record, write_again
from llama.formats.tokenizers import vocabulary
from short_gpt import ShortHFModel, open_model
from short_gpt.checkpoints import Provenance
from short_gpt.checkpoints.provenance import source_card

CUT = ("--layers", "1,3")
UINT64 = 10  # GGUF's number of the type
TOKENS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def made(llama_folders) -> Path:
    """A random Llama in all formats, and a Qwen as GGUF."""
    write_model(llama_folders / "qwen.gguf", "qwen2", make("qwen2", num_hidden_layers=3))
    return llama_folders


def same_tensors(one: str, other: str) -> bool:
    ours, theirs = GGUFParts(Path(one)), GGUFParts(Path(other))
    return ours.tensors.keys() == theirs.tensors.keys() and all(
        torch.equal(ours.read(name), theirs.read(name)) for name in ours.tensors
    )


def logits(source: str) -> torch.Tensor:
    return ShortHFModel(source, dtype=torch.float32).decoder.logits(TOKENS)


def test_a_conversion_to_gguf_replaces_only_what_it_would_write(here, capsys):
    run("convert", "meta", "meta.gguf", "--type", "q8_0")
    run("convert", "hf", "hf.gguf")
    assert same_tensors("hf.gguf", "model.gguf")
    assert Path("meta.gguf").stat().st_size < 0.5 * Path("hf.gguf").stat().st_size
    capsys.readouterr()
    assert "meta.gguf exists; choose another" in fails(capsys, "convert", "meta", "meta.gguf")
    run("convert", "meta", "meta.gguf", "--overwrite")
    assert same_tensors("meta.gguf", "hf.gguf")
    capsys.readouterr()
    line = fails(capsys, "convert", "meta", "model.gguf", "--overwrite")
    assert "model.gguf exists and is not what this would write there" in line


def test_any_gguf_file_that_transformers_reads_becomes_hugging_faces(here, capsys):
    run("convert", "qwen.gguf", "qwen")
    assert torch.equal(logits("qwen"), logits("qwen.gguf"))
    assert json.loads(Path("qwen/conversion.json").read_text())["source"] == "qwen.gguf"
    run("convert", "qwen.gguf", "qwen", "--overwrite", "--dtype", "bfloat16")
    assert json.loads(Path("qwen/config.json").read_text())["dtype"] == "bfloat16"
    run("convert", "model.gguf", "llama-hf", "--to", "hf")
    assert torch.equal(logits("llama-hf"), logits("model.gguf"))


def test_smollms_cut_at_digits_stays_in_every_format(tmp_path, monkeypatch):
    """Transformers drops it for a GGUF file: "\\n\\n1" would lose the token of both."""
    monkeypatch.chdir(tmp_path)
    meta(tmp_path / "meta", "smollm")
    run("convert", "meta", "m.gguf")
    run("convert", "m.gguf", "hf", "--to", "hf")
    # of more words than the model, as transformers adds a token for what it knows none of
    assert b"smollm" in vocabulary(Path("hf/tokenizer.json"), 300)["tokenizer.ggml.pre"].raw
    run("convert", "m.gguf", "again")
    run("convert", "again", "o.gguf")
    expected = [open_model("meta").encode(text) for text in ODD[:-1]]  # the last has special ones
    for name in ("m.gguf", "hf", "again", "o.gguf"):
        short = open_model(name)
        assert [short.encode(text) for text in ODD[:-1]] == expected, name
        if name.endswith(".gguf"):
            assert GGUFParts(Path(name)).fields["tokenizer.ggml.pre"] == "smollm"


def test_the_history_goes_along(here):
    run("prune", "hf", "cut", *CUT)
    run("convert", "cut", "cut.gguf")
    assert Provenance.of_checkpoint("cut.gguf").removed_layers == [1, 3]
    run("convert", "cut.gguf", "again", "--to", "hf")
    assert Provenance.of_checkpoint("again").removed_layers == [1, 3]
    assert "without 2 of its 5 layers" in Path("again/README.md").read_text()


def with_keys(path: str, out: str, **values: object) -> None:
    """A copy of a GGUF file with further keys, or others; ``__`` for ``.``."""
    kinds = {int: (UINT64, None), str: (STRING, None), list: (ARRAY, UINT32)}
    parts = GGUFParts(Path(path))
    keys = {name.replace("__", "."): value for name, value in values.items()}
    records = {key: record(key, value, *kinds[type(value)]) for key, value in keys.items()}
    tensors = {name: copied(parts, name) for name in parts.tensors}
    write_again(Path(out), parts, tensors, records=records)


def test_the_card_carries_a_gguf_files_licence_and_base_model(here):
    said = {"license": "other", "license__name": "gemma", "license__link": "https://a.b/c"}
    said |= {"base_model__count": 1, "base_model__0__repo_url": "https://huggingface.co/them/one"}
    with_keys("qwen.gguf", "m.gguf", **{f"general__{name}": value for name, value in said.items()})
    run("prune", "m.gguf", "cut.gguf", "--layers", "1")
    run("convert", "cut.gguf", "again")
    head = yaml.safe_load(Path("again/README.md").read_text().split("---")[1])
    expected = {"license": "other", "license_name": "gemma", "license_link": "https://a.b/c"}
    assert head == {**head, **expected, "base_model": "them/one"}
    several = {f"general__base_model__{i}__repo_url": f"https://hf.co/them/{i}/" for i in (0, 1)}
    more = {"general__base_model__2__repo_url": "https://example.org/them/2"}
    with_keys("qwen.gguf", "n.gguf", general__base_model__count=4, **several, **more)
    assert source_card("n.gguf") == {"base_model": ["them/0", "them/1"]}
    with_keys("m.gguf", "n.gguf", general__license=7)
    assert "license" not in source_card("n.gguf")


def test_what_is_for_llamas_alone_names_what_works_for_others(here, capsys):
    line = fails(capsys, "convert", "qwen.gguf", "out", "--to", "meta")
    assert "expected 'llama'; in Hugging Face's format: short-gpt" in line
    command = shlex.split(line.rsplit(": ", 1)[1].replace("DIRECTORY", "qwen"))
    assert command[0] == "short-gpt"
    run(*command[1:])
    assert torch.equal(logits("qwen"), logits("qwen.gguf"))
    capsys.readouterr()
    line = fails(capsys, "convert", "qwen", "x.gguf")
    assert "config.json: model_type = 'qwen2': expected 'llama'" in line


def turned(monkeypatch, at: int = 1) -> None:
    """From now on, the last byte of each tensor of Meta's and of each GGUF file is another one."""
    record, header = pth._write_record, gguf_write.read_header

    def in_archive(archive, *arguments):
        record(archive, *arguments)
        archive.fp.seek(-1, 1)
        archive.fp.write(b"\x7f")

    def in_file(path):  # before it is read again
        data = bytearray(path.read_bytes())
        data[-at] ^= 1
        path.write_bytes(data)
        return header(path)

    monkeypatch.setattr(pth, "_write_record", in_archive)
    monkeypatch.setattr(gguf_write, "read_header", in_file)


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "hf", "out.gguf"),
        ("convert", "meta", "out.gguf"),
        ("convert", "hf", "out"),
        ("convert", "meta", "out", "--shards", "2"),
        ("prune", "model.gguf", "out.gguf", *CUT),
        ("prune", "meta", "out", *CUT),
    ],
    ids=" ".join,
)
def test_what_a_disk_holds_otherwise_than_written_is_found(here, capsys, monkeypatch, command):
    turned(monkeypatch, at=40)  # before what may follow the last tensor
    before = {*Path().iterdir()}
    line = fails(capsys, *command)
    assert "read again, holds another" in line and line.endswith("check the disk")
    assert {*Path().iterdir()} == before


def test_a_conversion_to_gguf_says_what_was_proved(here, capsys):
    run("convert", "hf", "a.gguf")
    said = "verified: read again, every tensor is what was written, byte for byte"
    assert said in capsys.readouterr().out
    run("convert", "a.gguf", "b.gguf")
    said = "verified: read again, every tensor that remains is the source's, byte for byte"
    assert said in capsys.readouterr().out
    line = fails(capsys, "convert", "meta", "d.gguf", "--verify", "yes", "--type", "q8_0")
    assert "--type = 'q8_0': expected one that keeps the weights, as --verify is set" in line
    run("convert", "meta", "bf16", "--dtype", "bfloat16", "--shards", 1)
    capsys.readouterr()
    for kind in ("bf16", "f32"):  # which round nothing
        run("convert", "bf16", f"{kind}.gguf", "--verify", "yes", "--type", kind)
        assert "verified: the logits are those of the source" in capsys.readouterr().out
    assert "--type = 'f16': expected one that keeps" in fails(
        capsys, "convert", "bf16", "e.gguf", "--verify", "yes", "--type", "f16"
    )
    run("convert", "meta", "c.gguf", "--verify", "yes", "--type", "f32")
    assert "verified: the logits are those of the source" in capsys.readouterr().out
    run("convert", "hf", "a.gguf", "--overwrite")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["convert", "model.gguf", "x.gguf", "--type", "f16"], "--type f16 is for writing GGUF"),
        (
            ["convert", "hf", "x.gguf", "--type", "q4_k"],
            "--type = 'q4_k': expected one of f32, f16, bf16, q8_0",
        ),
        (["convert", "hf", "x.gguf", "--dtype", "float16"], "GGUF has --type"),
        (["convert", "hf", "x.gguf", "--to", "meta"], "expected the name of a directory for meta"),
        (["convert", "hf", "x", "--to", "hf"], "hf is in the format hf already"),
        (["convert", "hf", "x.gguf", "--shards", 2], "--shards 2 writes Meta's format, not gguf"),
        (["prune", "model.gguf", "x-00001-of-00002.gguf", *CUT], "the name of a single file"),
    ],
)
def test_mistakes_cost_one_line(here, capsys, argv, message):
    before = sorted(p.name for p in Path().iterdir())
    assert message in fails(capsys, *argv)
    assert sorted(p.name for p in Path().iterdir()) == before


def test_a_header_is_parsed_once_a_command(here, monkeypatch):
    parsed = []
    header = gguf_read._header
    monkeypatch.setattr(gguf_read, "_header", lambda path: parsed.append(path.name) or header(path))
    os.utime("qwen.gguf", (1, 1))  # of another second than this command's
    Path("text.txt").write_text("so much " * 99)
    rank = ("--data", "text.txt", "--size", 16, "--max_windows", 2, "--json", "r.json")
    run("rank", "qwen.gguf", *rank)
    assert parsed.count("qwen.gguf") == 1
    run("prune", "qwen.gguf", "out.gguf", "--scores", "r.json", "--n", 1)
    assert parsed.count("qwen.gguf") == 1
