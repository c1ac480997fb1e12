"""Safetensors files, read and written tensor by tensor.

The format is 8 bytes with the length of a JSON header, the header, and the tensors' bytes. The
writer of the package safetensors needs all tensors of a file at once; this one needs none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Entry:
    """A stored tensor: the format's name of its dtype, its shape, its size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
        """The entry of a tensor of one of `DTYPES`."""
        name = next(name for name, known in DTYPES.items() if known == dtype)
        return cls(name, shape, dtype.itemsize * prod(shape))


class SafetensorsFile:
    """One file: its tensors' entries in the order of their bytes; the bytes only on demand.

    Raises:
        InputError: the file is damaged or cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._starts: dict[str, int] = {}
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a complete safetensors file: {error}") from None

    def _read_header(self) -> None:
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length + 8 > size:
                raise InputError(f"it has {size} bytes and announces a header of {length}")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = at = 8 + length
        for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
            begin, end = (at + int(offset) for offset in item["data_offsets"])
            entry = Entry(item["dtype"], tuple(item["shape"]), end - begin)
            known = DTYPES.get(entry.dtype)
            if (known and Entry.of(known, entry.shape) != entry) or end < begin:
                raise InputError(f"{name} of shape {list(entry.shape)} has {end - begin} bytes")
            self.entries[name], self._starts[name] = entry, begin
        if end > size:
            raise InputError(f"it has {size} bytes, its header tells of {end}")

    def chunks(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes, in pieces of at most 16 MiB."""
        left = self.entries[name].nbytes
        with open(self.path, "rb") as file:
            file.seek(self._starts[name])
            while left:
                piece = file.read(min(left, CHUNK_BYTES))
                if not piece:
                    raise InputError(f"{self.path} was cut off while it was read")
                left -= len(piece)
                yield piece

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own; InputError unless it is of one of `DTYPES`."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise InputError(
                f"{name} in {self.path} is {entry.dtype}; expected one of {', '.join(DTYPES)}"
            )
        data = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        target, at = data.reshape(-1).view(torch.uint8).numpy(), 0
        for piece in self.chunks(name):
            target[at : at + len(piece)] = memoryview(piece)
            at += len(piece)
        return data


def tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in one piece, for `write_weights`."""
    yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def open_weights(directory: Path) -> dict[str, SafetensorsFile]:
    """The file of every tensor in a model's directory, by the tensor's name.

    Raises:
        FileNotFoundError: there are no safetensors, or the index names a file that is missing.
        InputError: a file is damaged, or the index does not fit.
    """
    if (directory / WEIGHTS).is_file():
        file = SafetensorsFile(directory / WEIGHTS)
        return dict.fromkeys(file.entries, file)
    index = directory / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}")
    try:
        places = {str(k): str(v) for k, v in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} holds no weight_map: {error!r}") from None
    files: dict[str, SafetensorsFile] = {}
    for name in sorted(set(places.values())):
        if os.path.basename(name) != name or not (directory / name).is_file():
            raise FileNotFoundError(f"{index} names a file {name}, which is not in {directory}")
        files[name] = SafetensorsFile(directory / name)
    for tensor, name in places.items():
        if tensor not in files[name].entries:
            raise InputError(f"{index} expects {tensor} in {name}, which lacks it")
    return {tensor: files[name] for tensor, name in places.items()}


def write_file(
    path: Path, entries: Mapping[str, Entry], read: Callable[[str], Iterable[bytes | memoryview]]
) -> None:
    """Writes one file, in memory of what ``read`` yields at a time.

    Args:
        path: the new file.
        entries: what is to be written, by name, in this order.
        read: gives the bytes of a name, in pieces of any size; called once for every name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        offsets = [end, end + entry.nbytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            written = sum(file.write(piece) for piece in read(name))
            if written != entry.nbytes:
                raise InputError(f"{name} has {written} bytes, expected {entry.nbytes}")


def write_weights(
    directory: Path,
    groups: Sequence[Mapping[str, Entry]],
    read: Callable[[str], Iterable[bytes | memoryview]],
) -> None:
    """Writes a model's files: one alone, or several and their index.

    Args:
        directory: where ``model.safetensors`` or ``model-00001-of-00002.safetensors`` and on go.
        groups: the content of each file.
        read: as for `write_file`.
    """
    if len(groups) == 1:
        write_file(directory / WEIGHTS, groups[0], read)
        return
    places: dict[str, str] = {}
    for number, entries in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_file(directory / file, entries, read)
        places |= dict.fromkeys(entries, file)
    total = sum(entry.nbytes for entries in groups for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def grouped(entries: Mapping[str, Entry], max_bytes: int) -> list[dict[str, Entry]]:
    """Files of at most so many bytes (one tensor may be larger), in the given order."""
    groups: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if groups[-1] and size + entry.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = entry
        size += entry.nbytes
    return groups
