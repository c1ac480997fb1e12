"""A tokenizer as the keys by which llama.cpp reads it: from its file, and back to one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama.checkpoint.meta import check_vocabulary
from llama.errors import InputError
from llama.formats.gguf_read import ARRAY, STRING, GGUFParts, Record
from llama.formats.gguf_write import BOOL, FLOAT32, INT32, UINT32, record
from llama.formats.tokenizers import (
    BYTE,
    CONTROL,
    DIGITS,
    GPT2_PATTERN,
    LLAMA2_CONFIG,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Pieces,
    llama3_json,
    tokenizer_json,
    with_bos,
)
from llama.io.json_files import JsonObject, read_json
from llama.tokenizer import Tokenizer, holds_json

PREFIX = "tokenizer.ggml"
SPACE = "\u2581"  # SentencePiece's


def vocabulary(path: Path, size: int) -> dict[str, Record]:
    """A GGUF file's keys of a tokenizer, with as many ids as the model's vocabulary.

    ``path`` is ``tokenizer.json``, a SentencePiece model or ranks of Llama 3; in the same directory
    ``tokenizer_config.json`` names tokens and may hold the template of chats.
    """
    tokenizer = Tokenizer(path)
    check_vocabulary(tokenizer, path, size, "the model to write", spare=True)
    if holds_json(path):
        keys = _of_json(read_json(path), path, size)
    elif tokenizer.dialog_format == "llama2":
        keys = _of_pieces(Pieces.read(path.read_bytes(), str(path)), size)
    else:
        keys = _of_json(json.loads(llama3_json(path)), path, size)
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    for name, number in named.items():
        if number >= 0:
            keys |= _key(f"{PREFIX}.{name}_token_id", number, UINT32)
    keys |= _key(f"{PREFIX}.add_bos_token", tokenizer.add_bos, BOOL)
    if template := _template(path.parent):
        keys |= _key("tokenizer.chat_template", template, STRING)
    return keys


def _key(key: str, value: object, kind: int, element: int | None = None) -> dict[str, Record]:
    return {key: record(key, value, kind, element)}


def _template(directory: Path) -> str | None:
    own, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _of_pieces(pieces: Pieces, size: int) -> dict[str, Record]:
    missing = range(len(pieces.texts), size)
    texts = [*pieces.texts, *(f"[PAD{i}]" for i in missing)]
    keys = _key(f"{PREFIX}.model", "llama", STRING) | _key(f"{PREFIX}.pre", "default", STRING)
    keys |= _key(f"{PREFIX}.tokens", texts, ARRAY, STRING)
    keys |= _key(f"{PREFIX}.scores", [*pieces.scores, *(0.0 for _ in missing)], ARRAY, FLOAT32)
    types = [*pieces.types, *(UNUSED for _ in missing)]
    keys |= _key(f"{PREFIX}.token_type", types, ARRAY, INT32)
    if UNKNOWN in pieces.types:
        number = list(pieces.types).index(UNKNOWN)
        keys |= _key(f"{PREFIX}.unknown_token_id", number, UINT32)
    return keys | _key(f"{PREFIX}.add_space_prefix", pieces.space_first, BOOL)


def _of_json(content: JsonObject, path: Path, size: int) -> dict[str, Record]:
    """The keys of a ``tokenizer.json``: of a byte-level encoding, or of one like Llama 2's."""
    model = content.get("model") or {}
    kind = model.get("type")
    if kind != "BPE" or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{path} is of kind {kind!r}; expected byte-pair encoding ('BPE')")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    tokens, types = _tokens(content, model["vocab"], size)
    if model.get("byte_fallback"):
        return _of_pieces(_as_pieces(content, tokens, types, merges, path), size)
    keys = _key(f"{PREFIX}.model", "gpt2", STRING)
    keys |= _key(f"{PREFIX}.pre", _pre_tokenizer(content, path), STRING)
    keys |= _key(f"{PREFIX}.tokens", tokens, ARRAY, STRING)
    keys |= _key(f"{PREFIX}.token_type", types, ARRAY, INT32)
    return keys | _key(f"{PREFIX}.merges", merges, ARRAY, STRING)


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
    """The SentencePiece model of a ``tokenizer.json`` that was made from one."""
    rules = _rules(content.get("normalizer"), content.get("pre_tokenizer"))
    kinds = {rule.get("type") for rule in rules}
    if not all(map(_is_llama2, rules)) or not kinds & {"Replace", "Metaspace"}:
        raise InputError(f"{path} splits texts by {str(rules)[:300]}, unlike Llama 2's")
    # SentencePiece merges by the scores of pieces, tokenizer.json in the order of its list
    score: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        score.setdefault(merge.replace(" ", ""), -float(rank))
    unknown, piece_types = content["model"].get("unk_token"), list(types)
    for number, text in enumerate(tokens):
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            piece_types[number] = BYTE
        elif text == unknown:
            piece_types[number] = UNKNOWN
    scores = [score.get(text, -float(len(merges))) for text in tokens]
    schemes = [rule.get("prepend_scheme") for rule in rules if rule.get("type") == "Metaspace"]
    space_first = "Prepend" in kinds or any(scheme != "never" for scheme in schemes)
    return Pieces(tokens, scores, piece_types, space_first)


def _rules(*parts: object) -> list[JsonObject]:
    """The single rules in parts of a ``tokenizer.json``, which may be sequences."""
    rules: list[JsonObject] = []
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "Sequence":
            rules += _rules(*part.get("normalizers", []), *part.get("pretokenizers", []))
        elif isinstance(part, dict):
            rules.append(part)
    return rules


