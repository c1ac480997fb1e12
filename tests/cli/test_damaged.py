"""A damaged file costs one line that names the model, whatever reads it; nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import DATA, TEXT, fails
from conftest import make_transformer, save_byte_llama, save_checkpoint
from tokenizer_files import sentencepiece_model

from llama.formats.hf import meta_to_hf

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
INDEX = "model.safetensors.index.json"
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "bytes": lambda whole: bytes(range(256)) * 4,
    "list": lambda whole: b"[1, 2]",
}
RANK = ("rank", "model", *DATA, "--max_windows", 2)
COMMANDS = [RANK, (*RANK, "--stream"), ("prune", "model", "out", "--layers", 1)]
COMMANDS += [("convert", "model", "out"), ("generate", "model", "a", "--max_new_tokens", 2)]
HF_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json"]
META_FILES = ["params.json", "tokenizer.json", "tokenizer_config.json", "consolidated.00.pth"]
CASES = [("hf", name) for name in HF_FILES] + [("meta", name) for name in META_FILES]
CASES += [("parts", INDEX), ("parts", "model-00001-of-00002.safetensors")]
CASES += [("pieces", "tokenizer.model"), ("pieces-hf", "tokenizer.model")]
# A part of a model that a command does not read, or copies without a look, as documented.
NOT_READ = {
    ("tokenizer.json", "prune"),
    ("tokenizer_config.json", "prune"),
    ("tokenizer.model", "prune"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, one_rank) -> Path:
    """A random Llama in both formats, in two files, and with SentencePiece's tokenizer."""
    path = tmp_path_factory.mktemp("models")
    save_byte_llama(path / "meta")
    meta_to_hf(path / "meta", path / "hf")
    size = (path / "hf/model.safetensors").stat().st_size
    meta_to_hf(path / "meta", path / "parts", max_shard_bytes=size * 6 // 10)
    save_checkpoint(path / "pieces", make_transformer(vocab_size=320))
    sentencepiece_model(path / "pieces/tokenizer.model")
    meta_to_hf(path / "pieces", path / "pieces-hf")
    return path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("model", "name"), CASES, ids=lambda part: part)
def test_a_damaged_file_is_named(models, tmp_path, monkeypatch, capsys, model, name, damage):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / model, "model")
    Path("book.txt").write_text(TEXT)
    path = Path("model", name)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = sorted(Path().rglob("*"))
    for command in COMMANDS:
        if (name, command[0]) in NOT_READ or (name, command[-1]) in NOT_READ:
            continue
        line = fails(capsys, *command)
        assert "model" in line, (command, line)
        assert sorted(Path().rglob("*")) == before
