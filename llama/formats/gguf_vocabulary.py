"""A tokenizer's file as the keys by which llama.cpp reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama.errors import InputError
from llama.formats.gguf_header import ARRAY, STRING, Record
from llama.formats.gguf_write import BOOL, FLOAT32, INT32, UINT32, record
from llama.formats.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Pieces,
)
from llama.formats.tokenizers import (
    DIGITS,
    GPT2_PATTERN,
    PRE_TOKENIZERS,
    llama3_json,
)
from llama.io.json_files import JsonObject, read_json
from llama.tokenizer import Tokenizer, holds_json


def vocabulary(path: Path, size: int) -> dict[str, Record]:
    """A GGUF file's keys of a tokenizer.

    Args:
        path: ``tokenizer.json``, SentencePiece model or ranks of Llama 3; beside it
            ``tokenizer_config.json`` names tokens and may hold the template of chats.
        size: of the model's vocabulary; ids that the tokenizer leaves out are filled up.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is damaged, larger than the model's vocabulary, or splits texts by rules
            that are known under no name of llama.cpp.
    """
    tokenizer = Tokenizer(path)
    if tokenizer.n_words > size:
        raise InputError(f"{path} has {tokenizer.n_words} words, more than the model's {size}")
    if holds_json(path):
        keys = _of_json(read_json(path), path, size)
    elif tokenizer.dialog_format == "llama2":
        keys = _of_pieces(Pieces.read(path.read_bytes(), str(path)), size)
    else:
        keys = _of_json(json.loads(llama3_json(path)), path, size)
    prefix = "tokenizer.ggml"
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    for name, number in named.items():
        if number >= 0:
            keys |= _one(f"{prefix}.{name}_token_id", number, UINT32)
    keys |= _one(f"{prefix}.add_bos_token", tokenizer.add_bos and tokenizer.bos_id >= 0, BOOL)
    if template := _template(path.parent):
        keys |= _one("tokenizer.chat_template", template, STRING)
    return keys


def _one(key: str, value: object, kind: int, element: int | None = None) -> dict[str, Record]:
    return {key: record(key, value, kind, element)}


def _template(directory: Path) -> str | None:
    """The template of chats in a directory."""
    own, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _of_pieces(pieces: Pieces, size: int) -> dict[str, Record]:
    """The keys of a SentencePiece model of byte-pair encoding."""
    prefix, missing = "tokenizer.ggml", range(len(pieces.texts), size)
    texts = [*pieces.texts, *(f"[PAD{i}]" for i in missing)]
    keys = _one(f"{prefix}.model", "llama", STRING) | _one(f"{prefix}.pre", "default", STRING)
    keys |= _one(f"{prefix}.tokens", texts, ARRAY, STRING)
    keys |= _one(f"{prefix}.scores", [*pieces.scores, *(0.0 for _ in missing)], ARRAY, FLOAT32)
    types = [*pieces.types, *(UNUSED for _ in missing)]
    keys |= _one(f"{prefix}.token_type", types, ARRAY, INT32)
    if UNKNOWN in pieces.types:
        number = list(pieces.types).index(UNKNOWN)
        keys |= _one(f"{prefix}.unknown_token_id", number, UINT32)
    return keys | _one(f"{prefix}.add_space_prefix", pieces.space_in_front, BOOL)


def _of_json(content: JsonObject, path: Path, size: int) -> dict[str, Record]:
    """The keys of a ``tokenizer.json``: of a byte-level encoding, or of one like Llama 2's."""
    model = content.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise InputError(
            f"{path} is of kind {model.get('type')!r}; expected byte-pair encoding ('BPE')"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    tokens, types = _tokens(content, model["vocab"], size)
    if model.get("byte_fallback"):
        return _of_pieces(_as_pieces(content, tokens, types, merges, path), size)
    prefix = "tokenizer.ggml"
    keys = _one(f"{prefix}.model", "gpt2", STRING)
    keys |= _one(f"{prefix}.pre", _pre_tokenizer(content, path), STRING)
    keys |= _one(f"{prefix}.tokens", tokens, ARRAY, STRING)
    keys |= _one(f"{prefix}.token_type", types, ARRAY, INT32)
    return keys | _one(f"{prefix}.merges", merges, ARRAY, STRING)


def _tokens(
    content: JsonObject, vocab: Mapping[str, int], size: int
) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids without a token are filled up."""
    added = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    by_id = {number: text for text, number in vocab.items()}
    by_id |= {number: entry["content"] for number, entry in added.items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    types = [NORMAL if i in by_id else UNUSED for i in range(size)]
    for number, entry in added.items():
        types[number] = CONTROL if entry.get("special") else USER_DEFINED
    return tokens, types


def _as_pieces(
    content: JsonObject,
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Sequence[str],
    path: Path,
) -> Pieces:
    """The SentencePiece model of a ``tokenizer.json`` that was made from one.

    There pairs are merged by the score of their piece, here in the order of the list, in which
    pairs of one piece stand together: a score is less the later its first pair stands.
    """
    rules = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    known = ("Prepend", "Replace", "Metaspace", "Sequence")
    kinds = set(_kinds(content.get("normalizer"), content.get("pre_tokenizer")))
    if not kinds <= set(known):
        raise InputError(f"{path} splits texts by {sorted(kinds - set(known))}, unlike Llama 2's")
    score: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        score.setdefault(merge.replace(" ", ""), -float(rank))
    unknown, kinds_of_tokens = content["model"].get("unk_token"), list(types)
    for number, text in enumerate(tokens):
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds_of_tokens[number] = BYTE
        elif text == unknown:
            kinds_of_tokens[number] = UNKNOWN
    lowest = -float(len(merges))
    scores = [score.get(text, lowest) for text in tokens]
    in_front = '"Prepend"' in rules or ('"Metaspace"' in rules and '"never"' not in rules)
    return Pieces(tokens, scores, kinds_of_tokens, in_front)


def _kinds(*parts: object) -> list[str]:
    """The kinds of all rules in parts of a ``tokenizer.json``."""
    kinds: list[str] = []
    for part in parts:
        if isinstance(part, dict):
            kinds.append(str(part.get("type")))
            kinds += _kinds(*part.get("normalizers", []), *part.get("pretokenizers", []))
    return kinds


def _pre_tokenizer(content: JsonObject, path: Path) -> str:
    """Llama.cpp's name of the rules by which a byte-level ``tokenizer.json`` splits texts."""
    part = content.get("pre_tokenizer") or {}
    rules = part.get("pretokenizers", [part])
    patterns = [(r.get("pattern") or {}).get("Regex") for r in rules if r.get("type") == "Split"]
    digits = any(r.get("type") == "Digits" and r.get("individual_digits") for r in rules)
    own = any(r.get("type") == "ByteLevel" and r.get("use_regex", True) for r in rules)
    kinds = {r.get("type") for r in rules}
    split = [*patterns, *([GPT2_PATTERN] if own else [])]
    names = [name for name, known in PRE_TOKENIZERS.items() if split == [known]]
    names = [name for name in names if (name == DIGITS) == digits]
    plain = kinds <= {"Split", "Digits", "ByteLevel"} and "ByteLevel" in kinds
    plain = plain and not any(r.get("add_prefix_space") for r in rules)
    merges_first = not content["model"].get("ignore_merges")
    names = [name for name in names if (name == "llama-bpe") != merges_first]
    normal = (content.get("normalizer") or {}).get("type")
    if not names or not plain or normal not in (None, *(["NFC"] if names == ["qwen2"] else [])):
        raise InputError(
            f"{path} splits texts by rules that are known under no name of llama.cpp's: {split}; "
            f"known are those of {', '.join(PRE_TOKENIZERS)}"
        )
    return names[0]
