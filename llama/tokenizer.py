"""Text and dialogs to token ids and back, over three kinds of tokenizer files.

A file's kind is known by its content; dialogs have the formats of Llama 2 and Llama 3.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from llama.errors import InputError, check, check_file, damaged
from llama.files import JsonObject, StrPath, read_json

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# By GGUF's names. SmolLM2's texts are cut around every digit first, so that in "\n\n1" the token
# "\n\n" stays intact; transformers drops that cut for a GGUF file.
PRE_TOKENIZERS = {"gpt-2": GPT2_PATTERN, "smollm": GPT2_PATTERN, "llama-bpe": LLAMA3_PATTERN}
PRE_TOKENIZERS |= {"qwen2": LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")}  # digits one by one
DIGITS = "smollm"  # the one with that cut
# Types of tokens in llama.cpp's table, and of SentencePiece's pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# GPT-2's printable stand-ins of the 256 bytes.
ALPHABET = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
ALPHABET |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in ALPHABET)}
# Llama 3's special tokens, in reserve (-) from here to N_SPECIAL; 3.1 gave three of those names.
LLAMA_NAMES = "begin_of_text end_of_text - - - - start_header_id end_header_id - eot_id"
LLAMA31_NAMES = {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
N_SPECIAL = 256
USUAL_NAMES = {
    "bos_token": {"<|begin_of_text|>", "<s>", "<bos>", "<|im_start|>", "<|endoftext|>"},
    "eos_token": {"<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|endoftext|>"},
}


class Tokenizer:
    """One `encode` and one `decode` over SentencePiece, tiktoken and ``tokenizer.json`` files.

    Text never turns into special tokens: ``"<|end_of_text|>"`` in a text is encoded as the
    characters it is made of. In `decode` special tokens vanish; half characters become U+FFFD.

    Bos, eos and pad of ``tokenizer.json`` are named by ``tokenizer_config.json`` in its directory.
    Without it, bos and eos are set if exactly one of the usual names is a special token.

    Attributes:
        n_words: Size of the vocabulary, special tokens included.
        bos_id: Id of the token that begins a text; -1 where there is none.
        eos_id: Id of the token that ends a text, or -1.
        pad_id: Id of padding, or -1, as for Llama 3's file, which does not name it.
        stop_tokens: Ids that end a generation: eos, and Llama 3's ends of text, turn and message.
        special_tokens: Ids of special tokens by name; empty for SentencePiece.
        add_bos: True where the model expects bos before a plain text.
        dialog_format: ``"llama2"``, ``"llama3"`` or None.
        json: Text of a ``tokenizer.json`` with the same ids; None for SentencePiece.
    """

    def __init__(self, model_path: StrPath) -> None:
        backend = self._backend = _open(Path(str(model_path)))
        special = self.special_tokens = backend.special_tokens
        self.n_words: int = max(backend.ids, default=-1) + 1
        self.bos_id, self.eos_id, self.pad_id = backend.bos_eos_pad
        self.add_bos: bool = backend.add_bos and self.bos_id >= 0
        ends = {special.get(f"<|{name}|>", -1) for name in ("end_of_text", "eot_id", "eom_id")}
        self.stop_tokens: set[int] = (ends | {self.eos_id}) - {-1}
        self.json: str | None = backend.json
        self.dialog_format = "llama2" if self.json is None else None
        if {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= special.keys():
            self.dialog_format = "llama3"

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Token ids of a text of any length, after `bos_id` and before `eos_id` where set."""
        for added, token_id, key in ((bos, self.bos_id, "bos"), (eos, self.eos_id, "eos")):
            check(not added or token_id >= 0, key, True, f"a {key}_token, but {self._backend.lack}")
        check_text(s)
        return [self.bos_id] * bos + self._backend.encode(s) + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; InputError if one is not in the vocabulary, like -1."""
        ids = [int(i) for i in ids]
        unknown = [i for i in ids if i not in self._backend.ids]
        check(not unknown, "token ids", unknown[:1], f"0..{self.n_words - 1}")
        return self._backend.decode(ids)


class _SentencePiece:
    """A protobuf ``tokenizer.model``, as of Llama 2."""

    def __init__(self, path: Path, data: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            model = self.model = SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise damaged(path, "expected a SentencePiece model") from None
        self.lack, self.add_bos, self.json = f"{path} defines none", True, None
        self.ids, self.special_tokens = range(model.vocab_size()), dict[str, int]()
        self.bos_eos_pad = model.bos_id(), model.eos_id(), model.pad_id()
        self.encode, self.decode = model.encode, model.decode


class _TokenizerJson:
    """A Hugging Face ``tokenizer.json`` and the ``tokenizer_config.json`` of its directory."""

    def __init__(self, path: Path, data: bytes) -> None:
        import tokenizers

        try:
            model = self.model = tokenizers.Tokenizer.from_buffer(data)
            model.encode("")
        except BaseException as error:  # for some damage a PanicException, which is no Exception
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            raise damaged(path, error) from None
        self.json = data.decode("utf-8")
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # in spite of its name: as ordinary text
        added, vocab = model.get_added_tokens_decoder().items(), model.get_vocab()
        special = {token.content: i for i, token in sorted(added) if token.special}
        config_path = path.with_name("tokenizer_config.json")
        self.lack = f"{config_path} {'names none' if config_path.is_file() else 'is missing'}"
        # the reference reads nothing beside Llama 3's ranks
        config = read_json(config_path) if holds_json(path) and config_path.is_file() else {}
        keys = ("bos_token", "eos_token", "pad_token")
        names = [_name(config, key, special, config_path) for key in keys]
        for name in filter(None, names):
            check_file(name in vocab, config_path, f"it names a token {name!r}, which {path} lacks")
            model.add_special_tokens([name])
            special[name] = vocab[name]
        self.ids, self.special_tokens = frozenset(vocab.values()), special
        self.bos_eos_pad = tuple(vocab.get(name, -1) for name in names)
        # of a config without that key, the file's post-processor tells
        puts_bos = model.encode("").ids[:1] == [self.bos_eos_pad[0]]
        stated = config.get("add_bos_token")
        self.add_bos = puts_bos if stated is None else bool(stated)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=True)


def check_text(text: str) -> None:
    """Raises InputError for half a surrogate pair, from JSON or a byte that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = f"{text[error.start]!a} as character {error.start}"
        raise InputError(f"the text holds {character}, half a surrogate pair: remove it") from None