def _is_llama2(rule: JsonObject) -> bool:
    """Whether a rule only makes spaces SentencePiece's, without a split of the text at them."""
    if rule.get("type") == "Metaspace":  # which splits unless it says that it does not
        return rule.get("replacement") == SPACE and rule.get("split") is False
    pattern, content = rule.get("pattern"), rule.get("content")
    replaces = rule.get("type") == "Replace" and (pattern, content) == ({"String": " "}, SPACE)
    return replaces or (rule.get("type") == "Prepend" and rule.get("prepend") == SPACE)


def _pre_tokenizer(content: JsonObject, path: Path) -> str:
    """Llama.cpp's name of the rules by which a byte-level ``tokenizer.json`` splits texts."""
    part = content.get("pre_tokenizer") or {}
    rules = part.get("pretokenizers", [part])
    patterns = [(r.get("pattern") or {}).get("Regex") for r in rules if r.get("type") == "Split"]
    digits = any(r.get("type") == "Digits" and r.get("individual_digits") for r in rules)
    own = any(r.get("type") == "ByteLevel" and r.get("use_regex", True) for r in rules)
    kinds = {r.get("type") for r in rules}
    split = [*patterns, *([GPT2_PATTERN] if own else [])]
    merges_first = not content["model"].get("ignore_merges")
    names = [name for name, pattern in PRE_TOKENIZERS.items() if split == [pattern]]
    names = [n for n in names if (n == DIGITS, n != "llama-bpe") == (digits, merges_first)]
    plain = kinds <= {"Split", "Digits", "ByteLevel"} and "ByteLevel" in kinds
    plain = plain and not any(r.get("add_prefix_space") for r in rules)
    normal = (content.get("normalizer") or {}).get("type")
    if not names or not plain or normal not in (None, *(["NFC"] if names == ["qwen2"] else [])):
        raise InputError(
            f"{path} splits texts by rules that are known under no name of llama.cpp's: {split}; "
            f"known are those of {', '.join(PRE_TOKENIZERS)}"
        )
    return names[0]


def gguf_tokenizer(source: GGUFParts) -> tuple[str, bytes, JsonObject]:
    """A GGUF file's tokenizer: a file's name and content, and ``tokenizer_config.json``.

    Byte-level encodings become ``tokenizer.json``, SentencePiece's ``tokenizer.model``.
    """
    kind = source.need(f"{PREFIX}.model")
    if kind == "llama":
        return _sentencepiece(source)
    if kind != "gpt2":
        raise InputError(
            f"{source.path} has a tokenizer of kind {kind!r}; only byte-level BPE ('gpt2') and "
            "SentencePiece's ('llama') can be converted"
        )
    tokens, types = source.need_list(f"{PREFIX}.tokens", str), _types(source)
    pre = str(source.get(f"{PREFIX}.pre", "default"))
    text = tokenizer_json(tokens, types, source.need_list(f"{PREFIX}.merges", str), pre)
    # llama.cpp's defaults where the file is silent: Llama 3 begins with bos, others do not
    add_bos = bool(source.get(f"{PREFIX}.add_bos_token", pre == "llama-bpe"))
    bos = _token_id(source, "bos", tokens)
    if add_bos and bos is not None:
        text = with_bos(text, tokens[bos], bos)
    config = {"add_bos_token": add_bos, **_named_tokens(source, tokens)}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    return "tokenizer.json", text.encode("utf-8"), config


def _sentencepiece(source: GGUFParts) -> tuple[str, bytes, JsonObject]:
    tokens, types = source.need_list(f"{PREFIX}.tokens", str), _types(source)
    scores = source.need_list(f"{PREFIX}.scores", float)
    if not len(tokens) == len(scores) == len(types) == len(set(tokens)):
        counts = f"{len(tokens)} tokens, {len(set(tokens))} distinct, {len(scores)} scores"
        raise InputError(f"{source.path} has {counts} and {len(types)} types: it is damaged")
    if not source.get(f"{PREFIX}.add_bos_token", True):
        raise InputError(
            f"{source.path} puts no bos before a text; Meta's format of SentencePiece does"
        )
    space = bool(source.get(f"{PREFIX}.add_space_prefix", True))
    named = _named_tokens(source, tokens)
    ends = {key: named[f"{key}_token"] for key in ("bos", "eos") if f"{key}_token" in named}
    data = Pieces(tokens, scores, types, space).to_bytes(**ends)
    return "tokenizer.model", data, {**LLAMA2_CONFIG, **named}


def _types(source: GGUFParts) -> list[int]:
    types = source.need_list(key := f"{PREFIX}.token_type", int)
    if odd := [kind for kind in types if not 0 <= kind <= BYTE]:
        raise InputError(
            f"{source.path} has {key} {odd[0]}, expected 0 to {BYTE}; convert the model again"
        )
    return types


def _token_id(source: GGUFParts, name: str, tokens: Sequence[str]) -> int | None:
    """The number of a token that a GGUF file names; InputError if there is no such token."""
    number = source.get(f"{PREFIX}.{name}_token_id")
    if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
        raise InputError(
            f"{source.path} has {PREFIX}.{name}_token_id = {str(number)[:40]}, expected the "
            f"number of one of its {len(tokens)} tokens; convert the model again"
        )
    return number


def _named_tokens(source: GGUFParts, tokens: Sequence[str]) -> Mapping[str, str]:
    """What ``tokenizer_config.json`` says of single tokens, and the template of chats."""
    config: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (number := _token_id(source, name, tokens)) is not None:
            config[f"{key}_token"] = str(tokens[number])
    template = source.get("tokenizer.chat_template")
    return config if template is None else {**config, "chat_template": str(template)}
