"""Text and dialogs to token ids and back, over three kinds of tokenizer files.

A file's kind is known by its content; dialogs have the formats of Llama 2 and Llama 3.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from llama.errors import InputError, check, check_file, damaged
from llama.files import JsonObject, read_json

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3's special tokens, in reserve (-) from here to N_SPECIAL; 3.1 gave three of those names.
LLAMA_NAMES = "begin_of_text end_of_text - - - - start_header_id end_header_id - eot_id"
LLAMA31_NAMES = {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
N_SPECIAL = 256
USUAL_NAMES = {
    "bos_token": {"<|begin_of_text|>", "<s>", "<bos>", "<|im_start|>", "<|endoftext|>"},
    "eos_token": {"<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|endoftext|>"},
}
# tiktoken fails on longer texts and on longer runs of (or without) white space. The reference cuts
# at the same places, so the ids are the same.
MAX_CHARS, MAX_RUN = 400_000, 25_000
LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_RUN + 1},}}|(?<!\s)\s{{{MAX_RUN + 1},}}")


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
    """

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        backend = self._backend = _open(Path(str(model_path)))
        special = self.special_tokens = backend.special_tokens
        self.n_words: int = max(backend.ids, default=-1) + 1
        self.bos_id, self.eos_id, self.pad_id = backend.bos_eos_pad
        self.add_bos: bool = backend.add_bos and self.bos_id >= 0
        ends = {special.get(f"<|{name}|>", -1) for name in ("end_of_text", "eot_id", "eom_id")}
        self.stop_tokens: set[int] = (ends | {self.eos_id}) - {-1}
        self.dialog_format = "llama2" if isinstance(backend, _SentencePiece) else None
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
        check_file(_has_settings(data), path, "it ends after the pieces")
        self.lack, self.add_bos = f"{path} defines none", True
        self.ids, self.special_tokens = range(model.vocab_size()), dict[str, int]()
        self.bos_eos_pad = model.bos_id(), model.eos_id(), model.pad_id()
        self.encode, self.decode = model.encode, model.decode


class _Tiktoken:
    """A text ``tokenizer.model``, as of Llama 3: ranks, which the special tokens follow."""

    def __init__(self, path: Path, data: bytes) -> None:
        from tiktoken import Encoding

        ranks = read_ranks(path, data)
        self.lack, self.add_bos = f"{path} defines none", True
        n = self.n_ranks = len(ranks)
        self.ids, self.special_tokens = range(n + N_SPECIAL), llama3_special_tokens(n)
        self.bos_eos_pad = n, n + 1, -1
        self.model = Encoding("", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        return [i for chunk in _chunks(text) for i in self.model.encode_ordinary(chunk)]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < self.n_ranks])


class _TokenizerJson:
    """A Hugging Face ``tokenizer.json`` and the ``tokenizer_config.json`` of its directory."""

    def __init__(self, path: Path, data: bytes) -> None:
        import tokenizers

        try:
            model = self.model = tokenizers.Tokenizer.from_buffer(data)
            model.encode("")
        except BaseException as error:
            if not isinstance(error, ValueError) and not is_panic(error):
                raise
            raise damaged(path, error) from None
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # in spite of its name: as ordinary text
        added, vocab = model.get_added_tokens_decoder().items(), model.get_vocab()
        special = {token.content: i for i, token in sorted(added) if token.special}
        config_path = path.with_name("tokenizer_config.json")
        self.lack = f"{config_path} {'names none' if config_path.is_file() else 'is missing'}"
        config = read_json(config_path) if config_path.is_file() else {}
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


def is_panic(error: BaseException) -> bool:
    """Whether the package tokenizers raised it for some damage, which is not an Exception."""
    return type(error).__name__ == "PanicException"


def check_text(text: str) -> None:
    """Raises InputError for half a surrogate pair, from JSON or a byte that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = f"{text[error.start]!a} as character {error.start}"
        raise InputError(f"the text holds {character}, half a surrogate pair: remove it") from None


def find_tokenizer(ckpt_dir: str | os.PathLike[str]) -> Path:
    """The tokenizer file in a directory or, as Llama 2's, its parent; else FileNotFoundError."""
    folder = Path(str(ckpt_dir))
    paths = [folder / "tokenizer.model", folder / "tokenizer.json"]
    paths.append(Path(os.path.abspath(folder)).parent / "tokenizer.model")
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no tokenizer file; looked for {', '.join(map(str, paths))}")


def llama3_special_tokens(n_ranks: int) -> dict[str, int]:
    """Ids by name of the 256 special tokens that follow Llama 3's ``n_ranks`` ranks (128000).

    Llama 3.1's three new tokens are second names of reserved ones: the files of both are the same.
    """
    reserved = (f"reserved_special_token_{i}" for i in range(N_SPECIAL))
    names = (LLAMA_NAMES.split() + ["-"] * N_SPECIAL)[:N_SPECIAL]
    names = [next(reserved) if name == "-" else name for name in names]
    return {f"<|{name}|>": n_ranks + i for i, name in [*enumerate(names), *LLAMA31_NAMES.items()]}


def _open(path: Path) -> _SentencePiece | _Tiktoken | _TokenizerJson:
    if not path.is_file():
        problem = "is a directory, not the file in it" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"tokenizer file {path} {problem}")
    data = path.read_bytes()
    if data[:64].lstrip().startswith(b"{"):
        return _TokenizerJson(path, data)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", data):
        return _Tiktoken(path, data)
    if re.match(rb"\n[\x07-\xff]\x01?\n", data):  # a piece, its length, and its text likewise
        return _SentencePiece(path, data)
    expected = "expected SentencePiece, tiktoken ranks or tokenizer.json"
    raise damaged(path, f"{expected}, it begins with {data[:20]!r}")


def holds_json(path: Path) -> bool:
    """Whether a tokenizer file is a ``tokenizer.json``, whatever its name."""
    with open(path, "rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def _has_settings(model: bytes) -> bool:
    """Whether something follows the pieces of a SentencePiece model."""
    at = 0
    while model[at : at + 1] == b"\n":
        size = model[at + 1]  # a second byte follows where the first is above 127
        at += 2 + size if size < 128 else 3 + size - 128 + 128 * model[at + 2]
    return at < len(model)


def read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """Llama 3's tokens and their ids from lines of a token in base64 and its rank, from 0 up."""
    ranks: dict[bytes, int] = {}
    for line in filter(None, data.splitlines()):
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            if int(rank) != len(ranks) or token in ranks:
                raise ValueError
        except ValueError:
            expected = f"expected a new token in base64 and the rank {len(ranks)}"
            raise damaged(path, f"{expected}, got {line[:40]!r}") from None
        ranks[token] = len(ranks)
    missing = sum(bytes([i]) not in ranks for i in range(256))
    check_file(not missing, path, f"it lacks {missing} of the 256 single bytes")
    return ranks


def _chunks(text: str) -> Iterator[str]:
    """Pieces of at most `MAX_CHARS`, in which no run is longer than `MAX_RUN`."""
    for start in range(0, len(text), MAX_CHARS):
        chunk, begin = text[start : start + MAX_CHARS], 0
        for run in LONG_RUN.finditer(chunk):
            for end in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield chunk[begin:end]
                begin = end
        yield chunk[begin:]


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
