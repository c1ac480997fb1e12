"""Llama.build on complete directories of all three tokenizer kinds, and everything it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import (
    make_transformer,
    refuses,
    save_byte_llama,
    save_checkpoint,
    write_byte_tokenizer,
)
from tokenizer_files import ranks, sentencepiece_model

from llama import Llama, Tokenizer

KINDS = {
    "llama-2": lambda folder: sentencepiece_model(folder / "tokenizer.model", 290),
    "llama-3": lambda folder: ranks(folder / "tokenizer.model"),
    "json": write_byte_tokenizer,
}


@pytest.fixture(params=KINDS)
def built(request, tmp_path: Path):
    """The kind of tokenizer, the Llama built with it, and the model that was saved."""
    tokenizer = KINDS[request.param](tmp_path)
    model = make_transformer(vocab_size=Tokenizer(tokenizer).n_words)
    save_checkpoint(tmp_path, model)
    return request.param, Llama.build(tmp_path, tokenizer, 64, 4, device="cpu"), model


def test_a_built_model_is_the_saved_one(built):
    _, llama, model = built
    tokens = torch.arange(3, 15)[None]
    assert torch.equal(llama.model(tokens), model(tokens))
    assert not llama.model.training
    assert llama.model.params.max_batch_size == 4
    assert llama.tokenizer.n_words == llama.model.vocab_size


def test_completions(built):
    _, llama, _ = built
    results = llama.text_completion(["a text", "from"], temperature=0, max_gen_len=5, logprobs=True)
    assert [sorted(r) for r in results] == [["generation", "logprobs", "tokens"]] * 2


def test_chat(built):
    kind, llama, _ = built
    dialogs = [[{"role": "user", "content": "a text"}]]
    if kind == "json":
        refuses("neither Llama 2's nor Llama 3's dialog format", llama.chat_completion, dialogs)
        return
    result = llama.chat_completion(dialogs, temperature=0, max_gen_len=5)[0]
    assert list(result) == ["generation"]
    assert sorted(result["generation"]) == ["content", "role"]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtypes(tmp_path, dtype):
    tokenizer = save_byte_llama(tmp_path) / "tokenizer.json"
    llama = Llama.build(tmp_path, tokenizer, 64, 4, device="cpu", dtype=dtype)
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {w.dtype for w in llama.model.parameters()} == {expected}
    assert torch.get_default_dtype() == torch.float32


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    tokenizer = save_byte_llama(tmp_path, make_transformer()) / "tokenizer.json"
    with pytest.raises(ValueError, match=r"has 258 tokens, .* has 96 ids: it belongs to another"):
        Llama.build(tmp_path, tokenizer, 64, 4, device="cpu")


def test_limits_are_checked(tmp_path):
    tokenizer = save_byte_llama(tmp_path) / "tokenizer.json"
    refuses("max_seq_len = 0: expected a positive integer", Llama.build, tmp_path, tokenizer, 0, 4)
    with pytest.raises(ValueError, match="model_parallel_size = 2: expected 1"):
        Llama.build(tmp_path, tokenizer, 64, 4, model_parallel_size=2, device="cpu")
