"""GGUF files written tensor by tensor, each key and each tensor copied from the source or new.

The package gguf's writer takes every key apart, refuses empty arrays and writes version 3 alone.
Here what does not change is copied, and without changes the bytes are the source's.

Weights are rounded to ggml's types of 4 to 6 bits with scales that make the squared error small. A
group of weights is ``scale * codes + offset``; some types have no offset. K-quants also round the
scales and offsets of 256 weights. The layout of the bytes is that of ggml's ``ggml-common.h``. The
package gguf reads these types, but writes no K-quants, and the others with more error: it takes
scales from the outermost weights.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from llama.errors import InputError
from llama.files import file_chunks
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
    raw = _text(key) + struct.pack("<I", kind) + _value(value, kind, element)
    return Record(kind, element, raw)


def _value(value: object, kind: int, element: int | None = None) -> bytes:
    if kind == STRING:
        assert isinstance(value, str)
        return _text(value)
    if kind != ARRAY:
        return struct.pack(f"<{NUMBERS[kind]}", value)
    assert isinstance(value, Sequence) and element is not None
    head = struct.pack("<IQ", element, len(value))
    return head + b"".join(_value(item, element) for item in value)


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
    return quants.quantize(rows.float().contiguous().numpy(), GGMLQuantizationType(kind)).tobytes()


def stored(name: str, weight: Tensor, kind: int) -> Stored:
    """A tensor to be written in a type that `writable` gives, packed when it is written."""
    size = nbytes_of(name, tuple(weight.shape), kind)
    return Stored(tuple(weight.shape), kind, size, lambda: [packed(name, weight, kind)])


Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K = 2, 3, 6, 7, 12, 13, 14  # ggml's numbers of types
AT_A_TIME = 2**20  # weights


class Layout(NamedTuple):
    """How a type stores weights."""

    block: int  # weights in a block
    group: int  # weights that share a scale
    bits: int  # of a weight's code
    offset: bool  # whether a group has one; else codes are below and above 0
    row: int  # codes in a row; the low bits of two rows share bytes


LAYOUTS = {
    Q4_0: Layout(32, 32, 4, False, 16),
    Q4_1: Layout(32, 32, 4, True, 16),
    Q5_0: Layout(32, 32, 5, False, 16),
    Q5_1: Layout(32, 32, 5, True, 16),
    Q4_K: Layout(256, 32, 4, True, 32),
    Q5_K: Layout(256, 32, 5, True, 32),
    Q6_K: Layout(256, 16, 6, False, 64),
}
# The codes begin spread over such shares of a group's range: less than all clips the outermost.
SHARES = (0.9, 0.925, 0.95, 0.975, 1.0, 1.025, 1.05)
STEPS = 2  # codes and scale that follow from each other, from each of these


def quantized(weight: Tensor, kind: int) -> bytes:
    """The bytes of a tensor (..., K) on the CPU, K a multiple of the block of ``kind``."""
    blocks = weight.detach().reshape(-1, LAYOUTS[kind].block)
    pieces = blocks.split(AT_A_TIME // LAYOUTS[kind].block)
    return b"".join(_blocks(piece.float(), kind).numpy().tobytes() for piece in pieces)


def _blocks(blocks: Tensor, kind: int) -> Tensor:
    """Blocks (N, block) in float32 as bytes (N, bytes of a block)."""
    layout = LAYOUTS[kind]
    is_k = layout.block > layout.group
    groups = blocks.reshape(len(blocks), -1, layout.group)  # (N, G, group)
    scale, offset = _fitted(groups, layout, below=is_k)
    head: list[Tensor] = []  # bytes before the codes, and after them
    tail: list[Tensor] = []
    if not is_k:
        scale, offset = scale.half().float(), offset.half().float()
        head = [_half(scale), _half(offset)] if layout.offset else [_half(scale)]
    elif layout.offset:
        (step, scales), (low, offsets) = _rounded(scale, 63), _rounded(-offset, 63)
        scale, offset = step * scales, -low * offsets
        head = [_half(step), _half(low), _six_bits(scales, offsets)]
    else:
        step, scales = _rounded(scale, -128)
        scale = step * scales
        tail = [scales.squeeze(-1).to(torch.int8).view(torch.uint8), _half(step)]
    codes = _codes(groups, scale, offset, layout) - _lowest(layout)
    codes = codes.to(torch.uint8).reshape(len(blocks), -1)
    if layout.bits == 5:
        head.append(_merged(codes >> 4, 8, 32 if is_k else 1))
    if layout.bits == 6:
        tail.insert(0, _merged(codes >> 4, 4, 32))
    return torch.cat([*head, _merged(codes & 15, 2, layout.row), *tail], dim=1)


def _lowest(layout: Layout) -> int:
    return 0 if layout.offset else -(2 ** (layout.bits - 1))


def _codes(groups: Tensor, scale: Tensor, offset: Tensor, layout: Layout) -> Tensor:
    low = _lowest(layout)  # 0 / 0, of a group of one value, gives the code nearest to 0
    return ((groups - offset) / scale).round().nan_to_num(0).clamp(low, low + 2**layout.bits - 1)


def _fitted(groups: Tensor, layout: Layout, *, below: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset (N, G, 1) of every group, the offset at most 0 where ``below``.

    Alternates nearest codes and the least-squares scale and offset, and keeps the best pair.
    """
    count, total = groups.shape[-1], groups.sum(-1, keepdim=True)
    if layout.offset:
        first = groups.amin(-1, keepdim=True)
        first = first.clamp(max=0) if below else first
        unit = (groups.amax(-1, keepdim=True) - first) / (2**layout.bits - 1)
    else:
        first = torch.zeros_like(total)
        outermost = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        unit = outermost / _lowest(layout)
    best, least = (unit, first), torch.full_like(total, torch.inf)
    for share in SHARES:
        scale, offset = unit * share, first
        for _ in range(STEPS):
            codes = _codes(groups, scale, offset, layout)
            squares = codes.square().sum(-1, keepdim=True)
            product = (codes * groups).sum(-1, keepdim=True)
            scale = product / squares
            if layout.offset:
                mean = codes.sum(-1, keepdim=True) / count
                slope = (product - mean * total) / (squares - mean * mean * count)
                level = total / count - slope * mean
                free = level <= 0 if below else level.isfinite()
                scale, offset = slope.where(free, scale), level.where(free, 0)
            error = (scale * codes + offset - groups).square().sum(-1, keepdim=True)
            better = error < least  # never where it is not a number
            least = error.where(better, least)
            best = scale.where(better, best[0]), offset.where(better, best[1])
    return best


