"""Tokenizers from one format to another: Llama 3's ranks and GGUF's vocabulary to tokenizer.json.

transformers has converters too. They were tried (5.24, 97 passages, vocabulary of 3,000): its
``TikTokenConverter`` gives the same merges and ids as `llama3_json`, and its
``convert_gguf_tokenizer`` the same ids as `tokenizer_json`. Our own stay for three reasons: those
are internal (the second moved between 4.57 and 5.24, the first renamed an argument), they would
make converting a Llama need all of transformers, and theirs takes an unknown pre-tokenizer for
GPT-2's without a word, where this one refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llama.checkpoint.meta import copy_tokenizer
from llama.errors import InputError
from llama.formats.sentencepiece_model import Pieces
from llama.io.json_files import JsonObject, write_json
from llama.tokenizer import (
    LLAMA3_PATTERN,
    N_SPECIAL,
    Tokenizer,
    holds_json,
    llama3_special_tokens,
    read_ranks,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# By GGUF's names. SmolLM2's texts are cut around every digit first, so that in "\n\n1" the token
# "\n\n" stays whole; transformers drops that cut for a GGUF file.
PRE_TOKENIZERS = {"gpt-2": GPT2_PATTERN, "smollm": GPT2_PATTERN, "llama-bpe": LLAMA3_PATTERN}
PRE_TOKENIZERS |= {"qwen2": LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")}  # digits one by one
DIGITS = "smollm"  # the one with that cut
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of tokens in llama.cpp's table

LLAMA2_CONFIG: dict[str, object] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": True,
    "tokenizer_class": "LlamaTokenizer",
}
LLAMA3_CONFIG: dict[str, object] = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "add_bos_token": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
}


class Fields(Protocol):
    """A GGUF file's metadata by key, as `gguf.GGUFFile` reads it."""

    path: Path

    def get(self, key: str, default: object = None) -> Any: ...

    def need(self, key: str) -> Any: ...


def find_hf_tokenizer(directory: Path) -> Path:
    """The tokenizer file of a Hugging Face directory; FileNotFoundError if there is none."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory} has neither tokenizer.json nor tokenizer.model")


def write_tokenizer(source: Path, target: Path) -> None:
    """Writes a Meta checkpoint's tokenizer for transformers.

    ``tokenizer.json`` and SentencePiece files are copied, with a configuration for the latter;
    Llama 3's ranks become a ``tokenizer.json`` with the same ids. Where only the configuration
    says that bos comes first, ``tokenizer.json`` is made to say so too.

    Args:
        source: the tokenizer file.
        target: an existing directory.
    """
    tokenizer, is_json = Tokenizer(source), holds_json(source)
    llama2 = tokenizer.dialog_format == "llama2"
    if is_json or llama2:
        copy_tokenizer(source, target)
        if is_json and tokenizer.add_bos and tokenizer.bos_id >= 0:
            _put_bos(target / "tokenizer.json", tokenizer.bos_id)
    else:
        (target / "tokenizer.json").write_text(llama3_json(source), encoding="utf-8")
    if not is_json and not (target / "tokenizer_config.json").is_file():
        config = LLAMA2_CONFIG if llama2 else LLAMA3_CONFIG
        write_json(target / "tokenizer_config.json", config)


def _put_bos(path: Path, bos_id: int) -> None:
    """Makes a ``tokenizer.json`` put bos in front that leaves this to its configuration.

    There transformers does not look, and a model read without bos is another one.
    """
    from tokenizers import Tokenizer as FastTokenizer

    fast = FastTokenizer.from_file(str(path))
    if fast.encode("").ids[:1] != [bos_id]:
        bos = fast.id_to_token(bos_id) or ""
        text = with_bos(path.read_text(encoding="utf-8"), bos, bos_id)
        path.write_text(text, encoding="utf-8")


def llama3_json(path: Path) -> str:
    """The ``tokenizer.json`` of a file of ranks: every pair that makes a token is a merge."""
    ranks = read_ranks(path, path.read_bytes())
    merges: list[str] = []
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += [f"{_spell(a)} {_spell(b)}" for _, _, a, b in sorted(pairs)]
    special = {i: name for name, i in llama3_special_tokens(len(ranks)).items()}  # 3.1's names
    names = [special[len(ranks) + i] for i in range(N_SPECIAL)]
    types = [NORMAL] * len(ranks) + [CONTROL] * N_SPECIAL
    text = tokenizer_json([*map(_spell, ranks), *names], types, merges, pre="llama-bpe")
    return with_bos(text, names[0], len(ranks))


def with_bos(text: str, bos: str, number: int) -> str:
    """A ``tokenizer.json`` by which transformers puts bos in front.

    Args:
        text: the content of the file.
        bos: the token.
        number: its id.
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import processors

    fast = FastTokenizer.from_str(text)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
    )
    return fast.to_str()


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins of the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


ALPHABET = _byte_alphabet()


def _spell(token: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in token)


