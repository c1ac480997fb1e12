"""SentencePiece's ``tokenizer.model``, as of Llama 2, as plain data and back.

The file is a protobuf message; the package sentencepiece gives neither all types of pieces nor a
writer, but with the package protobuf, which nothing else here needs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llama.errors import InputError

# Types of pieces; GGUF's types of tokens have the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of the message
TEXT, SCORE, TYPE = 1, 2, 3  # of a piece
MODEL_TYPE, VOCAB_SIZE, BYTE_FALLBACK, UNK_PIECE, BOS_PIECE, EOS_PIECE = 3, 4, 35, 45, 46, 47
CHARSMAP, DUMMY_PREFIX, EXTRA_SPACES, ESCAPE = 2, 3, 4, 5  # of the normalizer
BPE = 2


@dataclass(frozen=True)
class Pieces:
    """The pieces of a SentencePiece model of byte-pair encoding, by id.

    Attributes:
        texts: the pieces.
        scores: of two pairs that could be merged, the one whose piece has the higher score is.
        types: such as `NORMAL`.
        space_in_front: whether a space is put before a text.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    space_in_front: bool = True

    @classmethod
    def read(cls, data: bytes, where: str) -> Pieces:
        """The pieces of a ``tokenizer.model``.

        Args:
            data: the file's content.
            where: names it in errors.

        Raises:
            InputError: it is damaged, or splits texts by other rules than llama.cpp can.
        """
        try:
            fields = list(_fields(data))
            pieces = [dict(_fields(bytes(value))) for number, value in fields if number == PIECES]
            rest = {number: dict(_fields(bytes(v))) for number, v in fields if number != PIECES}
            texts = [bytes(piece[TEXT]).decode("utf-8") for piece in pieces]
            scores = [struct.unpack("<f", bytes(p.get(SCORE, bytes(4))))[0] for p in pieces]
        except (struct.error, KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"{where} is a damaged SentencePiece model: {error!r}") from None
        trainer, rules = rest.get(TRAINER, {}), rest.get(NORMALIZER, {})
        if trainer.get(MODEL_TYPE) != BPE or rules.get(CHARSMAP) or rules.get(EXTRA_SPACES, 1):
            raise InputError(
                f"{where} is no plain byte-pair encoding: it has model_type "
                f"{trainer.get(MODEL_TYPE, 1)!r}, or rewrites texts; expected one like Llama 2's"
            )
        types = [int(piece.get(TYPE, NORMAL)) for piece in pieces]
        return cls(texts, scores, types, bool(rules.get(DUMMY_PREFIX, 1)))

    def to_bytes(self, *, bos: str = "<s>", eos: str = "</s>") -> bytes:
        """The content of a ``tokenizer.model``.

        Args:
            bos: the piece that begins a text.
            eos: the piece that ends a text.
        """
        rows = zip(self.texts, self.scores, self.types, strict=True)
        message = b"".join(
            _field(PIECES, _field(TEXT, text) + _field(SCORE, score) + _field(TYPE, kind))
            for text, score, kind in rows
        )
        unknown = next((t for t, k in zip(self.texts, self.types, strict=True) if k == UNKNOWN), "")
        trainer = _field(MODEL_TYPE, BPE) + _field(VOCAB_SIZE, len(self.texts))
        trainer += _field(BYTE_FALLBACK, int(BYTE in self.types))
        trainer += _field(UNK_PIECE, unknown) + _field(BOS_PIECE, bos) + _field(EOS_PIECE, eos)
        rules = _field(1, "identity") + _field(DUMMY_PREFIX, int(self.space_in_front))
        rules += _field(EXTRA_SPACES, 0) + _field(ESCAPE, 1)
        return message + _field(TRAINER, trainer) + _field(NORMALIZER, rules)


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a message: numbers as int, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            size, at = _varint(data, at)
        if kind not in (1, 2, 5) or at + size > len(data):
            raise ValueError(f"a field of type {kind} at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
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
