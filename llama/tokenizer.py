"""Text to token ids and back over the three kinds of tokenizer files, told apart by content."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GGUF's names of pre-tokenizers: the split before the byte level, None for GPT-2's own. SmolLM2 was
# trained with a cut around every digit too, which transformers leaves out when it reads a GGUF: no
# merge joins digits, so they stay single, but "\n\n1" is "\n", "\n", "1" and not "\n\n", "1".
PRE_TOKENIZERS = {"gpt-2": None, "smollm": None, "llama-bpe": LLAMA3_PATTERN}
# Llama 3's special tokens that are not reserved, then 3.1's second names of reserved ones.
LLAMA3_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
LLAMA31_NAMES = {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
N_SPECIAL = 256
USUAL_NAMES = {
    "bos_token": {"<|begin_of_text|>", "<s>", "<bos>", "<|im_start|>", "<|endoftext|>"},
    "eos_token": {"<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|endoftext|>"},
}
# Longer texts, or longer runs of only white space or only other characters, overflow tiktoken's
# stack. The reference cuts at the same places, so the ids are the same.
MAX_CHARS, MAX_RUN = 400_000, 25_000
LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_RUN + 1},}}|(?<!\s)\s{{{MAX_RUN + 1},}}")


class Tokenizer:
    """One `encode` and one `decode` over SentencePiece, tiktoken and ``tokenizer.json`` files.

    Text never turns into special tokens: ``"<|end_of_text|>"`` in a text is encoded as the
    characters it is made of. Likewise special tokens have no text and vanish in `decode`.

    Attributes:
        n_words: size of the vocabulary, special tokens included.
        bos_id, eos_id, pad_id: -1 where there is none. Llama 3 has no pad_id: the file does not
            tell 3.1, which has ``<|finetune_right_pad_id|>``, from 3.
        stop_tokens: ids that end a generation: eos and Llama 3's ends of turn and message.
        special_tokens: their ids by name; empty for SentencePiece.
        add_bos: whether the model expects bos in front of a plain text.
        dialog_format: ``"llama2"``, ``"llama3"`` or None.

    Args:
        model_path: ``tokenizer.model`` of Llama 2 or 3, or ``tokenizer.json``. Beside the latter,
            ``tokenizer_config.json`` names bos, eos and pad. Where it does not, bos and eos are
            known if exactly one of the usual names is a special token.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is a directory, empty, damaged or of no known kind.
    """

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        backend = self._backend = _open(Path(str(model_path)))
        special = self.special_tokens = backend.special_tokens
        self.n_words: int = max(backend.ids, default=-1) + 1
        self.bos_id: int = backend.bos_id
        self.eos_id: int = backend.eos_id
        self.pad_id: int = backend.pad_id
        self.add_bos: bool = backend.add_bos
        ends = {special.get(name, -1) for name in ("<|eot_id|>", "<|eom_id|>")}
        self.stop_tokens: set[int] = (ends | {self.eos_id}) - {-1}
        headers = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
        self.dialog_format = "llama3" if headers <= special.keys() else None
        if isinstance(backend, _SentencePiece):
            self.dialog_format = "llama2"

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Token ids of a text of any length, between `bos_id` and `eos_id` where asked for.

        Raises:
            ValueError: bos or eos is unknown, or the text holds half a surrogate pair.
        """
        for wanted, token_id, key in ((bos, self.bos_id, "bos"), (eos, self.eos_id, "eos")):
            if wanted and token_id < 0:
                lack = self._backend.lack
                raise ValueError(f"encode({key}=True): {lack} {key}_token; encode with {key}=False")
        s.encode("utf-8")  # raises on surrogates, which the backends treat differently
        return [self.bos_id] * bos + self._backend.encode(s) + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; incomplete characters become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary, like the -1 of an absent token.
        """
        ids = [int(i) for i in ids]
        unknown = [i for i in ids if i not in self._backend.ids]
        if unknown:
            known = f"the vocabulary is 0..{self.n_words - 1}"
            raise ValueError(f"there is no token id {unknown[0]}, {known}; drop it to decode")
        return self._backend.decode(ids)


class _SentencePiece:
    """A protobuf ``tokenizer.model``, as of Llama 2."""

    def __init__(self, path: Path, data: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            if not _has_settings(data):
                raise RuntimeError("the settings behind the pieces are missing")
            self.model = SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(f"{path} is a damaged SentencePiece model: {error}") from None
        self.lack, self.add_bos = f"{path} defines no", True
        self.ids = range(self.model.vocab_size())
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.pad_id, self.special_tokens = self.model.pad_id(), dict[str, int]()

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids) if ids else ""


class _Tiktoken:
    """A text ``tokenizer.model``, as of Llama 3: ranks, behind which the special tokens follow."""

    def __init__(self, path: Path, data: bytes) -> None:
        from tiktoken import Encoding

        ranks = _read_ranks(path, data)
        self.lack, self.add_bos = f"{path} defines no", True
        self.n_ranks, self.ids = len(ranks), range(len(ranks) + N_SPECIAL)
        self.special_tokens = llama3_special_tokens(self.n_ranks)
        self.bos_id, self.eos_id, self.pad_id = self.n_ranks, self.n_ranks + 1, -1
        args = {"pat_str": LLAMA3_PATTERN, "mergeable_ranks": ranks, "special_tokens": {}}
        self.model = Encoding(path.name, **args)

    def encode(self, text: str) -> list[int]:
        return [i for chunk in _chunks(text) for i in self.model.encode_ordinary(chunk)]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < self.n_ranks])


class _TokenizerJson:
    """A Hugging Face ``tokenizer.json`` and the ``tokenizer_config.json`` beside it."""

    def __init__(self, path: Path, data: bytes) -> None:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Model

        try:
            model = self.model = Model.from_buffer(data)
        except ValueError as error:
            raise ValueError(f"{path} is no tokenizer.json or a damaged one: {error}") from None
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # in spite of its name: as ordinary text
        added, vocab = model.get_added_tokens_decoder().items(), model.get_vocab()
        special = {token.content: i for i, token in sorted(added) if token.special}
        config_path = path.with_name("tokenizer_config.json")
        verb = "names no" if config_path.is_file() else "is missing, which would name the"
        self.lack = f"{config_path} {verb}"
        config = _read_config(config_path)
        names = [_name(config, key, special) for key in ("bos_token", "eos_token", "pad_token")]
        for name in filter(None, names):
            if name not in vocab:
                raise ValueError(f"{config_path} names a token {name!r}, which {path} lacks")
            model.add_special_tokens([AddedToken(name, normalized=False)])
            special[name] = vocab[name]
        self.bos_id, self.eos_id, self.pad_id = (vocab.get(name, -1) for name in names)
        self.ids, self.special_tokens = frozenset(vocab.values()), special
        add_bos = config.get("add_bos_token")
        if add_bos is None:  # does the file's own post-processor add it?
            add_bos = model.encode("").ids[:1] == [self.bos_id]
        self.add_bos = bool(add_bos)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=True)


def find_tokenizer(ckpt_dir: str | os.PathLike[str]) -> Path:
    """The tokenizer in a checkpoint directory or, Llama 2's place, in its parent.

    Raises:
        FileNotFoundError: none is there; names the places.
    """
    directory = Path(str(ckpt_dir))
    above = Path(os.path.abspath(directory)).parent
    places = [
        directory / "tokenizer.model",
        directory / "tokenizer.json",
        above / "tokenizer.model",
    ]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no tokenizer file; looked for {', '.join(map(str, places))}")


def llama3_special_tokens(n_ranks: int) -> dict[str, int]:
    """Ids by name of the 256 special tokens behind Llama 3's ``n_ranks`` ranks (128000).

    The files of Llama 3 and 3.1 are the same, so the names of both are there: every id has its
    Llama 3 name, and 3.1's new tokens are second names of three that Llama 3 keeps in reserve.
    """
    names, spare = [], iter(range(N_SPECIAL))
    for i in range(N_SPECIAL):
        names.append(LLAMA3_NAMES.get(i) or f"<|reserved_special_token_{next(spare)}|>")
    numbered = [*enumerate(names), *LLAMA31_NAMES.items()]
    return {name: n_ranks + i for i, name in numbered}


def tokenizer_json(
    tokens: Sequence[str], token_types: Sequence[int], merges: Sequence[str], pre: str
) -> str:
    """The text of a ``tokenizer.json`` for a byte-level BPE vocabulary as GGUF files hold it.

    It tokenizes as transformers does on the GGUF, but for one thing: with ``"llama-bpe"`` a whole
    word in the vocabulary precedes merges, as in Llama 3's own tokenizer.

    Args:
        tokens: V distinct tokens in GPT-2's byte alphabet (``tokenizer.ggml.tokens``).
        token_types: V numbers; 3 makes a token special, 4 one that is matched whole in texts.
        merges: ``"left right"``, the first to apply first.
        pre: name of the pre-tokenizer (``tokenizer.ggml.pre``), a key of `PRE_TOKENIZERS`.

    Raises:
        ValueError: ``pre`` is unknown, or tokens, types and merges do not fit together.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"unknown pre-tokenizer {pre!r}; known are {sorted(PRE_TOKENIZERS)}")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise = {t for t in tokens if set(t) <= set(spell.alphabet())}
    # As in transformers: other tokens are spelled bytewise and, special or not, never whole.
    vocab = {
        t if t in bytewise else spell.pre_tokenize_str(t)[0][0]: i for i, t in enumerate(tokens)
    }
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    misfit = next((p for p in pairs if not {*p, "".join(p)} <= vocab.keys()), None)
    if misfit or not len(tokens) == len(vocab) == len(token_types):
        raise ValueError(
            "expected distinct tokens, one type a token and merges among them; got "
            f"{len(tokens)} tokens, {len(vocab)} distinct, {len(token_types)} types"
            + (f", and a merge of {misfit}" if misfit else "")
        )
    model = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    before = PRE_TOKENIZERS[pre]
    if before is None:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(before), behavior="isolated")
        model.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    model.decoder = decoders.ByteLevel()
    kinds = [(t, kind) for t, kind in zip(tokens, token_types, strict=True) if t in bytewise]
    model.add_special_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == 3])
    model.add_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == 4])
    return model.to_str()


