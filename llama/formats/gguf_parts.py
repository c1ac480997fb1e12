"""A GGUF model in one file or in several: its metadata, its tensors, and their bytes.

llama.cpp cuts a large model into ``NAME-00001-of-00003.gguf`` and on: the first file holds the
metadata, each its own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama.errors import InputError
from llama.formats.gguf_header import Place, read_header

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
PLAIN = {"F16": np.float16, "F32": np.float32, "F64": np.float64}  # the others are in blocks
CHUNK_BYTES = 16 * 2**20
CHUNK_VALUES = 2**20


class GGUFParts:
    """A GGUF model, opened: what it says of itself; bytes of tensors only on demand.

    Args:
        path: the file; of a model in several files any of them.

    Attributes:
        path: as given.
        paths: all files, in order.
        headers: of each.
        fields: the metadata, which the first file holds.
        tensors: all of them, in the order of files and bytes.

    Raises:
        FileNotFoundError: the file, or another one of the same model, does not exist.
        InputError: one of them is damaged, or they are not the parts of one model.
        MissingPackageError: the package gguf is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.paths = path, part_paths(path)
        self.headers = [read_header(part) for part in self.paths]
        self.fields = self.headers[0].fields
        self.tensors: dict[str, Place] = {}
        self._part: dict[str, int] = {}
        for number, header in enumerate(self.headers):
            if twice := sorted(self.tensors.keys() & header.tensors.keys()):
                other = self.paths[self._part[twice[0]]]
                raise InputError(f"{self.paths[number]} holds {twice[0]}, which {other} has too")
            self.tensors |= header.tensors
            self._part |= dict.fromkeys(header.tensors, number)
        self._check_parts()

    def _check_parts(self) -> None:
        """Raises InputError unless the files say that they belong together."""
        for number, (part, header) in enumerate(zip(self.paths, self.headers, strict=True)):
            said = [header.fields.get(key) for key in (SPLIT_NO, SPLIT_COUNT)]
            expected = [number, len(self.paths)]
            if said != expected and (len(self.paths) > 1 or said[1] not in (None, 0, 1)):
                raise InputError(
                    f"{part} says that it is part {said[0]} of {said[1]}, expected "
                    f"{expected[0]} of {expected[1]}; a model in several files keeps their names, "
                    "NAME-00001-of-0000N.gguf"
                )
        count = self.fields.get(SPLIT_TENSORS)
        if len(self.paths) > 1 and count not in (None, len(self.tensors)):
            raise InputError(
                f"{self.paths[0]} counts {count} tensors in all files, which hold "
                f"{len(self.tensors)}; fetch them anew"
            )

    def part_of(self, name: str) -> int:
        """The number, from 0, of the file that holds a tensor."""
        return self._part[name]

    def chunks(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes, in pieces of at most 16 MiB."""
        path, left = self.paths[self._part[name]], self.tensors[name].nbytes
        with open(path, "rb") as file:
            file.seek(self.tensors[name].start)
            while left:
                piece = file.read(min(left, CHUNK_BYTES))
                if not piece:
                    raise InputError(f"{path} was cut off while it was read")
                left -= len(piece)
                yield piece

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this name, dequantized to float32, in memory of its own.

        Args:
            name: of the tensor.
            dtype: to which float32 is rounded, piece by piece; None leaves it.
        """
        from gguf import GGMLQuantizationType, quants

        place, kind = self.tensors[name], GGMLQuantizationType(self.tensors[name].kind)
        plain, width = PLAIN.get(kind.name), place.shape[-1]
        values = torch.empty(place.shape, dtype=dtype or torch.float32)  # (..., D)
        rows = values.view(-1, width)
        row_bytes = place.nbytes // len(rows)
        path = self.paths[self._part[name]]
        with open(path, "rb") as file:
            file.seek(place.start)
            for part in rows.split(max(1, CHUNK_VALUES // width)):  # dequantizing takes copies
                raw = np.fromfile(file, np.uint8, len(part) * row_bytes)
                if len(raw) < len(part) * row_bytes:
                    raise InputError(f"{path} was cut off while it was read")
                raw = raw.reshape(len(part), -1)
                found = raw.view(plain) if plain else quants.dequantize(raw, kind)
                part.copy_(torch.from_numpy(found.astype(np.float32, copy=False)))
        return values


def part_paths(path: Path) -> list[Path]:
    """The files of the model that ``path`` is a file of; FileNotFoundError if one is missing.

    Example:
        >>> part_paths(Path("tiny.gguf"))  # doctest: +SKIP
        [PosixPath('tiny.gguf')]
    """
    match = PART.fullmatch(path.name)
    paths = named_parts(path.with_name(f"{match[1]}.gguf"), int(match[3])) if match else [path]
    if missing := [p for p in paths if not p.is_file()]:
        others = f", one of {len(paths)} of its model," if match else ""
        raise FileNotFoundError(f"GGUF file {missing[0]}{others} does not exist")
    return paths


def named_parts(path: Path, count: int) -> list[Path]:
    """The names of ``count`` files of a model, by that of it in one file.

    Example:
        >>> [p.name for p in named_parts(Path("m.gguf"), 2)]
        ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']
    """
    names = [f"{path.stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    return [path.with_name(name) for name in names]