def find_tokenizer(ckpt_dir: StrPath) -> Path:
    """The tokenizer file in a directory or, as Llama 2's, its parent; else FileNotFoundError."""
    folder = Path(str(ckpt_dir))
    paths = [folder / "tokenizer.model", folder / "tokenizer.json"]
    paths.append(Path(os.path.abspath(folder)).parent / "tokenizer.model")
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no tokenizer file; looked for {', '.join(map(str, paths))}")


def llama3_names() -> list[str]:
    """The 256 special tokens that follow Llama 3's ranks; three have the names that 3.1 gave."""
    reserved = (f"reserved_special_token_{i}" for i in range(N_SPECIAL))
    names = (LLAMA_NAMES.split() + ["-"] * N_SPECIAL)[:N_SPECIAL]
    names = [next(reserved) if name == "-" else name for name in names]
    for i, name in LLAMA31_NAMES.items():
        names[i] = name
    return [f"<|{name}|>" for name in names]


def _open(path: Path) -> _SentencePiece | _TokenizerJson:
    if not path.is_file():
        problem = "is a directory, not the file in it" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"tokenizer file {path} {problem}")
    data = path.read_bytes()
    if data[:64].lstrip().startswith(b"{"):
        return _TokenizerJson(path, data)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", data):
        return _TokenizerJson(path, llama3_json(path, data).encode())
    if re.match(rb"\n[\x07-\xff]\x01?\n", data):  # a piece, its length, and its text likewise
        return _SentencePiece(path, data)
    expected = "expected SentencePiece, tiktoken ranks or tokenizer.json"
    raise damaged(path, f"{expected}, it begins with {data[:20]!r}")


