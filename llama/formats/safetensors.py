"""Safetensors files, read and written tensor by tensor.

The format is 8 bytes with the length of a JSON header, the header, and the tensors' bytes. The
package safetensors checks a file's header. Its ``save_file`` needs all tensors at once in memory
where they are changed on the way, and its ``safe_open`` neither aligns them for the same rounding
nor gives the dtypes that torch does not know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.errors import check, check_file, damaged
from llama.files import JsonObject, file_chunks, read_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


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
    """One file: its tensors' entries in the order of their bytes; the bytes only on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._starts: dict[str, int] = {}
        try:
            with safe_open(path, framework="pt"):  # checks that tensors fill the file, in order
                pass
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: JsonObject = json.loads(file.read(length))
        except (SafetensorError, ValueError) as error:
            raise damaged(path, error) from None
        header.pop("__metadata__", None)
        for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
            begin, end = item["data_offsets"]
            self.entries[name] = Entry(item["dtype"], tuple(item["shape"]), end - begin)
            self._starts[name] = 8 + length + begin

    def chunks(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes, in pieces of at most 16 MiB."""
        return file_chunks(self.path, self._starts[name], self.entries[name].nbytes)

    def read(self, name: str) -> Tensor:
        """A tensor, in aligned memory of its own; InputError unless of one of `DTYPES`."""
        entry = self.entries[name]
        check(entry.dtype in DTYPES, f"dtype of {name}", entry.dtype, f"one of {', '.join(DTYPES)}")
        data = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        target, at = data.reshape(-1).view(torch.uint8).numpy(), 0
        for piece in self.chunks(name):
            target[at : at + len(piece)] = memoryview(piece)
            at += len(piece)
        return data


def tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in one piece, for `write_weights`; bfloat16 has no NumPy type: as bytes."""
    yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def open_weights(directory: Path) -> dict[str, SafetensorsFile]:
    """The file of every tensor in a model's directory, by the tensor's name."""
    if (directory / WEIGHTS).is_file():
        file = SafetensorsFile(directory / WEIGHTS)
        return dict.fromkeys(file.entries, file)
    index = directory / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}")
    file_of: dict[str, str] = read_json(index).get("weight_map") or {}
    files: dict[str, SafetensorsFile] = {}
    for name in sorted(set(file_of.values())):
        if os.path.basename(name) != name or not (directory / name).is_file():
            raise FileNotFoundError(f"{index} names a file {name}, which is not in {directory}")
        files[name] = SafetensorsFile(directory / name)
    for tensor, name in file_of.items():
        check_file(tensor in files[name].entries, directory / name, f"it lacks {tensor}")
    return {tensor: files[name] for tensor, name in file_of.items()}


def write_file(
    path: Path, entries: Mapping[str, Entry], read: Callable[[str], Iterable[bytes | memoryview]]
) -> None:
    """Writes one file of these entries in their order, in memory of what ``read`` yields at a time.

    ``read`` gives the bytes of a name, in pieces of any size; called once for every name.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        offsets = [end, end + entry.nbytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            written = sum(file.write(piece) for piece in read(name))
            assert written == entry.nbytes, name


def write_weights(
    directory: Path,
    groups: Sequence[Mapping[str, Entry]],
    read: Callable[[str], Iterable[bytes | memoryview]],
) -> None:
    """Writes one file for each group of entries, and for several their index; see `write_file`."""
    if len(groups) == 1:
        write_file(directory / WEIGHTS, groups[0], read)
        return
    file_of: dict[str, str] = {}
    for number, entries in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_file(directory / file, entries, read)
        file_of |= dict.fromkeys(entries, file)
    total = sum(entry.nbytes for entries in groups for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
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
