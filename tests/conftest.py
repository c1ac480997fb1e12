"""Tiny models that the tests share; nothing here needs a network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llama.args import ModelArgs
from llama.model import Transformer
from llama.parallel import initialize
from llama.tokenizer import tokenizer_json

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tiny tensors: a second thread only waits

TINY = {
    "dim": 32,
    "n_layers": 5,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


@pytest.fixture(autouse=True, scope="session")
def one_rank() -> None:
    initialize(device=torch.device("cpu"))


def make_transformer(seed: int = 0, **changes: object) -> Transformer:
    """A random Transformer whose layers do something: weights of std 0.2."""
    torch.manual_seed(seed)
    limits = {"max_seq_len": 64, "max_batch_size": 4}
    model = Transformer(ModelArgs.from_params({**TINY, **changes}, **limits)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else weight * 10)
    return model


@pytest.fixture
def transformer() -> Transformer:
    return make_transformer()


def save_checkpoint(
    directory: Path, model: Transformer, *, shards: int = 1, vocab_parallel: bool = False
) -> Path:
    """Writes a model in Meta's format with torch.save, cut for ``shards`` ranks."""
    directory.mkdir(parents=True, exist_ok=True)
    params = {k: v for k, v in vars(model.params).items() if k in TINY and v is not None}
    (directory / "params.json").write_text(json.dumps(params))
    for rank in range(shards):
        state = {
            name: cut(name, weight, rank, shards, vocab_parallel)
            for name, weight in model.state_dict().items()
        }
        torch.save(state, directory / f"consolidated.{rank:02d}.pth")
    return directory


def cut(name: str, weight: Tensor, rank: int, shards: int, vocab_parallel: bool) -> Tensor:
    """One rank's part, by the table of Meta's format."""
    if "norm" in name:
        return weight
    if name.startswith("tok_embeddings"):
        dim = 0 if vocab_parallel else 1
    else:
        dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
    return weight.chunk(shards, dim)[rank].clone()


@pytest.fixture
def checkpoint_dir(tmp_path: Path, transformer: Transformer) -> Path:
    return save_checkpoint(tmp_path / "checkpoint", transformer)


def zero_layer(model: nn.Module, index: int) -> None:
    """Makes a layer of a Transformer the identity: its output projections become zero."""
    with torch.no_grad():
        layer = model.layers[index]  # type: ignore[index, union-attr]
        layer.attention.wo.weight.zero_()
        layer.feed_forward.w2.weight.zero_()


def random_windows(count: int, size: int, *, vocab: int = 96, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (count, size), generator=generator).tolist()


class CharTokenizer:
    """Stands in for a tokenizer where the text does not matter."""

    n_words, bos_id, eos_id, pad_id = 96, 1, 2, -1
    add_bos = True
    stop_tokens = frozenset({2})

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        ids = [3 + (ord(c) - 32) % 93 for c in s]
        return [1] * bos + ids + [2] * eos

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(32 + i - 3) for i in ids if i >= 3)


BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]
BYTE_VOCAB = 258


def write_byte_tokenizer(directory: Path) -> Path:
    """A tokenizer.json of the 256 bytes with bos 0 and eos 1, and its configuration."""
    tokens, types = ["<s>", "</s>", *BYTES], [3, 3] + [1] * 256
    path = directory / "tokenizer.json"
    path.write_text(tokenizer_json(tokens, types, [], "gpt-2"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return path