def tokenizer_json(
    tokens: Sequence[str], token_types: Sequence[int], merges: Sequence[str], pre: str
) -> str:
    """The text of a ``tokenizer.json`` for a byte-level BPE vocabulary as GGUF files hold it.

    It tokenizes as transformers does on the GGUF, except in two things, where it follows the
    models' own tokenizers: with ``"llama-bpe"`` a word that is in the vocabulary precedes merges,
    with ``"smollm"`` texts are cut around every digit first.

    Args:
        tokens: V distinct tokens in GPT-2's byte alphabet (``tokenizer.ggml.tokens``).
        token_types: V numbers; 3 makes a token special, 4 one that is matched whole in texts.
        merges: ``"left right"``, the first to apply first.
        pre: name of the pre-tokenizer (``tokenizer.ggml.pre``), a key of `PRE_TOKENIZERS`.

    Raises:
        InputError: ``pre`` is unknown, or tokens, types and merges do not fit together.
    """
    from tokenizers import AddedToken

    if pre not in PRE_TOKENIZERS:
        raise InputError(f"unknown pre-tokenizer {pre!r}; known are {sorted(PRE_TOKENIZERS)}")
    alphabet = set(ALPHABET.values())
    byte_level = {t for t in tokens if set(t) <= alphabet}
    model = _byte_level_bpe(_vocabulary(tokens, byte_level, token_types, merges), merges, pre)
    typed = [(t, kind) for t, kind in zip(tokens, token_types, strict=True) if t in byte_level]
    model.add_special_tokens([t for t, kind in typed if kind == CONTROL])
    model.add_tokens([AddedToken(t, normalized=False) for t, k in typed if k == USER_DEFINED])
    return model.to_str()


def _vocabulary(
    tokens: Sequence[str], byte_level: set[str], token_types: Sequence[int], merges: Sequence[str]
) -> dict[str, int]:
    """Ids by token; InputError unless types and merges fit them.

    As in transformers: tokens outside of the alphabet are spelled bytewise and, special or not,
    never matched whole.
    """
    vocab = {t if t in byte_level else _spell(t.encode()): i for i, t in enumerate(tokens)}
    pairs = _pairs(merges)
    misfits = [pair for pair in pairs if not {*pair, "".join(pair)} <= vocab.keys()][:1]
    if misfits or not len(tokens) == len(vocab) == len(token_types):
        counts = f"{len(tokens)} tokens, {len(vocab)} distinct, and {len(token_types)} types"
        raise InputError(f"expected one type a token, got {counts}; wrong merges: {misfits}")
    return vocab


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]


def _byte_level_bpe(vocab: dict[str, int], merges: Sequence[str], pre: str) -> FastTokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = Tokenizer(models.BPE(vocab, _pairs(merges), ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        model.normalizer = normalizers.NFC()
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == DIGITS else []
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[pre]), behavior="isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([*digits, split, spell])
    model.decoder = decoders.ByteLevel()
    return model


def gguf_tokenizer(source: Fields) -> tuple[str, bytes, JsonObject]:
    """A GGUF file's tokenizer: a file's name and content, and ``tokenizer_config.json``.

    Byte-level encodings become ``tokenizer.json``, those like Llama 2's SentencePiece's
    ``tokenizer.model``.

    Args:
        source: the file's metadata.

    Raises:
        InputError: a key is missing, or the tokenizer is of another kind.
    """
    kind = source.need("tokenizer.ggml.model")
    if kind == "llama":
        return _sentencepiece(source)
    if kind != "gpt2":
        raise InputError(
            f"{source.path} has a tokenizer of kind {kind!r}; only byte-level BPE ('gpt2') and "
            "SentencePiece's ('llama') can be converted"
        )
    tokens, pre = source.need("tokenizer.ggml.tokens"), source.get("tokenizer.ggml.pre", "default")
    types = source.need("tokenizer.ggml.token_type")
    text = tokenizer_json(tokens, types, source.need("tokenizer.ggml.merges"), pre)
    # llama.cpp's defaults where the file is silent: Llama 3 begins with bos, others do not
    add_bos = bool(source.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"))
    bos = _token_id(source, "bos", tokens)
    if add_bos and bos is not None:
        text = with_bos(text, tokens[bos], bos)
    config = {"add_bos_token": add_bos, **_named_tokens(source, tokens)}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    return "tokenizer.json", text.encode("utf-8"), config


def _sentencepiece(source: Fields) -> tuple[str, bytes, JsonObject]:
    """The SentencePiece model in a GGUF file, and its configuration."""
    tokens = source.need("tokenizer.ggml.tokens")
    scores, types = (source.need(f"tokenizer.ggml.{key}") for key in ("scores", "token_type"))
    if not len(tokens) == len(scores) == len(types) == len(set(tokens)):
        counts = f"{len(tokens)} tokens, {len(set(tokens))} distinct, {len(scores)} scores"
        raise InputError(f"{source.path} has {counts} and {len(types)} types: it is damaged")
    if not source.get("tokenizer.ggml.add_bos_token", True):
        raise InputError(
            f"{source.path} puts no bos in front of a text; Meta's format of SentencePiece does"
        )
    space = bool(source.get("tokenizer.ggml.add_space_prefix", True))
    named = _named_tokens(source, tokens)
    ends = {key: named[f"{key}_token"] for key in ("bos", "eos") if f"{key}_token" in named}
    data = Pieces(tokens, [float(s) for s in scores], types, space).to_bytes(**ends)
    return "tokenizer.model", data, {**LLAMA2_CONFIG, **named}


def _token_id(source: Fields, name: str, tokens: Sequence[str]) -> int | None:
    """The number of a token that a GGUF file names; InputError if there is no such token."""
    number = source.get(f"tokenizer.ggml.{name}_token_id")
    if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
        raise InputError(
            f"{source.path} has tokenizer.ggml.{name}_token_id = {str(number)[:40]}, expected the "
            f"number of one of its {len(tokens)} tokens; convert the model anew"
        )
    return number


def _named_tokens(source: Fields, tokens: Sequence[str]) -> Mapping[str, str]:
    """What ``tokenizer_config.json`` says of single tokens, and the template of chats."""
    config: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (number := _token_id(source, name, tokens)) is not None:
            config[f"{key}_token"] = str(tokens[number])
    template = source.get("tokenizer.chat_template")
    return config if template is None else {**config, "chat_template": str(template)}