def holds_json(path: Path) -> bool:
    """Whether a tokenizer file is a ``tokenizer.json``, whatever its name."""
    with open(path, "rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def llama3_json(path: Path, data: bytes) -> str:
    """The ``tokenizer.json`` of a file of ranks: every pair that makes a token is a merge.

    Its lines are Llama 3's tokens in base64 and their ids, from 0 up.
    """
    try:
        lines = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
    except ValueError as error:
        raise damaged(path, error) from None
    complete = list(ranks.values()) == list(range(len(lines)))
    complete = complete and all(bytes([i]) in ranks for i in range(256))
    check_file(complete, path, "expected new tokens of the ranks 0, 1, ... and each single byte")
    merges: list[str] = []
    for token in ranks:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [f"{_spell(a)} {_spell(b)}" for _, _, a, b in sorted(pairs)]
    names = llama3_names()
    types = [NORMAL] * len(ranks) + [CONTROL] * N_SPECIAL
    text = tokenizer_json([*map(_spell, ranks), *names], types, merges, pre="llama-bpe")
    return with_bos(text, names[0], len(ranks))


def with_bos(text: str, bos: str, number: int) -> str:
    """The content of a ``tokenizer.json`` by which transformers puts the token bos first.

    It reads that nowhere else: not in ``tokenizer_config.json``.
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import processors

    fast = FastTokenizer.from_str(text)
    if fast.encode("").ids[:1] == [number]:
        return text
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
    )
    return fast.to_str()


def _spell(token: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in token)


def tokenizer_json(
    tokens: Sequence[str], token_types: Sequence[int], merges: Sequence[str], pre: str
) -> str:
    """The text of a ``tokenizer.json`` for a byte-level BPE vocabulary as GGUF files hold it.

    It tokenizes as transformers does on the GGUF, except in two things, where it follows the
    models' own tokenizers: with ``"llama-bpe"`` a word that is in the vocabulary precedes merges,
    with ``"smollm"`` texts are cut around every digit first. As in transformers, tokens outside of
    the alphabet are spelled bytewise and, special or not, never matched as one.

    Args:
        tokens: V distinct tokens in GPT-2's byte alphabet (``tokenizer.ggml.tokens``).
        token_types: V numbers; 3 makes a token special, 4 one that is matched as one in texts.
        merges: pairs like ``"th e"``, the first to apply first.
        pre: name of the pre-tokenizer (``tokenizer.ggml.pre``), a key of `PRE_TOKENIZERS`.
    """
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    check(pre in PRE_TOKENIZERS, "tokenizer.ggml.pre", pre, f"one of {', '.join(PRE_TOKENIZERS)}")
    alphabet = set(ALPHABET.values())
    byte_level = {t for t in tokens if set(t) <= alphabet}
    vocab = {t if t in byte_level else _spell(t.encode()): i for i, t in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    misfits = [pair for pair in pairs if not {*pair, "".join(pair)} <= vocab.keys()]
    check_file(not misfits, "the vocabulary", f"it lacks tokens of the merges {misfits[:1]}")
    counts = [len(tokens), len(vocab), len(token_types)]
    check_file(len(set(counts)) == 1, "the vocabulary", f"tokens, distinct ones, types: {counts}")

    model = FastTokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        model.normalizer = normalizers.NFC()
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == DIGITS else []
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[pre]), behavior="isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([*digits, split, spell])
    model.decoder = decoders.ByteLevel()

    typed = [(t, kind) for t, kind in zip(tokens, token_types, strict=True) if t in byte_level]
    model.add_special_tokens([t for t, kind in typed if kind == CONTROL])
    model.add_tokens([AddedToken(t, normalized=False) for t, k in typed if k == USER_DEFINED])
    return model.to_str()


def _name(config: JsonObject, key: str, special: dict[str, int], path: Path) -> str:
    """The token under a key of the config, else the only usual one, else nothing."""
    if key in config:
        token = config[key]
        name = token.get("content", token) if isinstance(token, dict) else token
        check_file(isinstance(name, str | None), path, f"{key} {name!r:.60} is no token's text")
        return name or ""
    usual = USUAL_NAMES.get(key, set()) & special.keys()
    return usual.pop() if len(usual) == 1 else ""


Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a dialog."""

    role: Role
    content: str


Dialog = Sequence[Message]

INST, SYS = ("[INST]", "[/INST]"), ("<<SYS>>\n", "\n<</SYS>>\n\n")
LLAMA2_TAGS = (*INST, "<<SYS>>", "<</SYS>>")
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


def encode_dialog(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """Token ids that ask the model for the next assistant message; roles as in `check_roles`."""
    check_roles(dialog)
    if tokenizer.dialog_format == "llama2":
        return _encode_llama2(tokenizer, dialog)
    if tokenizer.dialog_format == "llama3":
        return _encode_llama3(tokenizer, dialog)
    raise InputError("this tokenizer has neither Llama 2's nor Llama 3's dialog format")


def is_unsafe(tokenizer: Tokenizer, dialog: Dialog) -> bool:
    """Whether a Llama 2 dialog holds the format's own tags, which would forge turns.

    Llama 3's markers are special tokens, which no text becomes.
    """
    if tokenizer.dialog_format != "llama2":
        return False
    return any(tag in message["content"] for message in dialog for tag in LLAMA2_TAGS)


def check_roles(dialog: Dialog) -> None:
    """Raises InputError unless the roles are [system,] user, assistant, ..., user."""
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    ok = turns == expected and len(turns) % 2 == 1
    check(ok, "roles", roles, "[system,] user, assistant, user, ... ending with user")


def _encode_llama2(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """``<s>[INST] question [/INST] answer </s>`` for every turn; the system text in the first."""
    contents = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        contents = [SYS[0] + contents[0] + SYS[1] + contents[1], *contents[2:]]
    ids: list[int] = []
    for question, answer in zip(contents[:-1:2], contents[1::2], strict=True):
        text = f"{INST[0]} {question.strip()} {INST[1]} {answer.strip()} "
        ids += tokenizer.encode(text, bos=True, eos=True)
    last = f"{INST[0]} {contents[-1].strip()} {INST[1]}"
    return ids + tokenizer.encode(last, bos=True, eos=False)


def _encode_llama3(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """A header with the role before every message, ``<|eot_id|>`` after; an open answer last."""
    special = tokenizer.special_tokens

    def header(role: str) -> list[int]:
        name = tokenizer.encode(role, bos=False, eos=False)
        gap = tokenizer.encode("\n\n", bos=False, eos=False)
        return [special["<|start_header_id|>"], *name, special["<|end_header_id|>"], *gap]

    ids = [special["<|begin_of_text|>"]]
    for message in dialog:
        text = tokenizer.encode(message["content"].strip(), bos=False, eos=False)
        ids += [*header(message["role"]), *text, special["<|eot_id|>"]]
    return ids + header("assistant")
