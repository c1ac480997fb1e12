"""Valid small files, cut or changed: a reader says in one line what is wrong."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from commands import TEXT
from conftest import (
    BYTE_VOCAB,
    make_transformer,
    random_windows,
    refuses,
    save_byte_llama,
    short_llama,
)
from gguf_files import write_gguf

from llama.checkpoint.meta import Checkpoint
from llama.formats.gguf import GGUFFile
from llama.formats.hf import meta_to_hf
from llama.formats.tokenizers import gguf_tokenizer
from llama.generation import load_model
from llama.tokenizer import Tokenizer
from short_gpt import ShortHFModel
from short_gpt.checkpoints.gguf import Stack
from short_gpt.jobs import SavedScores
from short_gpt.models.loading import load_tokenizer
from short_gpt.runtime.errors import USER_ERRORS
from short_gpt.runtime.state import StateFile, write_record
from short_gpt.scoring.run import RunState
from short_gpt.wrappers.streamed_transformer import HFSource

WINDOWS = random_windows(6, 8, vocab=BYTE_VOCAB)
FEW = {"vocab_size": BYTE_VOCAB, "n_layers": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_rank) -> Path:
    """Small models in every format, and tokenizers of every kind."""
    path = tmp_path_factory.mktemp("made")
    model = make_transformer(vocab_size=BYTE_VOCAB, n_layers=2)
    save_byte_llama(path / "meta", model)
    meta_to_hf(path / "meta", path / "hf")
    meta_to_hf(path / "meta", path / "parts", max_shard_bytes=40_000)
    write_gguf(path / "model.gguf", model)
    (path / "book.txt").write_text(TEXT.replace(". ", ".\n"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "book.txt"),
        model_prefix=str(path / "pieces"),
        vocab_size=40,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    ranks = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (path / "ranks.model").write_text("\n".join(ranks))
    rank_state(path)
    sleb_state(path)
    short = short_llama(**FEW)
    short.measure(WINDOWS, progress=False)
    arguments, sums = {"method": "bi", "seed": 0}, short.importance.to_dict()
    write_record(path / "scores.json", {"arguments": arguments, "importance": sums})
    return path


def read_meta(folder: Path) -> None:
    checkpoint = Checkpoint(folder / "meta", max_seq_len=8, max_batch_size=1)
    load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)


def read_streamed(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        source = HFSource(folder / name, max_seq_len=8)
        for key in source.infos:
            source.read(key)

    return read


def read_gguf(folder: Path) -> None:
    file = GGUFFile(folder / "model.gguf")
    file.args()
    gguf_tokenizer(file)
    for name in file.tensors:
        file.read(name)


def read_words(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        tokenizer = Tokenizer(folder / name)
        tokenizer.decode(tokenizer.encode("It was the best of times", False, False))

    return read


def rank_state(folder: Path) -> None:
    """Continues a scoring run, or begins it."""
    state = RunState(StateFile(folder / "rank.state", {"seed": 0, "text": "a"}))
    short_llama(**FEW).measure(WINDOWS, progress=False, state=state)


def sleb_state(folder: Path) -> None:
    """Continues a search by loss, or begins it."""
    state = StateFile(folder / "sleb.state", {"seed": 0, "text": "a"}, every=0.0)
    short_llama(**FEW).search(WINDOWS, 2, progress=False, state=state)


def read_transformers(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        short = ShortHFModel(folder / name)
        short.greedy(short.encode("It was"), 2)

    return read


CASES = [
    ("meta/params.json", read_meta),
    ("meta/consolidated.00.pth", read_meta),
    ("hf/config.json", read_streamed("hf")),
    ("hf/model.safetensors", read_streamed("hf")),
    ("parts/model.safetensors.index.json", read_streamed("parts")),
    ("parts/model-00001-of-00005.safetensors", read_streamed("parts")),
    ("model.gguf", read_gguf),
    ("model.gguf", lambda folder: Stack(folder / "model.gguf")),
    ("hf/tokenizer.json", read_words("hf/tokenizer.json")),
    ("hf/tokenizer_config.json", read_words("hf/tokenizer.json")),
    ("pieces.model", read_words("pieces.model")),
    ("hf/config.json", read_transformers("hf")),
    ("hf/model.safetensors", read_transformers("hf")),
    ("hf/tokenizer.json", read_transformers("hf")),
    ("parts/model.safetensors.index.json", read_transformers("parts")),
    ("model.gguf", read_transformers("model.gguf")),
    ("scores.json", lambda folder: SavedScores.read(str(folder / "scores.json")).layers(1)),
    ("rank.state", rank_state),
    ("sleb.state", sleb_state),
]


@pytest.mark.parametrize(("name", "read"), CASES)
@pytest.mark.parametrize("damage", [0.0, 0.3, 0.9, b"[1, 2]", bytes(range(256)) * 4])
def test_a_file_that_is_cut_off_or_another_is_told_in_one_line(name, read, damage, here):
    read(here)
    whole = (here / name).read_bytes()
    other = damage if isinstance(damage, bytes) else whole[: int(damage * len(whole))]
    (here / name).write_bytes(other)
    with pytest.raises(USER_ERRORS) as error:
        read(here)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_a_token_that_the_model_does_not_have(here):
    refuses(r"\.\.10000000 are outside .*the model's", ShortHFModel("hf").greedy, [10**7], 2)


def test_a_directory_without_its_vocabulary(here):
    (here / "hf/tokenizer.json").unlink()
    path = here / "hf/tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"}
    path.write_text(json.dumps(config))
    refuses(r"hf is damaged \(no vocabulary\): fetch its files", read_transformers("hf"), here)


def test_a_panic_of_the_tokenizers_code_is_one_line(here, monkeypatch):
    class PanicException(BaseException):
        pass

    def panics(*args, **options):
        raise PanicException("no entry found for key")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panics)
    refuses("the tokenizer in .* is damaged .no entry found", load_tokenizer, str(here / "hf"), {})