def _open(path: Path) -> _SentencePiece | _Tiktoken | _TokenizerJson:
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the tokenizer.model or tokenizer.json in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    data = path.read_bytes()
    if data[:64].lstrip().startswith(b"{"):
        return _TokenizerJson(path, data)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", data):
        return _Tiktoken(path, data)
    if re.match(rb"\n[\x07-\xff]\x01?\n", data):  # a piece, its length, and its text likewise
        return _SentencePiece(path, data)
    content = f"begins with {data[:20]!r}" if data else "is empty"
    raise ValueError(
        f"{path} {content}; expected a SentencePiece model, tiktoken ranks or a tokenizer.json"
    )


def _has_settings(model: bytes) -> bool:
    """Whether something follows the pieces of a SentencePiece model."""
    at = 0
    while model[at : at + 1] == b"\n" and at + 2 < len(model):
        size, at = model[at + 1], at + 2
        if size > 127:  # the length has a second byte
            size, at = size - 128 + 128 * model[at], at + 1
        at += size
    return at < len(model)


def _read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(filter(None, data.splitlines())):
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            damaged = int(rank) != number or token in ranks
        except ValueError:
            damaged = True
        if damaged:
            raise ValueError(
                f"{path} is damaged: expected a new token in base64 and the rank {number}, got "
                f"{line[:40]!r}"
            )
        ranks[token] = number
    lacking = sum(bytes([i]) not in ranks for i in range(256))
    if lacking:
        raise ValueError(f"{path} is damaged: it lacks {lacking} of the 256 single bytes")
    return ranks


def _chunks(text: str) -> Iterator[str]:
    """Pieces of at most `MAX_CHARS`, in which no run is longer than `MAX_RUN`."""
    for start in range(0, len(text), MAX_CHARS):
        chunk, begin = text[start : start + MAX_CHARS], 0
        for run in LONG_RUN.finditer(chunk):
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield chunk[begin:cut]
                begin = cut
        yield chunk[begin:]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return config


def _name(config: dict[str, Any], key: str, special: dict[str, int]) -> str:
    """The token under a key of the config, else the only usual one, else nothing."""
    if key in config:
        token = config[key]
        return (token["content"] if isinstance(token, dict) else token) or ""
    usual = USUAL_NAMES.get(key, set()) & special.keys()
    return usual.pop() if len(usual) == 1 else ""
