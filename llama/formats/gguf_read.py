"""GGUF files: their metadata and where their tensors lie, checked before any tensor is read.

llama.cpp cuts a large model into ``NAME-00001-of-00003.gguf`` and on: the first file holds the
metadata, each its own tensors.

The package gguf takes seconds for the header of a large vocabulary, and believes damaged files.
"""

from __future__ import annotations

import mmap
import re
import struct
import time
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from llama.errors import check_file, damaged
from llama.files import file_chunks

# The types of a value, by number: those of one size as struct names them, then two of any size.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
NUMBERS |= {12: "d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
SPLIT_NO, SPLIT_COUNT = "split.no", "split.count"
NUMPY_TYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}  # the others are in blocks
CHUNK_VALUES = 2**20


class TensorEntry(NamedTuple):
    """A stored tensor: its shape in torch's order, ggml's number of its type, and its bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


class Record(NamedTuple):
    """How a key stands in the file: its type, that of an array's elements, and all its bytes."""

    kind: int
    element: int | None
    raw: bytes


class Header(NamedTuple):
    """What a file says before its tensors' bytes: metadata by key, tensors by name."""

    fields: dict[str, object]
    tensors: dict[str, TensorEntry]  # in the order of their bytes
    records: dict[str, Record]  # the keys of `fields` as they stand in the file
    version: int
    alignment: int  # of the tensors' bytes


def read_header(path: Path) -> Header:
    """The header of a GGUF file; InputError for a damaged one."""
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file {path} does not exist")
    status = path.stat()
    if time.time_ns() - status.st_mtime_ns < 10**9:  # it may change again at the same time
        return _header(path)
    return _unchanged_header(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4)  # a command asks several times for the same model's
def _unchanged_header(path: Path, *_: int) -> Header:
    return _header(path)


def _header(path: Path) -> Header:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except struct.error:
        raise damaged(path, "its header ends early") from None
    except (ValueError, ArithmeticError, KeyError, TypeError) as error:
        raise damaged(path, error) from None


def has_key(path: Path, key: str) -> bool:
    """Whether a file is a GGUF file with this key."""
    try:
        return key in read_header(path).fields
    except ValueError:
        return False


def _expect(ok: bool, problem: str) -> None:
    if not ok:
        raise ValueError(problem)


