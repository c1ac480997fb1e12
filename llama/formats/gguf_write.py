"""GGUF files written tensor by tensor, each key and each tensor copied from the source or new.

The package gguf's writer takes every key apart, refuses empty arrays and writes version 3 alone.
Here what does not change is copied, and without changes the bytes are the source's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama.errors import InputError
from llama.files import file_chunks
from llama.formats.gguf_quantize import LAYOUTS, Q4_K, quantized
from llama.formats.gguf_read import (
    ARRAY,
    NUMBERS,
    STRING,
    GGUFParts,
    Header,
    Record,
    nbytes_of,
    read_header,
)

UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7  # types of values, by number
NEW = Header({}, {}, {}, 3, 32)  # version and alignment of a new file
F32, F16, Q8_0, F64, BF16 = 0, 1, 8, 28, 30  # ggml's numbers of types
TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}
TORCH_TYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


class Stored(NamedTuple):
    """A tensor to be written: shape in torch's order, ggml's type, its bytes."""

    shape: tuple[int, ...]
    kind: int
    nbytes: int
    chunks: Callable[[], Iterable[bytes]]


def record(key: str, value: object, kind: int, element: int | None = None) -> Record:
    """A key with its value, a number, a text or a list of either, as it stands in a file.

    ``kind`` is the number of its type, ``element`` that of a list's elements.
    """
    raw = _text(key) + struct.pack("<I", kind) + _packed(value, kind, element)
    return Record(kind, element, raw)


def _packed(value: object, kind: int, element: int | None = None) -> bytes:
    if kind == STRING:
        assert isinstance(value, str)
        return _text(value)
    if kind != ARRAY:
        return struct.pack(f"<{NUMBERS[kind]}", value)
    assert isinstance(value, Sequence) and element is not None
    head = struct.pack("<IQ", element, len(value))
    return head + b"".join(_packed(item, element) for item in value)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def copied(source: GGUFParts, name: str) -> Stored:
    """A tensor as its source has it, byte for byte."""
    entry = source.tensors[name]
    return Stored(entry.shape, entry.kind, entry.nbytes, lambda: source.chunks(name))


def write_again(
    path: Path,
    source: GGUFParts,
    tensors: Mapping[str, Stored],
    *,
    records: Mapping[str, Record | None] | None = None,
    progress: Callable[[str], object] = str,
) -> None:
    """Writes a file of a GGUF source's metadata; memory and errors as of `write_file`.

    ``tensors`` go by their new names, in order; ``records`` are the keys that are other than in the
    source, of which None leaves one out.
    """
    keys: dict[str, Record | None] = dict(source.headers[0].records)
    if len(source.headers) > 1:  # here is one file
        keys = {key: value for key, value in keys.items() if not key.startswith("split.")}
    keys |= records or {}  # a key that was there keeps its position, a new one goes to the end
    kept = {key: value for key, value in keys.items() if value is not None}
    write_file(path, kept, tensors, like=source.headers[0], progress=progress)


def write_file(
    path: Path,
    records: Mapping[str, Record],
    tensors: Mapping[str, Stored],
    *,
    like: Header = NEW,
    progress: Callable[[str], object] = str,
) -> None:
    """Writes a file of these keys and tensors, in memory of what a tensor yields at a time.

    ``like`` gives its version and alignment. The file is read again: OSError if it does not hold
    what was written.
    """
    infos, end, digests = [], 0, dict[str, bytes]()
    for name, tensor in tensors.items():
        start = end + -end % like.alignment
        dims = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        info = struct.pack("<I", len(tensor.shape)) + dims + struct.pack("<IQ", tensor.kind, start)
        infos.append(_text(name) + info)
        end = start + tensor.nbytes
    head = b"GGUF" + struct.pack("<IQQ", like.version, len(tensors), len(records))
    with open(path, "wb") as file:
        raw = [key.raw for key in records.values()]
        file.write(b"".join([head, *raw, *infos]))
        for name, tensor in tensors.items():
            progress(name)
            file.write(b"\0" * (-file.tell() % like.alignment))
            start, digest = file.tell(), blake2b()
            for piece in tensor.chunks():
                file.write(piece)
                digest.update(piece)
            assert file.tell() - start == tensor.nbytes, name
            digests[name] = digest.digest()
        file.write(b"\0" * (-file.tell() % like.alignment))
    again, wrong = read_header(path), list[str]()
    if [key.raw for key in again.records.values()] != raw:
        wrong.append("list of keys")
    for name, entry in again.tensors.items():
        digest = blake2b()
        for piece in file_chunks(path, entry.start, entry.nbytes):
            digest.update(piece)
        if digest.digest() != digests.pop(name, None):
            wrong.append(name)
    if wrong := [*wrong, *digests]:
        raise OSError(
            f"{path}, read again, holds another {wrong[0]} than was written: check the disk"
        )


def type_name(kind: int) -> str:
    """Ggml's name of a type: ``"Q8_0"``."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind).name


def writable(kind: int, shape: tuple[int, ...]) -> int:
    """``kind``, ggml's number of a type, or the type to write instead.

    Of types that are only read here, such as Q3_K or MXFP4, that is Q4_K, or Q8_0 where the rows do
    not fill blocks of 256; F16 where they fill none. Of F64 it is F32.
    """
    kind = F32 if kind == F64 else kind
    if kind in TORCH_TYPES:
        return kind
    if kind not in LAYOUTS and kind != Q8_0:
        kind = Q8_0 if shape[-1] % LAYOUTS[Q4_K].block else Q4_K
    block = LAYOUTS[kind].block if kind in LAYOUTS else 32
    return F16 if shape[-1] % block else kind


def packed(name: str, weight: Tensor, kind: int) -> bytes:
    """A tensor's bytes in a type that `writable` gives; InputError if a value exceeds F16's."""
    rows = weight.detach().cpu()
    if kind in (F16, Q8_0, *LAYOUTS) and rows.numel() and rows.isfinite().all():
        largest = rows.abs().amax().double() / (127 if kind == Q8_0 else 1)  # of Q8_0, the scale
        if not largest.half().isfinite():
            raise InputError(f"{name} has values beyond F16's: write bf16 or f32")
    if kind in LAYOUTS:
        return quantized(rows, kind)
    if kind in TORCH_TYPES:
        values = rows.to(TORCH_TYPES[kind]).contiguous()
        return values.view(torch.uint8).numpy().tobytes() if values.numel() else b""
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(rows.float().contiguous().numpy(), GGMLQuantizationType(kind)).tobytes()


def stored(name: str, weight: Tensor, kind: int) -> Stored:
    """A tensor to be written in a type that `writable` gives, packed when it is written."""
    size = nbytes_of(name, tuple(weight.shape), kind)
    return Stored(tuple(weight.shape), kind, size, lambda: [packed(name, weight, kind)])
