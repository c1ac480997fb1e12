"""Tokenizers in GGUF files, and SentencePiece models as their pieces.

The converters of transformers give the same ids, but are internal, and take an unknown
pre-tokenizer for GPT-2's, which is refused here. The package sentencepiece gives neither all types
of pieces nor a writer, except with protobuf.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.checkpoint.meta import check_vocabulary, copy_tokenizer
from llama.errors import check, check_file, damaged, refused, short_repr
from llama.files import JsonObject, read_json, write_json
from llama.formats.gguf_read import ARRAY, STRING, GGUFParts, Record
from llama.formats.gguf_write import BOOL, FLOAT32, INT32, UINT32, record
from llama.tokenizer import (
    ALPHABET,
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Tokenizer,
    holds_json,
    tokenizer_json,
    with_bos,
)

CONFIG = "tokenizer_config.json"
LLAMA2_CONFIG: dict[str, object] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA2_CONFIG |= {"add_bos_token": True, "add_eos_token": False, "legacy": True}
LLAMA2_CONFIG |= {"tokenizer_class": "LlamaTokenizer"}
LLAMA3_CONFIG: dict[str, object] = {"bos_token": "<|begin_of_text|>", "add_bos_token": True}
LLAMA3_CONFIG |= {"eos_token": "<|end_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"}

# Numbers of SentencePiece's protobuf: fields of the message, of a piece, of the trainer, of the
# normalizer, and the trainer's model type.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, TYPE = 1, 2, 3
MODEL_TYPE, VOCAB_SIZE, BYTE_FALLBACK, UNK_PIECE, BOS_PIECE, EOS_PIECE = 3, 4, 35, 45, 46, 47
CHARSMAP, DUMMY_PREFIX, EXTRA_SPACES, ESCAPE = 2, 3, 4, 5
BPE = 2


def write_tokenizer(source: Path, target: Path) -> None:
    """Writes a Meta checkpoint's tokenizer file for transformers into an existing directory.

    ``tokenizer.json`` and SentencePiece files are copied; Llama 3's ranks become a
    ``tokenizer.json`` with the same ids. A configuration is added where there is none.
    """
    tokenizer, is_json, config = Tokenizer(source), holds_json(source), target / CONFIG
    if is_json or tokenizer.json is None:
        copy_tokenizer(source, target)
    if (text := tokenizer.json) is not None:
        if tokenizer.add_bos:
            bos = next(t for t, i in tokenizer.special_tokens.items() if i == tokenizer.bos_id)
            text = with_bos(text, bos, tokenizer.bos_id)
        (target / "tokenizer.json").write_text(text, encoding="utf-8")
    if not is_json and not config.is_file():
        write_json(config, LLAMA2_CONFIG if tokenizer.json is None else LLAMA3_CONFIG)


@dataclass(frozen=True)
class Pieces:
    """The pieces of a SentencePiece ``tokenizer.model`` of byte-pair encoding, by id.

    Of two pairs that could be merged, the one whose piece has the higher score is. ``types`` are
    such as `NORMAL`; ``space_first`` puts a space before a text.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    space_first: bool = True

    @classmethod
    def read(cls, data: bytes, where: str) -> Pieces:
        """The pieces in a file's content, unless it splits texts by rules that llama.cpp lacks."""
        try:
            fields = list(_fields(data))
            pieces = [dict(_fields(bytes(value))) for number, value in fields if number == PIECES]
            rest = {number: dict(_fields(bytes(v))) for number, v in fields if number != PIECES}
            texts = [bytes(piece[TEXT]).decode("utf-8") for piece in pieces]
            scores = [struct.unpack("<f", bytes(p.get(SCORE, bytes(4))))[0] for p in pieces]
        except (struct.error, KeyError, IndexError, TypeError, ValueError) as error:
            raise damaged(where, repr(error)) from None
        trainer, rules = rest.get(TRAINER, {}), rest.get(NORMALIZER, {})
        if trainer.get(MODEL_TYPE) != BPE or rules.get(CHARSMAP) or rules.get(EXTRA_SPACES, 1):
            kind = trainer.get(MODEL_TYPE, 1)
            expected = "that of byte-pair encoding, 2, and no rewriting of texts"
            raise refused(f"{where}: model_type", kind, expected)
        types = [int(piece.get(TYPE, NORMAL)) for piece in pieces]
        return cls(texts, scores, types, bool(rules.get(DUMMY_PREFIX, 1)))

    def to_bytes(self, *, bos: str = "<s>", eos: str = "</s>") -> bytes:
        """The content of a file in which a text begins with the piece bos and ends with eos.

        Both become `CONTROL`, whatever their type: SentencePiece knows no others as bos and eos,
        and matches others in texts.
        """
        types = [
            CONTROL if text in (bos, eos) and kind != UNKNOWN else kind
            for text, kind in zip(self.texts, self.types, strict=True)
        ]
        rows = list(zip(self.texts, self.scores, types, strict=True))
        message = b"".join(
            _field(PIECES, _field(TEXT, text) + _field(SCORE, score) + _field(TYPE, kind))
            for text, score, kind in rows
        )
        unknown = next((text for text, _, kind in rows if kind == UNKNOWN), "")
        trainer = _field(MODEL_TYPE, BPE) + _field(VOCAB_SIZE, len(self.texts))
        trainer += _field(BYTE_FALLBACK, int(BYTE in self.types))
        trainer += _field(UNK_PIECE, unknown) + _field(BOS_PIECE, bos) + _field(EOS_PIECE, eos)
        rules = _field(1, "identity") + _field(DUMMY_PREFIX, int(self.space_first))
        rules += _field(EXTRA_SPACES, 0) + _field(ESCAPE, 1)
        return message + _field(TRAINER, trainer) + _field(NORMALIZER, rules)


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    at = 0
    while at < len(data):
        key, at = _read_number(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _read_number(data, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            size, at = _read_number(data, at)
        if kind not in (1, 2, 5) or at + size > len(data):
            raise ValueError(f"a field of type {kind} at byte {at}")
        yield number, data[at : at + size]
        at += size


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _field(number: int, value: str | bytes | int | float) -> bytes:
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    if isinstance(value, float):
        return _number(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode("utf-8") if isinstance(value, str) else value
    return _number(number << 3 | 2) + _number(len(data)) + data


def _number(value: int) -> bytes:
    data = b""
    while value > 127:
        data, value = data + bytes([value & 127 | 128]), value >> 7
    return data + bytes([value])


RULES = "rules of splitting texts"
# Rules are the same if they split this text alike, as llama.cpp's converter tells them apart.
PROBE = (
    "A b  c   \n \n\n \t \t\t\n  \nd\n1 E\u0301\u212b \u00bd\u00a0x_1 _a-b\r\n\r \U0001f680 (x) 3"
    " 33 333 3333 33333 3.3 3..3 1a22b \u6211apple1314\u5929 ------===== \u043d\u043e ''``\"\".!!??"
    " I've 'told he's, 'RE you? 'M I'll 'D We'Ve a'lL \u0915\u094d\u0937\u093f"  # marks
)
PREFIX = "tokenizer.ggml"
SPACE = "\u2581"  # SentencePiece's
Values = dict[str, tuple[Any, ...]]  # by key: a value, its type and that of its elements


def vocabulary(path: Path, size: int) -> dict[str, Record]:
    """A GGUF file's keys of a tokenizer, with as many ids as the model's vocabulary.

    ``path`` is ``tokenizer.json``, a SentencePiece model or ranks of Llama 3; in the same directory
    ``tokenizer_config.json`` names tokens and may hold the template of chats.
    """
    tokenizer = Tokenizer(path)
    check_vocabulary(tokenizer, path, size, "the model to write", spare=True)
    if tokenizer.json is None:
        values = _of_pieces(Pieces.read(path.read_bytes(), str(path)), size)
    else:
        values = _of_json(json.loads(tokenizer.json), path, size)
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    values |= {f"{PREFIX}.{n}_token_id": (i, UINT32) for n, i in named.items() if i >= 0}
    values["tokenizer.ggml.add_bos_token"] = (tokenizer.add_bos, BOOL)
    if template := _template(path.parent):
        values["tokenizer.chat_template"] = (template, STRING)
    return {key: record(key, *how) for key, how in values.items()}


def _template(directory: Path) -> str | None:
    jinja, config = directory / "chat_template.jinja", directory / CONFIG
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _of_pieces(pieces: Pieces, size: int) -> Values:
    missing = range(len(pieces.texts), size)
    texts = [*pieces.texts, *(f"[PAD{i}]" for i in missing)]
    types = [*pieces.types, *(UNUSED for _ in missing)]
    values: Values = {
        "tokenizer.ggml.model": ("llama", STRING),
        "tokenizer.ggml.pre": ("default", STRING),
        "tokenizer.ggml.tokens": (texts, ARRAY, STRING),
        "tokenizer.ggml.scores": ([*pieces.scores, *(0.0 for _ in missing)], ARRAY, FLOAT32),
        "tokenizer.ggml.token_type": (types, ARRAY, INT32),
    }
    if UNKNOWN in types:
        values["tokenizer.ggml.unknown_token_id"] = (types.index(UNKNOWN), UINT32)
    return values | {"tokenizer.ggml.add_space_prefix": (pieces.space_first, BOOL)}


def _of_json(content: JsonObject, path: Path, size: int) -> Values:
    """The keys of a ``tokenizer.json``: of a byte-level encoding, or of one like Llama 2's."""
    model = content.get("model") or {}
    kind = model.get("type")
    check(kind == "BPE", f"{path}: type", kind, "byte-pair encoding ('BPE')")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    tokens, types = _tokens(content, model["vocab"], size)
    if model.get("byte_fallback"):
        return _of_pieces(_as_pieces(content, tokens, types, merges, path), size)
    return {
        "tokenizer.ggml.model": ("gpt2", STRING),
        "tokenizer.ggml.pre": (_pre_tokenizer(content, path), STRING),
        "tokenizer.ggml.tokens": (tokens, ARRAY, STRING),
        "tokenizer.ggml.token_type": (types, ARRAY, INT32),
        "tokenizer.ggml.merges": (merges, ARRAY, STRING),
    }


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
    pieces = _pieces(content, PROBE)
    plain = PROBE.replace(" ", SPACE)
    check(pieces in ([plain], [SPACE + plain]), f"{path}: {RULES}", pieces[:3], "Llama 2's")
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
    return Pieces(tokens, scores, piece_types, space_first=pieces != [plain])


def _pieces(content: JsonObject, text: str) -> list[str]:
    """The pieces that a ``tokenizer.json`` splits a text into before it merges any."""
    from tokenizers import Tokenizer as FastTokenizer

    rules = {**content, "added_tokens": [], "post_processor": None}
    rules["model"] = {"type": "BPE", "vocab": {}, "merges": []}
    fast = FastTokenizer.from_str(json.dumps(rules))
    normal = fast.normalizer.normalize_str(text) if fast.normalizer else text
    splitter = fast.pre_tokenizer
    return [p for p, _ in splitter.pre_tokenize_str(normal)] if splitter else [normal]


def _pre_tokenizer(content: JsonObject, path: Path) -> str:
    """Llama.cpp's name of the rules by which a byte-level ``tokenizer.json`` splits texts."""
    tokens, pieces = list(ALPHABET.values()), _pieces(content, PROBE)
    merges_first = not content["model"].get("ignore_merges")
    for name in PRE_TOKENIZERS:
        known = json.loads(tokenizer_json(tokens, [NORMAL] * len(tokens), [], name))
        # llama.cpp itself normalizes nothing, and some models of Qwen do not either
        alike = [_pieces(rules, PROBE) for rules in (known, {**known, "normalizer": None})]
        if pieces in alike and merges_first == (name != "llama-bpe"):
            return name
    raise refused(f"{path}: {RULES}", pieces[:3], f"those of {', '.join(PRE_TOKENIZERS)}")


def gguf_tokenizer(source: GGUFParts) -> tuple[str, bytes, JsonObject]:
    """A GGUF file's tokenizer: a file's name and content, and ``tokenizer_config.json``.

    Byte-level encodings become ``tokenizer.json``, SentencePiece's ``tokenizer.model``.
    """
    kind = source.need(f"{PREFIX}.model")
    check(kind in ("gpt2", "llama"), f"{source.path}: {PREFIX}.model", kind, "'gpt2' or 'llama'")
    tokens = source.need_list(f"{PREFIX}.tokens", str)
    types = source.need_list(f"{PREFIX}.token_type", int)
    if kind == "llama":
        return _sentencepiece(source, tokens, types)
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


def _sentencepiece(
    source: GGUFParts, tokens: Sequence[str], types: Sequence[int]
) -> tuple[str, bytes, JsonObject]:
    scores = source.need_list(f"{PREFIX}.scores", float)
    counts = [len(tokens), len(set(tokens)), len(scores), len(types)]
    problem = f"tokens, distinct ones, scores, types: {counts}"
    check_file(len(set(counts)) == 1, source.path, problem)
    add_bos = source.get(f"{PREFIX}.add_bos_token", True)
    check(add_bos, f"{source.path}: add_bos_token", add_bos, "true, as of SentencePiece")
    space = bool(source.get(f"{PREFIX}.add_space_prefix", True))
    named = _named_tokens(source, tokens)
    ends = {key: named[f"{key}_token"] for key in ("bos", "eos") if f"{key}_token" in named}
    data = Pieces(tokens, scores, types, space).to_bytes(**ends)
    return "tokenizer.model", data, {**LLAMA2_CONFIG, **named}


def _token_id(source: GGUFParts, name: str, tokens: Sequence[str]) -> int | None:
    """The number of a token that a GGUF file names; InputError if there is no such token."""
    number = source.get(f"{PREFIX}.{name}_token_id")
    ok = number is None or (isinstance(number, int) and 0 <= number < len(tokens))
    check_file(ok, source.path, f"its {name}_token_id {short_repr(number)} is none of its tokens")
    return number


def _named_tokens(source: GGUFParts, tokens: Sequence[str]) -> Mapping[str, str]:
    """What ``tokenizer_config.json`` says of single tokens, and the template of chats."""
    config: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (number := _token_id(source, name, tokens)) is not None:
            config[f"{key}_token"] = str(tokens[number])
    template = source.get("tokenizer.chat_template")
    return config if template is None else {**config, "chat_template": str(template)}