class _Reader:
    """Reads a header from its first byte to its last; ValueError or struct.error for damage."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def header(self) -> Header:
        _expect(self._data[:4] == b"GGUF", f"it begins with {self._data[:4]!r}, not b'GGUF'")
        self._at = 4
        version, tensors, keys = self._number("I"), self._number("Q"), self._number("Q")
        _expect(version in VERSIONS, f"it is of version {version}, expected 2 or 3")
        fields, records = self._keys(keys)
        alignment: Any = fields.get("general.alignment", 32)
        return Header(fields, self._tensors(tensors, alignment), records, version, alignment)

    def _keys(self, count: int) -> tuple[dict[str, object], dict[str, Record]]:
        fields: dict[str, object] = {}
        records: dict[str, Record] = {}
        for _ in range(count):
            start = self._at
            key = self._string()
            kind, value_start = self._number("I"), self._at
            fields[key] = self._value(kind)
            element = None
            if kind == ARRAY:
                (element,) = struct.unpack_from("<I", self._data, value_start)
            records[key] = Record(kind, element, self._data[start : self._at])
        return fields, records

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorEntry]:
        """Where tensors lie: one after the other, each at a multiple of the alignment."""
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name, dims = self._string(), self._number("I")
            shape = tuple(self._number("Q") for _ in range(dims))[::-1]
            infos[name] = (shape, self._number("I"), self._number("Q"))
        first = end = self._at + -self._at % alignment
        entries: dict[str, TensorEntry] = {}
        for name, (shape, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
            start = end + -(end - first) % alignment
            _expect(first + offset == start, f"tensor {name} is not where the one before it ends")
            entries[name] = TensorEntry(shape, kind, start, nbytes_of(name, shape, kind))
            end = start + entries[name].nbytes
        # less than an alignment fills up the last tensor's bytes
        problem = f"its {len(entries)} tensors end at byte {end} of {len(self._data)}"
        _expect(0 <= len(self._data) - end < alignment, problem)
        return entries

    def _value(self, kind: int) -> object:
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind == STRING:
            return self._string()
        _expect(kind == ARRAY, f"it holds a value of type {kind}, which GGUF does not know")
        kind, count = self._number("I"), self._number("Q")
        if kind == STRING:
            return [self._string() for _ in range(count)]
        _expect(kind in NUMBERS, f"it holds an array of type {kind}, expected numbers or texts")
        dtype = np.dtype(f"<{NUMBERS[kind]}")
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()

    def _number(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8")

    def _bytes(self, size: int) -> bytes:
        _expect(size <= len(self._data) - self._at, "its header ends early")
        self._at += size
        return self._data[self._at - size : self._at]


def nbytes_of(name: str, shape: tuple[int, ...], kind: int) -> int:
    """The bytes of a tensor of this shape, in torch's order, in blocks of ggml's type."""
    _expect(kind in GGML_QUANT_SIZES, f"tensor {name} is of the unknown type {kind}")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    full_blocks = shape and 0 not in shape and not shape[-1] % block
    _expect(bool(full_blocks), f"tensor {name} {list(shape)} does not fill blocks of {block}")
    return prod(shape) // block * size


class GGUFParts:
    """A GGUF model in one file or in several, opened; bytes of tensors only on demand.

    ``path`` may be any of several files; InputError if one is damaged or of another model.
    ``fields`` is the metadata, which the first file holds; ``tensors`` are in the order of
    ``paths`` and bytes; ``file_of`` is the path of each.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.paths = path, part_paths(path)
        self.headers = [read_header(part) for part in self.paths]
        self.fields = self.headers[0].fields
        self.tensors: dict[str, TensorEntry] = {}
        self.file_of: dict[str, Path] = {}
        for number, header in enumerate(self.headers):
            self.tensors |= header.tensors
            self.file_of |= dict.fromkeys(header.tensors, self.paths[number])
            split = (header.fields.get(SPLIT_NO), header.fields.get(SPLIT_COUNT))
            alone = len(self.paths) == 1 and split[1] in (None, 0, 1)
            problem = f"it says that it is part {split[0]} of {split[1]}, unlike its name"
            check_file(alone or split == (number, len(self.paths)), self.paths[number], problem)

    def get(self, key: str, default: object = None) -> Any:
        """The value of a key of the metadata."""
        return self.fields.get(key, default)

    def need(self, key: str) -> Any:
        """The value of a key; InputError if the file lacks it."""
        check_file(key in self.fields, self.path, f"it lacks the key {key}")
        return self.fields[key]

    def need_list(self, key: str, kind: type) -> list[Any]:
        """A list of values of one type; InputError if the key is missing or holds another."""
        values = self.need(key)
        ok = isinstance(values, list) and all(isinstance(value, kind) for value in values)
        check_file(ok, self.path, f"{key} is no list of values of type {kind.__name__}")
        return values

    def chunks(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes, in pieces of at most 16 MiB."""
        entry = self.tensors[name]
        return file_chunks(self.file_of[name], entry.start, entry.nbytes)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in its own memory, dequantized to float32 and rounded to ``dtype`` in pieces."""
        entry, path = self.tensors[name], self.file_of[name]
        kind, width = GGMLQuantizationType(entry.kind), entry.shape[-1]
        plain = NUMPY_TYPES.get(kind.name)
        integers = kind.name[0] == "I" and kind.name[1:].isdigit()  # I8 to I64
        check_file(not integers, path, f"{name} holds whole numbers ({kind.name}), not weights")
        values = torch.empty(entry.shape, dtype=dtype or torch.float32)  # (..., D)
        rows = values.view(-1, width)
        row_bytes = entry.nbytes // len(rows)
        with open(path, "rb") as file:
            file.seek(entry.start)
            for part in rows.split(max(1, CHUNK_VALUES // width)):  # dequantizing takes copies
                raw = np.fromfile(file, np.uint8, len(part) * row_bytes)
                complete = len(raw) == len(part) * row_bytes
                check_file(complete, path, "it was cut off while it was read")
                packed = raw.reshape(len(part), -1)
                dequantized = packed.view(plain) if plain else quants.dequantize(packed, kind)
                part.copy_(torch.from_numpy(dequantized.astype(np.float32, copy=False)))
        return values


def part_paths(path: Path) -> list[Path]:
    """The files of the model that ``path`` is a file of; FileNotFoundError if one is missing."""
    match, paths = PART.fullmatch(path.name), [path]
    if match:
        names = (f"{match[1]}-{i:05d}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1))
        paths = [path.with_name(name) for name in names]
    if missing := [p for p in paths if not p.is_file()]:
        others = f", one of {len(paths)} of its model," if match else ""
        raise FileNotFoundError(f"GGUF file {missing[0]}{others} does not exist")
    return paths
