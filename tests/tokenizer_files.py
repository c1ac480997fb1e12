"""Small tokenizer files of every kind, trained on a few sentences."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from conftest import BYTES, make_transformer, save_checkpoint

from llama.tokenizer import Tokenizer, tokenizer_json

TEXTS = ["the cat sat on the mat and the hat", "a thing that they think then there", "1492 and 12"]
ODD = [
    "the cat",
    " the  hat",
    "  two  spaces   three ",
    "tab\tand\n\n\nlines\n 1 b\n\n1",
    "1234567 12.5 1,000",
    "don't I'll WE'RE they've",
    "caf\u00e9 na\u00efve \u00df \u4f60\u597d \U0001f600",
    "\u00a0x\u2003y",
    "http://a.b/?c=1&d=%20#x",
    "<s> </s> <|end_of_text|>",
]
MERGES = ["t h", "th e", "Ġ the", "a t", "h at", "a n", "an d", "1 2", "Ġ a", "Ċ Ċ"]


def sentencepiece_model(path: Path, size: int = 320, **options: object) -> Path:
    """A model of byte-pair encoding like Llama 2's."""
    import sentencepiece

    data = io.BytesIO()
    settings = {"model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    settings |= options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=data, vocab_size=size, **settings
    )
    path.write_bytes(data.getvalue())
    return path


def byte_level(path: Path, pre: str) -> Path:
    """A ``tokenizer.json`` of bytes and a few merges, that splits texts in a known way."""
    words = ["".join(merge.split()) for merge in MERGES]
    tokens = ["<s>", "</s>", *BYTES, *words]
    content = json.loads(tokenizer_json(tokens, [3, 3] + [1] * (len(tokens) - 2), MERGES, pre))
    if pre == "smollm":  # as the model's own file has it, whose parts stand otherwise than ours
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        rules = [{"type": "Digits", "individual_digits": True}, {**level, "use_regex": True}]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": rules}
    path.write_text(json.dumps(content))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def ranks(path: Path) -> Path:
    """A ``tokenizer.model`` of Llama 3's kind."""
    words = [bytes([i]) for i in range(256)]
    words += [b"th", b"the", b" t", b" the", b"at", b"hat", b"12", b"123", b"\n\n", b"an", b"and"]
    lines = [f"{base64.b64encode(word).decode()} {i}" for i, word in enumerate(words)]
    path.write_text("\n".join(lines) + "\n")
    return path


KINDS = ("sentencepiece", "ranks", "gpt-2", "llama-bpe", "qwen2", "smollm")


def write_tokenizer(directory: Path, kind: str) -> Path:
    directory.mkdir(exist_ok=True)
    if kind == "sentencepiece":
        return sentencepiece_model(directory / "tokenizer.model")
    if kind == "ranks":
        return ranks(directory / "tokenizer.model")
    return byte_level(directory / "tokenizer.json", kind)


def meta(directory: Path, kind: str = "gpt-2", **changes: object) -> Path:
    """A random checkpoint with a tokenizer of this kind."""
    words = Tokenizer(write_tokenizer(directory, kind)).n_words
    model = make_transformer(vocab_size=words, n_layers=2, **changes)
    return save_checkpoint(directory, model)