def _rounded(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """A block's step (N, 1, 1), in float16, and the codes of its ``values`` (N, G, 1) in that step.

    The value of largest magnitude gets the code ``most``.
    """
    outermost = values.gather(1, values.abs().argmax(1, keepdim=True))
    step = (outermost / most).half().float()
    low, high = (0, most) if most > 0 else (most, -most - 1)
    # 0 / 0, of a block of zeros, gives the code 0
    return step, (values / step).round().nan_to_num(0).clamp(low, high)


def _half(values: Tensor) -> Tensor:
    """A value a block as the bytes (N, 2) of float16."""
    return values.reshape(-1, 1).half().view(torch.uint8)


def _six_bits(scales: Tensor, offsets: Tensor) -> Tensor:
    """Numbers of 6 bits (N, 8, 1) as bytes (N, 12): 4 and 4 whole, then 8 halves and quarters."""
    first, second = (x.squeeze(-1).to(torch.uint8) for x in (scales, offsets))
    whole = [x[:, :4] | x[:, 4:] >> 4 << 6 for x in (first, second)]
    return torch.cat([*whole, first[:, 4:] & 15 | (second[:, 4:] & 15) << 4], dim=1)


def _merged(codes: Tensor, count: int, row: int) -> Tensor:
    """``count`` codes in one byte, the first in the lowest bits: of rows that follow each other."""
    rows = codes.reshape(len(codes), -1, count, row)
    parts = [rows[:, :, i] << (8 // count * i) for i in range(count)]
    return torch.stack(parts).sum(0, dtype=torch.uint8).flatten(1)
